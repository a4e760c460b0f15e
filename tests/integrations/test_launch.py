"""The launchers themselves, with the configurations in launch/ and the fine-tuning example."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("transformers", reason="the extra shardopt[transformers]")
from accelerate.commands.launch import launch_command, launch_command_parser

from tests.distributed.pool import on_ranks

ROOT = Path(__file__).parents[2]
EXAMPLE = "scripts/examples/finetune_trainer.py"
OPTIONS = ["--use_cpu", "--disable_tqdm", "true", "--dataloader_pin_memory", "false"]


def launch(command: list[str], timeout: float = 280) -> str:
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return run.stdout


def state_bytes(output: str) -> list[float]:
    """Of each rank, as the last row of the log has them."""
    row = [line for line in output.splitlines() if "state_bytes" in line][-1]
    return [float(value) for value in re.findall(r"'state_bytes/rank_\d+': '([^']+)'", row)]


def launched(name: str, folder: Path) -> list[str]:
    """The arguments of `accelerate launch` with a file of launch/accelerate, for two CPU ranks of the example."""
    return [
        *("--config_file", f"launch/accelerate/{name}.yaml", "--num_processes", "2", "--main_process_port", "0"),
        *("--num_cpu_threads_per_process", "1", "tests/integrations/on_cpu.py", EXAMPLE, *OPTIONS),
        *("--output_dir", str(folder), "--max_steps", "25", "--save_strategy", "steps", "--save_steps", "25"),
    ]


def holds(folder: Path, host: str, output: str) -> None:
    """What the example has said and saved is of `host` on two ranks, each of which held half of the state."""
    assert "(learned)" in output
    document = json.loads((folder / "checkpoint-25" / "shardopt" / "checkpoint.json").read_text())
    assert (document["host"], document["checkpoint"]["world_size"]) == (host, 2)
    parameters = document["checkpoint"]["parameters"].values()
    elements = sum(math.prod(entry["shape"]) for entry in parameters if "m2" in entry["kinds"])
    assert sum(state_bytes(output)) == pytest.approx(3 * 4 * elements, rel=1e-2)
    assert max(state_bytes(output)) < 0.55 * 3 * 4 * elements


@pytest.mark.slow  # what it starts is below, but for accelerate's own start of processes
def test_accelerate_launch(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "accelerate"), "launch"]
    holds(tmp_path, "deepspeed", launch([*command, *launched("zero2", tmp_path)]))


def _rank(rank: int, world_size: int, script: str, arguments: list[str], environment: dict[str, str]) -> str:
    """What `script` prints in the environment that a launcher has made for it."""
    os.environ |= environment
    said = io.StringIO()
    with redirect_stdout(said), mock.patch.object(sys, "argv", [script, *arguments]), pytest.raises(SystemExit) as done:
        runpy.run_path(script, run_name="__main__")
    assert done.value.code == 0, said.getvalue()
    return said.getvalue()


# Those of the CI tier; the rest differ from zero2 in a line of JSON.
HOSTS = {"ddp": "ddp", "fsdp2": "fsdp", "zero2": "deepspeed"}
CONFIGURATIONS = sorted(path.stem for path in (ROOT / "launch" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize(
    "name", [name if name in HOSTS else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGURATIONS]
)
def test_each_file_of_accelerate_shards_the_state(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ranks that are forked from a warm process, in the place of those that the launcher would start."""
    started: dict[str, Any] = {}

    def run(arguments: argparse.Namespace) -> None:
        before = started.pop("environment")
        started["environment"] = {key: value for key, value in os.environ.items() if before.get(key) != value}
        started["script"] = (arguments.training_script, arguments.training_script_args)

    monkeypatch.setattr("torch.distributed.run.run", run)
    monkeypatch.chdir(ROOT)
    started["environment"] = dict(os.environ)
    launch_command(launch_command_parser().parse_args(launched(name, tmp_path)))
    script, arguments = started["script"]
    output = on_ranks(2, _rank, script, arguments, started["environment"], fresh=True)[0]
    holds(tmp_path, HOSTS.get(name, "deepspeed"), output)


@pytest.mark.slow  # two new ranks; tests/test_readme.py starts torchrun too
def test_plain_torchrun(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        EXAMPLE,
        *OPTIONS,
    ]
    held = state_bytes(launch([*command, "--output_dir", str(tmp_path), "--max_steps", "25"]))
    assert len(held) == 2
    assert max(held) < 0.51 * sum(held)
