"""Which runs a study is made of: variants of one config, each with several seeds.

A trial is an ordinary run of one process in the study's folder. Those of one seed begin with the same weights and take
the same batches, whatever their variant.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from shardopt import checkpoint
from shardopt.checkpoint.stored import step_of
from shardopt.engines import SingleConfig
from shardopt.errors import InputError, did_you_mean, few
from shardopt.optim import registry
from shardopt.pretrain import branch, hub, strict_yaml
from shardopt.pretrain.config import Config, changes, load, parse

_NAME = r"\w[\w.+-]*"
# Keys that a resumed run may change, and that make the figures of finished runs another thing than those of new ones.
_ALSO_FIXED = ("eval.every", "eval.batches", "tracking.log_every")
# What the study decides for each of its runs.
_OF_THE_STUDY = {"run": "--name and --seeds set it", "engine": "every run is one process"}


@dataclass(frozen=True)
class Variant:
    """One of the configs that are compared.

    Attributes:
        name: begins the names of its runs.
        settings: the keys in which it differs, dotted, and their values.
        left_out: keys of the config's optimizer that its own does not have; empty where there are none.
    """

    name: str
    settings: Mapping[str, Any]
    left_out: str = ""

    @property
    def overrides(self) -> list[str]:
        """`settings` as the command line of `shardopt pretrain` takes them."""
        return [f"{key}={json.dumps(value)}" for key, value in self.settings.items()]


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    variant: Variant
    config: Config

    @property
    def name(self) -> str:
        return self.config.run.name

    @property
    def checkpoint(self) -> Path | None:
        """The newest complete one."""
        return checkpoint.latest(self.config.store / "checkpoints")

    @property
    def finished(self) -> bool:
        newest = self.checkpoint
        return newest is not None and step_of(newest) == self.config.train.steps


class Study:
    """The runs of some variants of a config, with the seeds run.seed, run.seed + 1, ….

    Args:
        path, overrides: the config that all have in common; see `config.load`.
        variants: at least one.
        seeds: runs of each variant.
        name: of the study's folder inside run.dir; None: run.name and the `command`.
        baseline: the name of the variant that the others are held against.

    Raises:
        InputError: a variant's config cannot run.
    """

    def __init__(
        self,
        path: str,
        overrides: Sequence[str],
        variants: Sequence[Variant],
        seeds: int,
        name: str | None,
        command: str,
        baseline: str,
    ) -> None:
        self.path, self.overrides, self.variants = path, list(overrides), list(variants)
        self.base = load(path, overrides)
        self.name, self.baseline = name or f"{self.base.run.name}-{command}", baseline
        if not re.fullmatch(_NAME, self.name):
            raise InputError(f"--name {self.name}: is a folder inside run.dir: letters, digits, and . _ + - in it")
        self.seeds = [self.base.run.seed + i for i in range(seeds)]
        self.folder = self.base.run.dir / self.name
        self.trials = [self._trial(variant, seed) for variant in self.variants for seed in self.seeds]

    def config_of(self, variant: Variant) -> Config:
        """The config of a variant, as a run of its own would have it."""
        try:
            return load(self.path, [*self.overrides, *variant.overrides])
        except InputError as error:
            raise InputError(f"{variant.name}: {error}") from error

    def _trial(self, variant: Variant, seed: int) -> Trial:
        tree = self.config_of(variant).as_dict()
        name = f"{variant.name}-seed{seed}"
        tree["run"] |= {"name": name, "dir": str(self.folder), "seed": seed, "resume": "auto"}
        tree["engine"] = self.engine
        if tree["checkpoint"]["dir"] is not None:
            tree["checkpoint"]["dir"] = f"{tree['checkpoint']['dir'].rstrip('/')}/{self.name}"
        tree["tracking"]["wandb"]["group"] = tree["tracking"]["wandb"]["group"] or self.name
        trial = Trial(variant, parse(tree))
        try:
            trial.config.check_ranks(1, distributed=False)
        except InputError as error:
            raise InputError(f"{variant.name}, as each run of a study is one process: {error}") from error
        return trial

    @cached_property
    def engine(self) -> dict[str, Any]:
        """The engine of one process, with the precision of the config's own."""
        return {"name": SingleConfig.name, "compute_dtype": getattr(self.base.engine, "compute_dtype", "auto")}

    def settle(self) -> None:
        """Give every run what the runs that have begun were given: commits of the hub, the checkpoint of run.from.

        Those of now, where none has begun.

        Raises:
            InputError: a run has begun with another config, naming the runs and the keys; the folder has runs that
                are not of this study, whose results these would replace; or see `branch.resolve`.
        """
        own = {trial.name for trial in self.trials}
        if others := {path.parent.name for path in self.folder.glob("*/metrics.jsonl")} - own:
            raise InputError(
                f"--name: {self.folder} also holds {few(others)}, which are not of this study and would be left out of "
                f"its results: give their variants and seeds too, or choose another --name"
            )
        recorded = {trial.name: old for trial in self.trials if (old := _recorded(trial)) is not None}
        if (origin := next(iter(recorded.values()), None)) is None:
            base = hub.pin(self.base)
            origin = (base if base.run.source is None else branch.resolve(base)).as_dict()
        lines = []
        for i, trial in enumerate(self.trials):
            old = recorded.get(trial.name)
            try:
                config = hub.keep(old or origin, branch.keep_source(old or origin, trial.config))
                differ = {} if old is None else changes(old, config.as_dict(), _ALSO_FIXED)
            except (AttributeError, KeyError, TypeError) as e:
                raise InputError(f"{trial.config.folder}/config.yaml is damaged ({e}): remove that run's folder") from e
            self.trials[i] = Trial(trial.variant, config)
            lines += [f"{trial.name}: {key}: {was} → {now}" for key, (was, now) in differ.items()]
        if lines:
            more = f"\n  and {len(lines) - 8} more" if len(lines) > 8 else ""
            listed = "\n  ".join(lines[:8]) + more
            raise InputError(
                f"--name: {self.folder} already holds runs of another config; these keys differ:\n  {listed}\n"
                f"Set them back to go on with it, or choose another --name."
            )


def _recorded(trial: Trial) -> dict[str, Any] | None:
    """The config of a run that has begun; None where it has not."""
    recorded = trial.config.folder / "config.yaml"
    if not (recorded.exists() and (trial.config.folder / "metrics.jsonl").exists()):
        return None
    try:
        return strict_yaml.parse(recorded.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise InputError(f"{recorded} is damaged ({e}): remove that run's folder") from e


def optimizers(base: Config, names: Sequence[str], settings: Sequence[str] = ()) -> list[Variant]:
    """A variant for each optimizer, with the hyper-parameters of the config that it has too.

    Args:
        base: the config; its own optimizer keeps every key.
        names: of the registry.
        settings: "NAME.KEY=VALUE": hyper-parameters of one of them.

    Raises:
        InputError: an unknown name, one that stands twice, or a setting of none of them.
    """
    _no_repeats("--optimizers", names)
    given = base.as_dict()["optimizer"]
    own: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in settings:
        where, equals, value = text.partition("=")
        name, dot, key = where.partition(".")
        if not (equals and dot and key) or name not in own:
            raise InputError(f"--set {text}: write it as NAME.KEY=VALUE, with NAME one of {', '.join(names)}")
        own[name][key] = _value(f"--set {text}", value)
    variants = []
    for name in names:
        kept = given if name == given["name"] else _taken_over(given, name)
        left_out = ", ".join(key for key in given if key not in kept)
        variants.append(Variant(name, {"optimizer": kept | own[name]}, left_out))
    return variants


def _taken_over(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    known = registry.spec(name).arguments
    kept = {"name": name} | {key: value for key, value in given.items() if key in known}
    if isinstance(theirs := known.get("betas"), tuple) and "betas" in kept:  # beta1 and beta2 are the first in all
        kept["betas"] = [*kept["betas"][: len(theirs)], *theirs[len(kept["betas"]) :]]
    return kept


def grid(axes: Sequence[str], overrides: Sequence[str] = ()) -> list[Variant]:
    """A variant for each point of a grid.

    Args:
        axes: "KEY=VALUE,VALUE,…", values as YAML; "[…]" is one value.
        overrides: "KEY=VALUE" for all runs.

    Raises:
        InputError: no values, or a key that stands twice or is the study's own.
    """
    values: dict[str, list[Any]] = {}
    fixed = {override.partition("=")[0] for override in overrides}
    for text in axes:
        key, equals, listed = text.partition("=")
        points = _value(f"--grid {text}", f"[{listed}]")
        if not (key and equals and points):
            raise InputError(f"--grid {text}: write it as KEY=VALUE,VALUE, such as optimizer.lr=1e-3,3e-3")
        section = key.partition(".")[0]
        if section in _OF_THE_STUDY:
            raise InputError(f"--grid {key}: {section} is not for a grid, {_OF_THE_STUDY[section]}")
        if key == "optimizer.name":
            raise InputError("--grid optimizer.name: optimizers have keys of their own; use shardopt compare")
        if key in values:
            raise InputError(f"--grid {key}: stands twice; write all its values in one")
        if key in fixed:
            raise InputError(f"{key}: is a value for all runs, and --grid {key} has its values: leave one out")
        values[key] = points
    leaves = [key.rpartition(".")[2] for key in values]
    shown = [leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(values, leaves, strict=True)]
    variants = []
    for point in itertools.product(*values.values()):
        name = "_".join(f"{leaf}-{_word(value)}" for leaf, value in zip(shown, point, strict=True))
        variants.append(Variant(name, dict(zip(values, point, strict=True))))
    _no_repeats("--grid", [variant.name for variant in variants])
    return variants


def check_baseline(name: str, variants: Sequence[Variant]) -> str:
    """`name`, which is that of a variant.

    Raises:
        InputError: it is not.
    """
    names = [variant.name for variant in variants]
    if name not in names:
        raise InputError(f"--baseline {name}: is none of {', '.join(names)}{did_you_mean(name, names)}")
    return name


def _value(where: str, text: str) -> Any:
    try:
        return strict_yaml.parse(text)
    except yaml.YAMLError as e:
        raise InputError(f"{where}: the value is not valid YAML: {' '.join(str(e).split())}") from e


def _word(value: Any) -> str:
    """A value as a part of a folder's name."""
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.+-]+", "_", text).strip("_") or "_"


def _no_repeats(option: str, names: Sequence[str]) -> None:
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{option}: {repeated} stands twice")
