"""Find values that are not finite in what is about to be saved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardopt.checkpoint.manifest import EXTRA
from shardopt.checkpoint.ranges import by_range
from shardopt.slices import Slice, local_tensor


@torch.no_grad()
def not_finite(slices: Sequence[Slice]) -> list[str]:
    """Each slice that has an infinite value or a NaN, with their number; buffers and extras may (a mask of -inf).

    One pass over the memory: a sum is finite only if every term is. (A block format has a scale of NaN for a block that
    holds such a value.)
    """
    may = ("buffer", EXTRA)
    held = [s for s in slices if s.kind not in may and s.layout.ranges and s.tensors[-1].is_floating_point()]
    sums = [_sum(local_tensor(s.tensors[-1])) for s in held]
    found = []
    for s, suspicious in zip(held, _suspicious(sums), strict=True):
        # A sum may overflow, or there may be something between the ranges.
        if suspicious and (count := _count(s)):
            what = "values" if s.format is None else "blocks with values"
            found.append(f"{s.name}/{s.kind} ({count:,} {what} that are not finite)")
    return found


def _sum(tensor: Tensor) -> Tensor:
    # torch does not add 8-bit floats. It adds 16-bit ones in fp32, and 50 times as fast as when asked for an fp32 sum.
    return (tensor.float() if tensor.dtype.itemsize == 1 else tensor).sum()


def _suspicious(sums: list[Tensor]) -> list[bool]:
    """Which are not finite; one wait for a GPU, not one for each."""
    return (
        (~torch.stack([total.to(sums[0].device, torch.float64) for total in sums]).isfinite()).tolist() if sums else []
    )


def _count(s: Slice) -> int:
    return sum(int((~part.tensors[-1].isfinite()).sum()) for part in by_range(s))
