"""Find values that are not finite in what is about to be saved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardopt.checkpoint.flat import chunks_of
from shardopt.slices import Slice, local_tensor


@torch.no_grad()
def not_finite(slices: Sequence[Slice]) -> list[str]:
    """Each slice that has an infinite value or a NaN, with their number; buffers may (a mask of -inf).

    One pass over the memory: a sum is finite only if every term is. (A block format has a scale of NaN for a block that
    holds such a value.)
    """
    held = [s for s in slices if s.kind != "buffer" and s.layout.ranges and s.tensors[-1].is_floating_point()]
    sums = [_sum(local_tensor(s.tensors[-1])) for s in held]
    found = []
    for s, suspicious in zip(held, _suspicious(sums), strict=True):
        # A sum may overflow, or there may be something between the ranges.
        if suspicious and (count := _count(s)):
            what = "values" if s.format is None else "blocks with values"
            found.append(f"{s.name}/{s.kind} ({count:,} {what} that are not finite)")
    return found


def _sum(tensor: Tensor) -> Tensor:
    if tensor.dtype.itemsize == 1:  # torch does not add 8-bit floats
        tensor = tensor.float()
    return tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))


def _suspicious(sums: list[Tensor]) -> list[bool]:
    """Which are not finite; one wait for a GPU, not one for each."""
    return (
        (~torch.stack([total.to(sums[0].device, torch.float64) for total in sums]).isfinite()).tolist() if sums else []
    )


def _count(s: Slice) -> int:
    parts = [s.tensors[-1]] if s.format is not None else list(chunks_of(s.layout, s.tensors[0]).values())
    return sum(int((~local_tensor(part).isfinite()).sum()) for part in parts)
