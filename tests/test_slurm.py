"""launch/slurm.sbatch by stand-ins for SLURM's commands: when the job is queued again, and when not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from scripts import stand_in_slurm
from shardopt.pretrain.record import read_metrics
from tests.pretrain import tiny

# A torchrun that lasts until it is told to stop, and ends as the test says.
_RUN = """\
echo "$@" >arguments
trap 'sleep 0.1; {on_term}' TERM
touch started
{at_once}
while :; do sleep 0.02; done"""
STOPPED = 'echo -n stopped >"$SHARDOPT_STATUS"; exit 1'
FINISHED = 'echo -n finished >"$SHARDOPT_STATUS"; exit 0'


def start(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = ["bash", str(stand_in_slurm.SBATCH), *arguments]
    output, both = subprocess.PIPE, subprocess.STDOUT
    return subprocess.Popen(command, cwd=folder, env=os.environ | environment, stdout=output, stderr=both, text=True)


def wait_for(path: Path, job: subprocess.Popen[str], holds: str = "") -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or holds not in path.read_text():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("run", "number", "status", "requeued"),
    [
        pytest.param({"on_term": STOPPED}, signal.SIGUSR1, 0, 1, id="stopped with a checkpoint as the time was up"),
        pytest.param({"on_term": FINISHED}, signal.SIGUSR1, 0, 0, id="finished as the time was up"),
        pytest.param({"on_term": "exit 1"}, signal.SIGUSR1, 1, 0, id="no checkpoint as the time was up"),
        pytest.param({"on_term": STOPPED}, signal.SIGTERM, 1, 0, id="stopped by somebody"),
        pytest.param({"at_once": FINISHED}, None, 0, 0, id="finished"),
        pytest.param({"at_once": "exit 3"}, None, 3, 0, id="failed"),
    ],
)
def test_the_job_is_queued_again_only_where_its_time_was_up_before_the_run_was_finished(
    tmp_path: Path, run: dict[str, str], number: signal.Signals | None, status: int, requeued: int
) -> None:
    (tmp_path / "slurm-4711.status").write_text("stopped")  # of the start before, which was killed then
    torchrun = tmp_path / "run"
    torchrun.write_text(_RUN.format(**{"on_term": "exit 9", "at_once": "", **run}))
    environment = stand_in_slurm.install(tmp_path, 2, f"bash {torchrun}", "true")
    job = start(tmp_path, environment | {"SLURM_RESTART_COUNT": "2"}, "c.yaml", "train.steps=9")
    wait_for(tmp_path / "started", job) if number else None
    if number == signal.SIGUSR1:
        job.send_signal(number)
    elif number is not None:
        os.kill(int((tmp_path / "slurm" / "task").read_text()), number)
    said, _ = job.communicate(timeout=20)
    assert (job.returncode, stand_in_slurm.requeued(tmp_path)) == (status, requeued), said
    assert ("not queued again" in said) == (status != 0)
    assert not (tmp_path / "slurm-4711.status").exists()
    assert (tmp_path / "arguments").read_text().split() == [
        "--nnodes", "1", "--nproc_per_node", "2", "--max-restarts", "3", "--rdzv_id", "4711-2", "--rdzv_backend",
        "c10d", "--rdzv_endpoint", f"127.0.0.1:{environment['RDZV_PORT']}", "launch/pretrain.py", "c.yaml",
        "train.steps=9",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("per_node", "on_node"), [("a100:3", ""), ("", "3"), ("a100:8", "3")], ids=["typed", "gres", "both"]
)
def test_ranks_threads_and_port_follow_from_what_slurm_says_of_the_job(
    tmp_path: Path, per_node: str, on_node: str
) -> None:
    torchrun = 'echo "$@" >arguments; echo $SRUN_CPUS_PER_TASK $OMP_NUM_THREADS >cpus; '
    (tmp_path / "run").write_text(torchrun + FINISHED)
    environment = stand_in_slurm.install(tmp_path, 8, f"bash {tmp_path / 'run'}", "true")
    environment |= {"SLURM_GPUS_PER_NODE": per_node, "SLURM_GPUS_ON_NODE": on_node, "RDZV_PORT": ""}
    job = start(tmp_path, environment, "c.yaml")
    said, _ = job.communicate(timeout=20)
    assert job.returncode == 0, said
    given = (tmp_path / "arguments").read_text()
    assert "--nproc_per_node 3 " in given
    assert "--rdzv_endpoint 127.0.0.1:24711 " in given
    assert (tmp_path / "cpus").read_text().split() == ["8", "2"]


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ("SLURM_GPUS_PER_NODE", "set #SBATCH --gpus-per-node (or --gres=gpu:N) in launch/slurm.sbatch"),
        ("SLURM_CPUS_PER_TASK", "set #SBATCH --cpus-per-task in launch/slurm.sbatch"),
        (".venv", "has no .venv/bin/torchrun: call sbatch in shardopt's folder, with its .venv"),
    ],
)
def test_a_job_without_what_it_needs_names_the_line_to_set(tmp_path: Path, lacks: str, message: str) -> None:
    environment = stand_in_slurm.install(tmp_path, 2, "touch started", "true") | {lacks: ""}
    if lacks == ".venv":
        (tmp_path / ".venv" / "bin" / "torchrun").unlink()
    job = start(tmp_path, environment, "c.yaml")
    said, _ = job.communicate(timeout=20)
    assert job.returncode == 2
    assert said.endswith(f"{message}\n")
    assert not (tmp_path / "started").exists()


def test_a_mistake_in_the_config_ends_the_job_before_a_rank_is_started(tmp_path: Path) -> None:
    environment = stand_in_slurm.install(tmp_path, 2, "touch started", "bash -c 'exit 2'")
    job = start(tmp_path, environment, "c.yaml")
    job.communicate(timeout=20)
    assert job.returncode == 2
    assert not (tmp_path / "started").exists()


@pytest.mark.slow
def test_a_run_that_is_stopped_by_the_time_goes_on_when_its_job_is_queued_again_until_it_is_finished(
    tmp_path: Path,
) -> None:
    tiny.corpus(tmp_path / "text")
    config = tmp_path / "timed.yaml"
    config.write_text(json.dumps(tiny.tree(tmp_path, run__name="timed", train__steps=200)))
    environment = stand_in_slurm.install(tmp_path, 2)
    metrics = tmp_path / "runs" / "timed" / "metrics.jsonl"
    job = start(tmp_path, environment, str(config))
    wait_for(metrics, job, '"step": 5,')
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=120)
    assert "stopped by SIGTERM" in said
    assert (job.returncode, stand_in_slurm.requeued(tmp_path)) == (0, 1), said
    stopped = read_metrics(metrics)[-1]["step"]
    assert stopped < 200
    assert (tmp_path / "runs" / "timed" / "checkpoints" / f"step-{stopped:08d}").is_dir()
    job = start(tmp_path, environment | {"SLURM_RESTART_COUNT": "1"}, str(config))
    said, _ = job.communicate(timeout=240)
    assert (job.returncode, stand_in_slurm.requeued(tmp_path)) == (0, 1), said
    assert [row["step"] for row in read_metrics(metrics)] == list(range(1, 201))
    job = start(tmp_path, environment, str(config), "train.stepz=3")
    said, _ = job.communicate(timeout=60)
    assert (job.returncode, stand_in_slurm.requeued(tmp_path)) == (2, 1)
    assert said.count("did you mean train.steps?") == 1
