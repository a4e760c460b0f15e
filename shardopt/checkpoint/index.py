"""The index of a checkpoint's data files, as JSON: DCP's own is a pickle, and reading one runs what it says."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from shardopt.checkpoint.folders import INDEX, write_json
from shardopt.errors import InputError

DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
        "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool",
        "complex64", "complex128",
    )
}  # fmt: skip
_DATA_FILE = re.compile(r"__\d+_\d+\.distcp")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_index(folder: Path, metadata: Metadata, results: Iterable[WriteResult]) -> None:
    """Write {key: [dtype, size, [[offsets, sizes, file, first byte, bytes], ...]]} for the tensors of all ranks."""
    places = {result.index: result.storage_data for result in results}
    index: dict[str, list[Any]] = {}
    for key, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        chunks = []
        for chunk in tensor.chunks:
            place = places[MetadataIndex(key, chunk.offsets)]
            chunks.append([chunk.offsets, chunk.sizes, place.relative_path, place.offset, place.length])
        index[key] = [dtype_name(tensor.properties.dtype), tensor.size, chunks]
    write_json(folder / INDEX, index)


def read_index(folder: Path) -> Metadata:
    """What `write_index` wrote, as DCP's readers want it.

    Raises:
        InputError: it cannot be read, or does not fit the data files beside it.
    """
    path = folder / INDEX
    bytes_of = functools.cache(lambda name: (folder / name).stat().st_size)
    entries: dict[str, Any] = {}
    places = {}
    try:
        for key, (dtype, size, stored) in json.loads(path.read_text(encoding="utf-8")).items():
            chunks = []
            for offsets, sizes, file, start, length in stored:
                chunk = ChunkStorageMetadata(_size(offsets), _size(sizes))
                if not _DATA_FILE.fullmatch(file):
                    raise ValueError(f"{file!r} is not a data file of a checkpoint")
                if _count(length) < math.prod(chunk.sizes) * DTYPES[dtype].itemsize:
                    raise ValueError(f"{key!r} has a chunk without its data")
                if _count(start) + length > bytes_of(file):
                    raise ValueError(f"{key!r}: {file} is shorter than it was written")
                places[MetadataIndex(key, chunk.offsets)] = _StorageInfo(file, start, length)
                chunks.append(chunk)
            entries[key] = TensorStorageMetadata(TensorProperties(dtype=DTYPES[dtype]), _size(size), chunks)
    except FileNotFoundError as error:
        raise InputError(f"{folder} is not a complete checkpoint: {error.strerror}: {error.filename}") from error
    except (OSError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is refused: {error if isinstance(error, ValueError) else repr(error)}") from error
    return Metadata(entries, storage_data=places)


def _size(numbers: list[int]) -> torch.Size:
    return torch.Size([_count(number) for number in numbers])


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a count was expected, not {value!r}")
    return value
