"""Branching: another run that begins with the weights and all state of a checkpoint (`run.from`).

It goes on at the checkpoint's step. What its config says of lr, schedule, data, batch, length and optimizer holds from
there on; the run folder keeps what was taken over and what is new, in branch.yaml.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.optim import Adam

from shardopt import checkpoint
from shardopt.checkpoint.blocks import DamagedError
from shardopt.checkpoint.store import as_folder
from shardopt.checkpoint.stored import locate, store_of
from shardopt.checkpoint.verify import refuse_damage
from shardopt.engines.state import ShardedState
from shardopt.errors import InputError
from shardopt.optim.ademamix import AdEMAMix
from shardopt.optim.from_adamw import STATE_FROM_ADAMW
from shardopt.optim.registry import OptimizerSpec
from shardopt.optim.schema import MASTERS, STATE_TENSORS, Deciding
from shardopt.pretrain import rng
from shardopt.pretrain.config import Config, OptimizerConfig, changes
from shardopt.pretrain.data import Batches
from shardopt.pretrain.data.stages import StageConfig, Stages
from shardopt.pretrain.progress import Progress, read_document, restore_generators
from shardopt.pretrain.report import COLUMNS
from shardopt.pretrain.schedule import lr_factor
from shardopt.pretrain.strict_yaml import as_written

RECORD = "branch.yaml"
_MOST_CHANGES = 12
_OF_THE_RUN = {"run.name", "run.from"}  # which differ in every branch


def resolve(config: Config) -> Config:
    """`config` with the checkpoint itself as `run.from`, after the checks that need neither data nor model.

    Raises:
        InputError: there is no such checkpoint, it is beyond train.steps, or its state is another optimizer's.
    """
    assert config.run.source is not None
    try:
        folder = locate(config.run.source)
        if checkpoint.read_document(folder).get("format") is None:
            raise InputError(
                f"{folder} is of another program, or converted: it does not say where a run stood. Its weights "
                f"alone: shardopt export {folder} NEW, and model='{{path: NEW}}' in the place of run.from"
            )
        document = read_document(folder)
    except InputError as e:
        raise InputError(f"run.from: {e}") from e
    if config.train.steps <= document["step"]:
        raise InputError(
            f"train.steps: {config.train.steps} is not larger than {document['step']}, the step of run.from = "
            f"{folder}; the steps before it count too"
        )
    if _take_over(document["config"], config).schedules_begin:
        left = config.train.steps - document["step"]
        for key, value in (config.optimizer.model_extra or {}).items():
            if key.endswith("_warmup") and value == "total":
                raise InputError(
                    f"optimizer.{key}: total is train.steps = {config.train.steps}, and this warm-up begins at step "
                    f"{document['step']}, after AdamW's: give it as steps, such as the {left} that are left"
                )
    return _with_source(config, folder)


def keep_source(recorded: Mapping[str, Any], config: Config) -> Config:
    """`config` of a run that has begun, with the checkpoint that it began with; `recorded` is its config.yaml.

    `run.from` may be left out, or still name that checkpoint or its run; what else it says stays, as a difference.
    """
    began, given = recorded["run"].get("from"), config.run.source
    if began is None:
        return config
    folder = as_folder(began).absolute()
    same = given is None or {given.absolute(), store_of(given).absolute()} & {folder, *list(folder.parents)[:2]}
    return _with_source(config, as_folder(began)) if same else config


def _with_source(config: Config, folder: Path) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"source": folder})})


def why_not(recorded: Mapping[str, Any], config: Config, done: int) -> str | None:
    """Why a run cannot go on after `done` steps with another `train.steps` and other `train.stages`, where nothing else
    is changed; None where no step that is done would have differed."""
    before, after = recorded["train"]["steps"], config.train.steps
    return _other_stages(recorded, config, done) or (
        _not_longer(before, after, config, done) if after != before else None
    )


def _other_stages(recorded: Mapping[str, Any], config: Config, done: int) -> str | None:
    given = [StageConfig.model_validate(one) for one in recorded["train"].get("stages") or ()]
    was, now = Stages(config.data.weights, recorded["train"]["global_batch"], given), config.stages
    for step in sorted({stage.from_step for stage in [*was.all, *now.all] if stage.from_step < done}):
        old, new = was.at(step), now.at(step)
        if old.global_batch != new.global_batch:
            return f"step {step + 1} would have had another batch"
        if old.shares != new.shares:
            return f"step {step + 1} would have had other weights of the sources"
    return None


def _not_longer(before: int, after: int, config: Config, done: int) -> str | None:
    if after < before:
        return "it can only be raised"
    if done >= before:
        return "the run is finished"
    was, now = (config.optimizer.spec(steps, config.run.seed).kwargs for steps in (before, after))
    if depend := [key for key in was if was[key] != now[key]]:
        return f"optimizer.{depend[0]} is total, which stands for it"
    for step in range(1, done + 1):
        if lr_factor(step, before, config.schedule) != lr_factor(step, after, config.schedule):
            return f"with schedule.name = {config.schedule.name} step {step} would have had another lr"
    return None


def tokenizer_check(config: Config) -> Callable[[str | None], None] | None:
    """For `data.prepare`: refuse a tokenizer that is not that of the checkpoint `run.from`; None without one."""
    folder = config.run.source
    if folder is None:
        return None

    def check(key: str | None) -> None:
        document = read_document(folder)
        theirs, own = document["config"]["data"]["tokenizer"], config.as_dict()["data"]["tokenizer"]
        if document["tokenizer"] == key or (key is None and theirs == own):
            return
        kept = folder.parent.parent / checkpoint.export.MODEL
        raise InputError(
            f"data.tokenizer: run.from = {folder} was trained with another tokenizer: take that one"
            + (f", data.tokenizer='{{path: {kept}}}'" if kept.is_dir() else "")
        )

    return check


def start(config: Config, state: ShardedState, batches: Batches) -> tuple[Progress, dict[str, object]]:
    """Load the checkpoint that is `run.from` into `state`, `batches` and the random generators. A collective.

    Returns:
        How far the run has come, and what the console says of where it began.

    Raises:
        InputError: the checkpoint does not fit, saying which part; on every rank.
    """
    folder, ranks = config.run.source, state.ranks
    assert folder is not None
    try:
        refuse_damage(folder, ranks)
    except DamagedError as e:
        raise InputError(f"run.from: {e}") from e

    def read() -> tuple[dict[str, Any], _Taken]:
        document = read_document(folder)
        return document, _take_over(document["config"], config)

    document, taken = ranks.together(read)
    checkpoint.load(folder, state, convert=True, kinds=taken.kinds)
    counts = document["checkpoint"]["step_counts"]
    if taken.schedules_begin:
        state.load_step_counts({name: {**held, "schedule_step": 0} for name, held in counts.items()})
    progress = replace(Progress.of(document), rewinds=0)
    same_seed = document["config"]["run"]["seed"] == config.run.seed
    if document["data_fingerprint"] != batches.data.fingerprint:
        batches.begin(progress.step)
        place = "begins at its beginning, being other text, or mixed or cut otherwise"
    elif not same_seed:
        batches.begin(progress.step)
        place = "begins at its beginning, in the order of another run.seed"
    else:
        batches.load_state_dict(document["data"], progress.step)
        place = f"goes on after {document['data']['samples']:,} sequences"
    if same_seed:
        restore_generators(folder, ranks, config.run.seed, progress.step)
    else:
        rng.seed_all(config.run.seed, ranks.rank, progress.step)
    record = {
        "checkpoint": str(folder),
        "run": document["config"]["run"]["name"],
        "step": progress.step,
        "tokens": progress.tokens,
        "save_id": document["checkpoint"]["save_id"],
        "taken_over": _names(document["checkpoint"]["parameters"], taken.kinds),
        "begins_anew": taken.anew,
        "left_behind": taken.left,
        "data": place,
        "changed": {key: {"from": old, "to": new} for key, (old, new) in taken.changed.items()},
    }
    ranks.together(lambda: _write(config.folder / RECORD, record) if ranks.is_main else None)
    return progress, _facts(record)


@dataclass
class _Taken:
    """How the state of one optimizer becomes another's.

    Attributes:
        kinds: see `checkpoint.load`.
        anew, left: what begins anew here, and what is left behind there, in words.
        schedules_begin: the schedules of the optimizer's own begin at the branch.
        changed: old and new value of each setting that differs.
    """

    kinds: dict[str, str | None] = field(default_factory=dict)
    anew: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    schedules_begin: bool = False
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)


def _take_over(old: dict[str, Any], config: Config) -> _Taken:
    """How the state under the config `old` becomes that of `config`.

    Raises:
        InputError: it cannot.
    """
    new = config.as_dict()
    was, now = specs = [_spec(old), _spec(new)]
    names = f"optimizer.name: {old['optimizer']['name']} → {new['optimizer']['name']}"
    taken = _Taken()
    if was.cls is not now.cls and issubclass(was.cls, Adam) and now.cls is AdEMAMix:
        try:  # in its own words, of a stand-in
            AdEMAMix.from_adamw(was.cls([nn.Parameter(torch.zeros(1))], **was.kwargs))
        except InputError as e:
            raise InputError(f"{names}: {e}") from e
        taken.kinds, taken.anew = dict(STATE_FROM_ADAMW), ["m2", "warm-ups of alpha and beta3"]
        taken.schedules_begin = True
        if "m1" not in _kept(now):
            taken.kinds |= {"m1": None, "exp_avg": None}
            taken.left.append("exp_avg")
    elif was.cls is not now.cls and not (issubclass(was.cls, Adam) and issubclass(now.cls, Adam)):
        raise InputError(
            f"{names}: the state of one is not the other's, so it cannot be taken over; export the checkpoint and "
            f"train its weights alone on, with model.path"
        )
    elif now.cls is AdEMAMix and (differ := (_kept(was) ^ _kept(now)) & {"m1"}):
        betas = " → ".join(as_written(spec.arguments["betas"]) for spec in specs)
        raise InputError(
            f"optimizer.betas: {betas}: where beta1 is 0 there is no {differ.pop()}, so the state cannot be taken over"
        )
    if "weight_ema" in _kept(now) - _kept(was):
        taken.kinds["weight_ema"] = "weight"
        taken.anew.append("weight_ema, from the weights")
    elif "weight_ema" in _kept(was) - _kept(now):
        taken.kinds["weight_ema"] = None
        taken.left.append("weight_ema")
    _take_masters(taken, _master(old, was), _master(new, now), exact=config.model.dtype == "fp32")
    a, b = (_settings(tree, spec, specs) for tree, spec in zip((old, new), specs, strict=True))
    engine = [f"engine.{key}" for key in old["engine"].keys() & new["engine"].keys()]
    taken.changed = {key: values for key, values in changes(a, b, engine).items() if key not in _OF_THE_RUN}
    return taken


def _spec(tree: dict[str, Any]) -> OptimizerSpec:
    return OptimizerConfig.model_validate(tree["optimizer"]).spec(tree["train"]["steps"], tree["run"]["seed"])


def _master(tree: dict[str, Any], spec: OptimizerSpec) -> str | None:
    """The state key of what is kept beside weights in bf16; None where nothing is."""
    if tree["model"].get("dtype", "fp32") == "fp32":
        return None
    chosen = spec.arguments["master_weights"] if spec.cls is AdEMAMix else "fp32"  # our ZeRO's own
    return None if chosen is None else MASTERS[chosen][0]


def _take_masters(taken: _Taken, was: str | None, now: str | None, exact: bool) -> None:
    """Take masters from weights or from masters of the other kind, and weights that are `exact` here from masters."""
    if was == now:
        return
    if was is not None and exact:
        taken.kinds["weight"] = was
    elif now is not None:  # fp32 weights and masters of either kind give it exactly
        taken.kinds[now] = was or "weight"
        taken.anew += [] if was else [f"{now}, from the weights"]
    elif was is not None:
        taken.kinds[was] = None
        taken.left.append(was)


def _kept(spec: OptimizerSpec) -> set[str]:
    """The state tensors that an AdEMAMix of these settings has; empty for others."""
    if spec.cls is not AdEMAMix:
        return set()
    settings = Deciding.of(spec.arguments)
    return {t.key for t in STATE_TENSORS if t.kept(settings)}


def _settings(tree: dict[str, Any], spec: OptimizerSpec, both: list[OptimizerSpec]) -> dict[str, Any]:
    """The config with the settings that its optimizer really has, of those that both optimizers know."""
    common = set.intersection(*(set(one.arguments) for one in both))
    given = tree["optimizer"].keys()
    known = {key: value for key, value in spec.arguments.items() if key in common or key in given}
    return tree | {"optimizer": known | {"name": tree["optimizer"]["name"]}}


def _names(parameters: Mapping[str, Any], kinds: Mapping[str, str | None]) -> list[str]:
    """The kinds of tensors that are taken over, those of another name here with both."""
    there = dict.fromkeys(kind for parameter in parameters.values() for kind in parameter["kinds"])
    here = {source: kind for kind, source in kinds.items() if source != "weight"}
    return [f"{here[kind]} from {kind}" if kind in here else kind for kind in there if kinds.get(kind, kind)]


def _write(path: Path, record: dict[str, Any]) -> None:
    plain = json.loads(json.dumps(record, default=str))
    path.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _facts(record: dict[str, Any]) -> dict[str, object]:
    """The record for the console: lists of lines that fit beside its labels."""
    taken = ", ".join([*record["taken_over"], "step counts", f"{record['tokens']:,} tokens"])
    lines = [_line(key, value["from"], value["to"]) for key, value in record["changed"].items()]
    if len(lines) > _MOST_CHANGES:
        lines[_MOST_CHANGES - 1 :] = [f"and {len(lines) - _MOST_CHANGES + 1} more, in {RECORD}"]
    return {
        "from": record["checkpoint"],
        "taken over": textwrap.wrap(taken, COLUMNS),
        "begins anew": textwrap.wrap(", ".join(record["begins_anew"]), COLUMNS) or None,
        "left behind": ", ".join(record["left_behind"]) or None,
        "text": textwrap.wrap(record["data"], COLUMNS),
        "new": lines or "nothing: it is the run it came from",
    }


def _line(key: str, old: object, new: object) -> str:
    room = max(8, (COLUMNS - len(key) - len(":  → ")) // 2)
    texts = [as_written(value) for value in (old, new)]
    if max(map(len, texts)) > room:  # what both begin with would be all that is shown
        alike = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
        texts = ["..." + text[alike - 4 :] for text in texts] if alike > len("...") + 4 else texts
    shown = [text if len(text) <= room else text[: room - 3] + "..." for text in texts]
    return f"{key}: {shown[0]} → {shown[1]}"
