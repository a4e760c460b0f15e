"""A checkpoint from a stranger is data: reading it runs nothing and opens nothing outside its folder."""

from __future__ import annotations

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
from shardopt.checkpoint import DamagedError, saving
from shardopt.checkpoint.blocks import FileRecord
from shardopt.checkpoint.document import INDEX, write_document
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
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.json", "index.json", "rank-00000.data"]

    class Runs:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return os.mkdir, (str(folder / "ran"),)

    content = pickle.dumps(Runs())
    (folder / ".metadata").write_bytes(content)  # where DCP would look
    live = made.slices(made.whole, filled=False)
    checkpoint.load(folder, made.State(live, made.ranks_here()))
    assert made.wrong(live) == []
    (folder / "index.json").write_bytes(content)
    _load_refused(folder, "index.json is damaged: ")
    assert not (folder / "ran").exists()
    pickle.loads(content)
    assert (folder / "ran").exists()  # the trap works


def test_nothing_that_is_read_is_a_pickle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle is read")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    live = made.slices(made.whole, filled=False)
    checkpoint.load(folder, made.State(live, made.ranks_here()))
    assert made.wrong(live) == []


def test_the_index_is_what_dcp_would_write(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def keep(writer: Any, metadata: Any, results: Any) -> None:
        found.append(metadata)
        finish(writer, metadata, results)

    finish = saving.Writer.finish
    monkeypatch.setattr(saving.Writer, "finish", keep)
    made.save(0, 1, tmp_path / "b", made.whole)
    index = read_index(tmp_path / "b", checkpoint.read_document(tmp_path / "b"))
    assert index.metadata(index.tensors).state_dict_metadata == found[0].state_dict_metadata


def _seal(folder: Path, index: bytes | None = None, change: Callable[[Any], None] = lambda _: None) -> None:
    """Put another index, and a changed document, into a checkpoint, with the checksums that they should have."""
    document = checkpoint.read_document(folder)
    if index is not None:
        (folder / INDEX).write_bytes(index)
        document["checkpoint"]["files"][INDEX] = FileRecord.of(index)._asdict()
    change(document["checkpoint"])
    write_document(folder, document)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value"),
        ("[]", "indices must be integers"),
        ('{"save_id": "SAVE_ID", "files": [], "tensors": {"w": {}}}', "not enough values to unpack"),
        ('{"save_id": "SAVE_ID", "files": [], "tensors": {"w": ["object", [1], []]}}', "KeyError"),
        ('{"save_id": "SAVE_ID", "files": [], "tensors": {"w": [[], [1], []]}}', "unhashable"),
        ('{"save_id": "SAVE_ID", "files": [], "tensors": {"w": ["float32", [true], []]}}', "was expected, not True"),
        ('{"save_id": "SAVE_ID", "files": [], "tensors": {"w": ["float32", [1e9], []]}}', "a count was expected"),
        ('{"save_id": "0", "files": [], "tensors": {}}', "of another save than the document"),
        ("[" * 10**6, "RecursionError"),
    ],
)  # fmt: skip
def test_a_crafted_index_is_refused(folder: Path, content: str, reason: str) -> None:
    save_id = checkpoint.read_document(folder)["checkpoint"]["save_id"]
    _seal(folder, content.replace("SAVE_ID", save_id).encode())
    _load_refused(folder, "index.json is refused: .*" + reason)


Index = dict[str, Any]


def _rewrite(folder: Path, change: Callable[[Index], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    _seal(folder, json.dumps(index).encode())


def _place(**changed: int) -> Callable[[Index], None]:
    def change(index: Index) -> None:
        (flat,) = (t[2] for key, t in index["tensors"].items() if key == "embed.weight/weight")
        for number, name in enumerate(("start", "length", "file", "byte")):
            flat[number] = changed.get(name, flat[number])

    return change


def _elsewhere(index: Index) -> None:
    index["files"] = ["../../etc/passwd"]


def _huge(index: Index) -> None:
    index["tensors"]["embed.weight/weight"][1] = [10**30]


def _fraction(index: Index) -> None:
    index["tensors"]["embed.weight/weight"][2][0] = 0.5


def _other_dtype(index: Index) -> None:
    next(iter(index["tensors"].values()))[0] = "uint8"


def _drop_entry(index: Index) -> None:
    index["tensors"].popitem()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_elsewhere, "is not a data file of this checkpoint"),
        (_place(file=1), "beyond its end, or in no file"),
        (_place(byte=-64), "chunks that are no counts"),
        (_place(length=-1), "chunks that are no counts"),
        (_place(start=2**70), "chunks that are no counts"),
        (_fraction, "chunks that are no counts"),
        (_place(length=53), "beyond its end, or in no file"),
        (_place(byte=10**9), "has a chunk without its data"),
        (_place(byte=130), "has a chunk without its data"),
        (_huge, "OverflowError|beyond its end"),
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


def test_a_truncated_data_file_is_refused_before_anything_is_touched(folder: Path) -> None:
    data = folder / "rank-00000.data"
    os.truncate(data, data.stat().st_size - 1)
    assert checkpoint.latest(folder.parent) is None
    live = made.slices(made.whole, filled=False)
    with pytest.raises(DamagedError, match=r"rank-00000\.data is damaged: it has .* bytes, and was written with"):
        checkpoint.load(folder, made.State(live, made.ranks_here()))
    assert all((s.tensors[0] == 7).all() for s in live)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not the document of a shardopt checkpoint"),
        ("[]", "is not the document of a shardopt checkpoint"),
        ('{"checkpoint": {"format": 1}}', "has checkpoint format 1, this shardopt reads format 4"),
        ('{"checkpoint": {"format": 4}}', "is damaged: it has no checksum"),
        ('{"crc32": "00000000",\n"checkpoint": {"format": 4}}', "is damaged, or was edited: its checksum is another"),
    ],
)
def test_another_document_is_refused(folder: Path, content: str, reason: str) -> None:
    (folder / "checkpoint.json").write_text(content)
    _load_refused(folder, reason)


@pytest.mark.parametrize(
    "wrong",
    [
        {"parameters": []},
        {"parameters": {"w": {}}},
        {"parameters": {"w": {"shape": "3", "kinds": {"m1": {"dtypes": [[]]}}}}},
        {"parameters": {"w": {"shape": [3], "kinds": {"m1": {"dtypes": []}}}}},
        {"parameters": {"w": {"shape": [True], "kinds": {}}}},
        {"step_counts": {"w": {"step": "3"}}},
        {"step_counts": {"w": {"step": True}}},
        {"files": {}},
        {"files": {"index.json": {"size": "3", "crc32": ""}}},
        {"files": {"../index.json": {"size": 0, "crc32": ""}}},
        {"save_id": 3},
        {"world_size": -1},
        {"extras": None},
        {"byteorder": 1},
    ],
    ids=str,
)
def test_a_document_of_another_form_is_refused(folder: Path, wrong: dict[str, Any]) -> None:
    _seal(folder, change=lambda written: written.update(wrong))
    with pytest.raises(DamagedError, match="has a document that is not of this format"):
        checkpoint.load(folder, made.State([], made.ranks_here()))


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    _load_refused(tmp_path / "nothing", "is not a complete checkpoint: it has no checkpoint.json")


def test_a_folder_written_by_plain_dcp_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"x": torch.ones(3)}, checkpoint_id=tmp_path / "a")
    _load_refused(tmp_path / "a", "is not a complete checkpoint")
