"""Rank 0's part of a save: from what all ranks hold, which of them writes what, and where it will lie."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from shardopt.checkpoint import manifest
from shardopt.checkpoint.blocks import HEADER
from shardopt.checkpoint.index import DTYPES, Sizes
from shardopt.checkpoint.manifest import Description, Entry
from shardopt.checkpoint.ranges import Ints
from shardopt.errors import InputError
from shardopt.optim.precision import BLOCK

Share = Ints | None
"""What one rank writes, in the order of its file: [pieces, 3] of number of the range in its description, first element
in that range, elements. None: all that it holds, where no rank holds what another does."""


class Replicas(NamedTuple):
    """The ranges of the weights that all ranks hold, rank after rank, sorted so that equal ones lie together."""

    order: Ints
    is_new: np.ndarray[Any, np.dtype[np.bool_]]
    """In that order: not the same range as the one before."""
    tensor: Ints
    start: Ints
    entries: list[Entry]

    def check(self, firsts: Sequence[Ints]) -> None:
        """Compare the bits of the first element of equal ranges, given by rank.

        Raises:
            InputError: replicas differ.
        """
        bits = np.concatenate(firsts)[self.order]
        differ = np.flatnonzero((bits[1:] != bits[:-1]) & ~self.is_new[1:])
        if differ.size:
            at = int(differ[0])
            entry = self.entries[self.tensor[at]]
            dtype = DTYPES[entry.dtypes[0]]
            one, other = (
                torch.from_numpy(bits[i : i + 1].view(np.uint8)[: dtype.itemsize].copy()).view(dtype).item()
                for i in (at, at + 1)
            )
            raise manifest.unequal(f"{entry.name}[{self.start[at]}]", one, other)


class Plan(NamedTuple):
    """What all ranks together write. It holds for the next save too, if no rank holds anything else by then."""

    parameters: dict[str, dict[str, Any]]
    extras: dict[str, dict[str, Any]]
    table: Ints
    """See `index.read_table`."""
    replicas: Replicas | None
    """None where no element is held twice."""


def make_plan(descriptions: Sequence[Description]) -> tuple[Plan, list[Share]]:
    """Put together what the ranks hold, and give every element to one of those that hold it, evenly by bytes.

    Returns:
        The plan, and the share of each rank.

    Raises:
        InputError: an element that no rank holds or that is held in two ranges that differ; ranks that disagree.
    """
    tables = {table: manifest.read_table(table) for table in dict.fromkeys(d.table for d in descriptions)}
    merged = manifest.merge(tables.values())
    entries = sorted(merged.values(), key=lambda e: manifest.file_order((e.name, e.kind)))
    numbers = {(e.name, e.kind): number for number, e in enumerate(entries)}
    numbered = {t: np.array([numbers[e.name, e.kind] for e in table], np.int64) for t, table in tables.items()}
    columns = [d.columns() for d in descriptions]
    counts = np.array([c.shape[1] for c in columns])
    tensor = np.concatenate([numbered[d.table][c[0]] for d, c in zip(descriptions, columns, strict=True)])
    start, length, row, stride = (np.concatenate([c[i] for c in columns]) for i in (1, 2, 3, 4))
    rank = np.repeat(np.arange(len(columns)), counts)

    # All tensors in one line, tensor after tensor; of equal ranges the first rank's comes first.
    sizes = Sizes.of(entries)
    line = np.cumsum(sizes.numel) - sizes.numel
    order = np.argsort(line[tensor] + start, kind="stable")
    ranges = np.stack([tensor, start, length, row, stride])[:, order]
    tensor, start, length, row, stride = ranges
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (np.diff(ranges) != 0).any(0)
    once = np.flatnonzero(is_new)
    if wrong := manifest.uncovered(entries, sizes.numel, *ranges[:, once]):
        raise InputError(wrong)

    if len(once) == len(order):
        source, begin, replicas = order, np.zeros_like(start), None
    else:
        replicas = _replicas(order, is_new, tensor, start, entries)
        which, source, begin, length = _deal(order, once, rank, length, row, sizes.itemsize[tensor])
        tensor, start, row, stride = ranges[[0, 1, 3, 4]][:, which]
        start = start + np.where(row > 0, begin // np.maximum(row, 1) * stride, begin)
        row, stride = np.where(length > row, [row, stride], 0)
    writer = rank[source]
    by_writer = np.argsort(writer, kind="stable")
    ends = np.searchsorted(writer[by_writer], np.arange(len(columns) + 1))
    byte = np.empty_like(start)
    held = source - (np.cumsum(counts) - counts)[writer]
    shares: list[Share] = []
    for first, last in pairwise(ends):
        mine = by_writer[first:last]
        spans = sizes.spans(tensor[mine], length[mine])
        byte[mine] = HEADER + np.cumsum(spans) - spans
        shares.append(np.stack([held[mine], begin[mine], length[mine]], axis=1) if replicas is not None else None)
    rows = [row, stride] if row.any() else []
    table = np.stack([tensor, start, length, writer, byte, *rows], axis=1)
    return Plan(manifest.parameters_of(merged), manifest.extras_of(merged), table, replicas), shares


def _deal(
    order: Ints, once: Ints, rank: Ints, length: Ints, row: Ints, itemsize: Ints
) -> tuple[Ints, Ints, Ints, Ints]:
    """Deal out ranges that several ranks hold: each set of holders cuts the bytes of all it holds into equal parts.

    Args:
        order: of all ranges, after which equal ones lie together.
        once: where in this order each range stands first.
        rank: of each range as it was given.
        length, row, itemsize: of each range in this order.

    Returns:
        Of each piece: its range by place in the order, and the same of its holder as it was given; its first element in
        it; elements.
    """
    holders = np.diff(np.append(once, len(order)))
    length, itemsize = length[once], itemsize[once]
    # A set of ranks is told by a sum of random numbers; two that are taken for one would only be dealt less evenly.
    code = np.random.default_rng(0).integers(2**63, size=rank.max(initial=0) + 1, dtype=np.uint64)
    _, owners = np.unique(np.add.reduceat(code[rank[order]], once), return_inverse=True)
    by_set = np.argsort(owners, kind="stable")
    size = length * itemsize
    total = np.bincount(owners, size).astype(np.int64)
    before = np.empty_like(size)
    before[by_set] = np.cumsum(size[by_set]) - size[by_set] - np.repeat(np.cumsum(total) - total, np.bincount(owners))
    total = total[owners]
    first, last = before * holders // total, (before + size - 1) * holders // total
    parts = last - first + 1
    which = np.repeat(np.arange(len(once)), parts)
    turn = np.arange(len(which)) - (np.cumsum(parts) - parts - first)[which]
    byte = turn * total[which] // holders[which] - before[which]
    # Whole blocks, so that their codes stay beside their scales; and whole rows.
    unit = np.lcm(BLOCK, np.maximum(row[once], 1))[which]
    begin = np.clip(byte // itemsize[which] // unit * unit, 0, length[which])
    end = np.append(begin[1:], 0)
    is_last = turn == last[which]
    end[is_last] = length[which][is_last]
    kept = end > begin
    which, turn, begin, end = which[kept], turn[kept], begin[kept], end[kept]
    return once[which], order[once[which] + turn], begin, end - begin


def _replicas(order: Ints, is_new: Any, tensor: Ints, start: Ints, entries: list[Entry]) -> Replicas:
    """Of all ranges, those of the weights."""
    is_weight = np.array([e.kind == "weight" for e in entries])[tensor]
    given = np.zeros(len(order), dtype=bool)
    given[order] = is_weight
    position = np.cumsum(given) - 1  # among the weights' as they were given
    return Replicas(position[order[is_weight]], is_new[is_weight], tensor[is_weight], start[is_weight], entries)
