"""Runs in a list: what each does or why it does not, by what it has left in its folder."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from shardopt import cli
from shardopt.checkpoint.folders import step_folder
from shardopt.pretrain import lock, loop, runs
from shardopt.pretrain.lock import RunLock
from shardopt.pretrain.record import last_row
from shardopt.rows import newest_rows
from tests.distributed.pool import on_ranks
from tests.pretrain import tiny


def made(folder, name, steps=(10, 20), total=40, age=0.0, **files):
    """A run's folder as it is left; `files` are others in it, with _ for the dot."""
    folder = folder / name
    folder.mkdir(parents=True)
    config = tiny.config(folder, run__name=name.replace("/", "-"), train__steps=total, engine="{name: ddp}")
    (folder / "config.yaml").write_text(config.as_yaml())
    rows = [{"step": step, "loss": 100.0 / step, "step_time": 1.5 * (step > 10)} for step in steps]
    for row in rows[:1]:
        row["eval_loss"] = 9.5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file, text in files.items():
        (folder / file.replace("_", ".")).write_text(text)
    for path in folder.iterdir():
        os.utime(path, (time.time() - age,) * 2)
    return folder


def ended(kind, text=""):
    """A line of events.jsonl."""
    return json.dumps({"time": 1, "event": kind, "step": 20, "text": text}) + "\n"


def held_by(pid, host=None):
    return json.dumps({"host": host or socket.gethostname(), "pid": pid, "token": "t"})


def listed(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(["runs", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def by_name(folder, sort="age"):
    return {run.name: run for run in runs.list_runs(folder, sort)}


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_states_are_told_by_lock_failure_and_steps(tmp_path, dead):
    made(tmp_path, "alive", **{"_lock": held_by(os.getpid())})
    made(tmp_path, "far", **{"_lock": held_by(1, "elsewhere")})
    made(tmp_path, "gone", **{"_lock": held_by(dead)})
    made(tmp_path, "far-gone", age=3600, **{"_lock": held_by(1, "elsewhere")})
    made(tmp_path, "silent", age=3600, **{"_lock": held_by(os.getpid())})
    made(tmp_path, "done", steps=(10, 40))
    made(tmp_path, "asked")
    made(tmp_path, "wrong", steps=(), events_jsonl=ended("failed", "loss is nan"))
    made(tmp_path, "signal", events_jsonl=ended("interrupted", "SIGTERM"))
    made(tmp_path, "power", events_jsonl=ended("save"))
    made(tmp_path, "again", events_jsonl=ended("failed", "a disk") + ended("start"), **{"_lock": held_by(os.getpid())})
    found = by_name(tmp_path)
    assert {name: run.state for name, run in found.items()} == {
        "alive": "running", "far": "running", "gone": "killed", "far-gone": "killed", "silent": "silent",
        "done": "finished", "asked": "stopped", "wrong": "failed", "signal": "stopped", "power": "killed",
        "again": "running",
    }  # fmt: skip
    assert found["wrong"].reason == "loss is nan"
    assert f"pid {dead} on {socket.gethostname()} has died" in found["gone"].reason
    one = found["asked"]
    assert (one.step, one.steps, one.loss, one.holdout_loss, one.engine) == (20, 40, 5.0, 9.5, "ddp")
    assert one.seconds_left == pytest.approx(20 * (1.5 + 0.0) / 2)
    assert found["done"].seconds_left is None
    assert found["far-gone"].age == pytest.approx(3600, abs=60)
    assert (found["wrong"].step, found["wrong"].loss) == (0, None)


def test_a_lock_that_is_held_is_running_and_stays_held(tmp_path):
    folder = made(tmp_path, "one")
    held = RunLock(folder / ".lock")
    assert by_name(tmp_path)["one"].state == "running"
    assert held.check()
    held.release()
    assert by_name(tmp_path)["one"].state == "stopped"
    assert lock.look_at(folder / ".lock") == ("free", "")


def test_studies_are_listed_with_their_runs_and_foreign_or_damaged_folders_do_no_harm(tmp_path, capsys, monkeypatch):
    made(tmp_path, "study/adamw-seed0")
    made(tmp_path, "study/adamw-seed1", age=100)
    (tmp_path / "study" / ".lock").write_text("")
    made(tmp_path, "damaged")
    (tmp_path / "damaged" / "config.yaml").write_text("{run: [")
    made(tmp_path, "bare")
    (tmp_path / "bare" / "config.yaml").unlink()
    made(tmp_path, "torn")
    with (tmp_path / "torn" / "metrics.jsonl").open("a") as file:
        file.write('3\n{"step": 30, "loss": null}\n{"step": 4')
    for name, text in (("theirs", "lr: 3"), ("wandb", "run: {value: 3}\ntrain: {}\ndata: {}"), ("binary", "\0\1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    (tmp_path / "binary" / "config.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "empty").mkdir()
    found = by_name(tmp_path)
    assert {name for name in found if not name.startswith("loop/")} == {
        "study/adamw-seed0", "study/adamw-seed1", "damaged", "bare", "torn", "binary",
    }  # fmt: skip
    assert [found[name].state for name in ("damaged", "bare", "torn", "binary")] == [
        "damaged",
        "damaged",
        "stopped",
        "damaged",
    ]
    assert (found["torn"].step, found["torn"].loss) == (30, 5.0)
    assert set(by_name(tmp_path / "study")) == {"adamw-seed0", "adamw-seed1"}
    assert list(by_name(tmp_path / "study" / "adamw-seed0")) == ["adamw-seed0"]
    said = listed(capsys, tmp_path / "damaged")
    assert "damaged damaged: " in said
    assert "config.yaml is damaged: " in said
    monkeypatch.chdir(tmp_path)
    assert listed(capsys, "empty") == "there is no run in empty\n"
    assert cli.main(["runs", "emty"]) == 2
    assert "did you mean empty?" in capsys.readouterr().err


def test_the_list_is_sorted_as_json_and_as_a_table_of_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    made(tmp_path, "a-study-of-many-optimizers/ademamix_lr-0.001-seed0", (10, 100_000), 1_000_000, 4e5)
    made(tmp_path, "b", (20,), age=50)
    made(tmp_path, "c", (10,), age=100, events_jsonl=ended("failed", "the disk\nis full " + "x" * 100))
    text = listed(capsys, tmp_path)
    table, reason = text.splitlines()[:-2], text.splitlines()[-2:]
    assert max(map(len, table)) <= 80
    assert "".join(reason) == "c failed: the disk" + "is full " + "x" * 100
    assert [line.split()[0] for line in table if line.split()[0] in "abc"] == ["b", "c"]
    names = {}
    for sort in runs.SORTS:
        names[sort] = [row["name"][0] for row in json.loads(listed(capsys, tmp_path, "--json", "--sort", sort))]
    assert names == {
        "age": ["b", "c", "a"],
        "name": ["a", "b", "c"],
        "loss": ["a", "b", "c"],
        "held-out": ["a", "b", "c"],
    }


def test_names_are_printed_as_they_are_in_one_line(tmp_path, capsys):
    names = ["run[v2]", "a[bold]b", "[red]", "[", "two\nlines"]
    for name in names:
        folder = made(tmp_path, name.encode().hex(), events_jsonl=ended("failed", "[/why]"))
        folder.rename(tmp_path / name)
    (tmp_path / "[").rename(tmp_path / "study")
    made(tmp_path, "nested").rename(tmp_path / "study" / "x]")
    (tmp_path / "study" / "config.yaml").unlink()
    (tmp_path / "study" / "metrics.jsonl").unlink()
    (tmp_path / "study").rename(tmp_path / "[")  # "[/x]" is a tag that closes none
    said = listed(capsys, tmp_path).splitlines()
    for name in ("run[v2]", "a[bold]b", "[red]", "two\\nlines"):
        assert any(line.startswith(f"{name} ") and " failed " in line for line in said), name
        assert f"{name} failed: [/why]" in said
    assert any(line.startswith("[/x] ") for line in said)


def test_what_is_not_finite_is_not_known(tmp_path, capsys):
    folder = made(tmp_path, "one")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "loss": NaN, "eval_loss": Infinity, "step_time": NaN}\n')
    made(tmp_path, "two", steps=())
    (tmp_path / "two" / "metrics.jsonl").write_text('{"step": 3, "loss": NaN}\n')
    one, two = json.loads(listed(capsys, tmp_path, "--json", "--sort", "name"), parse_constant=pytest.fail)
    assert (one["step"], one["loss"], one["holdout_loss"], two["loss"]) == (30, 5.0, 9.5, None)
    assert "nan" not in listed(capsys, tmp_path)


@pytest.mark.parametrize("columns", [50, 40, 24, 10])
def test_a_narrow_terminal_has_the_names_still(tmp_path, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    made(tmp_path, "ademamix_lr-0.001-seed0-and-more-words", (10, 100_000), 1_000_000)
    made(tmp_path, "b")
    header, *lines = listed(capsys, tmp_path).splitlines()
    assert max(map(len, [header, *lines])) <= columns
    assert header.split()[0] == "run"
    assert ("state" in header, "age" in header) == (columns > 20, False)
    assert sorted(line[:7] for line in lines)[0] == "ademami"
    assert "…" in sorted(lines)[0]
    assert len(lines) == 2


def test_why_a_folder_is_damaged_is_true(tmp_path):
    for name, text in (("empty", ""), ("foreign", "lr: 3"), ("folder", None), ("none", None)):
        config = made(tmp_path, name) / "config.yaml"
        if text is None:
            config.unlink()
        else:
            config.write_text(text)
    (tmp_path / "folder" / "config.yaml").mkdir()
    assert {name: (run.state, run.reason) for name, run in by_name(tmp_path).items()} == {
        "empty": ("damaged", "it has metrics, and its config.yaml is empty"),
        "foreign": ("damaged", "it has metrics, and its config.yaml is not of a run of shardopt"),
        "folder": ("damaged", "it has metrics, and its config.yaml is a folder"),
        "none": ("damaged", "it has metrics and no config.yaml"),
    }


def test_a_path_that_is_no_folder_of_runs_is_told_what_it_is(tmp_path, capsys):
    config = made(tmp_path, "one") / "config.yaml"
    for path, said in (
        (config, f"{config} is a config: give the run's folder, such as runs/NAME"),
        (
            config.with_name("metrics.jsonl"),
            f"{config.parent}/metrics.jsonl is not a folder: give that of the runs, run.dir",
        ),
        (
            tmp_path / "ones",
            f"{tmp_path}/ones does not exist: give that of the runs, run.dir; did you mean {tmp_path}/one?",
        ),
        ("s3://bucket/runs", "s3://bucket/runs: stores are not supported here; give a local folder"),
    ):
        assert cli.main(["runs", str(path)]) == 2
        assert capsys.readouterr().err == f"shardopt: {said}\n"


def test_a_run_without_metrics_is_new_or_what_its_events_say(tmp_path):
    for name in ("new", "done"):
        (made(tmp_path, name) / "metrics.jsonl").unlink()
    (tmp_path / "done" / "events.jsonl").write_text(ended("finished"))
    found = by_name(tmp_path)
    assert (found["new"].state, found["new"].step) == ("new", 0)
    assert (found["done"].state, found["done"].step) == ("finished", 20)


def test_rows_are_read_from_the_end_a_piece_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("shardopt.rows._TAIL", 50)
    path = tmp_path / "metrics.jsonl"
    assert list(newest_rows(path)) == []
    path.write_text(
        "".join(json.dumps({"step": step, "text": "x" * step}) + "\n" for step in range(1, 90)) + '{"step": 9'
    )
    assert [row["step"] for row in newest_rows(path)] == list(range(89, 0, -1))
    assert last_row(path)["step"] == 89


def test_a_run_that_fails_leaves_its_reason_until_it_is_started_again(tmp_path, monkeypatch, capsys):
    tiny.corpus(tmp_path / "text")
    alone = {"engine": "{name: single}", "checkpoint__every": 2}
    step = loop.Run._step

    def fails(self, stop):
        step(self, stop)
        if self.progress.step == 3:
            raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_step", fails)
        with pytest.raises(RuntimeError):
            tiny.run(0, 1, tmp_path, **alone)
    one = by_name(tmp_path / "runs")["tiny"]
    assert (one.state, one.reason, one.step) == ("failed", "the device is gone", 2)
    assert "tiny failed: the device is gone" in listed(capsys, tmp_path / "runs")
    tiny.run(0, 1, tmp_path, **alone)
    one = by_name(tmp_path / "runs")["tiny"]
    assert (one.state, one.reason, one.step, one.steps) == ("finished", None, 6, 6)


def test_a_finished_run_that_is_started_again_says_so_in_one_line(tmp_path, capsys):
    tiny.corpus(tmp_path / "text")
    settings = {"engine": "{name: single}", "checkpoint__export": "true", "checkpoint__every": 3}
    first = tiny.run(0, 1, tmp_path, plot=True, **settings)
    (tmp_path / "text").rename(tmp_path / "away")  # neither text nor model is touched
    capsys.readouterr()
    again = tiny.run(0, 1, tmp_path, **settings)
    run = tmp_path / "runs" / "tiny"
    loss, bits = first.holdout_loss, first.holdout_bits_per_byte
    said = f"tiny is finished: step 6, held-out loss {loss:.4f}, {bits:.3f} bits per byte, in {run}\n"
    assert capsys.readouterr() == (said, "")
    for key in ("status", "step", "tokens", "holdout_loss", "checkpoint", "plot", "export"):
        assert getattr(again, key) == getattr(first, key), key
    assert not (run / ".lock").exists()
    for result in on_ranks(2, tiny.run, tmp_path, **settings | {"engine": "{name: fsdp}"}):
        assert (result.status, result.holdout_loss) == ("finished", loss)
    # An export that has failed is made now; a checkpoint that is damaged is not taken for the end.
    (tmp_path / "away").rename(tmp_path / "text")
    (run / "export" / "config.json").unlink()
    tiny.run(0, 1, tmp_path, **settings)
    assert (run / "export" / "config.json").exists()
    (data,) = step_folder(run / "checkpoints", 6).glob("*.data")
    data.write_bytes(data.read_bytes()[:-1] + b"\0")
    capsys.readouterr()
    assert tiny.run(0, 1, tmp_path, **settings).holdout_loss == loss
    assert "is set aside as" in capsys.readouterr().out
