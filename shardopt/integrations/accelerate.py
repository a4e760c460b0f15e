"""AdEMAMix under accelerate: the optimizer that fits the host, and a checkpoint of every rank's slices.

    accelerator = Accelerator()
    optimizer = sharded_ademamix(accelerator, model, lr=1e-3, alpha=5.0, state_dtype="bf16")
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

What the host has already spread (FSDP2, DeepSpeed) is left to it; under DDP, where every rank has whole gradients,
our ZeRO-1 spreads the state.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from shardopt import checkpoint
from shardopt.distributed import Ranks
from shardopt.engines.zero import ZeroOptimizer
from shardopt.errors import InputError, MissingExtraError
from shardopt.optim import precision, registry, states
from shardopt.optim.ademamix import AdEMAMix
from shardopt.slices import Slice, local_tensor, named_parameters

Host = Literal["single", "ddp", "fsdp", "deepspeed"]
_POINTER = "shardopt"


class _Pointing:
    """An optimizer whose state_dict is plain data: the state itself is in slices, which every rank saves.

    Hosts that save rank 0's `state_dict()` alone would lose the other ranks' slices, so there is nothing in it to
    lose. After such a state_dict has been loaded the optimizer will not step until `load_slices` has brought
    the slices.
    """

    param_groups: list[dict[str, Any]]
    state: Any
    awaits_slices = False

    def state_dict(self) -> dict[str, Any]:
        """The step count, and how the groups are made; no tensor."""
        groups, at = [], 0
        for group in self.param_groups:
            numbers = list(range(at, at + len(group["params"])))
            lr: dict[str, Any] = {key: float(group[key]) for key in ("lr", "initial_lr") if key in group}
            groups.append({**group, **lr, "params": numbers})
            at += len(numbers)
        step = max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)
        return {"state": {}, "param_groups": groups, _POINTER: {"step": step}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take note that slices are to come; hyper-parameters are the program's, not the file's.

        Raises:
            InputError: another optimizer's state.
        """
        if _POINTER not in state_dict:
            raise InputError(
                "this optimizer state was not saved by shardopt: start a new run from the checkpoint's weights, or "
                "resume with the optimizer that wrote it"
            )
        self.awaits_slices = state_dict[_POINTER]["step"] > 0

    def _refuse_to_start_afresh(self) -> None:
        if self.awaits_slices:
            raise InputError(
                "the optimizer's slices have not been loaded, only the file that stands for them: call "
                "shardopt.integrations.accelerate.load_slices(folder, optimizer) on every rank"
            )


class PointingAdEMAMix(_Pointing, AdEMAMix):
    """AdEMAMix for one process, whose checkpoints more processes can read."""

    def step(self, closure: Any = None) -> Any:
        self._refuse_to_start_afresh()
        return super().step(closure)


class ShardedAdEMAMix(_Pointing, ZeroOptimizer):
    """AdEMAMix with its state cut over the ranks of DistributedDataParallel, which has reduced the gradients.

    Args:
        groups: parameter groups with (name, parameter) pairs.
        model: the module before it is wrapped, on its device.
        **kwargs: of AdEMAMix.
    """

    def __init__(self, groups: list[dict[str, Any]], model: nn.Module, **kwargs: Any) -> None:
        super().__init__(groups, AdEMAMix, stage=1, gradients="host", model=model, **kwargs)
        self._settled = False

    @torch.no_grad()
    def settle(self) -> None:
        """Make the parameters views of the buckets again, if the host has copied them since construction.

        accelerate moves a model to "cpu:0", which copies what is on "cpu". Before the first step only: whoever
        replaces parameters later is refused.
        """
        if self._settled:
            return
        self._settled = True
        self.flat.reattach()

    def step(self, closure: Any = None) -> Any:
        """As AdEMAMix, and hand the new weights round. A collective."""
        self._refuse_to_start_afresh()
        self.settle()
        return super().step(closure)


class HostedAdEMAMix(PointingAdEMAMix):
    """AdEMAMix as DeepSpeed's client optimizer: finds out at its first step what the flat partitions hold.

    Args:
        groups: parameter groups with (name, parameter) pairs.
        accelerator: whose `prepare` will make the DeepSpeed engine.
        model: the module before it is wrapped.
        **kwargs: of AdEMAMix.
    """

    def __init__(self, groups: list[dict[str, Any]], accelerator: Any, model: nn.Module, **kwargs: Any) -> None:
        super().__init__(groups, **kwargs)
        self._accelerator: Any = accelerator
        self._model: nn.Module | None = model
        self._partitions: Any = None

    @property
    def partitions(self) -> Any:
        """The map of DeepSpeed's flat partitions (engines/deepspeed/layouts.py); only after `prepare`.

        Raises:
            InputError: it cannot be found.
        """
        if self._partitions is None:
            from shardopt.engines.deepspeed.layouts import Partitions

            wrapped = self._accelerator.deepspeed_engine_wrapped
            if wrapped is None:
                raise InputError("accelerator.prepare(model, optimizer) has not been called on this optimizer")
            assert self._model is not None
            self._partitions = Partitions(wrapped.engine, self, self._model)
            self._accelerator = self._model = None
        return self._partitions

    def step(self, closure: Any = None) -> Any:
        """As AdEMAMix. Not a collective: DeepSpeed has reduced the gradients and hands the weights round."""
        _ = self.partitions
        return super().step(closure)


def host_of(accelerator: Any) -> Host:
    """What `accelerator` will make of a model.

    Raises:
        InputError: FSDP1, or a back end that shardopt does not know.
    """
    from accelerate.utils import DistributedType

    kind = accelerator.distributed_type
    if kind == DistributedType.NO:
        return "single"
    if kind == DistributedType.DEEPSPEED:
        return "deepspeed"
    if kind == DistributedType.FSDP:
        if getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
            raise InputError(
                "FSDP1 flattens parameters in a way that shardopt does not follow: set fsdp_version: 2 in the "
                "accelerate config, or fsdp_config={'version': 2} in TrainingArguments"
            )
        return "fsdp"
    if str(kind.value).startswith("MULTI_"):
        return "ddp"
    raise InputError(f"shardopt works under DDP, FSDP2 and DeepSpeed, not under {kind.value}: change distributed_type")


def sharded_ademamix(accelerator: Any, model: nn.Module, **kwargs: Any) -> Optimizer:
    """The optimizer to hand to `accelerator.prepare`, together with the model.

    Args:
        accelerator: an accelerate.Accelerator.
        model: not yet prepared. Matrices decay, norms and biases do not.
        **kwargs: of AdEMAMix, such as lr, alpha, state_dtype.

    Raises:
        InputError: a hyper-parameter, or a host that would not use this optimizer as it is; says what to change.
        MissingExtraError: deepspeed is asked for and not installed.
    """
    spec = registry.spec("ademamix", **kwargs)
    return build(accelerator, model, spec.groups(named_parameters(model)), spec.kwargs)


def build(
    accelerator: Any,
    model: nn.Module,
    groups: list[dict[str, Any]],
    kwargs: dict[str, Any],
    *,
    pointing: bool = False,
) -> Optimizer:
    """The optimizer for `accelerator`'s host over named groups.

    Args:
        pointing: also for one process keep the state out of `state_dict` (see `_Pointing`).
    """
    host = host_of(accelerator)
    if host == "ddp":
        if accelerator.mixed_precision == "fp16":
            raise InputError(
                "fp16 loss scaling looks for gradients where a sharded optimizer has none: use bf16 instead of fp16"
            )
        # prepare() would move the parameters later, away from the buffers that they are views of.
        return ShardedAdEMAMix(groups, model.to(accelerator.device), **kwargs)
    if host == "deepspeed":
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        check_deepspeed_config(config)
        kept = kwargs.get("state_dtype", "fp32")
        if set(kept.values() if isinstance(kept, Mapping) else [kept]) & set(precision.BLOCK_FORMATS):
            raise InputError(
                f"state_dtype={kept!r}: blocks belong to one parameter, and DeepSpeed's flat partitions hold several: "
                f"use 'bf16', or DDP or FSDP2"
            )
        # Else bf16 gradients are added up in bf16.
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        return HostedAdEMAMix(groups, accelerator, model, **kwargs)
    # Under FSDP2 accelerate saves every rank's shards itself, and insists on finding some.
    return (PointingAdEMAMix if pointing and host == "single" else AdEMAMix)(groups, **kwargs)


# What would put another optimizer, or another update, in our place; and what to do instead.
_REFUSED = {
    "optimizer": 'it would be used instead of AdEMAMix: delete the "optimizer" block (the program sets lr and decay)',
    "bf16.bf16_optimizer_states": 'it rounds state to nearest: delete it, and give AdEMAMix state_dtype="bf16"',
    "zero_optimization.zenflow": "it replaces the optimizer's step: delete it",
    "zero_optimization.offload_optimizer.super_offload": "it needs DeepSpeed's own Adam: delete it",
}


def check_deepspeed_config(config: Mapping[str, Any] | None) -> None:
    """Refuse a DeepSpeed config under which DeepSpeed or accelerate would put another optimizer in our place.

    Raises:
        InputError: naming the line to change.
        MissingExtraError: deepspeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingExtraError("deepspeed", "deepspeed")
    config = config or {}

    def get(key: str) -> Any:
        node: Any = config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node

    for key, reason in _REFUSED.items():
        if get(key):
            raise InputError(f"the DeepSpeed config has {key}: {reason}")
    device = get("zero_optimization.offload_optimizer.device") or "none"
    if device != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise InputError(
            "with offload_optimizer DeepSpeed puts its own CPU Adam in AdEMAMix's place: add "
            '"zero_force_ds_cpu_optimizer": false to the DeepSpeed config (our CPU kernel then takes the step)'
        )
    if device != "none" and (get("zero_optimization.offload_optimizer.ratio") or 1.0) != 1.0:
        raise InputError("offload_optimizer.ratio below 1 leaves the rest to DeepSpeed's own Adam: delete it")


def unwrap(optimizer: Optimizer) -> AdEMAMix | ZeroOptimizer:
    """Our optimizer inside the host's wrappers.

    Raises:
        InputError: there is none.
    """
    inner: Any = optimizer
    while not isinstance(inner, AdEMAMix | ZeroOptimizer):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise InputError(f"{type(optimizer).__name__} does not hold an optimizer of shardopt")
    return inner


def ranks_here() -> Ranks:
    """The processes of the host's process group."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks(0, 1, local, device, False)
    if dist.get_backend() == "gloo":
        device = torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), local, device, True)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of optimizer state that this process holds."""
    held = (value for state in unwrap(optimizer).state.values() for value in state.values())
    return sum(local_tensor(value).nbytes for value in held if isinstance(value, Tensor))


@contextmanager
def _in_place(ours: AdEMAMix | ZeroOptimizer) -> Iterator[None]:
    """Parameters where the optimizer's own methods look for them: DeepSpeed's stage 3 takes them out of the groups."""
    if isinstance(ours, HostedAdEMAMix):
        with ours.partitions.in_groups():
            yield
        return
    if isinstance(ours, ShardedAdEMAMix):
        ours.settle()
    yield


def slices(optimizer: Optimizer) -> list[Slice]:
    """What this process holds of the trained weights and of the optimizer's state: the live tensors."""
    ours = unwrap(optimizer)
    with _in_place(ours):
        if isinstance(ours, ZeroOptimizer):
            return ours.slices()
        layouts = states.layouts_of(ours)
        if isinstance(ours, HostedAdEMAMix):
            names = {layout.name for where in layouts.values() for layout in where}
            weights = [s for s in ours.partitions.weight_slices() if s.name in names]
        else:
            weights = [Slice(w.name, "weight", w, (local_tensor(p.detach()),)) for p, (w,) in layouts.items()]
        return weights + states.state_slices(ours)


def save_slices(folder: str | Path, optimizer: Optimizer, **document: Any) -> None:
    """Write what every rank holds of the trained weights and of the optimizer's state to `folder`. A collective.

    All ranks must see one file system. Weights are the fp32 masters where the host has such.

    Args:
        folder: replaced whole if it is a checkpoint already.
        optimizer: what `accelerator.prepare` returned, or what went into it.
        **document: plain data to keep with it.

    Raises:
        InputError: the folder cannot be written; on every rank.
    """
    ours, ranks = unwrap(optimizer), ranks_here()
    with _in_place(ours):
        kept = {**document, "scalars": states.step_counts(ours), "world_size": ranks.world_size}
    checkpoint.save(Path(folder), slices(ours), {}, kept, ranks)


def load_slices(folder: str | Path, optimizer: Optimizer, *, convert: bool = False) -> dict[str, Any]:
    """Fill weights and state from what `save_slices` wrote, on any host and world size. A collective.

    Call it after `accelerator.prepare` and before the first step. Hyper-parameters stay the program's.

    Args:
        convert: let a tensor change its dtype, rounded once, to nearest.

    Returns:
        The document: what `save_slices` was given, "scalars" and "world_size".

    Raises:
        InputError: the folder is of another model or other settings; says which.
    """
    ours = unwrap(optimizer)
    with _in_place(ours):
        states.init_state(ours)
    document = checkpoint.load(Path(folder), slices(ours), ranks_here(), convert=convert)
    with _in_place(ours):
        states.load_step_counts(ours, document["scalars"])
    if isinstance(ours, HostedAdEMAMix):
        ours.partitions.stage.refresh()
    if isinstance(ours, _Pointing):
        ours.awaits_slices = False
    return document


def statistics(optimizer: Optimizer) -> dict[str, float]:
    """alpha, beta3, the norms of m1, m2 and the update over the whole model, and each rank's bytes of state.

    A collective; the same numbers on every rank.
    """
    ours, ranks = unwrap(optimizer), ranks_here()
    inner: Any = getattr(ours, "inner", ours)
    with _in_place(ours):
        sums = inner.statistics()
        values = dict(inner.schedule_values())
    totals = ranks.sum([value.item() / _replicas(inner) for value in sums.values()])
    values |= {f"{key}_norm": total**0.5 for key, total in zip(sums, totals, strict=True)}
    held = ranks.gather(state_bytes(ours))
    return values | {f"state_bytes/rank_{rank}": float(count) for rank, count in enumerate(held)}


def _replicas(optimizer: Optimizer) -> int:
    """On how many ranks each element is held: the replicated dimensions of an FSDP2 mesh."""
    from torch.distributed.tensor import DTensor, Replicate

    for group in optimizer.param_groups:
        for param in group["params"]:
            if isinstance(param, DTensor):
                sizes = (param.device_mesh.size(i) for i, p in enumerate(param.placements) if isinstance(p, Replicate))
                return math.prod(sizes)
    return 1
