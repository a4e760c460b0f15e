"""Agreement of all ranks before a step: the norm, the parameters that have a gradient, and that no rank has failed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsFloat

import torch
import torch.distributed as dist
from torch import Tensor

from shardopt.distributed import all_gather_objects
from shardopt.engines.state import sum_of_squares
from shardopt.engines.zero.reducer import Reducer
from shardopt.engines.zero.transports import PeerError
from shardopt.errors import InputError


class NonFiniteGradientError(ArithmeticError):
    """A gradient is infinite or NaN. Raised on every rank, before any of them has changed anything."""


class Agreement:
    """One small all-reduce before each step, over the ranks that gradients are cut over and their replicas.

    With `from_host` the gradients are whole in `.grad`, reduced by some host.
    """

    def __init__(self, reducer: Reducer, from_host: bool) -> None:
        self.reducer, self.flat, self.shard, self.replicate = reducer, reducer.flat, reducer.comm, reducer.replicate
        self.from_host = from_host
        self.has_gradient: list[bool] = []  # on any rank, in registration order
        self.sample = 0.0  # of gradients from a host: the norm of some elements
        self.versions: list[Any] = []  # of `.grad`, as it was taken

    def norm(self, refuse: Callable[[], None], groups: Sequence[Mapping[str, Any]]) -> float:
        """L2 norm of the whole gradient, the same double on every rank. A collective.

        Raises PeerError if another rank failed or `refuse` raised there, and InputError on every rank if the lr of
        `groups`, or gradients that a host should have reduced, differ between ranks.
        """
        flat, replicas = self.flat, self.replicate.size
        take = self._take_from_host if self.from_host else self._refuse_second_reduction
        refusal = _attempt(refuse) or _attempt(take)
        self.versions = self._versions()
        self.reducer.replicate_rest()
        error = _attempt(self._run_hooks) or refusal
        as_reduced = not self.from_host and replicas == 1 and not self.reducer.hooks
        norms = self.reducer.norms if as_reduced else torch._foreach_norm(flat.gradients)
        rates = [group.get("lr") for group in groups]
        alike = [self.sample, *(float(lr) if isinstance(lr, SupportsFloat) else 0.0 for lr in rates)]
        order: list[int] = []
        if learns := self.reducer.learns and not self.from_host:  # the first rank's
            order = self.reducer.filled if self.shard.rank == self.replicate.rank == 0 else [0] * len(flat.buckets)
        mine = [error is not None, *self.reducer.present, *order, *alike, *(a * a for a in alike)]
        total, failed, *sums = self._sums(norms, mine)
        if not (failed or math.isfinite(total)):  # on all ranks alike; squares overflow in fp32 before the values do
            wide = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in flat.gradients]
            total, failed, *sums = self._sums(wide, mine)
        if failed:
            self._raise_on_all(error)
        self.has_gradient = [count > 0 for count in sums[: len(flat.parameters)]]
        if learns:
            self.reducer.send_in_order([int(number) for number in sums[len(flat.parameters) :][: len(order)]])
        if math.isfinite(total):
            self._refuse_different(sums[-2 * len(alike) : -len(alike)], sums[-len(alike) :])
        return math.sqrt(total) if total >= 0 else math.nan

    def _sums(self, norms: Sequence[Tensor], others: Sequence[float]) -> list[float]:
        """Sums over all ranks of the squares of `norms`, together, and of each of `others`. A collective.

        On a GPU this is where a step waits for the device, once.
        """
        # Replicas hold the same shards: each contributes an equal share of the norm.
        square = torch.stack([norm.double() for norm in norms]).square().sum() / self.replicate.size
        sent = torch.tensor(others, dtype=torch.float64)
        if square.is_cuda:
            sent = sent.pin_memory().to(square.device, non_blocking=True)
        agreed = torch.cat([square.reshape(1), sent.to(square.device)])
        return self.replicate.sum(self.shard.sum(agreed)).tolist()

    def _raise_on_all(self, error: Exception | None) -> None:
        mine = (dist.get_rank() if self.shard.group is not None else 0, repr(error) if error is not None else "")
        reports = all_gather_objects(mine, self.shard.group, self.replicate.group)
        if error is not None:
            raise error
        rank, text = next(report for report in reports if report[1])
        raise PeerError(f"rank {rank} failed before the step: {text}")

    def _refuse_different(self, sums: list[float], squares: list[float]) -> None:
        """Raise InputError where values, given by sums over ranks of them and of their squares, have a variance."""
        ranks = self.shard.size * self.replicate.size
        differ = [not math.isclose(s * s, ranks * q, rel_tol=1e-9) for s, q in zip(sums, squares, strict=True)]
        if differ[0]:
            raise InputError(
                "the ranks have different gradients, and gradients='host' takes reduced ones: train through "
                "DistributedDataParallel, and a step's last micro-batch outside no_sync()"
            )
        if True in differ:
            raise InputError(f"the ranks have different lr in parameter group {differ.index(True) - 1}")

    def _versions(self) -> list[Any]:
        return [p.param.grad is not None and (id(p.param.grad), p.param.grad._version) for p in self.flat.parameters]

    def refuse_changed(self) -> None:
        """Raise InputError if somebody has changed or replaced a `.grad` since it was taken."""
        if self.versions != self._versions():
            raise InputError(
                "gradients have changed since clip_grad_norm_() took them: clip with it, or call it after the change"
            )

    def _take_from_host(self) -> None:
        self.reducer.clear()
        # Enough to tell gradients that only this rank has.
        gradients = [p.param.grad for p in self.flat.parameters if p.param.grad is not None]
        self.sample = math.sqrt(sum_of_squares([g.reshape(-1)[:64] for g in gradients]))
        for index, p in enumerate(self.flat.parameters):
            if p.param.grad is None:
                p.gradient.zero_()
            else:
                self.reducer.present[index] = True
                p.layout.copy_from_whole(p.gradient, p.param.grad)

    def _refuse_second_reduction(self) -> None:
        if held := [p.name for p in self.flat.parameters if p.param.grad is not None]:
            raise InputError(
                f"{held[0]} has a .grad after ZeroOptimizer has taken it, so that somebody else reduces gradients too: "
                f"take DistributedDataParallel off the model, or give gradients='host' and stage=1"
            )

    def _run_hooks(self) -> None:
        for bucket, gradient in enumerate(self.flat.gradients):
            for hook in self.reducer.hooks:
                hook.after_reduce(bucket, gradient)

    def explain(self) -> str:
        """Name the parameters, and the ranks, whose gradients are not finite. A collective."""
        found = []
        for p, has_gradient in zip(self.flat.parameters, self.has_gradient, strict=True):
            if has_gradient and not p.gradient.isfinite().all():
                bucket, ranks = p.bucket.index, self.reducer.blame.get(p.bucket.index)
                origin = f", from rank {' and '.join(map(str, ranks))}" if ranks else ""
                found.append((bucket, f"{p.name} (bucket {bucket}{origin})"))
        lines = sorted({line for report in all_gather_objects(found, self.shard.group) for line in report})
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        shown = ", ".join(text for _, text in lines[:3])
        return f"the gradient is not finite in {shown}{more}; no rank has taken the step"


def _attempt(action: Callable[[], None]) -> Exception | None:
    """Return the exception of `action`, for the other ranks, which wait for this one."""
    try:
        action()
    except Exception as error:
        return error
    return None
