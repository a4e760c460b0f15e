"""A job as a person starts it, in processes of its own, with keys in its environment: how it ends, what it shows."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from shardopt.pretrain.record import read_metrics
from tests.pretrain import tiny

SECRETS = {"WANDB_API_KEY": "5ec2e7" + "ab1e" * 8 + "77", "HF_TOKEN": "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"}


class Job(NamedTuple):
    folder: Path
    titles: set[str]  # of all its processes
    output: str
    status: int


def titles(job: psutil.Process) -> list[str]:
    found = []
    for process in [job, *job.children(recursive=True)]:
        try:
            found += [" ".join(process.cmdline()), process.name()]
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Two ranks with DeepSpeed and W&B that are stopped by SIGTERM after their fourth step."""
    folder = tmp_path_factory.mktemp("started")
    tiny.corpus(folder / "text")
    config, home = folder / "config.yaml", folder / "home"
    changes = {"train__steps": 3000, "checkpoint__every": 3, "engine": "{name: deepspeed}"}
    config.write_text(json.dumps(tiny.tree(folder, **changes, tracking__wandb__mode="offline")))
    home.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "shardopt", "pretrain", "--nproc-per-node", "2", str(config)],
        env=os.environ | SECRETS | {"HOME": str(home), "XDG_CACHE_HOME": str(home)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    seen: set[str] = set()
    metrics = folder / "runs" / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(read_metrics(metrics)) < 4:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        seen.update(titles(psutil.Process(process.pid)))
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)  # until no process of it holds the pipe
    return Job(folder, seen, output, process.returncode)


def test_the_command_that_starts_ranks_stops_with_a_checkpoint_and_without_a_traceback(job):
    assert job.status == 0, job.output
    assert "stopped by SIGTERM" in job.output
    here = job.folder / "runs" / "tiny"
    last = read_metrics(here / "metrics.jsonl")[-1]["step"]
    assert (here / "checkpoints" / f"step-{last:08d}").is_dir()
    assert (here / "loss.png").exists()
    assert "Traceback (most" not in job.output
    # torchrun's own; of a package that transformers imports; of DeepSpeed
    for log in (
        "death signal",
        "closing signal",
        "torch/distributed/elastic",
        "torchao",
        "_pytree",
        "DeepSpeed",
        "MA ",
    ):
        assert log not in job.output


def holding(folder: Path, secret: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_planted_keys_reach_no_file_console_or_process_title(job, monkeypatch):
    assert sum("shardopt pretrain" in title for title in job.titles) >= 2  # the command and its ranks
    assert any("wandb" in title for title in job.titles)
    here = job.folder / "runs" / "tiny"
    assert list(here.glob("wandb/offline-run-*/*.wandb"))
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    # What is written at a run's end.
    exported = tiny.run(0, 1, job.folder, run__name="whole", engine="{name: single}", checkpoint__export="true").export
    assert exported is not None
    for name, secret in SECRETS.items():
        assert secret not in job.output, name
        assert not [title for title in job.titles if secret in title], name
        assert holding(job.folder, secret) == [], name
    # And a search that finds what is there.
    assert here / "config.yaml" in holding(job.folder, "hidden_size")
    assert exported / "config.json" in holding(job.folder, "hidden_size")
