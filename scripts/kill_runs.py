"""Kill the ranks of small runs at random moments, and hold what they end with against a run that nobody disturbed.

    python scripts/kill_runs.py --kills 20                  one rank at a time, restarted by torchrun --max-restarts
    python scripts/kill_runs.py --kills 20 --by-hand        all processes at a time, started again by the same command
    python scripts/kill_runs.py --engines fsdp ddp "{name: zero, stage: 1}" "{name: zero, stage: 2}" "{name: deepspeed}"

A kill comes while the ranks start, between two steps or in a save (which all happen in the background), as chance has
it. One line per engine; the exit status is 1 if a run took more restarts than there were kills, lost a checkpoint that
was complete, or ended with other weights or other losses, to the bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from shardopt import checkpoint  # noqa: E402
from shardopt.pretrain.metrics import read_metrics  # noqa: E402

# A start takes some seconds: this many of the kills come in it.
_IN_THE_START = 0.3
_LONGEST_START = 240.0


def corpus(folder: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(40)]
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(words, k=100)))


def config(folder: Path, name: str, engine: str, steps: int) -> dict[str, Any]:
    return {
        "run": {"name": name, "dir": str(folder / "runs"), "device": "cpu", "timeout_minutes": 1},
        "model": {
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 64, "attention_dropout": 0.1,
        },
        "data": {
            "sources": [{"source": "text", "paths": [str(folder / "text")]}],
            "block_size": 32, "holdout": 0.1, "cache": str(folder / "cache"),
        },
        "optimizer": {"name": "ademamix", "lr": 3e-3, "state_dtype": "bf16"},
        "schedule": {"warmup": 2},
        "engine": yaml.safe_load(engine) if engine.startswith("{") else {"name": engine},
        "train": {"steps": steps, "global_batch": 8, "micro_batch": 2},
        "eval": {"every": 10, "batches": 1, "sample_tokens": 0},
        "checkpoint": {"every": 4},
        "tracking": {"log_every": 1, "wandb": {"mode": "disabled"}},
    }  # fmt: skip


@dataclass
class Run:
    """A run in its own torchrun job, and what was done to it."""

    folder: Path
    name: str
    ranks: int
    settings: dict[str, Any]
    max_restarts: int
    job: subprocess.Popen[bytes] | None = None
    kills: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    newest: int = 0  # step of the newest complete checkpoint that was seen

    @property
    def here(self) -> Path:
        return self.folder / "runs" / self.name

    def start(self) -> None:
        path = self.folder / f"{self.name}.yaml"
        path.write_text(yaml.safe_dump(self.settings))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.ranks)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.job = subprocess.Popen(
                [*command, "--max-restarts", str(self.max_restarts), str(ROOT / "launch" / "pretrain.py"), str(path)],
                env=environment, stdout=log, stderr=log, cwd=self.folder,
            )  # fmt: skip

    def workers(self, attempt: int) -> list[psutil.Process]:
        """The ranks of that attempt of the job, or a later one; empty where they are not all there."""
        found = []
        for process in psutil.Process(self.job.pid).children(recursive=True) if self.job is not None else []:
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            if "LOCAL_RANK" in environment and int(environment["TORCHELASTIC_RESTART_COUNT"]) >= attempt:
                found.append(process)
        return found if len(found) >= self.ranks else []

    def step(self) -> int:
        path = self.here / "metrics.jsonl"
        rows = read_metrics(path) if path.exists() else []
        return rows[-1]["step"] if rows else 0

    def wait(self, ready: Any) -> bool:
        """Whether `ready()` came true before the job ended, or before the longest start was over."""
        deadline = time.monotonic() + _LONGEST_START
        while not ready():
            if self.job is None or self.job.poll() is not None:
                return False
            if time.monotonic() > deadline:
                self.faults.append(f"no step within {_LONGEST_START:g} s after kill {self.kills.total()}")
                return False
            time.sleep(0.02)
        return True

    def note_checkpoint(self) -> None:
        newest = checkpoint.latest(self.here / "checkpoints")
        step = int(newest.name.rpartition("-")[2].split(".")[0]) if newest is not None else 0
        if step < self.newest:
            self.faults.append(f"checkpoint {self.newest} was complete, and after a kill the newest is {step}")
        self.newest = max(step, self.newest)

    def kill_all(self) -> None:
        assert self.job is not None
        job = psutil.Process(self.job.pid)
        for process in [job, *job.children(recursive=True)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.job.wait()


def kill(run: Run, attempt: int, draw: random.Random, by_hand: bool) -> bool:
    """Kill once, in attempt number `attempt`; False where the run has ended before."""
    if not run.wait(lambda: run.workers(attempt)):
        return False
    began = run.step()
    if draw.random() < _IN_THE_START:
        time.sleep(draw.uniform(0.0, 8.0))
    else:  # at least one checkpoint further
        goal = max(began, run.newest) + draw.randint(5, 12)
        if not run.wait(lambda: run.step() >= goal):
            return False
        time.sleep(draw.uniform(0.0, 0.3))
    phase = "saving" if list(run.here.glob("checkpoints/.*")) else "training" if run.step() > began else "starting"
    if by_hand:
        run.kill_all()
        run.start()
    else:
        workers = run.workers(attempt)
        if not workers:
            return False
        seen = int(workers[0].environ()["TORCHELASTIC_RESTART_COUNT"])
        if seen != attempt:
            run.faults.append(f"attempt {attempt} failed by itself")
        draw.choice(workers).send_signal(signal.SIGKILL)
    run.kills[phase] += 1
    run.note_checkpoint()
    return True


def outcome(run: Run) -> tuple[str, list[float]]:
    """Hash of the exported weights, and the losses of all steps."""
    weights = (run.here / "export" / "model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest(), [row["loss"] for row in read_metrics(run.here / "metrics.jsonl")]


def survive(folder: Path, engine: str, number: int, arguments: argparse.Namespace) -> dict[str, Any]:
    draw = random.Random(arguments.seed + number)
    steps = 14 * arguments.kills + 20
    settings = [config(folder, f"{name}-{number}", engine, steps) for name in ("whole", "killed")]
    whole = Run(folder, f"whole-{number}", arguments.ranks, settings[0], 0)
    whole.start()
    assert whole.job is not None
    if whole.job.wait() != 0:
        raise SystemExit(f"{engine}: the undisturbed run failed, see {folder}/{whole.name}.log")
    # Some more than kills, so that one that fails by itself is counted and does not end it.
    run = Run(folder, f"killed-{number}", arguments.ranks, settings[1], 0 if arguments.by_hand else arguments.kills + 5)
    began = time.monotonic()
    run.start()
    try:
        for count in range(arguments.kills):
            if not kill(run, 0 if arguments.by_hand else count, draw, arguments.by_hand):
                run.faults.append(f"ended before kill {count + 1}")
                break
        assert run.job is not None
        status = run.job.wait(timeout=600)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        if run.job is not None and run.job.poll() is None:
            run.kill_all()
    if status != 0:
        run.faults.append(f"status {status}, see {folder}/{run.name}.log")
    elif outcome(run) != outcome(whole):
        run.faults.append("ended with other weights or losses")
    return {
        "engine": engine,
        "kills": run.kills.total(),
        "by phase": dict(run.kills),
        "steps": steps,
        "seconds": round(time.monotonic() - began),
        "faults": run.faults,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="per engine")
    parser.add_argument("--engines", nargs="+", default=["fsdp"], help="names, or sections as YAML")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--by-hand", action="store_true", help="kill torchrun too, and start the command again")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--keep", type=Path, help="a new folder for the runs and their logs, which stays")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shardopt-kills-") as scratch:
        folder = Path(scratch) if arguments.keep is None else arguments.keep.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        corpus(folder / "text")
        failed = False
        for number, engine in enumerate(arguments.engines):
            report = survive(folder, engine, number, arguments)
            failed = failed or bool(report["faults"])
            print(json.dumps(report), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
