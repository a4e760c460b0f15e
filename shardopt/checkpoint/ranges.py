"""Arithmetic on ranges of a flattened parameter: slices cut at them, what they cover, where they overlap."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from shardopt.optim.precision import BLOCK, blocks
from shardopt.slices import Layout, Range, Slice, local_tensor

Ints = np.ndarray[Any, np.dtype[np.int64]]


def by_range(s: Slice) -> Iterator[Slice]:
    """A slice of each range, with 1-D tensors of its elements alone: views of `s`'s, or of a copy if not contiguous."""
    vectors = [local_tensor(t).detach().reshape(-1) for t in s.tensors]
    scale = 0
    for r in s.layout.ranges:
        own = [vectors[0].narrow(0, r.local_start, r.length)]
        if s.format is not None:
            own.append(vectors[1].narrow(0, scale, blocks(r.length)))
            scale += blocks(r.length)
        layout = Layout.contiguous(s.name, s.layout.shape, r.global_start, r.length)
        yield Slice(s.name, s.kind, layout, tuple(own), s.format)


def part(chunk: Slice, begin: int, length: int) -> Slice:
    """Some elements of what `by_range` made, from `begin`, which is a multiple of `precision.BLOCK`."""
    (r,) = chunk.layout.ranges
    if length == r.length:
        return chunk
    own = [chunk.tensors[0].narrow(0, begin, length)]
    own += [scales.narrow(0, begin // BLOCK, blocks(length)) for scales in chunk.tensors[1:]]
    layout = Layout.contiguous(chunk.name, chunk.layout.shape, r.global_start + begin, length)
    return Slice(chunk.name, chunk.kind, layout, tuple(own), chunk.format)


def packed(layout: Layout) -> Layout:
    """The same elements, one after the other: how states.read_slice and states.write_slice hold them."""
    ranges, at = [], 0
    for r in layout.ranges:
        ranges.append(Range(r.global_start, at, r.length))
        at += r.length
    return Layout(layout.name, layout.shape, tuple(ranges))


def overlap(r: Range, start: int, length: int) -> tuple[int, int]:
    """What `r` has of `length` elements from `start`: place of the first, and their number (not positive: none)."""
    first = max(r.global_start, start)
    return first, min(r.global_start + r.length, start + length) - first


def same_blocks(r: Range, starts: Ints, lengths: Ints) -> bool:
    """True where vectors of codes that together cover `r` are cut into blocks as `r` is, none of them beyond it."""
    begin, end = starts - r.global_start, starts + lengths - r.global_start
    inside = (begin >= 0).all() and (end <= r.length).all()
    return bool(inside and not (begin % BLOCK).any() and (end[:-1] % BLOCK == 0).all())


def gaps(numel: Ints, tensor: Ints, start: Ints, length: Ints) -> dict[int, str]:
    """What is wrong with ranges that should cover each tensor exactly once, by the tensor's number.

    Args:
        numel: of each tensor.
        tensor, start, length: of each range, sorted by tensor and start.
    """
    first = np.ones(len(tensor), dtype=bool)
    first[1:] = tensor[1:] != tensor[:-1]
    last = np.append(first[1:], True)[: len(tensor)]
    end = start + length
    before = np.where(first, 0, np.append(0, end)[:-1])
    wrong = (start != before) | (last & (end != numel[tensor]))
    none = np.ones(len(numel), dtype=bool)
    none[tensor] = False
    suspects = np.union1d(tensor[wrong], np.flatnonzero(none & (numel > 0)))
    found = {}
    for number in suspects.tolist():
        mine = tensor == number
        chunks = zip(start[mine].tolist(), length[mine].tolist(), strict=True)
        found[number] = coverage_error(int(numel[number]), chunks) or "ranges are not in order"
    return found


def coverage_error(numel: int, chunks: Iterable[tuple[int, int]]) -> str | None:
    """The error in (start, length) pairs that should cover 0 .. numel exactly once, or None."""
    end = 0
    for start, length in sorted(chunks):
        if start > end:
            return f"elements {end} to {start} of {numel} are held by no rank"
        if start < end:
            return f"elements {start} to {min(end, start + length)} of {numel} are held in two ranges"
        end = start + length
    if end < numel:
        return f"elements {end} to {numel} of {numel} are held by no rank"
    return f"elements beyond the end ({numel}) are held" if end > numel else None
