"""Read the index that torch.distributed.checkpoint writes, which is a pickle, without running what it says.

A pickle names callables and has them called. Here every name that such an index may use stands for an inert
record, made anew for each reading, that keeps what it was given; any other name is refused. Real metadata is
then rebuilt from the records, each field checked. Nothing that the file says is executed, and no class of
torch or of ours is within its reach.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from shardopt.checkpoint.folders import METADATA
from shardopt.errors import InputError

T = TypeVar("T")

# All that DCP's index of tensors is made of in torch 2.11 to 2.13; our writer leaves its paths out.
ALLOWED = frozenset(
    [("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
        "ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )]
    + [
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
    ]
)  # fmt: skip
DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
        "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool",
    )
}  # fmt: skip

_DATA_FILE = re.compile(r"__\d+_\d+\.distcp")


class _Malformed(Exception):
    pass


class _Record:
    """Stands for an object of the pickle: the arguments it was made with and the state it was given."""

    what = ""

    def __new__(cls, *args: Any) -> _Record:
        record = super().__new__(cls)
        record.args, record.state = args, {}
        return record

    args: tuple[Any, ...]
    state: Any

    # On the class itself, as a pickle could ask, this fails for want of an argument.
    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._stand_ins: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) not in ALLOWED:
            raise _Malformed(f"it asks for {module}.{name}, which has no place in it")
        return self._stand_ins.setdefault(name, type(name, (_Record,), {"what": name}))


def read_metadata(folder: Path) -> Metadata:
    """The index of the checkpoint in `folder`.

    Raises:
        InputError: it cannot be read, contains anything that an index of tensors does not (pickled objects
            among the entries too), or does not fit the data files beside it.
    """
    path = folder / METADATA
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{folder} is not a complete checkpoint: {path.name}: {error.strerror}") from error
    try:
        return _metadata(folder, _Unpickler(io.BytesIO(content)).load())
    except Exception as error:  # a hostile pickle can make the unpickler raise nearly anything
        reason = str(error) if isinstance(error, _Malformed) else repr(error)
        raise InputError(f"{path} is refused: {reason}") from error


def _metadata(folder: Path, record: Any) -> Metadata:
    fields = _state(record, "Metadata")
    tensors, storage = _typed(fields["state_dict_metadata"], dict), _typed(fields["storage_data"], dict)
    for key, value in tensors.items():
        if isinstance(value, _Record) and value.what == "BytesStorageMetadata":
            raise _Malformed(f"{key!r} is a pickled object; a checkpoint of ours holds tensors only")
    places = {_index(index): _place(info) for index, info in storage.items()}
    sizes = {name: (folder / name).stat().st_size for name in {p.relative_path for p in places.values()}}
    entries: dict[str, Any] = {}
    for key, value in tensors.items():
        entry = _tensor(value)
        for chunk in entry.chunks:
            place = places.get(MetadataIndex(_typed(key, str), chunk.offsets))
            needed = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            if place is None or place.length < needed:
                raise _Malformed(f"{key!r} has a chunk without its data")
            if place.offset + place.length > sizes[place.relative_path]:
                raise _Malformed(f"{key!r}: {place.relative_path} is shorter than it was written")
        entries[key] = entry
    return Metadata(entries, storage_data=places)


def _tensor(record: Any) -> TensorStorageMetadata:
    fields = _state(record, "TensorStorageMetadata")
    properties = _record(fields["properties"], "TensorProperties").state
    chunks = []
    for item in _typed(fields["chunks"], list):
        chunk = _state(item, "ChunkStorageMetadata")
        chunks.append(ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])))
    dtype = _typed(_typed(properties, tuple)[0], torch.dtype)
    return TensorStorageMetadata(TensorProperties(dtype=dtype), _size(fields["size"]), chunks)


def _index(record: Any) -> MetadataIndex:
    fields = _state(record, "MetadataIndex")
    return MetadataIndex(_typed(fields["fqn"], str), _size(fields["offset"]))


def _place(record: Any) -> _StorageInfo:
    fields = _state(record, "_StorageInfo")
    name = _typed(fields["relative_path"], str)
    if not _DATA_FILE.fullmatch(name):
        raise _Malformed(f"{name!r} is not a data file of a checkpoint")
    if fields.get("transform_descriptors"):
        raise _Malformed("it asks for transformations of the data")
    return _StorageInfo(name, _count(fields["offset"]), _count(fields["length"]))


def _state(record: Any, what: str) -> dict[str, Any]:
    return _typed(_record(record, what).state, dict)


def _record(record: Any, what: str) -> _Record:
    if not isinstance(record, _Record) or record.what != what:
        raise _Malformed(f"a {what} was expected, not {type(record).__name__}")
    return record


def _size(record: Any) -> torch.Size:
    (numbers,) = _record(record, "Size").args
    return torch.Size([_count(n) for n in _typed(numbers, tuple)])


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise _Malformed(f"a count was expected, not {value!r}")
    return value


def _typed(value: Any, cls: type[T]) -> T:
    if not isinstance(value, cls):
        raise _Malformed(f"a {cls.__name__} was expected, not {type(value).__name__}")
    return value
