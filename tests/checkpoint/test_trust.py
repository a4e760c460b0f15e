"""A checkpoint from a stranger is data: reading it runs nothing and opens nothing outside its folder."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from shardopt import checkpoint
from shardopt.checkpoint import DamagedError
from shardopt.checkpoint.document import index_file, write_document
from shardopt.checkpoint.index import read_table, write_index
from shardopt.errors import InputError
from shardopt.slices import Layout, Slice
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
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.json", "index.bin", "rank-00000.data"]

    class Runs:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return os.mkdir, (str(folder / "ran"),)

    content = pickle.dumps(Runs())
    (folder / ".metadata").write_bytes(content)  # where DCP would look
    live = made.slices(made.whole, filled=False)
    checkpoint.load(folder, made.State(live, made.ranks_here()))
    assert made.wrong(live) == []
    (folder / "index.bin").write_bytes(content)
    _load_refused(folder, "index.bin is damaged: ")
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


def _seal(folder: Path, change: Callable[[Any], None] = lambda _: None) -> None:
    """Change a document, and give it the checksum that it should have."""
    document = checkpoint.read_document(folder)
    change(document["checkpoint"])
    write_document(folder, document)


Table = Any  # [chunks, 5] of int64


def _rewrite(folder: Path, change: Callable[[Table], Table | None]) -> None:
    """Put a changed index into a checkpoint, with the checksums that it should have."""
    document = checkpoint.read_document(folder)
    table = read_table(folder, document).copy()
    changed = change(table)
    record = write_index(
        folder / index_file(""), document["checkpoint"]["save_id"], table if changed is None else changed
    )
    _seal(folder, lambda written: written["files"].update({index_file(""): record._asdict()}))


def _place(**changed: int) -> Callable[[Table], None]:
    """Change the chunk of embed.weight/weight, the second last by name of the last kind."""

    def change(table: Table) -> None:
        (row,) = (row for row in table if row[2] == 52 and row[0] == 8)
        for number, name in enumerate(("tensor", "start", "length", "file", "byte")):
            row[number] = changed.get(name, row[number])

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_place(file=1), "rank-00001.data is not a data file of this checkpoint"),
        (_place(file=10**12), "is not a data file of this checkpoint"),
        (_place(byte=-64), "numbers that are no counts"),
        (_place(length=-1), "numbers that are no counts"),
        (_place(length=0), "numbers that are no counts"),
        (_place(tensor=12), "or of no tensor"),
        (_place(length=53), "beyond its tensor's end"),
        (_place(start=2**63 - 1), "beyond its tensor's end"),
        (_place(start=1), "beyond its tensor's end"),
        (_place(start=1, length=51), "embed.weight/weight: elements 0 to 1 of 52 are held by no rank"),
        (_place(byte=2**63 - 64), "has a chunk without its data"),
        (_place(byte=0), "has a chunk without its data"),
        (_place(byte=130), "has a chunk without its data"),
        (_place(byte=1280), "has a chunk without its data"),  # of which a part is there
        (_place(byte=128), "has chunks that lie over each other"),
        (lambda table: table[:-1], "norm.weight/weight: elements 0 to 1 of 1 are held by no rank"),
        (lambda table: table[::-1].copy(), "its chunks are not in order"),
        (lambda table: np.repeat(table, 2, axis=0), "its chunks are not in order"),
        (lambda table: table[:, :4].copy(), "bytes are no table"),
        (lambda table: table[:0], "elements 0 to 52 of 52 are held by no rank"),
    ],
)  # fmt: skip
def test_an_index_that_does_not_fit_its_document_or_files_is_refused(
    folder: Path, change: Callable[[Table], Table | None], reason: str
) -> None:
    _rewrite(folder, change)
    _load_refused(folder, "index.bin is refused: .*" + reason)


def test_scales_beyond_the_end_of_their_file_are_refused(tmp_path: Path) -> None:
    codes, scales = torch.ones(257, dtype=torch.int8), torch.ones(3)
    held = [Slice("w", "m1", Layout.whole("w", (257,)), (codes, scales), "block8")]
    checkpoint.save(tmp_path / "a", made.State(held, made.ranks_here()))
    table = read_table(tmp_path / "a", checkpoint.read_document(tmp_path / "a"))
    assert table.tolist() == [[0, 0, 257, 0, 128]]
    _rewrite(tmp_path / "a", lambda table: table + np.array([0, 0, 0, 0, 64]))
    with pytest.raises(DamagedError, match="has a chunk without its scales"):
        checkpoint.load(tmp_path / "a", made.State(held, made.ranks_here()))


def _other_dtype(written: Any) -> None:
    written["parameters"]["embed.weight"]["kinds"]["weight"]["dtypes"] = ["float64"]


def _unknown_dtype(written: Any) -> None:
    written["parameters"]["embed.weight"]["kinds"]["weight"]["dtypes"] = ["object"]


def _without_a_kind(written: Any) -> None:
    written["parameters"]["embed.weight"]["kinds"].popitem()


def _huge(written: Any) -> None:
    written["parameters"]["embed.weight"]["shape"] = [10**30]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_dtype, "has chunks that lie over each other"),
        (_unknown_dtype, "KeyError"),
        (_without_a_kind, "refused"),
        (_huge, "OverflowError"),
    ],
)
def test_a_document_that_its_index_does_not_fit_is_refused(
    folder: Path, change: Callable[[Any], None], reason: str
) -> None:
    _seal(folder, change)
    _load_refused(folder, reason)


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
        ('{"checkpoint": {"format": 1}}', "has checkpoint format 1, this shardopt reads format 6"),
        ('{"checkpoint": {"format": 6}}', "is damaged: it has no checksum"),
        (
            f'{{"xxh3": "{"0" * 16}",\n"checkpoint": {{"format": 6}}}}',
            "damaged, or was edited: its checksum is another",
        ),
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
        {"files": {"index.bin": {"size": "3", "xxh3": ""}}},
        {"files": {"../index.bin": {"size": 0, "xxh3": ""}}},
        {"save_id": 3},
        {"world_size": -1},
        {"extras": None},
        {"extras": {"rng": {"shape": [3], "dtypes": []}}},
        {"byteorder": 1},
    ],
    ids=str,
)
def test_a_document_of_another_form_is_refused(folder: Path, wrong: dict[str, Any]) -> None:
    _seal(folder, change=lambda written: written.update(wrong))
    with pytest.raises(DamagedError, match="has a document that is not of this format"):
        checkpoint.load(folder, made.State([], made.ranks_here()))


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    _load_refused(tmp_path / "nothing", "is not a complete checkpoint: it has no checkpoint.json")


def test_a_folder_written_by_plain_dcp_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"x": torch.ones(3)}, checkpoint_id=tmp_path / "a")
    _load_refused(tmp_path / "a", "is not a complete checkpoint")


HALVES = [[0, 0, 64, 0, 128, 16, 32], [0, 16, 64, 0, 384, 16, 32]]  # the columns of a weight of 4 x 32


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ((0, 5), 16, None),
        ((0, 5), 17, "has a chunk of rows that are none"),
        ((0, 5), -16, "numbers that are no counts"),
        ((1, 6), 16, "has a chunk of rows that are none"),
        ((1, 6), 38, "has a chunk with rows beyond its tensor's end"),
        ((1, 6), 2**62, "has a chunk with rows beyond its tensor's end"),
        ((1, 5), 8, "has a chunk with rows beyond its tensor's end"),
        ((1, 6), 30, "elements 46 to 48 of 128 are held in two ranges"),
        ((1, 1), 17, "has a chunk with rows beyond its tensor's end"),
        (None, 6, "bytes are no table"),
    ],
)
def test_an_index_of_columns_is_read_and_one_whose_rows_cannot_be_is_refused(
    tmp_path: Path, place: tuple[int, int] | None, value: int, reason: str | None
) -> None:
    layout, values = Layout.whole("w", (4, 32)), torch.arange(128.0)
    checkpoint.save(tmp_path / "a", made.State([Slice("w", "m1", layout, (values,))], made.ranks_here()))
    table = np.array(HALVES)
    if place is not None:
        table[place] = value
    _rewrite(tmp_path / "a", lambda _: table)
    _seal(tmp_path / "a", lambda written: written.update(columns=7 if place else value))
    live = torch.zeros(4, 32)
    state = made.State([Slice("w", "m1", layout, (live,))], made.ranks_here())
    if reason is None:
        checkpoint.load(tmp_path / "a", state)
        assert torch.equal(live, torch.cat([half.view(4, 16) for half in values.split(64)], 1))
        return
    with pytest.raises(DamagedError, match=reason):
        checkpoint.load(tmp_path / "a", state)
