"""A torchtitan checkpoint: torch.distributed.checkpoint's files under torchtitan's names.

    NAME                                    a weight or a persistent buffer
    optimizer.state.NAME.exp_avg            the optimizer's state, by its own keys; step is a 0-d tensor
    optimizer.param_groups.NAME.lr          hyper-parameters, by parameter
    train_state.step, .ntokens_seen

Data loader and lr scheduler are left out: torchtitan's `checkpoint.exclude_from_loading` names them.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from shardopt.checkpoint.convert.state import Scratch, TrainingState, Whole, check_zip
from shardopt.errors import InputError
from shardopt.slices import canonical_name

# One process is meant.
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to"
)

_METADATA = ".metadata"
_DATA_FILE = re.compile(r"__\d+_\d+\.distcp")
_STATE, _GROUP, _TRAIN = "optimizer.state.", "optimizer.param_groups.", "train_state."
_BESIDE = {"optimizer", "train_state", "lr_scheduler", "dataloader"}  # what is no tensor may be the whole of it


def holds(path: Path) -> bool:
    return (path / _METADATA).is_file()


def read(path: Path) -> TrainingState:
    """Raises InputError where its index is not one of tensors and plain data; such a pickle is not run."""
    index = _read_index(path)
    _check_pieces(path, index)
    entries, places = index.state_dict_metadata, index.storage_data

    def whole(key: str) -> Whole:
        entry = entries[key]
        assert isinstance(entry, TensorStorageMetadata)

        def tensor() -> Tensor:
            value = torch.empty(entry.size, dtype=entry.properties.dtype)
            try:
                dcp.load({key: value}, storage_reader=_Reader(path, index), planner=_planner(), no_dist=True)
            except CheckpointException as error:
                raise InputError(f"cannot read {key} in {path}: {error.failures[0][0]}") from error
            return value

        return Whole(tuple(entry.size), entry.properties.dtype, tensor)

    def number(key: str) -> Any:
        if isinstance(entries[key], TensorStorageMetadata):
            return whole(key).read().tolist()
        place = places[MetadataIndex(key)]
        with (path / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            return torch.load(io.BytesIO(file.read(place.length)), weights_only=True)

    settings: dict[str, dict[str, Any]] = {}
    counts: dict[str, dict[str, int | float]] = {}
    tensors: dict[tuple[str, str], Whole] = {}
    weights = {
        key
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and key.partition(".")[0] not in _BESIDE
    }
    for key in entries:
        if key.startswith(_GROUP):
            name, setting, inner = _setting(key.removeprefix(_GROUP), weights)
            given = settings.setdefault(canonical_name(name), {})
            if setting == "param_names":  # torchtitan 0.2 has those of the whole group beside every parameter
                continue
            if inner:
                given.setdefault(setting, {})[inner] = number(key)
            else:
                given[setting] = number(key)
    for key, entry in entries.items():
        name, _, kind = key.removeprefix(_STATE).rpartition(".")
        if key in weights:
            name = canonical_name(key)
            # Without state or settings of its own among others that have them: a buffer (or a frozen weight).
            tensors[name, "weight" if name in settings or not settings else "buffer"] = whole(key)
        elif key.startswith(_STATE) and isinstance(entry, TensorStorageMetadata) and entry.size:
            tensors[canonical_name(name), kind] = whole(key)
        elif key.startswith(_STATE):
            counts.setdefault(canonical_name(name), {})[kind] = int(number(key)) if "step" in kind else number(key)
    groups: list[dict[str, Any]] = []
    for name, given in settings.items():
        group = next((g for g in groups if {**g, "names": None} == {**given, "names": None}), None)
        if group is None:
            groups.append(group := {"names": [], **given})
        group["names"].append(name)
    step = number(_TRAIN + "step") if _TRAIN + "step" in entries else None
    return TrainingState(tensors, counts, groups, step, source="torchtitan")


def write(path: Path, state: TrainingState, scratch: Scratch) -> None:
    tensors: dict[str, Whole] = {}
    content: dict[str, Any] = {}
    for (name, kind), whole in state.tensors.items():
        tensors[name if kind in ("weight", "buffer") else f"{_STATE}{name}.{kind}"] = whole
    for name, entry in state.counts.items():
        for key, value in entry.items():  # AdEMAMix counts in numbers, torch's optimizers in tensors
            content[f"{_STATE}{name}.{key}"] = value if state.optimizer == "ademamix" else torch.tensor(float(value))
    for group in state.full_groups():
        # Its schedulers put initial_lr into every group; torchtitan 0.2 keeps the names where the optimizer has them.
        given = {key: value for key, value in group.items() if key != "names"} | {"param_names": group["names"]}
        if "lr" in group:
            given.setdefault("initial_lr", group["lr"])
        for name in group["names"]:
            for key, value in given.items():
                inner = {f".{k}": v for k, v in value.items()} if isinstance(value, dict) else {"": value}
                content |= {f"{_GROUP}{name}.{key}{rest}": v for rest, v in inner.items()}
    if state.step is not None:
        content |= {_TRAIN + "step": state.step, _TRAIN + "ntokens_seen": 0}
    content |= {key: torch.empty(whole.shape, dtype=whole.dtype, device="meta") for key, whole in tensors.items()}
    writer = dcp.FileSystemWriter(path, sync_files=True)
    dcp.save(content, storage_writer=writer, planner=_OneByOne(tensors), no_dist=True)


def _setting(key: str, weights: set[str]) -> tuple[str, str, str]:
    """Parameter, setting and, of a setting that is a mapping (state_dtype), the key in it; `key` has them with dots."""
    name, _, setting = key.rpartition(".")
    outer, _, mapping = name.rpartition(".")
    return (outer, mapping, setting) if name not in weights and outer in weights else (name, setting, "")


_planner = partial(DefaultLoadPlanner, flatten_state_dict=False, flatten_sharded_tensors=False)


class _Reader(dcp.FileSystemReader):
    """Works from an index that was read and checked before."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


class _OneByOne(DefaultSavePlanner):
    """Reads a tensor when it is written, in the place of one without values."""

    def __init__(self, tensors: dict[str, Whole]) -> None:
        super().__init__(flatten_state_dict=False)
        self._tensors = tensors

    def lookup_object(self, index: MetadataIndex) -> Any:
        whole = self._tensors.get(index.fqn)
        return super().lookup_object(index) if whole is None else whole.read()


_PLAIN = {
    dcp_metadata.__name__: (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "collections": ("OrderedDict",),
}  # fmt: skip


class _Plain(pickle.Unpickler):
    """Loads the classes of DCP's index and no others: a pickle runs what it names."""

    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if name in _PLAIN.get(module, ()) or isinstance(found, torch.dtype | torch.layout | torch.memory_format):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an index")


def _check_pieces(path: Path, index: Metadata) -> None:
    """Raise InputError where elements are missing, or bytes are not those that were written."""
    for key, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        chunks = {(c.offsets, c.sizes) for c in entry.chunks if MetadataIndex(key, c.offsets) in index.storage_data}
        if sum(math.prod(sizes) for _, sizes in chunks) != math.prod(entry.size):
            raise InputError(f"{path / _METADATA} does not say where all elements of {key} are")
    for place in index.storage_data.values():
        with (path / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            check_zip(path / place.relative_path, io.BytesIO(file.read(place.length)))


def _read_index(path: Path) -> Metadata:
    try:
        with (path / _METADATA).open("rb") as file:
            index = _Plain(file).load()
        for place in index.storage_data.values():
            if not _DATA_FILE.fullmatch(place.relative_path):
                raise ValueError(f"{place.relative_path!r} is not a data file of a checkpoint")
            if (path / place.relative_path).stat().st_size < place.offset + place.length:
                raise ValueError(f"{place.relative_path} is shorter than it was written")
            if getattr(place, "transform_descriptors", None):
                raise ValueError("it is compressed: save it without extensions")
        return index
    except (pickle.UnpicklingError, OSError, ValueError, AttributeError, EOFError, IndexError, TypeError) as error:
        raise InputError(f"{path / _METADATA} is refused: {' '.join(str(error).split())}") from error
