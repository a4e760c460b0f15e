import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import wandb
from pydantic import ValidationError

from shardopt.errors import InputError, MissingExtraError
from shardopt.pretrain import plot
from shardopt.pretrain.about import git_commit
from shardopt.pretrain.metrics import Tracker
from shardopt.pretrain.record import last_row, read_metrics, summary
from shardopt.pretrain.tracking import TrackingConfig, WandbConfig
from tests.pretrain.wandb_server import KEY, online, rows_on

OFF = TrackingConfig(wandb=WandbConfig(mode="disabled"))
pytestmark = pytest.mark.usefixtures("home")


def track(folder, config=OFF, resume_step=None, *, warnings=None, run_config=None, **options):
    def refuse(message):
        raise AssertionError(f"unexpected warning: {message}")

    warn = refuse if warnings is None else warnings.append
    return Tracker(folder, config, run_config or {}, "a run", resume_step, warn=warn, **options)


def log(tracker, steps, loss=lambda step: 1 / step):
    for step in steps:
        tracker.log(step, {"loss": loss(step)})


def end(tracker, status="finished"):
    """Close as the end of a process does: wandb's service may still be writing when a run has finished."""
    tracker.close(status)
    wandb.teardown()


def lines(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def sink(tracker, name):
    return next(sink for sink in tracker._sinks if sink.name == name)


# metrics.jsonl


def test_one_json_object_a_step(tmp_path):
    tracker = track(tmp_path / "runs" / "new")
    tracker.log(10, {"loss": np.float32(2.5), "tokens": 640, "eval_loss": None})
    assert lines(tmp_path / "runs" / "new") == [{"step": 10, "loss": 2.5, "tokens": 640}]  # at once, not at the end
    tracker.log(20, {"loss": math.nan, "grad_norm": math.inf})
    tracker.close()
    assert lines(tmp_path / "runs" / "new")[1:] == [{"step": 20, "loss": None, "grad_norm": None}]


def test_resuming_cuts_what_lies_beyond_the_checkpoint(tmp_path):
    tracker = track(tmp_path)
    log(tracker, range(10, 60, 10))
    tracker.close("failed")
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 60, "lo')  # killed while writing
    tracker = track(tmp_path, resume_step=30)
    log(tracker, [40, 50], loss=lambda step: 7.0)
    tracker.close()
    assert [(row["step"], row["loss"]) for row in lines(tmp_path)] == [
        (10, 0.1), (20, 0.05), (30, 1 / 30), (40, 7.0), (50, 7.0),
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.tmp"))
    tracker = track(tmp_path, warnings=[])  # from the start again: no checkpoint was ever written
    log(tracker, [10])
    tracker.close()
    assert [row["step"] for row in lines(tmp_path)] == [10]


def test_a_run_that_begins_anew_where_there_are_metrics_says_so(tmp_path):
    tracker = track(tmp_path)
    log(tracker, range(1, 61))
    end(tracker)
    warnings = []
    end(track(tmp_path, resume_step=60, warnings=warnings))
    assert warnings == []
    end(track(tmp_path, warnings=warnings))
    assert warnings == [
        f"{tmp_path} has metrics up to step 60, but there is no checkpoint: the run begins anew, and so do its metrics"
    ]
    assert lines(tmp_path) == []


def test_steps_ascend(tmp_path):
    tracker = track(tmp_path, resume_step=20)
    with pytest.raises(ValueError, match="step 20 logged after step 20"):
        tracker.log(20, {"loss": 1.0})
    tracker.log(21, {"loss": 1.0})
    with pytest.raises(ValueError, match="each is logged in one call"):
        tracker.log(21, {"eval_loss": 1.0})
    tracker.close()


def test_full_disk_warns_once_and_loses_only_its_rows(tmp_path):
    warnings = []
    tracker = track(tmp_path, warnings=warnings)
    log(tracker, [1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # the kernel lets ten more bytes through: the next line is torn
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 10, hard))
        log(tracker, [2, 3])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(warnings) == 1
    assert "metrics.jsonl" in warnings[0]
    assert "File too large" in warnings[0]
    log(tracker, [4, 5])
    tracker.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 4, 5]
    assert warnings[1:] == ["metrics.jsonl: 2 writes failed in all"]


def test_folder_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"run\.dir"):
        track(tmp_path / "file" / "run")


def test_other_ranks_leave_nothing(tmp_path):
    tracker = track(tmp_path, TrackingConfig(), is_main=False)
    log(tracker, [1, 1])
    tracker.close()
    assert tracker.run_id is None
    assert tracker.where == {}
    assert not list(tmp_path.iterdir())


# loss.png


def test_plot_shows_the_losses(tmp_path):
    tracker = track(tmp_path)
    generator = np.random.default_rng(0)
    for step in range(10, 2010, 10):
        noise = 0.15 * generator.standard_normal()
        held_out = 1.6 + 4 * math.exp(-step / 400) if step % 400 == 0 else None
        tracker.log(step, {"loss": 1.5 + 4 * math.exp(-step / 400) + noise, "eval_loss": held_out})
    tracker.log(2010, {"loss": math.nan})
    tracker.close()
    picture = matplotlib.image.imread(tracker.plot_path)[..., :3]
    assert picture.shape == (675, 1200, 3)
    red, green, blue = np.moveaxis(picture, -1, 0)
    curve = (blue - red > 0.4) & (green > red)
    points = (red - blue > 0.4) & (red - green > 0.4)
    heights = [np.median(np.nonzero(curve[:, column])[0]) for column in (300, 500, 900)]
    assert heights == sorted(heights), "the loss falls, so its pixels lie lower and lower"
    assert heights[2] - heights[0] > 100
    assert points[:, 200:1100].sum() > 300
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("count", [1, 3, 30, 100, 101])
def test_plot_of_few_losses_is_one_line_with_a_point_for_each(tmp_path, monkeypatch, count):
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, target: figures.append(figure))
    plot.draw_loss([{"step": step, "loss": 5 / step} for step in range(1, count + 1)], tmp_path / "loss.png", "few")
    lines = [(line.get_label(), line.get_marker(), len(line.get_xdata())) for line in figures[0].axes[0].get_lines()]
    smoothed = [("train, raw", "None", count), ("train, smoothed", "None", count)]
    assert lines == ([("train", "o", count)] if count <= 100 else smoothed)
    assert all(float(tick).is_integer() for tick in figures[0].axes[0].get_xticks())


def test_run_without_rows_ends_quietly_without_a_plot(tmp_path):
    tracker = track(tmp_path)
    tracker.close("interrupted")
    tracker.close()
    assert not tracker.plot_path.exists()


# W&B


def test_run_id_survives_in_a_checkpoint(tmp_path):
    tracker = track(tmp_path / "a", TrackingConfig())
    tracker.close()
    moved = track(tmp_path / "b", TrackingConfig(), 10, run_id=tracker.run_id)
    moved.close()
    other = track(tmp_path / "c", TrackingConfig())
    other.close()
    assert moved.run_id == tracker.run_id != other.run_id
    assert list((tmp_path / "b").glob(f"wandb/offline-run-*-{tracker.run_id}/run-{tracker.run_id}.wandb"))


def test_failures_of_wandb_warn_once_and_training_goes_on(tmp_path, monkeypatch):
    warnings = []
    tracker = track(tmp_path, TrackingConfig(), warnings=warnings)

    def fail(*args, **kwargs):
        raise ConnectionResetError("Connection\nlost")

    with monkeypatch.context() as patch:
        patch.setattr(sink(tracker, "W&B")._run, "log", fail)
        log(tracker, [1, 2])
    assert warnings == ["W&B failed, training goes on without it: ConnectionResetError: Connection lost"]
    log(tracker, [3])
    monkeypatch.setattr(sink(tracker, "W&B")._run, "finish", fail)
    tracker.close()
    assert warnings[1:] == ["W&B: 3 writes failed in all"]
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3]
    assert tracker.plot_path.exists()


def test_wandb_that_does_not_start_is_done_without(tmp_path, monkeypatch):
    def fail(**kwargs):
        raise wandb.errors.CommError("no service")

    monkeypatch.setattr(wandb, "init", fail)
    warnings = []
    tracker = track(tmp_path, TrackingConfig(), warnings=warnings)
    log(tracker, [1])
    tracker.close()
    assert warnings == ["W&B could not be started offline, training goes on without it: CommError: no service"]
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]


@pytest.mark.parametrize("folder_of_that_name", [False, True])
def test_missing_package(tmp_path, monkeypatch, home, folder_of_that_name):
    monkeypatch.delitem(sys.modules, "wandb")
    if folder_of_that_name:  # which Python imports as a namespace package
        (home / "wandb").mkdir()
        monkeypatch.setattr(sys, "path", [str(home)])
    else:
        monkeypatch.setitem(sys.modules, "wandb", None)
    warnings = []
    tracker = track(tmp_path, TrackingConfig(), warnings=warnings)
    log(tracker, [1])
    tracker.close()
    (warning,) = warnings
    assert "pip install 'shardopt[wandb]'" in warning
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]
    for mode in ("offline", "online"):
        with pytest.raises(MissingExtraError, match=r"shardopt\[wandb\]"):
            track(tmp_path, TrackingConfig(wandb=WandbConfig(mode=mode)), resume_step=1)
    track(tmp_path, OFF, resume_step=1).close()


def test_environment_may_turn_wandb_off(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = track(tmp_path, TrackingConfig())
    tracker.close()
    assert tracker.run_id is None
    assert not (tmp_path / "wandb").exists()
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(InputError, match="WANDB_MODE is 'ofline'"):
        track(tmp_path, TrackingConfig())


def test_online_without_a_key_is_refused_at_the_start(tmp_path):
    with pytest.raises(InputError, match=r"WANDB_API_KEY.*tracking\.wandb\.mode=offline"):
        track(tmp_path, TrackingConfig(wandb=WandbConfig(mode="online")))


def test_config_is_checked():
    assert TrackingConfig.model_validate({"wandb": {"tags": ["a", "b"]}}).wandb.tags == ("a", "b")
    for wrong in ({"log_every": 0}, {"wandb": {"mode": "on"}}, {"wandb": {"modes": "auto"}}):
        with pytest.raises(ValidationError):
            TrackingConfig.model_validate(wrong)


def steps_on(backend, run_id):
    return [(row["_step"], row["step"]) for row in map(json.loads, backend.rows[run_id])]


def test_online_where_there_is_a_key_and_no_step_twice_after_resuming(tmp_path, backend, home, capfd):
    online(backend, home)
    tracker = track(tmp_path, TrackingConfig())
    assert tracker.where == {"W&B": f"{backend.url}/me/shardopt/runs/{tracker.run_id}"}
    log(tracker, range(10, 60, 10))
    end(tracker, "failed")
    tracker = track(tmp_path, TrackingConfig(), resume_step=30)
    log(tracker, range(40, 80, 10))
    end(tracker)
    assert steps_on(backend, tracker.run_id) == [(step, step) for step in range(10, 80, 10)]
    assert capfd.readouterr() == ("", "")


def test_wandb_has_labels_facts_summary_and_exit_code(tmp_path, backend, home):
    online(backend, home)
    labels = WandbConfig(group="a group", tags=("small", "new"), notes="to see\nwhat comes")
    about = {"parameters": 1234, "world_size": 2, "git_commit": "abc+"}
    run_config = {"optimizer": {"name": "ademamix", "betas": [0.9, 0.999, 0.9999]}}
    config = TrackingConfig(wandb=labels)
    tracker = track(tmp_path, config, run_config=run_config, about=about)
    for step, held_out in ((10, 3.0), (20, 2.5), (30, None), (40, 2.75)):
        tracker.log(step, {"loss": 1 / step, "tokens": 100 * step, "step_time": 36.0, "eval_loss": held_out})
    tracker.log(50, {f"a_rather_long_name_of_a_metric_{number}": math.nan for number in range(1000)})
    end(tracker, "interrupted")
    tracker = track(tmp_path, config, 40, run_config=run_config, about=about)
    tracker.log(61, {"loss": 1.0, "tokens": 6100, "step_time": 36.0})
    end(tracker, "failed")

    told = backend.runs[tracker.run_id]
    assert (told["groupName"], told["tags"], told["notes"]) == ("a group", ["small", "new"], "to see\nwhat comes")
    assert (told["displayName"], told["exit_code"]) == ("a run", 1)
    shown = json.loads(told["config"])
    assert shown["optimizer"]["value"] == run_config["optimizer"]
    assert shown["about"]["value"] == about
    expected = {"tokens": 6100, "final_eval_loss": 2.75, "best_eval_loss": 2.5, "best_eval_step": 20}
    assert expected.items() <= told["summary"].items()
    assert told["summary"]["hours"] == pytest.approx(0.61)
    rows = rows_on(backend, tracker.run_id)
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 61]
    assert len(rows[4]) == 1001


def test_samples_are_kept_in_a_file_and_as_one_table_over_all_starts(tmp_path):
    tracker = track(tmp_path, TrackingConfig())
    tracker.sample(20, "Once\nupon")
    tracker.sample(40, "another")
    end(tracker, "failed")
    tracker = track(tmp_path, TrackingConfig(), resume_step=30)
    tracker.sample(60, "a time | <b>")
    end(tracker)
    said = [[20, "Once\nupon"], [60, "a time | <b>"]]
    assert [[row["step"], row["text"]] for row in read_metrics(tmp_path / "samples.jsonl")] == said
    tables = [json.loads(path.read_text()) for path in tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")]
    assert {"columns": ["step", "text"], "data": said} in tables


def test_artifacts_are_kept_where_they_are_asked_for(tmp_path, monkeypatch):
    for name in ("export", "step-00000010"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    model, checkpoint = (("a-run-export", "model", ["file"]), ("a-run-checkpoint", "checkpoint", ["file"]))
    for asked, expected in (("none", []), ("export", [model]), ("all", [checkpoint, model])):
        tracker = track(tmp_path / f"run-{asked}", TrackingConfig(wandb=WandbConfig(artifacts=asked)))
        kept = []

        def keep(one, kept=kept):
            kept.append((one.name, one.type, list(one.manifest.entries)))

        monkeypatch.setattr(sink(tracker, "W&B")._run, "log_artifact", keep)
        tracker.keep(tmp_path / "step-00000010", tmp_path / "export")
        tracker.close()
        assert kept == expected


def test_offline_folders_sync_into_one_run(tmp_path, backend):
    tracker = track(tmp_path, TrackingConfig(), run_config={"optimizer": {"betas": [0.9, 0.99]}})
    log(tracker, range(10, 60, 10))
    end(tracker, "failed")
    tracker = track(tmp_path, TrackingConfig(), resume_step=30)
    log(tracker, [40])  # stopped again before it got as far
    end(tracker, "failed")
    tracker = track(tmp_path, TrackingConfig(), resume_step=30)
    log(tracker, range(40, 80, 10))
    end(tracker)
    binaries = Path(sys.executable).parent

    def sync():
        subprocess.run(
            f"{tracker.where['W&B']} --yes",
            shell=True,  # the command is for a person's shell
            env={**os.environ, "WANDB_API_KEY": KEY, "PATH": f"{binaries}:{os.environ['PATH']}"},
            check=True,
            capture_output=True,
            timeout=60,
        )

    sync()
    assert steps_on(backend, tracker.run_id) == [(step, step) for step in range(10, 80, 10)]
    told = backend.runs[tracker.run_id]
    assert (told["project"], told["displayName"], told["exit_code"]) == ("shardopt", "a run", 0)
    # Whether or not a folder is uploaded already, what it has is not logged again.
    tracker = track(tmp_path, TrackingConfig(), resume_step=60)
    log(tracker, [70, 80])
    end(tracker)
    sync()
    assert steps_on(backend, tracker.run_id) == [(step, step) for step in range(10, 90, 10)]


def test_server_that_does_not_answer_leaves_the_run_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("shardopt.pretrain.wandb_run._INIT_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nothing listens
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    warnings = []
    tracker = track(tmp_path, TrackingConfig(), warnings=warnings)
    log(tracker, [1])
    end(tracker)
    assert len(warnings) == 1
    assert "could not be started online, the run is logged offline" in warnings[0]
    assert tracker.where["W&B"].startswith("wandb sync ")
    assert list(tmp_path.glob(f"wandb/offline-run-*-{tracker.run_id}"))


# TensorBoard


def scalars(folder):
    """What TensorBoard itself reads back: the steps and values of each scalar, and the text."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    text = {tag: [(e.step, e.tensor_proto.string_val[0].decode()) for e in read.Tensors(tag)]
            for tag in read.Tags()["tensors"]}  # fmt: skip
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}, text


def test_tensorboard_has_every_row_once_also_after_resuming_and_going_back(tmp_path):
    config = TrackingConfig(tensorboard=True, wandb=WandbConfig(mode="disabled"))
    tracker = track(tmp_path, config, about={"git_commit": "abc"})
    assert tracker.where == {"TensorBoard": f"tensorboard --logdir {tmp_path}"}
    log(tracker, range(10, 60, 10))  # and no close: it was killed
    tracker = track(tmp_path, config, resume_step=30)
    log(tracker, [40, 50, 60], loss=lambda step: 2.0)
    tracker.rewind(40)
    log(tracker, [50], loss=lambda step: 3.0)
    tracker.sample(50, "a *b*\n<c>")
    tracker.log(60, {"loss": math.nan, "grad_norm/layers.0": 0.5})
    tracker.close()
    values, text = scalars(tmp_path)
    shown = [(step, None if math.isnan(value) else pytest.approx(value)) for step, value in values.pop("loss")]
    assert shown == [(row["step"], row["loss"]) for row in lines(tmp_path)]
    assert [step for step, _ in shown] == [10, 20, 30, 40, 50, 60]
    assert values == {"grad_norm/layers.0": [(60, 0.5)]}
    assert text["sample/text_summary"] == [(50, "    a *b*\n    <c>")]
    assert "| git_commit | abc |" in text["about/text_summary"][0][1]
    assert "| status | finished |" in text["summary/text_summary"][-1][1]


def test_tensorboard_that_is_not_installed_is_told_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"shardopt\[tensorboard\]"):
        track(tmp_path, TrackingConfig(tensorboard=True, wandb=WandbConfig(mode="disabled")))


def test_summary_of_a_run_without_evaluations_has_no_losses():
    assert summary([]) == {}
    assert summary([{"step": 4, "tokens": 8, "step_time": 900.0}]) == {"step": 4, "tokens": 8, "hours": 1.0}


def test_the_commit_says_where_tracked_files_differ_from_it(tmp_path, monkeypatch):
    def git(*arguments):
        who = {f"GIT_{role}_{what}": "a@b" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        ran = subprocess.run(["git", *arguments], cwd=tmp_path, env=os.environ | who, capture_output=True, check=True)
        return ran.stdout.decode().strip()

    assert git_commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-q", "-m", "a")
    (tmp_path / "run.log").write_text("not tracked")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "code.py").write_text("2")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD") + "+"
    monkeypatch.setenv("PATH", "")
    assert git_commit(tmp_path) is None


def test_last_row_is_found_while_the_next_is_written(tmp_path):
    assert last_row(tmp_path / "metrics.jsonl") is None
    rows = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 3000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 3000, "lo')
    assert last_row(tmp_path / "metrics.jsonl")["step"] == 2999
