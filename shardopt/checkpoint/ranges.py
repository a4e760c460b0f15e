"""Arithmetic on ranges of a flattened parameter: slices cut at them, what they cover, where they overlap."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any, NamedTuple

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
        layout = Layout(s.name, s.layout.shape, (r._replace(local_start=0),))
        yield Slice(s.name, s.kind, layout, tuple(own), s.format)


def part(chunk: Slice, begin: int, length: int) -> Slice:
    """Some elements of what `by_range` made, from `begin`, a multiple of `precision.BLOCK`; whole rows, if any."""
    (r,) = chunk.layout.ranges
    if length == r.length:
        return chunk
    own = [chunk.tensors[0].narrow(0, begin, length)]
    own += [scales.narrow(0, begin // BLOCK, blocks(length)) for scales in chunk.tensors[1:]]
    layout = Layout(chunk.name, chunk.layout.shape, (r.part(begin, length)._replace(local_start=0),))
    return Slice(chunk.name, chunk.kind, layout, tuple(own), chunk.format)


def packed(layout: Layout) -> Layout:
    """The same elements, one after the other: how states.read_slice and states.write_slice hold them."""
    ranges, at = [], 0
    for r in layout.ranges:
        ranges.append(r._replace(local_start=at))
        at += r.length
    return Layout(layout.name, layout.shape, tuple(ranges))


class _Box(NamedTuple):
    """Elements of a range in a parameter that is seen as lines of some length: a part of the columns of some lines."""

    line: int
    lines: int
    column: int
    columns: int
    number: int
    """Of its first element in the range."""
    pitch: int
    """Elements of the range from the start of a line to that of the next."""


def _boxes(r: Range, size: int) -> Iterator[_Box]:
    """A range in lines of `size` elements: its rows together if they are that far apart, otherwise each by itself."""
    line, column = divmod(r.global_start, size)
    if r.row and (r.stride != size or column + r.row > size):
        for number, row in zip(range(0, r.length, r.row), r.rows(), strict=True):
            yield from (box._replace(number=box.number + number) for box in _boxes(row, size))
        return
    if r.row:
        yield _Box(line, r.length // r.row, column, r.row, 0, r.row)
        return
    begun = min(r.length, (size - column) % size)  # the rest of a line, whole lines, the first part of one
    whole = (r.length - begun) // size * size
    for number, end in ((0, begun), (begun, begun + whole), (begun + whole, r.length)):
        if number < end:
            line, column = divmod(r.global_start + number, size)
            columns = min(end - number, size)
            yield _Box(line, (end - number) // columns, column, columns, number, columns)


def shared(r: Range, chunk: Range) -> Iterator[tuple[int, int, int]]:
    """What two ranges of a parameter both have, in pieces that lie together in both.

    Returns:
        Of each piece the number of its first element in `r`, that in `chunk`, and how many elements it has.
    """
    if not r.row and not chunk.row:
        first = max(r.global_start, chunk.global_start)
        count = min(r.global_end, chunk.global_end) - first
        if count > 0:
            yield first - r.global_start, first - chunk.global_start, count
        return
    size = r.stride or chunk.stride
    for a, b in product(_boxes(r, size), _boxes(chunk, size)):
        line, column = max(a.line, b.line), max(a.column, b.column)
        lines = min(a.line + a.lines, b.line + b.lines) - line
        columns = min(a.column + a.columns, b.column + b.columns) - column
        if lines <= 0 or columns <= 0:
            continue
        here, there = (box.number + (line - box.line) * box.pitch + column - box.column for box in (a, b))
        if columns == a.pitch == b.pitch:
            lines, columns = 1, lines * columns
        for i in range(lines):
            yield here + i * a.pitch, there + i * b.pitch, columns


def ends(start: Ints, length: Ints, row: Ints, stride: Ints) -> Ints:
    """Behind the last element of each range, in the whole parameter."""
    return start + np.where(row > 0, (length // np.maximum(row, 1) - 1) * stride + row, length)


def same_blocks(r: Range, start: Ints, length: Ints, row: Ints, stride: Ints) -> bool:
    """True where vectors of codes that together cover `r` are cut into blocks as `r` is, none of them beyond it."""
    begin, aligned = start - r.global_start, row == 0
    if r.row:
        rows, column = np.divmod(begin, r.stride)
        same = ((row == r.row) & (stride == r.stride)) | ((row == 0) & (length == r.row))
        begin, aligned = rows * r.row, same & (column == 0)
    end = begin + length
    inside = (begin >= 0).all() and (end <= r.length).all() and aligned.all()
    return bool(inside and not (begin % BLOCK).any() and (end[:-1] % BLOCK == 0).all())


def gaps(numel: Ints, tensor: Ints, start: Ints, length: Ints, row: Ints, stride: Ints) -> dict[int, str]:
    """What is wrong with ranges that should cover each tensor exactly once, by the tensor's number.

    Args:
        numel: of each tensor.
        tensor, start, length, row, stride: of each range, sorted by tensor and start.
    """
    found = {}
    in_rows = np.unique(tensor[row > 0])
    known: dict[tuple[int, bytes], str | None] = {}  # many tensors are of one shape and cut alike
    for number in in_rows.tolist():
        first, last = np.searchsorted(tensor, [number, number + 1])
        own = np.stack([column[first:last] for column in (start, length, row, stride)])
        key = int(numel[number]), own.tobytes()
        if key not in known:
            known[key] = _gap_between_rows(key[0], own)
        if (error := known[key]) is not None:
            found[number] = error
    others = np.isin(tensor, in_rows, invert=True)
    rest = numel.copy()
    rest[in_rows] = 0
    return found | _gaps(rest, tensor[others], start[others], length[others])


def _gap_between_rows(numel: int, ranges: Ints) -> str | None:
    """The error of one tensor's ranges; see `gaps`."""
    start, length, row, stride = ranges
    row = np.where(row > 0, row, length)
    count = length // row
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    begin, size = np.repeat(start, count) + number * np.repeat(stride, count), np.repeat(row, count)
    order = np.argsort(begin, kind="stable")
    begin, size = begin[order], size[order]
    end = begin + size
    if begin[0] == 0 and end[-1] == numel and (begin[1:] == end[:-1]).all():
        return None
    return coverage_error(numel, zip(begin.tolist(), size.tolist(), strict=True))


def _gaps(numel: Ints, tensor: Ints, start: Ints, length: Ints) -> dict[int, str]:
    """`gaps` of contiguous ranges."""
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
