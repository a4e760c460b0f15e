import json
import math
import os
import re
import resource
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import wandb
from pydantic import ValidationError

from shardopt.errors import InputError, MissingExtraError
from shardopt.pretrain.metrics import Tracker, TrackingConfig, read_metrics
from shardopt.pretrain.wandb_run import WandbConfig

OFF = TrackingConfig(wandb=WandbConfig(mode="disabled"))
KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """A machine on which nobody has ever used W&B."""
    folder = tmp_path_factory.mktemp("home")
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    yield folder
    wandb.teardown()


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


def offline_records(folder):
    """The records of each of a run folder's offline files, oldest first; checks every checksum on the way."""
    from wandb.proto import wandb_internal_pb2

    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    return [list(map(wandb_internal_pb2.Record.FromString, _log_entries(file.read_bytes()))) for file in files]


def _log_entries(data):
    assert data[:4] == b":W&B"
    at, entry = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        crc, length, kind = int.from_bytes(data[at : at + 4], "little"), data[at + 4] + 256 * data[at + 5], data[at + 6]
        part = data[at + 7 : at + 7 + length]
        assert crc == zlib.crc32(part, zlib.crc32(bytes([kind]))), "checksum"
        entry, at = (part if kind in (1, 2) else entry + part), at + 7 + length
        if kind in (1, 4):
            yield entry
    assert at == len(data), "the file ends within a record"


def history(records):
    rows = [record.history.item for record in records if record.HasField("history")]
    return [{(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in row} for row in rows]


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
    tracker = track(tmp_path)  # from the start again: no checkpoint was ever written
    log(tracker, [10])
    tracker.close()
    assert [row["step"] for row in lines(tmp_path)] == [10]


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
    assert tracker.where is None
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


def test_run_without_rows_ends_quietly_without_a_plot(tmp_path):
    tracker = track(tmp_path)
    tracker.close("interrupted")
    tracker.close()
    assert not tracker.plot_path.exists()


# W&B


def test_offline_runs_of_one_id_make_one_history(tmp_path, capfd):
    run_config = {"optimizer": {"name": "ademamix", "betas": [0.9, 0.999, 0.9999]}}
    tracker = track(tmp_path, TrackingConfig(), run_config=run_config)
    first = tracker.run_id
    log(tracker, range(10, 310, 10))  # over several blocks of the file, records in parts among them
    tracker.log(310, {f"a_rather_long_name_of_a_metric_{number}": 1.0 for number in range(1000)})
    tracker.log(320, {"loss": 1.0})
    end(tracker, "failed")
    tracker = track(tmp_path, TrackingConfig(), resume_step=310, run_config=run_config)
    assert tracker.run_id == first
    log(tracker, [320, 330, 340])
    end(tracker)

    before, after = offline_records(tmp_path)
    assert [row["step"] for row in history(before)] == list(range(10, 330, 10))
    assert [(row["step"], row["_step"], row["loss"]) for row in history(after)] == [
        (330, 330, 1 / 330),
        (340, 340, 1 / 340),
    ]  # the first folder has step 320
    for records in (before, after):
        (run,) = [record.run for record in records if record.HasField("run")]
        logged = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert (run.run_id, run.display_name, run.project) == (first, "a run", "shardopt")
        assert logged["optimizer"] == run_config["optimizer"]
        axes = {record.metric.name or record.metric.glob_name: record.metric.step_metric for record in records}
        assert axes["*"] == "step"
    assert [record.exit.exit_code for record in after if record.HasField("exit")] == [0]
    assert capfd.readouterr() == ("", "")


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
        patch.setattr(tracker._wandb._run, "log", fail)
        log(tracker, [1, 2])
    assert warnings == ["W&B failed, training goes on without it: ConnectionResetError: Connection lost"]
    log(tracker, [3])
    monkeypatch.setattr(tracker._wandb._run, "finish", fail)
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
            track(tmp_path, TrackingConfig(wandb=WandbConfig(mode=mode)))
    track(tmp_path, OFF).close()


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


class Backend(BaseHTTPRequestHandler):
    """As much of a W&B server as the real client needs to create, resume and fill a run."""

    rows: dict[str, list[str]]
    url: str

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer({})

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/graphql":
            body = json.loads(raw)
            name = re.search(r"(?:query|mutation) (\w+)", body["query"]).group(1)
            self.answer({"data": self.graphql(name, body.get("variables") or {})})
        elif run := re.search(r"/([^/]+)/file_stream$", self.path):
            sent = json.loads(raw).get("files", {}).get("wandb-history.jsonl")
            if sent:
                self.rows[run[1]][sent["offset"] :] = sent["content"]
            self.answer({"limits": {}})
        else:
            self.answer({})

    def graphql(self, name, given):
        run = given.get("name")
        place = {"id": "p", "name": "shardopt", "entity": {"id": "e", "name": "me"}}
        if name == "UpsertBucket":
            rows = self.rows.setdefault(run, [])
            bucket = {"id": "r", "name": run, "config": "{}", "project": place, "historyLineCount": len(rows)}
            return {"upsertBucket": {"bucket": bucket, "inserted": not rows}}
        if name == "RunResumeStatus":
            rows = self.rows.get(run)
            bucket = rows and {
                "id": "r", "name": run, "config": "{}", "tags": [], "wandbConfig": '{"t": 1}',
                "summaryMetrics": rows[-1], "historyTail": json.dumps(rows[-1:]), "eventsTail": "[]",
                "historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0,
            }  # fmt: skip
            return {"model": {**place, "bucket": bucket} if rows else None}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/{file}"} for file in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    def answer(self, reply):
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def backend(monkeypatch):
    Fresh = type("Fresh", (Backend,), {"rows": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    Fresh.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("WANDB_BASE_URL", Fresh.url)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Fresh
    wandb.teardown()
    server.shutdown()
    thread.join()
    server.server_close()


def steps_on(backend, run_id):
    return [(row["_step"], row["step"]) for row in map(json.loads, backend.rows[run_id])]


def test_online_where_there_is_a_key_and_no_step_twice_after_resuming(tmp_path, backend, home, capfd):
    host = backend.url.removeprefix("http://")
    (home / ".netrc").write_text(f"machine {host} login user password {KEY}\n")
    (home / ".netrc").chmod(0o600)
    tracker = track(tmp_path, TrackingConfig())
    assert tracker.where == f"{backend.url}/me/shardopt/runs/{tracker.run_id}"
    log(tracker, range(10, 60, 10))
    end(tracker, "failed")
    tracker = track(tmp_path, TrackingConfig(), resume_step=30)
    log(tracker, range(40, 80, 10))
    end(tracker)
    assert steps_on(backend, tracker.run_id) == [(step, step) for step in range(10, 80, 10)]
    assert capfd.readouterr() == ("", "")


def test_offline_folders_sync_into_one_run(tmp_path, backend):
    tracker = track(tmp_path, TrackingConfig())
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
            f"{tracker.where} --yes",
            shell=True,  # the command is for a person's shell
            env={**os.environ, "WANDB_API_KEY": KEY, "PATH": f"{binaries}:{os.environ['PATH']}"},
            check=True,
            capture_output=True,
            timeout=60,
        )

    sync()
    assert steps_on(backend, tracker.run_id) == [(step, step) for step in range(10, 80, 10)]
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
    (records,) = offline_records(tmp_path)
    assert [row["step"] for row in history(records)] == [1]
