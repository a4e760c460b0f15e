"""AdEMAMix under accelerate: the optimizer that fits the host, and a checkpoint of every rank's slices.

    accelerator = Accelerator()
    optimizer = sharded_ademamix(accelerator, model, lr=1e-3, alpha=5.0, state_dtype="bf16")
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

What the host has already spread (FSDP2, DeepSpeed) is left to it; under DDP, where every rank has whole gradients,
our ZeRO-1 spreads the state.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from shardopt import checkpoint
from shardopt.engines.ranks import Ranks
from shardopt.engines.zero import ZeroOptimizer
from shardopt.errors import InputError, MissingExtraError
from shardopt.optim import registry, states
from shardopt.optim.ademamix import AdEMAMix
from shardopt.slices import named_parameters

Host = Literal["single", "ddp", "fsdp", "deepspeed"]
_POINTER = "shardopt"


class _Pointing:
    """An optimizer whose state_dict is plain data: the state itself is in slices, which every rank saves.

    Hosts that save rank 0's `state_dict()` alone would lose the other ranks' slices, so there is nothing in it to
    lose. After such a state_dict has been loaded the optimizer will not step until `load_optimizer` has brought
    the slices.
    """

    param_groups: list[dict[str, Any]]
    awaits_slices = False

    def state_dict(self) -> dict[str, Any]:
        """The step count, and how the groups are made; no tensor."""
        groups = [
            {k: float(v) if k in ("lr", "initial_lr") else v for k, v in group.items() if k != "params"}
            for group in self.param_groups
        ]
        counts = states.scalar_state(self)  # type: ignore[arg-type]
        step = max((int(count.get("step", 0)) for count in counts.values()), default=0)
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
                "shardopt.integrations.accelerate.load_optimizer(folder, optimizer) on every rank"
            )


class WholeAdEMAMix(_Pointing, AdEMAMix):
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
        for bucket in self.buckets:
            for member in bucket.members:
                param = self._named[member.index][1]
                view = self._flats[bucket.index][member.offset : member.offset + member.numel].view(member.shape)
                if param.data_ptr() != view.data_ptr() and (param.device.type, param.dtype) == (
                    view.device.type,
                    view.dtype,
                ):
                    view.copy_(param)
                    param.data = view

    def step(self, closure: Any = None) -> Any:
        """As AdEMAMix, and hand the new weights round. A collective."""
        self._refuse_to_start_afresh()
        self.settle()
        try:
            return super().step(closure)
        finally:
            # Hosts clear gradients with model.zero_grad(), of which this optimizer hears nothing.
            self._norm = None


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


def sharded_ademamix(accelerator: Any, params: nn.Module | Iterable[dict[str, Any]], **kwargs: Any) -> Optimizer:
    """The optimizer to hand to `accelerator.prepare`, together with the model.

    Args:
        accelerator: an accelerate.Accelerator.
        params: the model (matrices decay, norms and biases do not).
        **kwargs: of AdEMAMix, such as lr, alpha, state_dtype.

    Raises:
        InputError: a hyper-parameter, or a host that would not use this optimizer as it is; says what to change.
        MissingExtraError: deepspeed is asked for and not installed.
    """
    if not isinstance(params, nn.Module):
        raise InputError("sharded_ademamix takes the model itself: it needs the parameters' names")
    spec = registry.spec("ademamix", **kwargs)
    return build(accelerator, params, spec.groups(named_parameters(params)), spec.kwargs)


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
        check_deepspeed_config(accelerator.state.deepspeed_plugin.deepspeed_config)
    return WholeAdEMAMix(groups, **kwargs) if pointing and host == "single" else AdEMAMix(groups, **kwargs)


def check_deepspeed_config(config: Mapping[str, Any] | None) -> None:
    """Refuse a DeepSpeed config under which DeepSpeed or accelerate would put another optimizer in our place.

    Raises:
        InputError: naming the line to change.
        MissingExtraError: deepspeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingExtraError("deepspeed", "deepspeed")
    config = config or {}
    if "optimizer" in config:
        raise InputError(
            'the DeepSpeed config has an "optimizer" block, which would be used instead of AdEMAMix: delete it '
            "(lr and weight decay come from the program)"
        )
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise InputError(
            "with offload_optimizer DeepSpeed puts its own CPU Adam in AdEMAMix's place: add "
            '"zero_force_ds_cpu_optimizer": false to the DeepSpeed config (shardopt\'s CPU kernel takes the step)'
        )


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
    ours = unwrap(optimizer)
    tensors = [v for state in ours.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(_local_bytes(t) for t in tensors)


def _local_bytes(tensor: Tensor) -> int:
    from shardopt.slices import local_tensor

    return local_tensor(tensor).nbytes


def save_optimizer(folder: str | Path, optimizer: Optimizer, **document: Any) -> None:
    """Write every rank's slices of the optimizer's state to `folder`; all ranks call it, and see one file system.

    Args:
        folder: replaced whole if it is a checkpoint already.
        optimizer: what `accelerator.prepare` returned, or what went into it.
        **document: plain data to keep with it.

    Raises:
        InputError: the folder cannot be written; on every rank.
    """
    ours = unwrap(optimizer)
    kept = {**document, "scalars": states.scalar_state(ours), "world_size": ranks_here().world_size}
    checkpoint.save(Path(folder), states.state_slices(ours), {}, kept, ranks_here())


def load_optimizer(folder: str | Path, optimizer: Optimizer) -> dict[str, Any]:
    """Fill the optimizer's state from what `save_optimizer` wrote, on any host and world size. A collective.

    Call it after `accelerator.prepare` and before the first step.

    Raises:
        InputError: the folder is of another model or other settings; says which.
    """
    ours = unwrap(optimizer)
    if isinstance(ours, ShardedAdEMAMix):
        ours.settle()
    states.init_state(ours)
    document = checkpoint.load(Path(folder), states.state_slices(ours), ranks_here())
    states.load_scalar_state(ours, document["scalars"])
    if isinstance(ours, _Pointing):
        ours.awaits_slices = False
    return document


def statistics(optimizer: Optimizer) -> dict[str, float]:
    """alpha, beta3, the norms of m1, m2 and the update over the whole model, and each rank's bytes of state.

    A collective; the same numbers on every rank.
    """
    ours, ranks = unwrap(optimizer), ranks_here()
    inner: Any = getattr(ours, "inner", ours)
    sums = inner.statistics()
    totals = ranks.sum([value.item() / _replicas(inner, ranks) for value in sums.values()])
    values = dict(inner.schedule_values())
    values |= {f"{key}_norm": total**0.5 for key, total in zip(sums, totals, strict=True)}
    return values | {
        f"state_bytes/rank_{rank}": float(held) for rank, held in enumerate(ranks.gather(state_bytes(ours)))
    }


def _replicas(optimizer: Optimizer, ranks: Ranks) -> int:
    """On how many ranks each element is held: the replicated dimensions of an FSDP2 mesh."""
    from torch.distributed.tensor import DTensor, Replicate

    for group in optimizer.param_groups:
        for param in group["params"]:
            if isinstance(param, DTensor):
                sizes = [param.device_mesh.size(i) for i, p in enumerate(param.placements) if isinstance(p, Replicate)]
                return int(torch.tensor(sizes).prod()) if sizes else 1
    return 1
