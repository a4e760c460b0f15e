"""The index of a checkpoint's data files, as JSON: DCP's own is a pickle, and reading one runs what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from shardopt.checkpoint.blocks import DamagedError, FileRecord, check_content, check_file, reading
from shardopt.checkpoint.document import INDEX, records_of
from shardopt.checkpoint.storage import Place, Written

DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
        "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool",
        "complex64", "complex128",
    )
}  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class StoredTensor(NamedTuple):
    """A tensor in the data files."""

    dtype: torch.dtype
    size: torch.Size
    chunks: np.ndarray[Any, np.dtype[np.int64]]
    """[chunks, 4]: first element of the flattened tensor, elements, number of the file, first byte in it."""


class Index(NamedTuple):
    """The tensors of a checkpoint by key, and the files that they lie in."""

    save_id: str
    records: dict[str, FileRecord]
    """Of the data files."""
    files: list[str]
    tensors: dict[str, StoredTensor]

    def check_files(self, folder: Path, names: Iterable[str]) -> None:
        """Check that data files are there, of this save and with their sizes; their content is not read.

        Raises:
            DamagedError, InputError: as `blocks.read_file`.
        """
        for name in names:
            check_file(folder / name, self.save_id, self.records[name], [])

    def metadata(self, keys: Iterable[str]) -> Metadata:
        """Some of the tensors, as DCP's readers want them."""
        entries: dict[str, Any] = {}
        places: dict[MetadataIndex, Any] = {}
        for key in keys:
            dtype, size, chunks = self.tensors[key]
            described = []
            for start, length, file, byte in chunks.tolist():
                # Only vectors are in several chunks.
                offsets, sizes = ([start], [length]) if len(size) == 1 else ([0] * len(size), size)
                chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                described.append(chunk)
                places[MetadataIndex(key, chunk.offsets)] = Place(self.files[file], byte)
            entries[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, described)
        return Metadata(entries, storage_data=places)


def index_content(save_id: str, written: list[Written], metadata: Metadata) -> bytes:
    """The index of what all ranks wrote: {key: [dtype, size, a flat list of `StoredTensor.chunks`]}."""
    tensors: dict[str, list[Any]] = {
        key: [dtype_name(tensor.properties.dtype), list(tensor.size), []]  # type: ignore[union-attr]
        for key, tensor in metadata.state_dict_metadata.items()
    }
    for number, file in enumerate(written):
        for key, start, length, byte in file.chunks:
            tensors[key][2] += [start, length, number, byte]
    content = {"save_id": save_id, "files": [file.file for file in written], "tensors": tensors}
    return json.dumps(content, separators=(",", ":")).encode()


def read_index(folder: Path, document: dict[str, Any]) -> Index:
    """The index in `folder`, of the save and the files that its document names.

    Raises:
        DamagedError: it is missing, is not what was written, or does not fit the files.
        InputError: it cannot be read.
    """
    path, records, save_id = folder / INDEX, records_of(document), document["checkpoint"]["save_id"]
    with reading(path):
        content = path.read_bytes()
    check_content(path, content, records.pop(INDEX))
    try:
        read = json.loads(content)
        if read["save_id"] != save_id:
            raise ValueError("it is of another save than the document")
        files = read["files"]
        for name in files:
            if name not in records:
                raise ValueError(f"{name!r} is not a data file of this checkpoint")
        sizes = np.array([records[name].size for name in files], dtype=np.int64)
        tensors = {key: _stored(key, entry, sizes) for key, entry in read["tensors"].items()}
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise DamagedError(f"{path} is refused: {error if isinstance(error, ValueError) else repr(error)}") from error
    return Index(save_id, records, files, tensors)


def _stored(key: str, entry: list[Any], file_sizes: np.ndarray[Any, Any]) -> StoredTensor:
    """An entry of the index, checked against the sizes of the files."""
    dtype, size, flat = entry
    for number in size:
        if type(number) is not int or number < 0:
            raise ValueError(f"a count was expected, not {number!r}")
    chunks = np.array(flat or np.empty(0, np.int64)).reshape(-1, 4)
    if chunks.dtype != np.int64 or (chunks < 0).any():
        raise ValueError(f"{key!r} has chunks that are no counts")
    itemsize, numel = DTYPES[dtype].itemsize, math.prod(size)
    start, length, file, byte = chunks.T
    # Divided, since a product may not fit into 64 bits.
    if (start > numel).any() or (length > numel - start).any() or (file >= len(file_sizes)).any():
        raise ValueError(f"{key!r} has a chunk beyond its end, or in no file")
    if (byte % itemsize).any() or (length > (file_sizes[file] - byte) // itemsize).any():
        raise ValueError(f"{key!r} has a chunk without its data")
    if len(size) != 1 and chunks[:, :2].tolist() != [[0, numel]]:
        raise ValueError(f"{key!r} is not whole")
    return StoredTensor(DTYPES[dtype], torch.Size(size), chunks)
