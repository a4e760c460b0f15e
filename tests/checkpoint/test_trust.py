"""A checkpoint from a stranger is data: reading it runs nothing and opens nothing outside its folder."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from shardopt import checkpoint
from shardopt.checkpoint import metadata
from shardopt.errors import InputError
from tests.checkpoint import made


class Runs:
    """Unpickled, it leaves a file behind."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.sentinel}",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made.save(0, 1, tmp_path / "a", made.whole)
    return tmp_path / "a"


def _load_refused(folder: Path, reason: str) -> None:
    live = made.slices(made.whole, filled=False)
    with pytest.raises(InputError, match=reason):
        checkpoint.load(folder, made.State(live, made.ranks_here()))
    assert all((s.tensors[0] == 7).all() for s in live)
    with pytest.raises(InputError, match=reason):
        checkpoint.load_extras(folder, ["x"])


def test_an_index_that_runs_code_is_refused(folder: Path, tmp_path: Path) -> None:
    path, sentinel = folder / ".metadata", tmp_path / "ran"
    good = pickle.loads(path.read_bytes())
    good.planner_data = Runs(sentinel)
    path.write_bytes(pickle.dumps(good))
    pickle.loads(path.read_bytes())
    assert sentinel.exists()  # the trap works
    sentinel.unlink()
    _load_refused(folder, "asks for posix.system, which has no place in it")
    assert not sentinel.exists()


def test_a_pickled_entry_is_refused(tmp_path: Path) -> None:
    made.save(0, 1, tmp_path / "ours", made.whole)
    sentinel, folder = tmp_path / "ran", tmp_path / "a"
    state = {f"{s.name}/{s.kind}": s.tensors[0] for s in made.slices(made.whole)}
    key = next(iter(state))
    state[key] = Runs(sentinel)  # type: ignore[assignment]
    dcp.save(state, storage_writer=_Pathless(folder), planner=dcp.DefaultSavePlanner(flatten_state_dict=False))
    (folder / "checkpoint.json").write_bytes((tmp_path / "ours" / "checkpoint.json").read_bytes())
    assert not sentinel.exists()
    _load_refused(folder, f"{key!r} is a pickled object")
    assert not sentinel.exists()
    dcp.load({key: None}, checkpoint_id=folder)
    assert sentinel.exists()  # the trap works


class _Pathless(dcp.FileSystemWriter):
    def storage_meta(self) -> dcp_metadata.StorageMeta:
        return dcp_metadata.StorageMeta()


def test_dcp_writes_no_other_names_than_those_allowed(folder: Path) -> None:
    names: set[tuple[str, str]] = set()

    class Listening(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            names.add((module, name))
            return super().find_class(module, name)

    Listening(io.BytesIO((folder / ".metadata").read_bytes())).load()
    assert names - {("torch", name) for name in metadata.DTYPES} <= metadata.ALLOWED
    assert ("torch.distributed.checkpoint.metadata", "Metadata") in names


def test_the_index_is_read_as_pickle_would(folder: Path) -> None:
    ours = metadata.read_metadata(folder)
    theirs = pickle.loads((folder / ".metadata").read_bytes())
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


def _pickle(*opcodes: bytes) -> bytes:
    return b"\x80\x04" + b"".join(opcodes) + b"."


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


METADATA = _global("torch.distributed.checkpoint.metadata", "Metadata")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "EOFError"),
        (b"not a pickle", "refused"),
        (pickle.dumps({"state_dict_metadata": {}}), "a Metadata was expected, not dict"),
        (_pickle(_global("builtins", "getattr")), "asks for builtins.getattr"),
        # A dotted name reaches through an allowed module.
        (_pickle(_global("torch", "os.system")), "asks for torch.os.system"),
        (_pickle(_global("torch.serialization", "os.system")), "asks for torch.serialization.os.system"),
        (_pickle(_global("torch", "load")), "asks for torch.load"),
        # BUILD on a class would set attributes of the class for everyone.
        (_pickle(METADATA, b"N", b"}(X\x08\x00\x00\x00__init__K\x01u", b"\x86b"), "refused"),
        (_pickle(METADATA, b")\x81", b"K\x01b"), "a dict was expected, not int"),
        (_pickle(METADATA, b")\x81", b"}b"), "state_dict_metadata"),
    ],
)  # fmt: skip
def test_a_crafted_index_is_refused(folder: Path, content: bytes, reason: str) -> None:
    (folder / ".metadata").write_bytes(content)
    init = dcp_metadata.Metadata.__init__
    _load_refused(folder, reason)
    assert dcp_metadata.Metadata.__init__ is init


def _rewrite(folder: Path, change: Callable[[dcp_metadata.Metadata], None]) -> None:
    path = folder / ".metadata"
    index = pickle.loads(path.read_bytes())
    change(index)
    path.write_bytes(pickle.dumps(index))


def _place(path: str = "__0_0.distcp", offset: int = 0, length: int = 10**4, how: Any = None) -> Callable:
    def change(index: dcp_metadata.Metadata) -> None:
        index.storage_data[next(iter(index.storage_data))] = _StorageInfo(path, offset, length, how)

    return change


def _drop_place(index: dcp_metadata.Metadata) -> None:
    index.storage_data.popitem()


def _huge(index: dcp_metadata.Metadata) -> None:
    chunk = next(iter(index.state_dict_metadata.values())).chunks[0]  # type: ignore[union-attr]
    chunk.sizes = torch.Size([10**15])


def _other_dtype(index: dcp_metadata.Metadata) -> None:
    next(iter(index.state_dict_metadata.values())).properties.dtype = torch.uint8  # type: ignore[union-attr]


def _drop_entry(index: dcp_metadata.Metadata) -> None:
    index.state_dict_metadata.popitem()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_place("../../etc/passwd"), "is not a data file of a checkpoint"),
        (_place("__0_1.distcp"), "No such file"),
        (_place(how=["zstd"]), "transformations"),
        (_place(offset=-1), "a count was expected"),
        (_place(length=10**9), "shorter than it was written"),
        (_drop_place, "has a chunk without its data"),
        (_huge, "has a chunk without its data"),
    ],
)  # fmt: skip
def test_an_index_that_does_not_fit_its_files_is_refused(
    folder: Path, change: Callable[[dcp_metadata.Metadata], None], reason: str
) -> None:
    _rewrite(folder, change)
    _load_refused(folder, reason)


@pytest.mark.parametrize("change", [_other_dtype, _drop_entry])
def test_an_index_that_does_not_fit_its_document_is_refused(
    folder: Path, change: Callable[[dcp_metadata.Metadata], None]
) -> None:
    _rewrite(folder, change)
    live = made.slices(made.whole, filled=False)
    with pytest.raises(InputError, match="is not there with the dtype that its document names"):
        checkpoint.load(folder, made.State(live, made.ranks_here()))
    assert all((s.tensors[0] == 7).all() for s in live)


def test_a_truncated_data_file_is_refused(folder: Path) -> None:
    data = folder / "__0_0.distcp"
    os.truncate(data, data.stat().st_size - 1)
    assert checkpoint.latest(folder.parent) is None
    _load_refused(folder, "__0_0.distcp is shorter than it was written")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not the document of a shardopt checkpoint"),
        ("[]", "is not the document of a shardopt checkpoint"),
        ('{"checkpoint": {"format": 1}}', "has checkpoint format 1, this shardopt reads format 2"),
    ],
)
def test_another_document_is_refused(folder: Path, content: str, reason: str) -> None:
    (folder / "checkpoint.json").write_text(content)
    _load_refused(folder, reason)


@pytest.mark.parametrize("parameters", [[], {"w": {}}, {"w": {"shape": "3", "kinds": {"m1": {"dtypes": [[]]}}}}])
def test_a_document_of_another_form_is_refused(folder: Path, parameters: Any) -> None:
    document = checkpoint.read_document(folder)
    document["checkpoint"]["parameters"] = parameters
    (folder / "checkpoint.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="has a document that is not of this format"):
        checkpoint.load(folder, made.State([], made.ranks_here()))


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    _load_refused(tmp_path / "nothing", "is not a complete checkpoint: it has no checkpoint.json")


def test_a_folder_written_by_plain_dcp_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"x": torch.ones(3)}, checkpoint_id=tmp_path / "a")
    _load_refused(tmp_path / "a", "is not a complete checkpoint")
