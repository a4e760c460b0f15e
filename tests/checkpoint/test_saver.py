"""In the background, replacing, keeping, failing and being killed: the last good checkpoint stays."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from shardopt import checkpoint
from shardopt.checkpoint import Saver, blocks, folders
from shardopt.errors import InputError
from shardopt.slices import Layout, Slice
from tests.checkpoint import made
from tests.distributed.pool import RankError, on_ranks

LAYOUT = Layout.whole("w", (4096,))


def _slice(number: float) -> tuple[list[Slice], torch.Tensor]:
    tensor = torch.full((4096,), float(number))
    return [Slice("w", "m1", LAYOUT, (tensor,))], tensor


def _number(folder: Path) -> float:
    given, tensor = _slice(-1)
    checkpoint.load(folder, made.State(given, made.ranks_here()))
    assert (tensor == tensor[0]).all()
    return tensor[0].item()


def _names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def _snapshots(rank: int, world_size: int, root: Path) -> None:
    saver = Saver(root, 2, ranks=made.ranks_here(rank, world_size), asynchronous=True, allow_nonfinite=True)
    given = made.slices(made.flat, rank, world_size)
    extra = torch.tensor([1, 2], dtype=torch.uint8)
    progress = {"step": 0, "recent": [0]}
    for step in (1, 2, 3):
        progress["step"] = progress["recent"][0] = step
        saver.save(step, made.State(given, saver.ranks), progress, {"rng": extra} if rank == 0 else {})
        # Training goes on, and changes everything in place.
        progress["step"] = progress["recent"][0] = -1
        for s in given:
            s.tensors[0].fill_(3)
        extra.fill_(0)
        if step < 3:
            for s, right in zip(given, made.slices(made.flat, rank, world_size), strict=True):
                s.tensors[0].copy_(right.tensors[0])
            extra.copy_(torch.tensor([1, 2]))
    saver.close()


def test_the_background_writes_what_was_there_at_the_call(tmp_path: Path) -> None:
    root = tmp_path / "new" / "checkpoints"
    on_ranks(3, _snapshots, root)
    assert _names(root) == ["step-00000002", "step-00000003"]
    assert checkpoint.latest(root) == root / "step-00000003"
    for documents in on_ranks(2, made.load, root / "step-00000003", made.rows):
        assert documents["step"] == 3
        assert documents["recent"] == [3]
    assert checkpoint.load_extras(root / "step-00000003", ["rng"])["rng"].tolist() == [1, 2]


def _hold(monkeypatch: pytest.MonkeyPatch, gate: Path) -> None:
    """Data are written when told to."""

    def write_file(*arguments: Any, write: Any = blocks.write_file) -> Any:
        while not gate.exists():
            time.sleep(0.01)
        return write(*arguments)

    monkeypatch.setattr(blocks, "write_file", write_file)


def test_saving_returns_before_the_disk_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _hold(monkeypatch, tmp_path / "gate")
    root = tmp_path / "root"
    saver = Saver(root, 1, ranks=made.ranks_here(), asynchronous=True)
    given, tensor = _slice(1)
    saver.save(1, made.State(given, saver.ranks))
    tensor.fill_(2)
    assert _names(root) == [".step-00000001.partial"]
    assert checkpoint.latest(root) is None
    (tmp_path / "gate").touch()
    saver.close()
    assert _names(root) == ["step-00000001"]
    assert _number(root / "step-00000001") == 1


def test_an_exception_does_not_wait_for_a_save_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _hold(monkeypatch, tmp_path / "gate")
    root = tmp_path / "root"
    ranks = dataclasses.replace(made.ranks_here(), timeout=timedelta(seconds=0.2))

    def fails() -> None:
        with Saver(root, 1, ranks=ranks, asynchronous=True) as saver:
            saver.save(1, made.State(_slice(1)[0], ranks))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert _names(root) == [".step-00000001.partial"]
    # Without an exception a save that the disk does not take is an error, in time.
    saver = Saver(root, 1, ranks=ranks, asynchronous=True)
    saver.save(2, made.State(_slice(2)[0], ranks))
    with pytest.raises(RuntimeError, match=r"a checkpoint was not written to .* within 0.2 s \(run.timeout_minutes\)"):
        saver.close()
    (tmp_path / "gate").touch()


_WITHOUT_CLOSE = """
import sys, torch
from shardopt import AdEMAMix, checkpoint
from shardopt.distributed import Ranks
from shardopt.engines.state import ModuleState
model = torch.nn.Linear(3, 2)
state = ModuleState(AdEMAMix(model.named_parameters(), lr=1e-3), model)
checkpoint.Saver(sys.argv[1], 1, ranks=state.ranks, asynchronous=True).save(1, state)
"""


def test_a_program_that_ends_without_close_waits_for_its_save(tmp_path: Path) -> None:
    slow = "import os, time; real = os.fsync; os.fsync = lambda d: (time.sleep(0.3), real(d))"
    subprocess.run([sys.executable, "-c", slow + _WITHOUT_CLOSE, str(tmp_path)], check=True, timeout=60)
    assert _names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_newest_are_kept_and_the_one_just_written(tmp_path: Path, asynchronous: bool) -> None:
    saver = Saver(tmp_path, 2, ranks=made.ranks_here(), asynchronous=asynchronous)
    for step in (10, 20, 30, 5):  # the last by a run that went back
        saver.save(step, made.State(_slice(step)[0], saver.ranks))
    saver.close()
    assert _names(tmp_path) == ["step-00000005", "step-00000020", "step-00000030"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000030"
    assert _number(tmp_path / "step-00000005") == 5


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    saver = Saver(tmp_path, 1, ranks=made.ranks_here(), asynchronous=False)
    for number in (1, 2):
        saver.save(7, made.State(_slice(number)[0], saver.ranks))
    assert _names(tmp_path) == ["step-00000007"]
    assert _number(tmp_path / "step-00000007") == 2


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds something else"):
        checkpoint.save(tmp_path / "a", made.State(_slice(1)[0], made.ranks_here()))
    assert _names(tmp_path) == ["a"]
    assert _names(tmp_path / "a") == ["thesis.tex"]


def test_a_checkpoint_that_holds_other_files_too_is_neither_replaced_nor_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver = Saver(tmp_path, 1, ranks=made.ranks_here(), asynchronous=False)
    saver.save(1, made.State(_slice(1)[0], saver.ranks))
    notes = tmp_path / "step-00000001" / "sub" / "notes.txt"
    notes.parent.mkdir()
    notes.touch()
    with pytest.raises(InputError, match="step-00000001 holds something else: move it away"):
        saver.save(1, made.State(_slice(2)[0], saver.ranks))
    for step in (2, 3):
        saver.save(step, made.State(_slice(step)[0], saver.ranks))
    assert notes.exists()
    assert _number(tmp_path / "step-00000001") == 1
    assert "step-00000001 is not deleted, since it holds something else, too: sub" in caplog.text
    with pytest.raises(InputError, match=r"out lies in a checkpoint: name a folder elsewhere"):
        checkpoint.save(tmp_path / "step-00000002" / "out", made.State(_slice(1)[0], saver.ranks))


def test_a_folder_that_is_no_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    def said(path: Any) -> str:
        with pytest.raises(InputError) as caught:
            checkpoint.load(path, made.State(_slice(1)[0], made.ranks_here()))
        return str(caught.value)

    checkpoint.save(tmp_path / "step-00000001", made.State(_slice(1)[0], made.ranks_here()))
    (tmp_path / "file").touch()
    assert said(tmp_path / "none") == f"{tmp_path}/none does not exist"
    assert said(tmp_path / "file") == f"{tmp_path}/file is a file, not the folder of a checkpoint"
    assert said(tmp_path).startswith(f"{tmp_path} holds step-00000001: give one of them, or checkpoint.latest(")
    assert _number((tmp_path / "step-00000001").rename(tmp_path / "best")) == 1
    (tmp_path / "best").rename(tmp_path / "step-00000002")
    assert "is not of the step in its name: it was saved as step-00000001" in said(tmp_path / "step-00000002")
    with pytest.raises(InputError, match=r"is not of the step in its name: it was saved as step-00000001"):
        checkpoint.load_extras(tmp_path / "step-00000002", ["rng"])


@pytest.mark.parametrize("folder", ["", ".", "/", "..", None, "zip://x.zip", "memory://"])
def test_a_save_names_a_folder(folder: Any) -> None:
    with pytest.raises(InputError, match=r"name a folder|zip://x\.zip: "):
        checkpoint.save(folder, made.State(_slice(1)[0], made.ranks_here()))


def test_leftovers_are_ignored_and_cleaned_away_by_the_next_run(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "step-00000001", made.State(_slice(1)[0], made.ranks_here()))
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000009.partial")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000008.deleting")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000007")
    (tmp_path / "step-00000007" / "checkpoint.json").unlink()  # by hand, or by a copy that was cut short
    (tmp_path / ".notes.partial").mkdir()  # not ours
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000001"
    saver = Saver(tmp_path, 3, ranks=made.ranks_here(), asynchronous=False)
    saver.save(2, made.State(_slice(2)[0], saver.ranks))
    assert _names(tmp_path) == [".notes.partial", "step-00000001", "step-00000002", "step-00000007"]


def test_checkpoint_with_a_file_of_another_size_is_not_the_latest(tmp_path: Path) -> None:
    for step in (1, 2):
        given = made.State(_slice(step)[0], made.ranks_here())
        checkpoint.save(tmp_path / f"step-0000000{step}", given, extras={"rng": torch.ones(3)})
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000002"
    (data,) = (tmp_path / "step-00000002").glob("*.data")
    with data.open("r+b") as file:
        file.truncate(data.stat().st_size - 1)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000001"


def test_step_that_is_damaged_again_is_set_aside_beside_the_one_before(tmp_path: Path) -> None:
    for count in range(1, 4):
        (tmp_path / "step-00000006").mkdir()
        (tmp_path / "step-00000006" / "data").write_bytes(b"0" * count)
        folders.set_aside(tmp_path / "step-00000006")
    kept = {path.parent.name: path.stat().st_size for path in tmp_path.glob("*/data")}
    assert kept == {f"step-00000006.damaged{'-again' * count}": count + 1 for count in range(3)}


def test_latest_of_nothing(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "missing") is None


def test_root_may_be_text(tmp_path: Path) -> None:
    Saver(str(tmp_path), 1, ranks=made.ranks_here(), asynchronous=False).save(
        3, made.State(_slice(3)[0], made.ranks_here())
    )
    assert checkpoint.latest(str(tmp_path)) == tmp_path / "step-00000003"
    assert checkpoint.load_extras(str(tmp_path / "step-00000003"), ["none"]) == {}


def _fail(rank: int, world_size: int, root: Path, asynchronous: bool) -> str:
    """Rank 1's disk takes no more than a few bytes in a file, for one checkpoint."""
    saver = Saver(root, 1, ranks=made.ranks_here(rank, world_size), asynchronous=asynchronous)
    layout = Layout.contiguous("w", (4096,), 2048 * rank, 2048)
    given = [Slice("w", "m1", layout, (torch.full((2048,), 1.0),))]
    saver.save(1, made.State(given, saver.ranks))
    saver.wait()
    given[0].tensors[0].fill_(2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InputError) as caught:
            _save_and_wait(saver, 2, given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    torch.distributed.barrier()
    assert _names(root) == ["step-00000001"]
    assert _number_by_halves(root / "step-00000001", layout, saver.ranks) == 1
    # Said once: the next one goes through.
    saver.save(3, made.State(given, saver.ranks))
    saver.close()
    assert _number_by_halves(root / "step-00000003", layout, saver.ranks) == 2
    return str(caught.value)


def _save_and_wait(saver: Saver, step: int, given: list[Slice]) -> None:
    saver.save(step, made.State(given, saver.ranks))
    saver.wait()


def _number_by_halves(folder: Path, layout: Layout, ranks: Any) -> float:
    target = torch.zeros(2048)
    checkpoint.load(folder, made.State([Slice("w", "m1", layout, (target,))], ranks))
    assert (target == target[0]).all()
    return target[0].item()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_on_one_rank_is_an_error_on_all(tmp_path: Path, asynchronous: bool) -> None:
    for message in on_ranks(2, _fail, tmp_path, asynchronous):
        assert re.search(r"cannot write checkpoint .*/step-00000002 \(rank 1: .*File too large\); free some", message)
    assert _names(tmp_path) == ["step-00000001", "step-00000003"]  # the first is known to be good


def _unwritable(rank: int, world_size: int, root: Path) -> None:
    ranks = made.ranks_here(rank, world_size)
    with pytest.raises(
        InputError,
        match=r"cannot write to .*Not a directory; name another folder \(for a run: run\.dir or checkpoint\.dir\)",
    ):
        Saver(root, 1, ranks=ranks, asynchronous=True)
    with pytest.raises(InputError, match=r"for a run: run\.dir"):
        checkpoint.save(root / "step-00000001", made.State([], ranks))
    with pytest.raises(InputError, match=r"checkpoint.keep must be at least 1, got 0"):
        Saver(root.parent.parent / "good", 0, ranks=ranks, asynchronous=True)


def test_an_unwritable_folder_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    on_ranks(2, _unwritable, tmp_path / "file" / "checkpoints")


def _alone(rank: int, world_size: int, root: Path) -> None:
    """Rank 1 looks at a disk of its own, as where nodes share no file system."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(folders, "partial_of", lambda folder: root / "mine")
        with pytest.raises(InputError, match=r"run\.dir, of a run\) must be on a file system that all nodes share"):
            made.save(rank, world_size, root / "a", made.rows)


def test_nodes_with_disks_of_their_own_are_told(tmp_path: Path) -> None:
    on_ranks(2, _alone, tmp_path)
    assert _names(tmp_path) == ["mine"]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_writing(rank: int, world_size: int, root: Path) -> None:
    saver = Saver(root, 1, ranks=made.ranks_here(rank, world_size), asynchronous=True, allow_nonfinite=True)
    saver.save(1, made.State(made.slices(made.rows, rank, world_size), saver.ranks))
    saver.wait()
    if rank == 1:
        blocks.write_file = lambda *_: _die()  # type: ignore[assignment]
    saver.save(2, made.State(made.slices(made.rows, rank, world_size), saver.ranks))
    saver.wait()


def test_a_rank_killed_while_writing_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="the process died") as caught:
        on_ranks(2, _killed_writing, tmp_path, fresh=True)
    assert "no answer" not in str(caught.value)  # rank 0 does not wait for ever
    assert _names(tmp_path) == [".step-00000002.partial", "step-00000001"]
    assert (tmp_path / ".step-00000002.partial" / "rank-00000.data").stat().st_size > 0
    latest = checkpoint.latest(tmp_path)
    assert latest == tmp_path / "step-00000001"
    made.load(0, 1, latest, made.whole)


def _killed_renaming(rank: int, world_size: int, root: Path) -> None:
    rename = Path.rename

    def kill_at_the_second(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            _die()
        return rename(path, target)

    Path.rename = kill_at_the_second  # type: ignore[method-assign,assignment]
    checkpoint.save(root / "step-00000001", made.State(_slice(2)[0], made.ranks_here(rank, world_size)))


def _killed_deleting(rank: int, world_size: int, root: Path) -> None:
    def kill_after_one_file(path: Path) -> None:
        next(iter(path.glob("rank-*"))).unlink()
        _die()

    folders.shutil.rmtree = kill_after_one_file  # type: ignore[assignment]
    saver = Saver(root, 1, ranks=made.ranks_here(rank, world_size), asynchronous=False)
    saver.save(3, made.State(_slice(3)[0], saver.ranks))


def test_killed_between_the_two_renames_the_old_one_is_there(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "step-00000001", made.State(_slice(1)[0], made.ranks_here()))
    with pytest.raises(RankError, match="the process died"):
        on_ranks(1, _killed_renaming, tmp_path, fresh=True)
    assert _names(tmp_path) == [".step-00000001.partial", ".step-00000001.previous"]
    latest = checkpoint.latest(tmp_path)
    assert latest is not None
    assert _number(latest) == 1
    # The next run's first save puts it back, and keeps it as any other.
    saver = Saver(tmp_path, 2, ranks=made.ranks_here(), asynchronous=False)
    saver.save(2, made.State(_slice(2)[0], saver.ranks))
    assert _names(tmp_path) == ["step-00000001", "step-00000002"]
    assert _number(tmp_path / "step-00000001") == 1


def test_killed_while_deleting_the_new_one_is_there(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path / f"step-0000000{step}", made.State(_slice(step)[0], made.ranks_here()))
    with pytest.raises(RankError, match="the process died"):
        on_ranks(1, _killed_deleting, tmp_path, fresh=True)
    assert _names(tmp_path) == [".step-00000001.deleting", "step-00000002", "step-00000003"]
    assert _number(tmp_path / "step-00000003") == 3


def test_threads_that_save_to_one_folder_at_a_time_are_told(tmp_path: Path) -> None:
    folder, said = tmp_path / "a", []
    start = threading.Barrier(4)

    def save() -> None:
        start.wait()
        try:
            checkpoint.save(folder, made.State(_slice(1)[0], made.ranks_here()))
        except InputError as error:
            said.append(str(error))

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(said) <= {f"{folder} is being written by another thread of this process: save to it one after the other"}
    assert _number(folder) == 1
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        folders.begin(folder)
        held.set()
        release.wait()
        folders.abandon(folder)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with pytest.raises(InputError, match="another thread of this process"):
        checkpoint.save(folder, made.State(_slice(2)[0], made.ranks_here()))
    release.set()
    thread.join()
    checkpoint.save(folder, made.State(_slice(2)[0], made.ranks_here()))
    assert _number(folder) == 2
