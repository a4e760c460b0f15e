"""The index of a checkpoint: which elements lie where in the data files. Numbers alone; names are in the document."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from shardopt.checkpoint import manifest
from shardopt.checkpoint.blocks import (
    ALIGN,
    HEADER,
    DamagedError,
    FileRecord,
    Wanted,
    check_file,
    read_file,
    write_file,
)
from shardopt.checkpoint.document import index_file, infix_of, records_of
from shardopt.checkpoint.manifest import Entry, dtype_name, vector_key
from shardopt.checkpoint.ranges import Ints, ends
from shardopt.errors import InputError
from shardopt.optim.precision import BLOCK, FORMATS
from shardopt.optim.schema import format_of
from shardopt.slices import Range

DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
        "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool",
        "complex64", "complex128",
    )
}  # fmt: skip
SCALE = torch.float32
_COLUMNS = 5, 7  # of the table, without and with ranges of several rows


class Sizes(NamedTuple):
    """Of tensors, by number."""

    numel: Ints
    itemsize: Ints
    in_blocks: np.ndarray[Any, np.dtype[np.bool_]]

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Sizes:
        return cls(
            np.array([math.prod(e.shape) for e in entries], dtype=np.int64),
            np.array([DTYPES[e.dtypes[0]].itemsize for e in entries], dtype=np.int64),
            np.array([e.format is not None for e in entries], dtype=bool),
        )

    def spans(self, tensor: Ints, length: Ints) -> Ints:
        """Bytes that elements of tensors take in a file, with their scales, up to where the next may begin."""
        scales = np.where(self.in_blocks[tensor], -(-length // BLOCK) * SCALE.itemsize, 0)
        return _aligned(length * self.itemsize[tensor]) + _aligned(scales)


class StoredTensor(NamedTuple):
    """A tensor in the data files."""

    entry: Entry
    chunks: Ints
    """[chunks, 6], sorted: first element of the flattened tensor, elements, number of the file, first byte in it, row
    and stride (see `slices.Range`). In a block format the codes lie there, and their scales after them (see
    `scales_at`)."""

    def overlapping(self, r: Range) -> Ints:
        """The chunks that have elements of `r`, and maybe some between its rows."""
        starts = self.chunks[:, 0]
        if self.chunks[:, 4].any():  # the next may begin between the rows of one
            end = ends(starts, *self.chunks[:, [1, 4, 5]].T)
            return self.chunks[(starts < r.global_end) & (end > r.global_start)]
        first = np.searchsorted(starts, r.global_start, side="right") - 1
        return self.chunks[first : np.searchsorted(starts, r.global_end)]


class Index(NamedTuple):
    """The tensors of a checkpoint, and the files that they lie in."""

    save_id: str
    infix: str
    """Of its files' names: see `document.infix_of`."""
    records: dict[str, FileRecord]
    """Of the data files."""
    tensors: dict[tuple[str, str], StoredTensor]
    """By name and kind."""

    @classmethod
    def of(cls, document: dict[str, Any], table: Ints) -> Index:
        """From a document and the content of its index, both checked (see `read_table`)."""
        entries = manifest.entries_of(document["checkpoint"])
        cut = np.searchsorted(table[:, 0], np.arange(len(entries) + 1))
        chunks = np.zeros((len(table), 6), dtype=np.int64)
        chunks[:, : table.shape[1] - 1] = table[:, 1:]
        tensors = {
            key: StoredTensor(entry, chunks[cut[i] : cut[i + 1]]) for i, (key, entry) in enumerate(entries.items())
        }
        infix, records = infix_of(document), records_of(document)
        del records[index_file(infix)]
        return cls(document["checkpoint"]["save_id"], infix, records, tensors)

    def check_files(self, folder: Path, names: Iterable[str]) -> None:
        """Check that data files are there, of this save and with their sizes; their content is not read.

        Raises:
            DamagedError, InputError: as `blocks.read_file`.
        """
        for name in names:
            check_file(folder / name, self.save_id, self.records[name], [])

    def nbytes(self, name: str, kind: str) -> int:
        """Bytes of a tensor's data."""
        entry, chunks = self.tensors[name, kind]
        scales = -(-chunks[:, 1] // BLOCK) * SCALE.itemsize if entry.format is not None else 0
        return int((chunks[:, 1] * DTYPES[entry.dtypes[0]].itemsize + scales).sum())

    def read(self, folder: Path, wanted: Iterable[tuple[int, Wanted]]) -> None:
        """Read from data files, given by number, into the targets; raises as `blocks.read_file`."""
        files: dict[int, list[Wanted]] = {}
        for file, one in wanted:
            files.setdefault(file, []).append(one)
        for file in sorted(files):
            name = data_file(file, self.infix)
            read_file(folder / name, self.save_id, self.records[name], files[file])


def data_file(number: int, infix: str) -> str:
    """The file that rank `number` has written; see `document.infix_of`."""
    return f"rank-{number:05d}{infix}.data"


def scales_at(byte: int, codes: int, dtype: torch.dtype) -> int:
    """The first byte of the scales of `codes` codes that lie at `byte`."""
    return byte + int(_aligned(np.int64(codes * dtype.itemsize)))


def _aligned(bytes_: Any) -> Any:
    return -(-bytes_ // ALIGN) * ALIGN


def write_index(path: Path, save_id: str, table: Ints) -> FileRecord:
    """Write a plan's index, on the disk when this returns; its record."""
    return write_file(path, save_id, [torch.from_numpy(table).view(-1)])


def read_index(folder: Path, document: dict[str, Any]) -> Index:
    """The index in `folder`, of the save that its document names; see `read_table`."""
    return Index.of(document, read_table(folder, document))


def read_table(folder: Path, document: dict[str, Any]) -> Ints:
    """The index, checked against the document: [chunks, 5 or 7], number of the tensor and `StoredTensor.chunks`, whose
    rows and strides are left out where they are all 0.

    Raises:
        DamagedError: it is missing, is not what was written, or does not fit the document.
        InputError: it cannot be read, or a format is not known.
    """
    infix, records, written = infix_of(document), records_of(document), document["checkpoint"]
    path, record = folder / index_file(infix), records[index_file(infix)]
    try:
        columns = written.get("columns", _COLUMNS[0])
        if columns not in _COLUMNS or record.size < HEADER or (record.size - HEADER) % (8 * columns):
            raise ValueError(f"{record.size} bytes are no table")
        content = torch.empty((record.size - HEADER) // 8, dtype=torch.int64)
        read_file(path, written["save_id"], record, [Wanted(HEADER, torch.int64, content)])
        table = content.view(-1, columns).numpy()
        entries = list(manifest.entries_of(written).values())
        for entry in entries:
            _check_entry(folder, entry)
        _check(table, entries, records, infix)
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise DamagedError(f"{path} is refused: {error if type(error) is ValueError else repr(error)}") from error
    return table


def _check_entry(folder: Path, entry: Entry) -> None:
    if entry.format is not None and list(entry.dtypes) != _dtypes_of(entry.kind, entry.format):
        key = vector_key(entry.name, entry.kind)
        raise InputError(f"{folder}: {key} is not in a known format, but in {entry.format!r}")


def _dtypes_of(kind: str, name: str) -> list[str]:
    """Of the codes and scales of a block format; empty where there is none of this name."""
    return [dtype_name(format_of(kind, name).dtype(torch.float32)), dtype_name(SCALE)] if name in FORMATS else []


def _check(table: Ints, entries: Sequence[Entry], records: dict[str, FileRecord], infix: str) -> None:
    """Raise ValueError where the table does not hold every element once, or names data that no file has."""
    tensor, start, length, file, byte = table.T[:5]
    row, stride = table.T[5:] if table.shape[1] > 5 else np.zeros((2, len(table)), dtype=np.int64)
    if (table < 0).any() or (tensor >= len(entries)).any() or (length == 0).any():
        raise ValueError("it has numbers that are no counts, or of no tensor")
    sizes = Sizes.of(entries)
    # Divided or subtracted, since a product or a sum may not fit into 64 bits.
    numel, itemsize, in_blocks = (column[tensor] for column in sizes)
    if (start > numel).any() or (length > numel - start).any():
        raise ValueError("it has a chunk beyond its tensor's end")
    divisor = np.maximum(row, 1)
    if ((row > 0) & ((length % divisor > 0) | (stride <= row))).any():
        raise ValueError("it has a chunk of rows that are none")
    if ((row > 0) & (length // divisor - 1 > (numel - start - row) // np.maximum(stride, 1))).any():
        raise ValueError("it has a chunk with rows beyond its tensor's end")
    if ((np.diff(tensor) < 0) | ((np.diff(tensor) == 0) & (np.diff(start) <= 0))).any():
        raise ValueError("its chunks are not in order")
    if wrong := manifest.uncovered(entries, sizes.numel, tensor, start, length, row, stride):
        raise ValueError(wrong)
    numbers, which = np.unique(file, return_inverse=True)
    for number in numbers.tolist():
        if data_file(number, infix) not in records:
            raise ValueError(f"{data_file(number, infix)} is not a data file of this checkpoint")
    size = np.array([records[data_file(number, infix)].size for number in numbers.tolist()], dtype=np.int64)[which]
    if (
        (byte % ALIGN).any()
        or (byte < HEADER).any()
        or (byte > size).any()
        or (length > (size - byte) // itemsize).any()
    ):
        raise ValueError("it has a chunk without its data")
    scales = byte + _aligned(length * itemsize)
    if (in_blocks & (-(-length // BLOCK) * SCALE.itemsize > size - scales)).any():
        raise ValueError("it has a chunk without its scales")
    by_file = np.argsort(file, kind="stable")
    file, begin, end = file[by_file], byte[by_file], (byte + sizes.spans(tensor, length))[by_file]
    if ((file[1:] == file[:-1]) & (begin[1:] < end[:-1])).any():
        raise ValueError("it has chunks that lie over each other")
