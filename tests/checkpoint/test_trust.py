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

from shardopt import checkpoint
from shardopt.checkpoint import saving
from shardopt.checkpoint.index import read_index
from shardopt.errors import InputError
from tests.checkpoint import made


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


def test_reading_unpickles_nothing_of_the_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["__0_0.distcp", "checkpoint.json", "index.json"]

    class Runs:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return os.mkdir, (str(folder / "ran"),)

    content = pickle.dumps(Runs())
    (folder / ".metadata").write_bytes(content)  # where DCP would look
    live = made.slices(made.whole, filled=False)
    checkpoint.load(folder, made.State(live, made.ranks_here()))
    assert made.wrong(live) == []
    (folder / "index.json").write_bytes(content)
    _load_refused(folder, "index.json is refused: ")
    assert not (folder / "ran").exists()
    pickle.loads(content)
    assert (folder / "ran").exists()  # the trap works


def test_a_pickled_object_in_a_data_file_is_refused(folder: Path, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    data = io.BytesIO()
    torch.save(Runs(), data)
    size = (folder / "__0_0.distcp").stat().st_size
    (folder / "__0_0.distcp").write_bytes(data.getvalue().ljust(size, b"\0"))
    index = json.loads((folder / "index.json").read_text())
    for _, _, chunks in index.values():
        for chunk in chunks:
            chunk[3:] = 0, len(data.getvalue())
    (folder / "index.json").write_text(json.dumps(index))
    live = made.slices(made.whole, filled=False)
    with pytest.raises(InputError, match=r"cannot read checkpoint .* Weights only load failed"):
        checkpoint.load(folder, made.State(live, made.ranks_here()))
    assert not (tmp_path / "ran").exists()
    torch.load(io.BytesIO(data.getvalue()), weights_only=False)
    assert (tmp_path / "ran").exists()  # the trap works


def test_the_index_is_what_dcp_would_write(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def both(writer: Any, metadata: Any, results: Any) -> None:
        dcp.FileSystemWriter.finish(writer, metadata, results)
        finish(writer, metadata, results)

    finish = saving._PublishingWriter.finish
    monkeypatch.setattr(saving._PublishingWriter, "finish", both)
    made.save(0, 1, tmp_path / "b", made.whole)
    ours = read_index(tmp_path / "b")
    theirs = pickle.loads((tmp_path / "b" / ".metadata").read_bytes())
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value"),
        ("[]", "has no attribute 'items'"),
        ('{"w": {}}', "not enough values to unpack"),
        ('{"w": ["object", [1], []]}', "KeyError"),
        ('{"w": [[], [1], []]}', "unhashable"),
        ('{"w": ["float32", [true], []]}', "a count was expected, not True"),
        ('{"w": ["float32", [1e9], []]}', "a count was expected"),
        ("[" * 10**6, "RecursionError"),
    ],
)  # fmt: skip
def test_a_crafted_index_is_refused(folder: Path, content: str, reason: str) -> None:
    (folder / "index.json").write_text(content)
    _load_refused(folder, reason)


Index = dict[str, Any]


def _rewrite(folder: Path, change: Callable[[Index], None]) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def _place(path: str = "__0_0.distcp", offset: int = 0, length: int = 10**4) -> Callable[[Index], None]:
    def change(index: Index) -> None:
        next(iter(index.values()))[2][0][2:] = path, offset, length

    return change


def _huge(index: Index) -> None:
    next(iter(index.values()))[2][0][1] = [10**15]


def _other_dtype(index: Index) -> None:
    next(iter(index.values()))[0] = "uint8"


def _drop_entry(index: Index) -> None:
    index.popitem()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_place("../../etc/passwd"), "is not a data file of a checkpoint"),
        (_place("__0_1.distcp"), "No such file"),
        (_place(offset=-1), "a count was expected"),
        (_place(length=-1), "a count was expected"),
        (_place(length=10**9), "shorter than it was written"),
        (_place(length=0), "has a chunk without its data"),
        (_huge, "has a chunk without its data"),
    ],
)  # fmt: skip
def test_an_index_that_does_not_fit_its_files_is_refused(
    folder: Path, change: Callable[[Index], None], reason: str
) -> None:
    _rewrite(folder, change)
    _load_refused(folder, reason)


@pytest.mark.parametrize("change", [_other_dtype, _drop_entry])
def test_an_index_that_does_not_fit_its_document_is_refused(folder: Path, change: Callable[[Index], None]) -> None:
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
        ('{"checkpoint": {"format": 1}}', "has checkpoint format 1, this shardopt reads format 4"),
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
