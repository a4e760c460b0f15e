"""Gradient hooks, one interface for our ZeRO, DistributedDataParallel and FSDP2.

    statistics = hooks.GradientStatistics()
    hooks.attach([statistics, hooks.ErrorFeedback()], optimizer)     # a ZeroOptimizer, a DDP or an FSDP2 module
    ...
    statistics.read()                                                # agreed by all ranks

A hook sees this rank's gradients of a bucket before they are sent, and the part of the sum that this rank owns
after they were reduced. What a bucket is, is the host's business: a bucket of ZeroOptimizer or DDP, a group of
FSDP2. Attach the same hooks in the same order on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from shardopt.engines.zero import ZeroOptimizer
from shardopt.engines.zero.transports import Communicator, communicator
from shardopt.errors import InputError

__all__ = ["ErrorFeedback", "GradientHook", "GradientStatistics", "NonFinite", "attach", "reduce_scatter_into"]


class GradientHook:
    """Override either method. Both get 1-D tensors, fp32 or wider, and change them in place.

    `wire_dtype`, where set, is what `before_reduce` has left representable: the host then sends that.
    """

    wire_dtype: torch.dtype | None = None
    group: dist.ProcessGroup | None = None  # the ranks that reduce together; set by `attach`

    def before_reduce(self, bucket: int, flat: Tensor) -> None:
        """This rank's gradients of one bucket, with the host's padding (zeros), before they are sent."""

    def after_reduce(self, bucket: int, reduced: Tensor) -> None:
        """The part that this rank owns of the reduced bucket: averaged, before clipping and the step."""


class ErrorFeedback(GradientHook):
    """Send bf16, and add what rounding lost to the next step's gradient (Seide et al., 2014; 1-bit SGD).

    Keeps one fp32 value a gradient element on every rank.
    """

    wire_dtype = torch.bfloat16

    def __init__(self) -> None:
        self.lost: dict[int, Tensor] = {}

    def before_reduce(self, bucket: int, flat: Tensor) -> None:
        lost = self.lost.get(bucket)
        if lost is None:
            lost = self.lost[bucket] = torch.zeros_like(flat)
        flat.add_(lost)
        torch.sub(flat, flat.to(torch.bfloat16), out=lost)
        # A value that is not finite must not stay: it would poison every later step.
        lost.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        flat.copy_(flat.to(torch.bfloat16))


class GradientStatistics(GradientHook):
    """Sums over the buckets since the last `read`."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._local: list[Tensor] = []
        self._reduced: list[Tensor] = []
        self._largest: list[Tensor] = []

    def before_reduce(self, bucket: int, flat: Tensor) -> None:
        self._local.append(torch.linalg.vector_norm(flat))

    def after_reduce(self, bucket: int, reduced: Tensor) -> None:
        self._reduced.append(torch.linalg.vector_norm(reduced))
        self._largest.append(torch.linalg.vector_norm(reduced, math.inf))

    def read(self) -> dict[str, float]:
        """The reduced gradient's `norm` and `largest` magnitude, and `local_norm`, the root mean square over ranks
        and micro-batches of a rank's own gradient norm times sqrt(micro-batches); then start again. A collective.

        The ratio of the last to the first tells gradient noise (McCandlish et al., arXiv 1812.06162).
        """
        values = torch.zeros(3, dtype=torch.float64)
        for i, norms in enumerate((self._local, self._reduced)):
            if norms:
                values[i] = torch.stack(norms).double().square().sum().cpu()
        largest = (
            torch.stack(self._largest).max().double().cpu() if self._largest else torch.zeros((), dtype=torch.float64)
        )
        ranks = 1
        if self.group is not None:
            ranks = dist.get_world_size(self.group)
            values, largest = _on_wire(values, self.group), _on_wire(largest, self.group)
            dist.all_reduce(values, group=self.group)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        self._clear()
        local, reduced, _ = values.tolist()
        return {"norm": math.sqrt(reduced), "largest": largest.item(), "local_norm": math.sqrt(local / ranks)}


class NonFinite(GradientHook):
    """Whether any rank's part of the gradient is not finite, so that all ranks skip the step together."""

    def __init__(self) -> None:
        self._seen: list[Tensor] = []

    def after_reduce(self, bucket: int, reduced: Tensor) -> None:
        self._seen.append(torch.linalg.vector_norm(reduced))

    def agreed(self) -> bool:
        """True on every rank if any of them saw one since the last call. A collective."""
        flag = torch.zeros(1)
        if self._seen:
            flag = (~torch.stack(self._seen).isfinite()).any().float().reshape(1).cpu()
        self._seen = []
        if self.group is not None:
            flag = _on_wire(flag, self.group)
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag.item())


def _on_wire(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`values` on a device that the group's backend takes."""
    return values.cuda() if dist.get_backend(group) == "nccl" else values


def attach(hooks: GradientHook | Sequence[GradientHook], target: ZeroOptimizer | nn.Module) -> None:
    """Run `hooks`, in order, on the gradients of a ZeroOptimizer, a DDP module or an FSDP2 module.

    An empty list is useful too: on gloo it gives DDP and FSDP2 our pairwise exchange, summed in fp32 in rank order.

    Raises:
        InputError: another kind of target, or a wire dtype that a ZeroOptimizer was not built for.
    """
    hooks = [hooks] if isinstance(hooks, GradientHook) else list(hooks)
    if isinstance(target, ZeroOptimizer):
        _attach_zero(hooks, target)
    elif isinstance(target, DistributedDataParallel):
        comm = communicator(target.process_group, next(target.parameters()).device)
        _bind(hooks, comm.group)
        _register(target, _DdpReduction(hooks, comm))
    elif isinstance(target, FSDPModule):
        _attach_fsdp(hooks, target)
    else:
        raise InputError(f"hooks attach to a ZeroOptimizer, a DDP or an FSDP2 module, not to {type(target).__name__}")


def _bind(hooks: list[GradientHook], group: dist.ProcessGroup | None) -> None:
    for hook in hooks:
        hook.group = group


def _wire_of(hooks: list[GradientHook], otherwise: torch.dtype) -> torch.dtype:
    return next((h.wire_dtype for h in reversed(hooks) if h.wire_dtype is not None), otherwise)


def _attach_zero(hooks: list[GradientHook], target: ZeroOptimizer) -> None:
    sent = target.reducer.reduce_dtype
    for hook in hooks:
        if hook.wire_dtype is not None and hook.wire_dtype != sent:
            raise InputError(
                f"{type(hook).__name__} sends {hook.wire_dtype}: build ZeroOptimizer with reduce_dtype='bf16'"
            )
        target.add_hook(hook)
    _bind(hooks, target.shard_group)


def _register(ddp: DistributedDataParallel, reduce: Callable[[dist.GradBucket], None]) -> None:
    """Make `reduce` DDP's communication hook; DDP goes on with what it leaves in the bucket's buffer."""

    def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        reduce(bucket)
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    hook.__annotations__ = {"bucket": dist.GradBucket}  # DDP compares the class, not the name of one
    ddp.register_comm_hook(None, hook)


def _reduce(comm: Communicator, sent: Tensor, out: Tensor, scale: float) -> None:
    reduction = comm.reduce_scatter([[part] for part in sent.chunk(comm.size)])
    reduction.finish(out, accumulate=False, scale=scale)
    reduction.release()


class _DdpReduction:
    """Reduce a bucket of DDP onto its owners, let the hooks see it, hand it round again."""

    def __init__(self, hooks: list[GradientHook], comm: Communicator) -> None:
        self.hooks, self.comm = hooks, comm

    def __call__(self, bucket: dist.GradBucket) -> None:
        buffer, comm = bucket.buffer(), self.comm
        part = -(-buffer.numel() // comm.size)
        flat = buffer.new_zeros(part * comm.size, dtype=torch.promote_types(buffer.dtype, torch.float32))
        flat[: buffer.numel()].copy_(buffer)
        for hook in self.hooks:
            hook.before_reduce(bucket.index(), flat)
        sent = flat.to(_wire_of(self.hooks, buffer.dtype))
        own = flat[comm.rank * part : (comm.rank + 1) * part]
        reduced = torch.empty_like(own)
        _reduce(comm, sent, reduced, 1.0 / comm.size)
        own.copy_(reduced)
        for hook in self.hooks:
            hook.after_reduce(bucket.index(), own)
        comm.all_gather(flat)()
        buffer.copy_(flat[: buffer.numel()])


class _FsdpReduction:
    """FSDP2's reduce-scatter for one of its modules."""

    def __init__(self, hooks: list[GradientHook], index: int) -> None:
        self.hooks, self.index = hooks, index
        self.comms: dict[dist.ProcessGroup, Communicator] = {}

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        if group not in self.comms:
            self.comms[group] = communicator(group, input_tensor.device)
        comm = self.comms[group]
        scale = {dist.ReduceOp.SUM: 1.0, dist.ReduceOp.AVG: 1.0 / comm.size}.get(getattr(op, "op", op))
        if scale is None:
            raise InputError(f"FSDP2 asks for the reduction {op}, which our hooks do not have: keep its divide factors")
        wide = torch.promote_types(input_tensor.dtype, torch.float32)
        flat = input_tensor.to(wide)
        for hook in self.hooks:
            hook.before_reduce(self.index, flat)
        sent = flat.to(_wire_of(self.hooks, input_tensor.dtype))
        reduced = output_tensor if output_tensor.dtype == wide else torch.empty_like(output_tensor, dtype=wide)
        _reduce(comm, sent, reduced, scale)
        output_tensor.copy_(reduced)


def _attach_fsdp(hooks: list[GradientHook], target: FSDPModule) -> None:
    assert isinstance(target, nn.Module)
    modules = [m for m in target.modules() if isinstance(m, FSDPModule)]
    groups = [p.device_mesh.get_group(p.device_mesh.ndim - 1) for p in target.parameters() if hasattr(p, "device_mesh")]
    _bind(hooks, groups[0] if groups else None)
    for index, module in enumerate(modules):
        module.set_custom_reduce_scatter(_FsdpReduction(hooks, index))  # type: ignore[arg-type]
        if hooks:
            module.set_all_reduce_hook(_after(hooks, index))


def _after(hooks: list[GradientHook], index: int) -> Callable[[Tensor], None]:
    def run(reduced: Tensor) -> None:
        for hook in hooks:
            hook.after_reduce(index, reduced)

    return run


def reduce_scatter_into(optimizer: ZeroOptimizer, ddp: DistributedDataParallel) -> None:
    """Make DDP hand its buckets to `optimizer`, which reduce-scatters them into its slices, instead of all-reducing.

    Half the gradient traffic, and no reduced copy on ranks that would not use it. Build the optimizer on the inner
    module with gradients="delivered". Afterwards `.grad` holds this rank's own gradients: clip with
    `optimizer.clip_grad_norm_`. A parameter that no rank used has a zero gradient, not none.

    Raises:
        InputError: the optimizer watches autograd itself, or covers other parameters than DDP.
    """
    if optimizer.gradients != "delivered":
        raise InputError('reduce_scatter_into needs ZeroOptimizer(..., gradients="delivered")')
    theirs = {p for p in ddp.module.parameters() if p.requires_grad}
    if theirs != optimizer.trained:
        raise InputError("reduce_scatter_into needs one ZeroOptimizer over all of DDP's trainable parameters")

    def deliver(bucket: dist.GradBucket) -> None:
        for param, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            optimizer.deliver(param, gradient)

    _register(ddp, deliver)
