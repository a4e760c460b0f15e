"""The launchers themselves, with the configurations in launch/ and the fine-tuning example."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the extra shardopt[transformers]")
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


# One of each host in the CI tier; the rest differ from them in a line of JSON.
QUICK = {"ddp": "ddp", "fsdp2": "fsdp", "zero2": "deepspeed"}
CONFIGURATIONS = sorted(path.stem for path in (ROOT / "launch" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGURATIONS]
)
def test_accelerate_launch(name: str, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "accelerate"), "launch"]
    command += ["--config_file", f"launch/accelerate/{name}.yaml", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--num_cpu_threads_per_process", "1", "tests/integrations/on_cpu.py", EXAMPLE, *OPTIONS]
    command += ["--output_dir", str(tmp_path), "--max_steps", "25", "--save_strategy", "steps", "--save_steps", "25"]
    output = launch(command)
    assert "(learned)" in output
    document = json.loads((tmp_path / "checkpoint-25" / "shardopt" / "checkpoint.json").read_text())
    assert (document["host"], document["checkpoint"]["world_size"]) == (QUICK.get(name, "deepspeed"), 2)
    parameters = document["checkpoint"]["parameters"].values()
    elements = sum(math.prod(entry["shape"]) for entry in parameters if "m2" in entry["kinds"])
    assert sum(state_bytes(output)) == pytest.approx(3 * 4 * elements, rel=1e-2)
    assert max(state_bytes(output)) < 0.55 * 3 * 4 * elements


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
