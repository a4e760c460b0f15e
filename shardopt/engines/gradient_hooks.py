"""Gradient hooks: one interface for ZeroOptimizer, DistributedDataParallel and FSDP2.

A hook sees this rank's gradients of a bucket before they are sent, and the part of the sum that this rank owns after
they were reduced. A bucket is one of ZeroOptimizer's or DDP's, or all that an FSDP2 module reduces at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from shardopt.distributed import raise_on_all_ranks
from shardopt.engines.zero import ZeroOptimizer
from shardopt.engines.zero.buckets import Bucket
from shardopt.engines.zero.transports import Communicator, communicator
from shardopt.errors import InputError

__all__ = ["ErrorFeedback", "GradientHook", "GradientHookError", "GradientStatistics", "NonFinite", "attach"]


class GradientHookError(RuntimeError):
    """A gradient hook raised."""


class GradientHook:
    """Override any method. A hook object belongs to the one target that it is attached to.

    Attributes:
        wire_dtype: what `before_reduce` rounds to, where it does: gradients are then sent in that dtype.
        group: the ranks that reduce together; set by `attach`, None for a single process.
    """

    wire_dtype: torch.dtype | None = None
    group: dist.ProcessGroup | None = None

    def before_reduce(self, bucket: int, flat: Tensor) -> None:
        """Change this rank's gradients of one bucket before they are sent.

        Args:
            bucket: its number.
            flat: 1-D, fp32 or wider, to be changed in place. Padding between parameters is zero, and is set to zero
                again afterwards.
        """

    def after_reduce(self, bucket: int, reduced: Tensor) -> None:
        """Change the part of the reduced bucket that this rank owns, before clipping and the step.

        Args:
            bucket: its number.
            reduced: 1-D, fp32 or wider, averaged over ranks, to be changed in place; padding as in `before_reduce`.
        """

    def reset(self) -> None:
        """Forget what earlier gradients left: their step was skipped, or the buckets have changed."""


class ErrorFeedback(GradientHook):
    """Send bf16, and add what rounding lost to the next step's gradient (Seide et al., 2014; 1-bit SGD).

    Keeps one fp32 value per gradient element on every rank. What a non-finite gradient left, or one that ZeroOptimizer
    dropped, is forgotten; on DDP and FSDP2 call `reset` after a step that you skip for another reason.
    """

    wire_dtype = torch.bfloat16

    def __init__(self) -> None:
        self._lost: dict[int, Tensor] = {}

    def before_reduce(self, bucket: int, flat: Tensor) -> None:
        lost = self._lost.setdefault(bucket, torch.zeros_like(flat))
        if lost.shape != flat.shape:
            change = f"the bucket had {lost.numel()} elements and now has {flat.numel()}"
            raise InputError(f"{change}: call ErrorFeedback.reset() where other parameters begin to have gradients")
        flat.add_(lost)
        sent = flat.to(torch.bfloat16)
        torch.sub(flat, sent, out=lost)
        flat.copy_(sent)

    def reset(self) -> None:
        self._lost.clear()


class GradientStatistics(GradientHook):
    """Norms and the largest magnitude of all gradients since the last `read`, in constant memory."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._local, self._reduced, self._largest = torch.zeros(3, dtype=torch.float64).unbind()

    def before_reduce(self, bucket: int, flat: Tensor) -> None:
        self._local = torch.linalg.vector_norm(flat).double().square() + self._local

    def after_reduce(self, bucket: int, reduced: Tensor) -> None:
        self._reduced = torch.linalg.vector_norm(reduced).double().square() + self._reduced
        self._largest = torch.maximum(torch.linalg.vector_norm(reduced, math.inf).double(), self._largest)

    def read(self) -> dict[str, float]:
        """Take the statistics since the last call, and start again. A collective.

        The ratio of `local_norm` to `norm` tells gradient noise (McCandlish et al., arXiv 1812.06162).

        Returns:
            The same on every rank: the reduced gradient's `norm` and `largest` magnitude, and `local_norm`, the root
            mean square over ranks and micro-batches of a rank's own gradient norm times sqrt(micro-batches).
        """
        local, reduced = _all_reduce([self._local, self._reduced], dist.ReduceOp.SUM, self.group)
        largest = _all_reduce([self._largest], dist.ReduceOp.MAX, self.group)[0]
        self._clear()
        ranks = dist.get_world_size(self.group) if self.group is not None else 1
        return {"norm": math.sqrt(reduced), "largest": largest, "local_norm": math.sqrt(local / ranks)}


class NonFinite(GradientHook):
    """Finds out whether any rank's part of the gradient is not finite, so that all ranks skip the step together."""

    def __init__(self) -> None:
        self._found = torch.tensor(False)

    def after_reduce(self, bucket: int, reduced: Tensor) -> None:
        self._found = ~reduced.isfinite().all() | self._found

    def agreed(self) -> bool:
        """True on every rank if any of them saw a NaN or an infinity since the last call. A collective."""
        found = _all_reduce([self._found.double()], dist.ReduceOp.MAX, self.group)[0]
        self._found = torch.tensor(False)
        return found > 0


def _all_reduce(values: list[Tensor], op: Any, group: dist.ProcessGroup | None) -> list[float]:
    """All-reduce a few numbers, on a device that the group's backend takes."""
    stacked = torch.stack(values)
    if group is not None:
        stacked = stacked.cuda() if dist.get_backend(group) == "nccl" else stacked
        dist.all_reduce(stacked, op, group=group)
    return stacked.tolist()


def attach(hooks: GradientHook | Sequence[GradientHook], target: ZeroOptimizer | nn.Module) -> None:
    """Run `hooks`, in order, on the gradients of a ZeroOptimizer, a DDP module or an FSDP2 module. A collective.

        >>> from shardopt import AdEMAMix, ZeroOptimizer
        >>> from shardopt.engines import gradient_hooks
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = ZeroOptimizer(model, AdEMAMix, lr=1e-3)
        >>> statistics = gradient_hooks.GradientStatistics()
        >>> gradient_hooks.attach(statistics, optimizer)
        >>> model(torch.ones(3, 4)).sum().backward()  # every weight's gradient is 3
        >>> optimizer.step()
        >>> statistics.read()["largest"]
        3.0

    The same hooks must be attached in the same order on every rank, all of a target in one call. A hook that raises on
    one rank raises on every rank: at the step of a ZeroOptimizer, within the backward of DDP and FSDP2. That takes a
    small all-reduce per bucket with those two.

    An empty list is useful too: on gloo it gives DDP and FSDP2 our exchange, summed in fp32 in rank order.

    Args:
        hooks: one, or several in the order in which they run.
        target: what reduces the gradients.

    Raises:
        InputError: another kind of target or hook, a hook or target that is attached already, or a `wire_dtype` that a
            ZeroOptimizer was not built for.
    """
    hooks = [hooks] if isinstance(hooks, GradientHook) else list(hooks)
    for i, hook in enumerate(hooks):
        if not isinstance(hook, GradientHook):
            raise InputError(f"{hook!r} is not a GradientHook object")
        if hook in _attached or hook in hooks[:i]:
            raise InputError(f"this {type(hook).__name__} is attached already, and keeps numbers: make another one")
    parts = target.modules() if isinstance(target, nn.Module) else ()
    covered = {target, *(m for m in parts if isinstance(m, FSDPModule))}
    if not covered.isdisjoint(_attached):
        raise InputError(f"this {type(target).__name__} has hooks already: attach all of them in one call")
    attach_to = next((function for kind, function in _TARGETS.items() if isinstance(target, kind)), None)
    if attach_to is None:
        raise InputError(f"hooks attach to a ZeroOptimizer, a DDP or an FSDP2 module, not to {type(target).__name__}")
    group = attach_to(hooks, target)
    _attached.update([*covered, *hooks])
    for hook in hooks:
        hook.group = group


_attached: WeakSet[Any] = WeakSet()  # hooks, and what has hooks
_Gaps = list[tuple[int, int]]


class _Hooks(GradientHook):
    """The hooks of one target: runs them in order, keeps padding at zero, and resets them after a non-finite gradient.

    An exception is kept while this rank goes on sending what the others wait for; the ranks then agree on it.

    Args:
        hooks: in the order in which they run.
        gaps: by bucket, where its padding starts and ends.
        agree_after: the bucket after which the ranks agree; None is every one.
    """

    comm: Communicator

    def __init__(self, hooks: list[GradientHook], gaps: dict[int, _Gaps], agree_after: int | None = None) -> None:
        self.hooks, self.gaps, self.agree_after = hooks, gaps, agree_after
        self.error: Exception | None = None
        self.finite = True  # this rank's part since the ranks agreed last
        self.spoiled = False  # whether any rank's gradient of this backward was not finite
        self.seen: set[int] = set()  # buckets of this backward

    def wire_dtype_or(self, otherwise: torch.dtype) -> torch.dtype:
        return next((h.wire_dtype for h in reversed(self.hooks) if h.wire_dtype is not None), otherwise)

    def before_reduce(self, bucket: int, flat: Tensor) -> None:
        if bucket in self.seen:  # another backward has begun
            self.seen.clear()
            if self.spoiled:
                self.reset()
        self.seen.add(bucket)
        self._run("before_reduce", bucket, flat, 0)

    def after_reduce(self, bucket: int, reduced: Tensor) -> None:
        if not self.hooks:
            return
        self.finite = self.finite and bool(reduced.isfinite().all())
        self._run("after_reduce", bucket, reduced, self.comm.rank * reduced.numel())
        if bucket == self.agree_after or self.agree_after is None:
            self._agree(reduced.device)

    def reset(self) -> None:
        self.spoiled = False
        for hook in self.hooks:
            hook.reset()

    def _run(self, method: str, bucket: int, values: Tensor, start: int) -> None:
        """Run `method` of all hooks on `values`, which are the bucket's from `start` on."""
        for hook in self.hooks:
            try:
                getattr(hook, method)(bucket, values)
            except Exception as error:
                kind = InputError if isinstance(error, InputError) else GradientHookError
                raised = kind(f"{type(hook).__name__}.{method}, bucket {bucket}: {error!r}")
                raised.__cause__ = error
                self.error = self.error or raised
            for first, last in self.gaps.get(bucket, ()):
                values[max(first - start, 0) : max(last - start, 0)].zero_()

    def _agree(self, device: torch.device) -> None:
        flags = torch.tensor([self.error is not None, not self.finite], dtype=torch.float64, device=device)
        failed, spoiled = self.comm.sum(flags).tolist()
        error, self.error, self.finite = self.error, None, True
        self.spoiled = self.spoiled or spoiled > 0
        if failed:
            raise_on_all_ranks(error, self.comm.group)


def _attach_to_zero(hooks: list[GradientHook], target: ZeroOptimizer) -> dist.ProcessGroup | None:
    sent = target.reducer.reduce_dtype
    for hook in hooks:
        if hook.wire_dtype is not None and hook.wire_dtype != sent:
            name = type(hook).__name__
            raise InputError(f"{name} sends {hook.wire_dtype}: build ZeroOptimizer with reduce_dtype='bf16'")
    if hooks:
        run = _Hooks(hooks, {b.index: _gaps(b) for b in target.buckets}, agree_after=len(target.buckets) - 1)
        run.comm = target.reducer.comm
        target.add_hook(run)
    return target.reducer.comm.group


def _gaps(bucket: Bucket) -> _Gaps:
    ends = [0, *(m.offset + m.numel for m in bucket.members)]
    starts = [*(m.offset for m in bucket.members), bucket.numel]
    return [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]


def _reduce(comm: Communicator, sent: Tensor, out: Tensor, scale: float) -> None:
    reduction = comm.reduce_scatter([[part] for part in sent.chunk(comm.size)])
    reduction.finish(out, accumulate=False, scale=scale)
    reduction.release()


def _attach_to_ddp(hooks: list[GradientHook], target: DistributedDataParallel) -> dist.ProcessGroup | None:
    run = _Hooks(hooks, {})
    run.comm = communicator(target.process_group, next(target.parameters()).device)
    members: dict[int, list[int]] = {}

    def reduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Reduce-scatter the bucket, let the hooks see it, and all-gather it into the buffer that DDP goes on with."""
        buffer, comm, index = bucket.buffer(), run.comm, bucket.index()
        now = [id(p) for p in bucket.parameters()]
        if members.setdefault(index, now) != now:  # DDP has laid them out anew, after its first backward
            members.clear()
            run.reset()
        part = -(-buffer.numel() // comm.size)
        run.gaps[index] = [(buffer.numel(), part * comm.size)]
        flat = buffer.new_zeros(part * comm.size, dtype=torch.promote_types(buffer.dtype, torch.float32))
        flat[: buffer.numel()].copy_(buffer)
        run.before_reduce(index, flat)
        reduced = flat.new_empty(part)
        _reduce(comm, flat.to(run.wire_dtype_or(buffer.dtype)), reduced, 1.0 / comm.size)
        run.after_reduce(index, reduced)
        flat.chunk(comm.size)[comm.rank].copy_(reduced)
        comm.all_gather(flat)()
        buffer.copy_(flat[: buffer.numel()])
        # With its device, so that who waits for it does so in the stream.
        devices: list[int | str | torch.device] | None = [buffer.device] if buffer.device.type == "cuda" else None
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        future.set_result(buffer)
        return future

    reduce.__annotations__ = {"bucket": dist.GradBucket}  # DDP compares the class, not the name of one
    target.register_comm_hook(None, reduce)
    return run.comm.group


class _FsdpReduction:
    """FSDP2's reduce-scatter for one of its modules."""

    def __init__(self, hooks: _Hooks, index: int, communicator_of: Callable[..., Communicator]) -> None:
        self.hooks, self.index, self.communicator_of = hooks, index, communicator_of

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        comm = self.hooks.comm = self.communicator_of(group, input_tensor.device)
        scale = {dist.ReduceOp.SUM: 1.0, dist.ReduceOp.AVG: 1.0 / comm.size}.get(getattr(op, "op", op))
        if scale is None:
            raise InputError(f"FSDP2 asks for the reduction {op}, which our hooks do not have: keep its divide factors")
        wide = torch.promote_types(input_tensor.dtype, torch.float32)
        flat = input_tensor.to(wide)
        self.hooks.before_reduce(self.index, flat)
        reduced = output_tensor if output_tensor.dtype == wide else torch.empty_like(output_tensor, dtype=wide)
        _reduce(comm, flat.to(self.hooks.wire_dtype_or(input_tensor.dtype)), reduced, scale)
        output_tensor.copy_(reduced)


def _attach_to_fsdp(hooks: list[GradientHook], target: nn.Module) -> dist.ProcessGroup | None:
    run, communicator_of = _Hooks(hooks, {}), cache(communicator)
    for index, module in enumerate(m for m in target.modules() if isinstance(m, FSDPModule)):
        module.set_custom_reduce_scatter(_FsdpReduction(run, index, communicator_of))  # type: ignore[arg-type]
        if hooks:
            module.set_all_reduce_hook(partial(run.after_reduce, index))
    groups = (p.device_mesh.get_group(p.device_mesh.ndim - 1) for p in target.parameters() if hasattr(p, "device_mesh"))
    return next(groups, None)


_TARGETS: dict[type, Callable[[list[GradientHook], Any], dist.ProcessGroup | None]] = {
    ZeroOptimizer: _attach_to_zero,
    DistributedDataParallel: _attach_to_ddp,
    FSDPModule: _attach_to_fsdp,
}
