"""A run folder that two processes want, that disappears, or whose disk fails: told, and nothing is lost."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import socket
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from shardopt import checkpoint
from shardopt.checkpoint import blocks, export, saving
from shardopt.errors import InputError, NonFiniteError, StorageError
from shardopt.pretrain import lock, loop
from shardopt.pretrain.lock import RunLock
from shardopt.pretrain.model_files import ModelFiles
from shardopt.pretrain.progress import newest
from tests.checkpoint import made
from tests.pretrain import tiny


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in {"_RENEW": 0.05, "_STALE": 0.6, "_SETTLE": 0.1}.items():
        monkeypatch.setattr(lock, name, seconds)


def _no_flock(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def _dies(held: RunLock) -> None:
    """As if its process had been killed: nothing is renewed, nothing removed."""
    held._closed.set()
    held._file.close()
    time.sleep(0.1)


@pytest.mark.parametrize("where", ["no flock", "flock of one host", "another host without flock"])
def test_a_second_run_is_refused_while_the_first_lives_and_takes_over_when_it_has_died(
    tmp_path, monkeypatch, caplog, where
):
    monkeypatch.setattr(fcntl, "flock", (lambda *_: None) if where == "flock of one host" else _no_flock)
    path = tmp_path / ".lock"
    first = RunLock(path)
    holder = f"(pid {os.getpid()} on {socket.gethostname()})"
    if where != "no flock":
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    with pytest.raises(InputError, match=r"run\.name: another process is running ") as refused:
        RunLock(path)
    assert holder in str(refused.value)
    assert first.is_mine()
    _dies(first)
    caplog.clear()
    second = RunLock(path)
    assert [record.getMessage() for record in caplog.records] == [
        f"run.name: {tmp_path} was in use {holder}: looking whether it still is"
    ]
    with pytest.raises(InputError, match=f"another process has taken {tmp_path} .pid"):
        first.check()
    first.release()
    assert second.check()
    second.release()
    assert not path.exists()


def test_of_two_that_take_a_lock_without_flock_at_once_the_later_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", _no_flock)
    path = tmp_path / ".lock"

    def other_writes(_):
        path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "token": "theirs"}))

    monkeypatch.setattr(time, "sleep", other_writes)
    with pytest.raises(InputError, match=r"another process is running .* \(pid 7 on elsewhere\)"):
        RunLock(path)


def test_a_process_that_was_killed_on_this_host_does_not_delay_the_next(tmp_path, caplog):
    first = RunLock(tmp_path / ".lock")
    _dies(first)
    RunLock(tmp_path / ".lock").release()
    assert not caplog.records


def _at_step(monkeypatch, step, action):
    steps, real = [], loop.Run._step

    def with_action(self, stop):
        real(self, stop)
        steps.append(1)
        if len(steps) == step:
            self.saver.wait()
            action()

    monkeypatch.setattr(loop.Run, "_step", with_action)


ALONE = {"engine": "{name: single}", "checkpoint__every": 2, "checkpoint__keep": 2}


def test_a_run_whose_folder_is_removed_makes_it_again_and_goes_on(tmp_path, monkeypatch, capsys):
    tiny.corpus(tmp_path / "text")
    expected = tiny.run(0, 1, tmp_path, run__name="whole", **ALONE).holdout_loss
    here = tmp_path / "runs" / "tiny"
    with monkeypatch.context() as patch:
        _at_step(patch, 3, lambda: shutil.rmtree(here))
        result = tiny.run(0, 1, tmp_path, **ALONE)
    assert (result.step, result.holdout_loss) == (6, expected)
    assert f"somebody has removed {here}: it is made again" in capsys.readouterr().out
    names = {path.name for path in here.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "model"} <= names
    assert ".lock" not in names
    assert [row["step"] for row in tiny.metrics(tmp_path, "tiny")] == [3, 4, 5, 6]
    assert tiny.run(0, 1, tmp_path, **ALONE).step == 6  # found, and the same run


def test_a_run_whose_folder_is_a_plain_file_for_a_while_goes_on_and_saves_later(tmp_path, monkeypatch, capsys):
    tiny.corpus(tmp_path / "text")
    here = tmp_path / "runs" / "tiny"

    def replaced():
        shutil.rmtree(here)
        here.write_text("")

    with monkeypatch.context() as patch:
        _at_step(patch, 3, replaced)
        with pytest.raises(StorageError, match=f"run.dir: cannot write the run folder {here}: Not a directory"):
            tiny.run(0, 1, tmp_path, **ALONE)
    said = " ".join(capsys.readouterr().out.split())
    assert f"cannot write the run folder {here}: Not a directory. The run goes on, and saves again later (1 in" in said
    assert here.read_text() == ""
    here.unlink()
    step = loop.Run._step

    def comes_back(self, stop):
        step(self, stop)
        if self.progress.step == 3:
            self.saver.wait()
            replaced()
        elif self.progress.step == 5:
            here.unlink()

    monkeypatch.setattr(loop.Run, "_step", comes_back)
    result = tiny.run(0, 1, tmp_path, **ALONE)
    document = checkpoint.read_document(result.checkpoint)["checkpoint"]
    assert (result.step, document["name"], document["after_finite_step"]) == (6, "step-00000006", True)


def test_a_store_that_cannot_be_written_names_checkpoint_dir(tmp_path):
    tiny.corpus(tmp_path / "text")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=f"checkpoint.dir: cannot write {tmp_path}/file/tiny/model: Not a directory"):
        tiny.run(0, 1, tmp_path, **ALONE, checkpoint__dir=tmp_path / "file")


def test_a_run_whose_folder_another_has_taken_stops_before_it_writes(tmp_path, monkeypatch):
    tiny.corpus(tmp_path / "text")
    here = tmp_path / "runs" / "tiny"
    theirs = json.dumps({"host": "elsewhere", "pid": 7, "token": "theirs"})
    _at_step(monkeypatch, 3, lambda: (here / ".lock").write_text(theirs))
    with pytest.raises(InputError, match=r"another process has taken .* \(pid 7 on elsewhere\): this one stops"):
        tiny.run(0, 1, tmp_path, **ALONE)
    assert checkpoint.latest(here / "checkpoints").name == "step-00000002"
    assert (here / ".lock").read_text() == theirs


@pytest.mark.parametrize(
    ("owner", "write", "file"), [(Path, "write_text", "config.yaml"), (ModelFiles, "write", "model")]
)
def test_a_full_disk_at_the_start_is_told_and_the_next_start_has_the_folder(tmp_path, monkeypatch, owner, write, file):
    tiny.corpus(tmp_path / "text")
    here, real = tmp_path / "runs" / "tiny", getattr(owner, write)

    def full(*arguments, **keywords):
        if owner is Path:
            if arguments[0].parent != here:
                return real(*arguments, **keywords)
            arguments[0].touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(owner, write, full)
        with pytest.raises(InputError, match=f"run.dir: cannot write {here}/{file}: No space left on device"):
            tiny.run(0, 1, tmp_path, **ALONE)
    if owner is Path:
        assert not here.exists()
        here.mkdir()
        (here / "config.tmp").touch()  # as a process leaves it that was killed there
    assert tiny.run(0, 1, tmp_path, **ALONE).step == 6


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_in_the_export_costs_the_export_alone(tmp_path, monkeypatch, capsys, error):
    tiny.corpus(tmp_path / "text")
    changes = ALONE | {"checkpoint__export": "true", "eval__sample_tokens": 4}

    def full(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(export, "_save_file", lambda: full)
        full_disk = r"disk is probably full .*No space left on device\)?; the run is complete but for its export"
        with pytest.raises(InputError, match=full_disk):
            tiny.run(0, 1, tmp_path, plot=True, **changes)
    here = tmp_path / "runs" / "tiny"
    said = capsys.readouterr().out
    assert "finished" in said
    assert f"checkpoint     {here}/checkpoints/step-00000006" in said
    assert not (here / "export").exists()
    assert (here / "loss.png").exists()
    assert tiny.run(0, 1, tmp_path, **changes).export == here / "export"
    assert load_file(here / "export" / "model.safetensors")


def test_run_whose_checkpoints_are_all_damaged_is_refused(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    assert newest(tmp_path, made.ranks_here(), "auto", print) is None
    (checkpoints / "step-00000003").mkdir(parents=True)
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged \(step-00000003.damaged\)"):
        newest(tmp_path, made.ranks_here(), "auto", print)
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000003.damaged"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning_and_tried_again(tmp_path, monkeypatch, caplog):
    tiny.corpus(tmp_path / "text")
    real, failed = shutil.rmtree, []

    def rmtree(path, *arguments, **options):
        if Path(path).name.endswith(".deleting") and not failed:
            failed.append(path)
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        return real(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    result = tiny.run(0, 1, tmp_path, train__steps=8, **ALONE)
    assert result.step == 8
    said = [record.getMessage() for record in caplog.records if record.name.startswith("shardopt.checkpoint")]
    assert said == [f"{failed[0]} cannot be deleted (Directory not empty), which is tried again later"]
    assert sorted(path.name for path in result.checkpoint.parent.iterdir()) == ["step-00000006", "step-00000008"]


def test_a_folder_that_is_removed_while_it_is_saved_to_is_made_again_by_the_next_save(tmp_path, monkeypatch, capsys):
    tiny.corpus(tmp_path / "text")
    here, real, times = tmp_path / "runs" / "tiny", blocks.write_file, []

    def removes(path, *arguments):
        record = real(path, *arguments)
        times.append(path)
        if len(times) == 2:  # the data of step 4
            shutil.rmtree(here, ignore_errors=True)  # the next step's row may come into it meanwhile
        return record

    monkeypatch.setattr(blocks, "write_file", removes)
    result = tiny.run(0, 1, tmp_path, **ALONE)
    assert result.checkpoint == here / "checkpoints" / "step-00000006"
    said = " ".join(capsys.readouterr().out.split())
    assert "has been removed while it was written. The run goes on, and saves again later (1 in a row" in said
    assert f"somebody has removed {here}: it is made again" in said


def test_a_run_that_gives_up_says_why_before_it_says_that_a_save_has_failed(tmp_path, monkeypatch):
    tiny.corpus(tmp_path / "text")
    real, step = saving.write_document, loop.Run._step

    def full(folder, document):
        if document["step"] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(folder, document)

    def poisoned(run, stop):
        if run.progress.step == 2:
            run.engine.state.slices()[0].tensors[0].data.fill_(math.inf)
        step(run, stop)

    monkeypatch.setattr(saving, "write_document", full)
    monkeypatch.setattr(loop.Run, "_step", poisoned)
    said = (
        r"^1 steps in a row, up to step 3, had a loss or a gradient that is not finite\. Lower .*"
        r"the last good checkpoint is .*step-00000001\. The save before has failed, too: .*No space left on device"
    )
    with pytest.raises(NonFiniteError, match=said):
        tiny.run(0, 1, tmp_path, **ALONE | {"checkpoint__every": 1, "train__max_nonfinite_steps": 0})


def test_a_run_that_never_saved_tells_how_to_begin_again_and_which_saves_it_left_out(tmp_path, capsys):
    tiny.corpus(tmp_path / "text")
    here = tmp_path / "runs" / "tiny"
    changes = {"schedule__warmup": 0, "train__steps": 20, "train__max_nonfinite_steps": 3, "train__grad_clip": "null"}
    changes = ALONE | changes | {"optimizer__lr": 1e30}
    said = f"Lower optimizer.lr or set train.grad_clip under another run.name, or remove {here} first; the run never"
    with pytest.raises(NonFiniteError, match=said):
        tiny.run(0, 1, tmp_path, **changes)
    printed = " ".join(capsys.readouterr().out.split())
    for step in (2, 4):
        assert f"step {step} is skipped, so that no checkpoint is written after it" in printed
    with pytest.raises(InputError, match="already holds another run") as refused:
        tiny.run(0, 1, tmp_path, **changes | {"optimizer__lr": 1e-3})
    assert str(refused.value).endswith(f"choose another run.name, or remove {here}: it has no checkpoint.")
    with pytest.raises(InputError, match=f"choose another run.name, or remove {here}: it has no checkpoint"):
        tiny.run(0, 1, tmp_path, **changes | {"run__resume": "never"})


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_run_ends_when_three_saves_in_a_row_fail_and_not_before(tmp_path, monkeypatch, capsys, asynchronous):
    tiny.corpus(tmp_path / "text")
    changes = ALONE | {"checkpoint__async": asynchronous, "checkpoint__every": 1, "train__steps": 9}
    fails, real, tried = {2, 3, 5, 7, 8, 9}, saving.write_document, []

    def full(folder, document):
        tried.append(document["step"])
        if document["step"] in fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(folder, document)

    monkeypatch.setattr(saving, "write_document", full)
    with pytest.raises(StorageError, match="Input/output error"):
        tiny.run(0, 1, tmp_path, **changes)
    assert tried == list(range(1, 10))
    names = sorted(path.name for path in (tmp_path / "runs/tiny/checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000006"]
    assert " ".join(capsys.readouterr().out.split()).count("The run goes on, and saves again later (2 in a row") == 2
    fails.update(range(10))
    with pytest.raises(StorageError, match=r"The run ends, since 3 saves in a row have failed"):
        tiny.run(
            0,
            1,
            tmp_path,
            **changes | {"train__steps": 20, "schedule": "{name: constant, warmup: 2}", "run__name": "x"},
        )
