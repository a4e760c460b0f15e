"""The deepspeed engine's section of a run's config, and the DeepSpeed configuration that comes of it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shardopt.engines.base import Config, DtypeName
from shardopt.errors import InputError, MissingExtraError, did_you_mean
from shardopt.optim.precision import BLOCK_FORMATS

# What a user's own configuration must not turn on, and what to do instead. A key that is absent, "auto" or off is
# fine; `None` as the allowed value refuses the key whatever it says.
Refusals = dict[str, tuple[Any, str]]
# Whoever drives DeepSpeed: these put another optimizer, or another update, in the place of its client optimizer.
_REPLACING: Refusals = {
    "optimizer": (None, "DeepSpeed would use that one instead of the program's own, which sets lr and weight decay"),
    "bf16.bf16_optimizer_states": (
        False,
        "it rounds the optimizer's state to nearest, without masters; AdEMAMix's state_dtype bf16 does it right",
    ),
    "zero_optimization.zenflow": (None, "it replaces the optimizer's step"),
    "zero_optimization.offload_optimizer.super_offload": (False, "it needs DeepSpeed's own Adam"),
    "zero_optimization.offload_optimizer.ratio": (1.0, "DeepSpeed would update the rest with an AdamW of its own"),
}
_FORBIDDEN: Refusals = _REPLACING | {
    "scheduler": (None, "the schedule section of the run decides the learning rate"),
    "gradient_clipping": (0, "train.grad_clip decides, and this engine clips"),
    "bf16.bf16_master_weights_and_grads": (False, "masters and gradients are fp32 here"),
    "zero_force_ds_cpu_optimizer": (False, "DeepSpeedCPUAdam would take the place of the run's optimizer"),
    "zero_allow_untested_optimizer": (True, "DeepSpeed refuses every optimizer but its own without it"),
    "data_types.grad_accum_dtype": ("fp32", "gradients are accumulated in fp32 here"),
    "gradient_allreduce_op": ("mean", "the engine undoes the mean itself"),
    "managed_gradient_accumulation": (True, "the engine drives the accumulation boundary"),
    "fp16.enabled": (False, "use engine.compute_dtype: bf16, which needs no loss scaling"),
    "amp.enabled": (False, "use engine.compute_dtype: bf16"),
    "torch_autocast.enabled": (False, "use engine.compute_dtype: bf16"),
    "zero_optimization.offload_param.device": ("none", "offloaded weights are not supported; use more ranks"),
    "zero_optimization.zero_hpz_partition_size": (1, "secondary partitions are not supported"),
    "zero_optimization.zero_quantized_weights": (False, "quantised weights are not supported"),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, "quantised weights are not supported"),
    "zero_optimization.zero_quantized_gradients": (False, "quantised gradients are not supported"),
    "tensor_parallel.autotp_size": (1, "tensor parallelism is not supported"),
    "sequence_parallel_size": (1, "sequence parallelism is not supported"),
    "hybrid_engine.enabled": (False, "it is for inference within training"),
    "compression_training": (None, "it changes the weights between steps"),
    "sparse_gradients": (False, "sparse gradients are not supported"),
    "data_efficiency.enabled": (False, "the data section decides the order of the data"),
    "curriculum_learning.enabled": (False, "the data section decides the order of the data"),
}
_BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# DeepSpeed passes over a top-level key that it does not know, so that a typo would go unnoticed.
_KNOWN = {
    *(key.split(".")[0] for key in _FORBIDDEN), *_BATCHES, "zero_optimization", "bf16", "fp16", "amp", "data_types",
    "communication_data_type", "seq_parallel_communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown",
    "activation_checkpointing", "comms_logger", "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet",
    "autotuning", "aio", "checkpoint", "compile", "timers", "log_level", "disable_allgather", "disable_python_gc",
    "dataloader_drop_last", "elasticity", "nebula", "zero_optimization_stage", "use_data_before_expert_parallelism",
}  # fmt: skip


@dataclass(frozen=True)
class DeepspeedConfig(Config):
    """DeepSpeed's ZeRO-1, 2 or 3, with the run's optimizer as its client optimizer."""

    name: Literal["deepspeed"] = "deepspeed"
    stage: Literal[1, 2, 3] = 2
    """1 shards the optimizer's state, 2 gradients too, 3 weights too."""
    compute_dtype: DtypeName = "auto"
    """Forward and backward; bf16 keeps fp32 masters. "auto" is what `config` says, else bf16 on a GPU."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Gradients on the wire."""
    overlap_comm: bool = True
    """Reduce gradients while backward runs (on a GPU; the CPU has one stream). `config` goes first."""
    bucket_mb: float = 25.0
    """Size of a gradient bucket, in fp32. `config` goes first."""
    offload_optimizer: bool = False
    """Keep masters and optimizer state in CPU memory, where our own CPU kernel steps."""
    config: str | dict[str, Any] | None = None
    """A DeepSpeed configuration of your own, a path or the keys themselves, to which the above is added."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _Given(self.config).check(self)

    def check_run(self, key: str, global_batch: int, micro_batch: int, world_size: int) -> None:
        """Check what only the start of a run can tell, for each global batch, which `key` of its config says.

        Raises:
            MissingExtraError: DeepSpeed is not installed.
            InputError: batch sizes in `config` that are not the run's.
        """
        _check_installed()
        given = _Given(self.config)
        own = (global_batch, micro_batch, global_batch // (micro_batch * world_size))
        for theirs, value in zip(_BATCHES, own, strict=True):
            if given.get(theirs) not in (None, value):
                run = f"{key} {global_batch} and train.micro_batch {micro_batch} on {world_size} ranks"
                raise InputError(f"{given.where(theirs)} is {given.get(theirs)}, but {run} make it {value}: remove it")

    def dtype_name(self) -> DtypeName:
        """`compute_dtype`, or what `config` says of bf16 where that is "auto"."""
        enabled = _Given(self.config).get("bf16.enabled")
        if self.compute_dtype != "auto" or enabled is None:
            return self.compute_dtype
        return "bf16" if enabled else "fp32"

    def merged(self, bf16: bool, pin_memory: bool) -> dict[str, Any]:
        """The configuration for deepspeed.initialize: the user's own, and what this engine needs."""
        tree = _without_auto(_Given(self.config).tree)
        for key in _BATCHES:
            tree.pop(key, None)
        # The loop drives the boundary and normalises by tokens: DeepSpeed is to count and divide by nothing.
        tree |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
        tree |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        tree["data_types"] = tree.get("data_types", {}) | {"grad_accum_dtype": "fp32"}
        tree["bf16"] = tree.get("bf16", {}) | {"enabled": bf16}
        tree.setdefault("communication_data_type", self.reduce_dtype)
        zero = dict(tree.get("zero_optimization", {}))
        zero["stage"] = self.stage
        zero.setdefault("overlap_comm", self.overlap_comm)
        zero.setdefault("reduce_bucket_size", int(self.bucket_mb * 2**18))
        if self.offload_optimizer:
            given = {"pin_memory": pin_memory} | zero.get("offload_optimizer", {})
            zero["offload_optimizer"] = given | {"device": "cpu"}
        tree["zero_optimization"] = zero
        return tree


def check_client_config(config: Mapping[str, Any] | None) -> None:
    """Refuse a DeepSpeed config, made for accelerate or HF Trainer, that replaces the client optimizer.

    Raises:
        InputError: naming the key to change.
        MissingExtraError: deepspeed is not installed.
    """
    _check_installed()
    given = _Given(dict(config or {}), "the DeepSpeed config")
    given.refuse(_REPLACING)
    device = given.get("zero_optimization.offload_optimizer.device") or "none"
    if device != "none" and given.get("zero_force_ds_cpu_optimizer") is not False:
        raise InputError(
            "with offload_optimizer DeepSpeed puts its own CPU Adam in AdEMAMix's place: add "
            '"zero_force_ds_cpu_optimizer": false to the DeepSpeed config (our CPU kernel then takes the step)'
        )


def check_state_dtype(key: str, kept: str | Mapping[str, str]) -> None:
    """Raise InputError naming `key` for a block format, which DeepSpeed's flat partitions cannot hold."""
    for name in kept.values() if isinstance(kept, Mapping) else (kept,):
        if name in BLOCK_FORMATS:
            reason = f"{name} has scales for blocks of one parameter, but a flat partition holds several"
            raise InputError(f"{key}: {reason}: use bf16, or another engine than DeepSpeed")


def _check_installed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingExtraError("deepspeed", "deepspeed")


class _Given:
    """The user's own DeepSpeed configuration, which says where each of its keys stands: in a file, or under `name`."""

    def __init__(self, config: str | dict[str, Any] | None, name: str = "engine.config") -> None:
        self.path, self.text, self.name = None, "", name
        self.tree: dict[str, Any] = config if isinstance(config, dict) else {}
        if isinstance(config, str):
            self.path = Path(config).expanduser()
            try:
                self.text = self.path.read_text(encoding="utf-8")
                tree = json.loads(self.text)
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"engine.config: cannot read {config}: {error}") from error
            except json.JSONDecodeError as error:
                raise InputError(f"engine.config: {config} line {error.lineno} is not JSON: {error.msg}") from error
            if not isinstance(tree, dict):
                raise InputError(f"engine.config: {config} must hold a JSON object")
            self.tree = tree

    def get(self, key: str) -> Any:
        """The value at a dotted key; None where it is absent or "auto"."""
        node: Any = self.tree
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return None if node == "auto" else node

    def where(self, key: str) -> str:
        """The key as a message names it, with the file's line."""
        if self.path is None:
            return f"{self.name}: {key}"
        position = 0
        for part in key.split("."):
            position = max(position, self.text.find(f'"{part}"', position))
        return f"{self.path} line {self.text.count(chr(10), 0, position) + 1}: {key}"

    def check(self, config: DeepspeedConfig) -> None:
        """Raise InputError for the first key that the engine cannot honour."""
        for key in self.tree.keys() - _KNOWN:
            hint = did_you_mean(key, _KNOWN) or "; remove it"
            raise InputError(f"{self.where(key)}: DeepSpeed has no such key{hint}")
        for key in ("zero_optimization", "bf16", "data_types"):
            if not isinstance(self.get(key), dict | None):
                raise InputError(f"{self.where(key)} must hold keys of its own, not {_short(self.get(key))}")
        self.refuse(_FORBIDDEN)
        offload = "zero_optimization.offload_optimizer.device"
        if (device := self.get(offload)) not in (None, "none", "cpu"):
            raise InputError(f"{self.where(offload)} cannot be {device}: state is offloaded to the cpu only")
        for key, field, ours in (
            ("zero_optimization.stage", "stage", config.stage),
            ("bf16.enabled", "compute_dtype", {"auto": None, "fp32": False, "bf16": True}[config.compute_dtype]),
            (offload, "offload_optimizer", "cpu" if config.offload_optimizer else "none"),
            ("communication_data_type", "reduce_dtype", config.reduce_dtype),
        ):
            if (value := self.get(key)) is not None and ours is not None and value != ours:
                found = f"{self.where(key)} is {_short(value)}"
                raise InputError(f"{found}, not engine.{field} = {getattr(config, field)}: change one of them")

    def refuse(self, refusals: Refusals) -> None:
        """Raise InputError for the first key that says what it must not."""
        for key, (allowed, instead) in refusals.items():
            value = self.get(key)
            if value is not None and (allowed is None or value != allowed):
                raise InputError(f"{self.where(key)} cannot be {_short(value)}: {instead}; remove it")


def _without_auto(node: Any) -> Any:
    """A deep copy of dicts without the keys that are "auto"."""
    if not isinstance(node, dict):
        return node
    return {key: _without_auto(value) for key, value in node.items() if value != "auto"}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
