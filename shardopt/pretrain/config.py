"""A run's whole configuration: YAML plus dotted overrides, typed and refused before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from shardopt import engines
from shardopt.checkpoint.keep import Keep
from shardopt.checkpoint.store import is_in_memory
from shardopt.engines import EngineConfig, FsdpConfig
from shardopt.engines.compile import CompileName
from shardopt.errors import InputError
from shardopt.optim import registry
from shardopt.pretrain import strict_yaml
from shardopt.pretrain.config_errors import explain
from shardopt.pretrain.data.config import DataConfig, holds_tokenizer
from shardopt.pretrain.data.stages import StageConfig, Stages
from shardopt.pretrain.hub import is_hub_name, local
from shardopt.pretrain.model import ModelConfig, transformers_config
from shardopt.pretrain.profile import ProfileConfig
from shardopt.pretrain.schedule import ScheduleConfig
from shardopt.pretrain.section import Folder, Section, Sequences, Steps, Tokens, in_unit
from shardopt.pretrain.spikes import LossSpikeConfig
from shardopt.pretrain.strict_yaml import as_written, flat
from shardopt.pretrain.tracking import TrackingConfig


class RunConfig(Section):
    """Name and folder of the run, its seed, its device, and how it resumes."""

    name: str = Field("quickstart", pattern=r"^\w[\w.+-]*$")
    """The run's folder inside `dir`, and its name in W&B."""
    dir: Path = Path("runs")
    """Folder of all runs, on this machine or a file system that it sees."""
    seed: int = Field(0, ge=0)
    """Seeds the weights, the order of the data and stochastic rounding."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: go on from the newest checkpoint if there is one; never: refuse a folder with a run; must: refuse
    one without a checkpoint."""
    source: Folder | None = Field(None, alias="from")
    """Begin with the weights and all state of this checkpoint of another run (a run folder: its newest); or a URL."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs where torch sees any."""
    timeout_minutes: float = Field(10, gt=0)
    """Timeout of a collective and of a checkpoint's writing, after which the run fails."""

    @field_validator("dir", mode="before")
    @classmethod
    def _here(cls, value: Any) -> Any:
        if not isinstance(value, str | Path) and hasattr(value, "protocol"):
            raise InputError(
                f"run.dir: {value} is not on this machine: give it as checkpoint.dir, for checkpoints alone"
            )
        return value


class OptimizerConfig(Section):
    """`name` from the registry, and that optimizer's own hyper-parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = "ademamix"
    """ademamix, adamw, ...: see shardopt.optim.registry."""

    def spec(self, steps: int, seed: int) -> registry.OptimizerSpec:
        """The optimizer for a run of `steps`, which "total" stands for in a warm-up; by default seeded by `seed`.

        Raises:
            InputError: an unknown name, key or value.
        """
        given = dict(self.model_extra or {})
        for key, value in given.items():
            if key.endswith("_warmup") and isinstance(value, str | float):
                if value != "total" and (isinstance(value, str) or not value.is_integer()):
                    raise InputError(f"optimizer.{key}: must be a whole number of steps or total, got {value!r}")
                given[key] = steps if value == "total" else int(value)
        if self.name == "ademamix":
            given.setdefault("seed", seed)
        try:
            return registry.spec(self.name, **given)
        except registry.UnknownKeyError as e:
            raise InputError(
                f"{e} (to change the optimizer and its keys at once, write optimizer='{{name: {self.name}, lr: ...}}')"
            ) from None


class TrainConfig(Section):
    """Length of the run, batch sizes, and what a step does to the gradient."""

    steps: Steps = Field(300, ge=1)
    """Optimizer steps of the whole run."""
    global_batch: Sequences = Field(32, ge=1)
    """Sequences per step over all ranks, until a stage says otherwise."""
    stages: tuple[StageConfig, ...] | None = Field(None, min_length=1)
    """Another batch, or other weights of the sources, from a step on; null: none."""
    micro_batch: Sequences = Field(8, ge=1)
    """Sequences per forward pass of a rank."""
    grad_clip: float | None = Field(1.0, gt=0)
    """Largest L2 norm of the whole gradient; null for none."""
    activation_checkpointing: bool = False
    """Recompute the activations of each block in backward (non-reentrant)."""
    compile: CompileName = "none"
    """torch.compile of each block, or of the whole model; the first step then takes a minute or more."""
    loss_chunks: Annotated[int, in_unit("chunks")] = Field(1, ge=1)
    """Chunks of the sequence in which logits and loss are made, each again in backward: 16 hold a sixteenth of the
    logits at a time."""
    max_nonfinite_steps: Steps = Field(10, ge=0)
    """Steps in a row that may be skipped because the loss or the gradient is not finite, before the run stops."""
    loss_spike: LossSpikeConfig | None = None
    """A guard against spikes of the loss; null: none."""


class EvalConfig(Section):
    """Loss on held-out text, and a sample of the model's own; of the weight EMA where the optimizer keeps one."""

    every: Steps = Field(100, ge=1)
    """Steps between evaluations; there is always one after the last step."""
    batches: Annotated[int, in_unit("global batches")] = Field(16, ge=1)
    """Batches of train.global_batch sequences per evaluation (fewer where the held-out text is shorter)."""
    sample_tokens: Tokens = Field(96, ge=0)
    """Tokens of text generated at the end; 0 for none."""


class CheckpointConfig(Section):
    """Checkpoints to resume from, and the export of the trained model."""

    dir: Folder | None = None
    """Where the checkpoints, the export and the model's config go, in a folder with the run's name, instead of the run
    folder; it may be a URL, such as s3://bucket/runs."""
    every: Steps = Field(100, ge=1)
    """Steps between checkpoints; there is always one after the last step and when the run is told to stop."""
    keep: Annotated[int, in_unit("checkpoints")] = Field(3, ge=1)
    """Newest complete checkpoints to keep. The newest that a finite step came after stays besides."""
    keep_every: Steps | None = Field(None, ge=1)
    """Keep those whose step is a multiple of it, for ever."""
    keep_hours: float | None = Field(None, gt=0)
    """Keep one for each so many hours of wall time, for ever."""
    keep_best: Annotated[int, in_unit("checkpoints")] = Field(0, ge=0)
    """Keep so many with the lowest held-out loss."""
    asynchronous: bool = Field(True, alias="async")
    """Write in the background from a copy in CPU memory."""
    export: bool = True
    """At the end, write the model as safetensors that transformers loads, with its tokenizer; the weight EMA where
    the optimizer keeps one."""
    export_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the exported weights: auto is model.dtype; bf16 is rounded to nearest. They are those that held-out loss is
    of; what masters hold besides is in the checkpoints."""

    @property
    def rules(self) -> Keep:
        return Keep(self.keep, self.keep_every, self.keep_hours, self.keep_best)


Engine = Annotated[EngineConfig, Field(discriminator="name")]


class Config(Section):
    """Everything a run is made from."""

    # Engine configs are plain dataclasses, which strict mode would take only as instances.
    model_config = ConfigDict(strict=False)

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: Engine = FsdpConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    profile: ProfileConfig = ProfileConfig()

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_of_the_model(cls, tree: Any) -> Any:
        """A model from a folder keeps the tokenizer in that folder, where the data section names none."""
        model, data = (tree.get(key) for key in ("model", "data")) if isinstance(tree, dict) else (None, None)
        if not isinstance(model, dict) or not isinstance(data, dict) or "tokenizer" in data:
            return tree
        folder = model.get("path")
        if not isinstance(folder, str) or not (holds_tokenizer(Path(folder)) or is_hub_name(folder)):
            return tree
        of_both = {key: model[key] for key in ("path", "revision", "commit", "trust_remote_code") if key in model}
        return tree | {"data": data | {"tokenizer": of_both}}

    @field_validator("engine", mode="before")
    @classmethod
    def _default_engine(cls, value: Any) -> Any:
        return {"name": FsdpConfig.name} | value if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _together(self) -> Config:
        train, schedule = self.train, self.schedule
        for key, batch in self.stages.batches.items():
            if batch % train.micro_batch:
                raise InputError(f"{key}: {batch} is not a multiple of train.micro_batch = {train.micro_batch}")
        for index, of_stages in enumerate(zip(*(stage.weights for stage in self.stages.all), strict=True)):
            if not any(of_stages):
                raise InputError(f"data.sources[{index}].weight: 0, and no stage of train.stages draws from it")
        for index, stage in enumerate(train.stages or ()):
            if stage.from_step >= train.steps:
                raise InputError(
                    f"train.stages[{index}].from_step: {stage.from_step} is not before the last step, train.steps = "
                    f"{train.steps}: this stage would never begin"
                )
        if train.loss_chunks > self.data.block_size:
            tokens = f"the tokens of a sequence, data.block_size = {self.data.block_size}"
            raise InputError(f"train.loss_chunks: {train.loss_chunks} is more than {tokens}")
        if train.loss_chunks > 1 and train.compile == "model":
            raise InputError("train.loss_chunks: not in a model that is compiled whole; set train.compile=blocks")
        if schedule.warmup > train.steps:
            default = "" if "warmup" in schedule.model_fields_set else " (the default)"
            raise InputError(f"schedule.warmup: {schedule.warmup}{default} is longer than train.steps = {train.steps}")
        if schedule.cooldown is not None and schedule.name != "wsd":
            raise InputError(f"schedule.cooldown: belongs to schedule.name=wsd, not to {schedule.name}")
        if schedule.warmup + (schedule.cooldown or 0) > train.steps:
            raise InputError(
                f"schedule.cooldown: warmup {schedule.warmup} + cooldown {schedule.cooldown} is longer than "
                f"train.steps = {train.steps}"
            )
        self.checkpoint.rules.check(self.checkpoint.every, self.eval.every)
        spec = self.optimizer.spec(train.steps, self.run.seed)
        if self.model.dtype == "fp32" and spec.kwargs.get("master_weights") is not None:
            chosen = spec.kwargs["master_weights"]
            raise InputError(f"optimizer.master_weights: {chosen} is for 16-bit weights: set model.dtype=bf16, or null")
        # The tokenizer comes later; all but the size of its vocabulary can be checked now.
        transformers_config(local(self.model, weights=False), 257, 256, self.data.block_size)
        return self

    def check_ranks(self, world_size: int, distributed: bool = True) -> None:
        """Raise InputError where `world_size` ranks (started by torchrun if `distributed`) cannot run this."""
        if self.checkpoint.dir is not None and is_in_memory(self.checkpoint.dir):
            raise InputError(
                f"checkpoint.dir: what is written to {self.checkpoint.dir} is gone when the process ends: name a "
                f"folder or another store"
            )
        spec = self.optimizer.spec(self.train.steps, self.run.seed)
        engines.check(self.engine, spec, world_size, distributed, self.model.weights)
        a_round, check = world_size * self.train.micro_batch, getattr(self.engine, "check_run", None)
        for key, batch in self.stages.batches.items():
            if batch % a_round:
                raise InputError(
                    f"{key}: {batch} cannot be cut into micro-batches of {self.train.micro_batch} over {world_size} "
                    f"ranks; make it a multiple of {a_round}, or change train.micro_batch"
                )
            if check is not None:
                check(key, batch, self.train.micro_batch, world_size)

    @property
    def export_dtype(self) -> Literal["fp32", "bf16"]:
        """`checkpoint.export_dtype`, or what auto stands for."""
        given = self.checkpoint.export_dtype
        return self.model.dtype if given == "auto" else given

    @property
    def stages(self) -> Stages:
        """The batch and the sources' weights at each step."""
        return Stages(self.data.weights, self.train.global_batch, self.train.stages or ())

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.dir / self.run.name

    @property
    def store(self) -> Path:
        """Where checkpoints/, export/ and model/ lie: the run folder, unless `checkpoint.dir` says otherwise."""
        return (self.checkpoint.dir or self.run.dir) / self.run.name

    @property
    def store_key(self) -> str:
        """The key that says where that is."""
        return "run.dir" if self.checkpoint.dir is None else "checkpoint.dir"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, every default filled in; `Config.model_validate` of it gives this config again."""
        return self.model_dump(mode="json", by_alias=True)

    def as_yaml(self) -> str:
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)


# What may differ between a run and its resumption; everything else changes what the run computes.
MAY_CHANGE = (
    "run.dir", "run.resume", "run.device", "run.timeout_minutes", "engine", "train.micro_batch",
    "train.activation_checkpointing", "train.compile", "train.loss_chunks", "train.max_nonfinite_steps", "eval",
    "checkpoint", "tracking", "data.cache", "data.max_broken", "data.prefetch", "data.tokenizer.trust_remote_code",
    "model.attention", "model.trust_remote_code", "profile",
)  # fmt: skip


def changes(old: dict[str, Any], new: dict[str, Any], also: Sequence[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Old and new value of each key that differs and changes what is computed, or is in `also`, of two `as_dict()`."""
    a, b = flat(old), flat(new)
    keys = [k for k in a | b if a.get(k) != b.get(k)]
    free = [k for k in keys if any(k == name or k.startswith(name + ".") for name in MAY_CHANGE)]
    bound = [k for k in keys if k not in free or k in ("checkpoint.dir", *also)]  # elsewhere are other checkpoints
    return {k: (a.get(k), b.get(k)) for k in bound}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """ "key: old → new" for each of the `changes`."""
    return [f"{k}: {as_written(before)} → {as_written(after)}" for k, (before, after) in changes(old, new).items()]


def load(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, with `key.sub=value` overrides whose values are YAML too.

    Raises:
        InputError: a missing file, bad YAML, an unknown key (with the nearest known one), a wrong type, or a
            combination that cannot run. All problems of the file are listed at once.
    """
    return parse(read(path, overrides))


def read(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What is written in a YAML file and its overrides, as plain data; see `load`."""
    try:
        tree = strict_yaml.parse(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = sorted(str(p) for p in Path("configs").glob("*.yaml"))
        hint = f"; there are: {', '.join(known)}" if known else ""
        raise InputError(f"no config file {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read the config file {path}: {e}") from e
    except yaml.YAMLError as e:
        at = str(e).replace("<unicode string>", str(path))
        raise InputError(f"{path} is not valid YAML: {at}") from e
    if not isinstance(tree, dict):
        raise InputError(f"{path} must hold sections (run:, model:, data:, ...)")
    for override in overrides:
        _override(tree, override)
    return tree


def parse(tree: dict[str, Any]) -> Config:
    """The config that nested plain data describes; see `load` for the errors."""
    try:
        return Config.model_validate(tree)
    except ValidationError as e:
        # A list that lacks only members that were refused is not too short.
        errors = [r for r in e.errors() if r["type"] != "too_short" or len(r["input"]) < r["ctx"]["min_length"]]
        raise InputError("\n".join(explain(error, Config) for error in errors)) from None


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"override {text!r}: write it as key.sub=value, such as train.steps=50")
    *parents, leaf = key.split(".")
    if parents and not value.strip():  # an unset variable of a shell, more often than not
        raise InputError(f"override {text!r}: there is no value; for none write {key}=null")
    node = tree
    for parent in parents:
        if not isinstance(node.get(parent, {}), dict):
            raise InputError(f"override {text!r}: {parent} is a value, not a section")
        # A copy: an alias of this section elsewhere in the file stays as it is written.
        node[parent] = node = dict(node.get(parent, {}))
    try:
        node[leaf] = strict_yaml.parse(value)
    except yaml.YAMLError as e:
        raise InputError(f"override {text!r}: the value is not valid YAML: {e}") from e
