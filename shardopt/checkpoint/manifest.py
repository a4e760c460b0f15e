"""What a rank holds, described without its values, and the descriptions of all ranks put together."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shardopt.checkpoint.ranges import Ints, by_range, gaps
from shardopt.errors import InputError, few
from shardopt.slices import Layout, Slice, local_tensor

EXTRA = "/extra"
"""The kind of a tensor of the caller's, which belongs to no parameter."""

StepCounts = dict[str, dict[str, int | float]]  # by parameter name


class Entry(NamedTuple):
    """A tensor without its values: a parameter's kind, or an extra."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    format: str | None  # name of a block format, whose dtypes are of codes and scales

    @property
    def stored_as(self) -> str:
        """The block format, or else the dtype."""
        return self.format or self.dtypes[0]


Entries = Mapping[tuple[str, str], Entry]  # by name and kind


class Description(NamedTuple):
    """What one rank holds. At 1,024 ranks rank 0 gets as many of them, so they are compressed."""

    table: bytes
    """JSON of its entries."""
    chunks: bytes
    """Five rows of int64, one column for each range in the order of `file_order`: number of the entry in the table,
    first element, elements, row and stride (see `slices.Range`)."""

    def columns(self) -> Ints:
        return np.frombuffer(zlib.decompress(self.chunks), dtype=np.int64).reshape(5, -1)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def vector_key(name: str, kind: str) -> str:
    return f"{name}/{kind}"


def file_order(key: tuple[str, str]) -> tuple[str, str]:
    """Tensors lie in the files, and have numbers, by kind and then by name: so all weights are together."""
    name, kind = key
    return kind, name


def extras_as_slices(extras: Mapping[str, Tensor]) -> list[Slice]:
    return [Slice(key, EXTRA, Layout.whole(key, t.shape), (t.detach(),)) for key, t in extras.items()]


def table_of(slices: Sequence[Slice]) -> bytes:
    """The entries of this rank, in the order of the slices.

    Raises:
        ValueError: two slices of the same name and kind.
        InputError: a tensor on the meta device, which holds no values.
    """
    entries: dict[tuple[str, str], list[Any]] = {}
    for s in slices:
        if (s.name, s.kind) in entries:
            raise ValueError(f"{vector_key(s.name, s.kind)!r} is given twice")
        if any(local_tensor(t).is_meta for t in s.tensors):
            raise InputError(f"{vector_key(s.name, s.kind)} is on the meta device: give the model its memory first")
        entries[s.name, s.kind] = [s.name, s.kind, s.layout.shape, [dtype_name(t.dtype) for t in s.tensors], s.format]
    return zlib.compress(json.dumps(list(entries.values())).encode(), 1)


def describe(slices: Sequence[Slice]) -> tuple[Description, list[Slice]]:
    """The slices of this rank, and each range of them in the order of files."""
    table = table_of(slices)
    order = sorted(range(len(slices)), key=lambda i: file_order((slices[i].name, slices[i].kind)))
    chunks, columns = [], []
    for number in order:
        for chunk in by_range(slices[number]):
            (r,) = chunk.layout.ranges
            chunks.append(chunk)
            columns.append((number, r.global_start, r.length, r.row, r.stride))
    rows = np.array(columns, dtype=np.int64).reshape(-1, 5).T
    return Description(table, zlib.compress(rows.tobytes(), 1)), chunks


def read_table(table: bytes) -> list[Entry]:
    """What `table_of` made."""
    return [
        Entry(name, kind, tuple(shape), tuple(dtypes), fmt)
        for name, kind, shape, dtypes, fmt in json.loads(zlib.decompress(table))
    ]


def merge(tables: Iterable[list[Entry]]) -> dict[tuple[str, str], Entry]:
    """The entries of all ranks.

    Raises:
        InputError: ranks disagree about a shape, a dtype or a format.
    """
    together: dict[tuple[str, str], Entry] = {}
    shapes: dict[tuple[str, bool], tuple[int, ...]] = {}
    for entry in (entry for table in tables for entry in table):
        known = together.setdefault((entry.name, entry.kind), entry)
        known = known._replace(shape=shapes.setdefault((entry.name, entry.kind == EXTRA), known.shape))
        if known != entry:
            raise InputError(
                f"{vector_key(entry.name, entry.kind)}: ranks disagree, {_facts(known)} on one and {_facts(entry)} on "
                f"another"
            )
    return together


def _facts(entry: Entry) -> str:
    return f"{list(entry.shape)} in {entry.stored_as}"


def parameters_of(entries: Entries) -> dict[str, dict[str, Any]]:
    """The document's "parameters", see document.read_document."""
    parameters: dict[str, dict[str, Any]] = {}
    for (name, kind), entry in entries.items():
        if kind != EXTRA:
            parameter = parameters.setdefault(name, {"shape": list(entry.shape), "kinds": {}})
            in_blocks = {} if entry.format is None else {"format": entry.format}
            parameter["kinds"][kind] = {"dtypes": list(entry.dtypes), **in_blocks}
    return parameters


def extras_of(entries: Entries) -> dict[str, dict[str, Any]]:
    """The document's "extras"."""
    kept = sorted(entry for (_, kind), entry in entries.items() if kind == EXTRA)
    return {entry.name: {"shape": list(entry.shape), "dtypes": list(entry.dtypes)} for entry in kept}


def entries_of(written: Mapping[str, Any]) -> dict[tuple[str, str], Entry]:
    """The entries that a document names, in the order of files: an entry's position is its number in the index."""
    entries = [
        Entry(name, kind, tuple(parameter["shape"]), tuple(stored["dtypes"]), stored.get("format"))
        for name, parameter in written["parameters"].items()
        for kind, stored in parameter["kinds"].items()
    ]
    entries += [Entry(k, EXTRA, tuple(e["shape"]), tuple(e["dtypes"]), None) for k, e in written["extras"].items()]
    return {(e.name, e.kind): e for e in sorted(entries, key=lambda e: file_order((e.name, e.kind)))}


def uncovered(entries: Sequence[Entry], numel: Ints, *ranges: Ints) -> str:
    """Which tensors have elements that are not there exactly once; empty for none. Arguments: see `ranges.gaps`."""
    errors = gaps(numel, *ranges)
    named = (f"{vector_key(entries[n].name, entries[n].kind)}: {error}" for n, error in errors.items())
    return f"incomplete: {few(named)}" if errors else ""


def pack_counts(counts: StepCounts) -> bytes:
    return zlib.compress(json.dumps(counts).encode(), 1)


def merge_counts(packed: Iterable[bytes]) -> StepCounts:
    """The step counts of all ranks, each of which may know its own parameters only.

    Raises:
        InputError: ranks disagree about a parameter that several hold.
    """
    together: StepCounts = {}
    for counts in map(json.loads, map(zlib.decompress, dict.fromkeys(packed))):
        for name, values in counts.items():
            if together.setdefault(name, values) != values:
                raise unequal(name, together[name], values)
    return together


def check_same_folder(main: str, given: str, rank: int) -> None:
    """Raise InputError where a rank was given another folder than rank 0."""
    if given != main:
        raise InputError(f"ranks gave different folders: {main} on rank 0, {given} on rank {rank}")


def unequal(what: str, one: object, another: object) -> InputError:
    """Replicas that differ."""
    return InputError(
        f"{what}: ranks disagree, {one} on one and {another} on another: replicas must be equal "
        f"(is DistributedDataParallel missing?)"
    )


def first_bits(chunks: Sequence[Slice]) -> Ints:
    """The bits of the first element of each range of the weights held here."""
    firsts = [c.tensors[0][:1].view(torch.uint8)[:8] for c in chunks if c.kind == "weight"]
    bits = np.zeros((len(firsts), 8), dtype=np.uint8)
    if firsts:
        sizes = np.array([t.numel() for t in firsts])
        # One copy from a GPU, not one for each.
        joined = torch.cat([t.to(firsts[0].device) for t in firsts]).cpu().numpy()
        bits[np.arange(8) < sizes[:, None]] = joined
    return bits.view(np.int64).reshape(-1)
