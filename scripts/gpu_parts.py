"""What only a GPU can show beside the kernel and ZeRO: cases of scripts/gpu_check.py."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from shardopt.checkpoint.staging import Staging
from shardopt.distributed import Ranks
from shardopt.pretrain import flops, machine, metrics, rng
from shardopt.pretrain.data.prefetch import Batches
from shardopt.pretrain.meter import StepClock

Row = tuple[str, bool | None, str]  # what, whether it holds (None: it was not run), in what figures
ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda", 0)
BUSY = int(0.05 * 1.5e9)  # cycles: some 50 ms
SECONDS = 100  # of a command
ENGINES = ("single", "ddp", "fsdp", "zero", "deepspeed")


def parts() -> Iterator[Row]:
    checks = (staged, read_ahead, timed, random_numbers, peak, names)
    for check in checks:
        yield attempt(check.__name__, check)


def attempt(name: str, check: Callable[[], Row]) -> Row:
    """The row of a check; one that raises does not keep the others from running."""
    try:
        return check()
    except Exception as error:
        return name, False, f"{type(error).__name__}: {error}"[:200]


def staged() -> Row:
    """What a save copies is what was there, though the device is behind and the tensors change at once."""
    source = torch.arange(1 << 20, dtype=torch.float32, device=DEVICE)
    staging = Staging()
    torch.cuda._sleep(BUSY)
    source.add_(1)
    buffer = staging.copy([source])
    held = buffer[: source.nbytes].view(torch.float32).clone()
    source.zero_()
    right = torch.equal(held, torch.arange(1 << 20, dtype=torch.float32) + 1)
    return "a save's copy to the host", right and buffer.is_pinned(), f"pinned: {buffer.is_pinned()}"


def read_ahead() -> Row:
    """Batches that a thread copies are whole when the step reads them, and stay so while the next ones come."""
    size = (64, 4097)
    data: Any = SimpleNamespace(
        batch=lambda step, *_: torch.full(size, step, dtype=torch.int64),
        state_dict=lambda step: {"step": step},
        stages=SimpleNamespace(at=lambda step: SimpleNamespace(global_batch=size[0])),
    )
    batches, sums = Batches(data, Ranks(0, 1, 0, DEVICE, distributed=False), ahead=2), []
    for step in range(20):
        tokens = batches.batch(step)
        torch.cuda._sleep(BUSY // 10)  # what is read late must not have been overwritten
        sums.append(tokens.sum())
        del tokens
    batches.close()
    expected = [step * size[0] * size[1] for step in range(20)]
    return "batches copied ahead", [int(s) for s in sums] == expected, "20 batches behind a busy device"


def timed() -> Row:
    """The clock of a step's parts reads the device's time, without waiting for it."""
    clock = StepClock(DEVICE)
    began = time.perf_counter()
    for part in ("forward_backward", "update", None):
        clock.mark(part)
        torch.cuda._sleep(BUSY)
    early, issued = clock.read(), time.perf_counter() - began
    torch.cuda.synchronize()
    late = clock.read()
    seconds = [early[part] + late[part] for part in ("forward_backward", "update")]
    waited = time.perf_counter() - began
    text = f"{1e3 * seconds[0]:.0f} and {1e3 * seconds[1]:.0f} ms, issued in {1e3 * issued:.0f} of {1e3 * waited:.0f}"
    return "the clock of a step's parts", min(seconds) > 0.01 and issued < waited / 2, text


def random_numbers() -> Row:
    rng.seed_all(3)
    saved = rng.capture(0)
    first = torch.rand(1000, device=DEVICE)
    torch.rand(10, device=DEVICE)
    rng.restore(0, saved)
    return "states of random numbers", torch.equal(first, torch.rand(1000, device=DEVICE)), ", ".join(sorted(saved))


def peak() -> Row:
    torch.cuda.reset_peak_memory_stats()
    before = metrics.peak_memory(DEVICE)
    torch.empty(1 << 26, dtype=torch.uint8, device=DEVICE)
    more = metrics.peak_memory(DEVICE) - before
    return "peak memory", more == 1 << 26, f"{more} bytes more after {1 << 26}"


def names() -> Row:
    """What `shardopt doctor` says, and whether the device's peak is known: a report, not a check."""
    found = [f"{finding.name} {finding.verdict}: {finding.text}" for finding in machine._gpus()]
    known = flops.peak_flops(DEVICE)
    return "the device", True, "; ".join([*found, "peak: " + (f"{known / 1e12:.1f} TFLOP/s" if known else "not known")])


def engines() -> Iterator[Row]:
    """Three steps on every GPU, and three more as another run from its checkpoint, on every engine."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text")
        text.mkdir()
        for number in range(40):
            text.joinpath(f"{number}.txt").write_text(f"document {number} of words that come again. " * 40)
        checks = [partial(trained, engine, Path(folder)) for engine in ENGINES]
        with ThreadPoolExecutor(len(checks)) as pool:  # most of a run this small is imports
            yield from pool.map(attempt, ENGINES, checks)


def trained(engine: str, folder: Path) -> Row:
    ranks = [] if engine == "single" else ["--nproc-per-node", "gpu"]
    settings = [f"run.dir={folder}", f"engine={{name: {engine}}}", "schedule.warmup=1"]
    settings += [f"data.sources=[{{source: text, paths: [{folder}/text]}}]", "train.global_batch=32"]
    settings += ["train.micro_batch=1", "eval.batches=1", "eval.every=3", "data.tokenizer=byte"]
    settings += ["checkpoint.every=3", "profile.steps=2"]
    began = time.perf_counter()
    again = f"{engine}-again"
    for changes in (
        [f"run.name={engine}", "train.steps=3"],
        [f"run.name={again}", "train.steps=6", f"run.from={folder / engine}"],
    ):
        done = shardopt("pretrain", *ranks, "configs/quickstart.yaml", *settings, *changes)
        if done.returncode:
            return engine, False, last_line(done)
    rows = (folder / again / "metrics.jsonl").read_text().splitlines()
    return engine, True, f"rows of metrics: {len(rows)}, {time.perf_counter() - began:.0f} s"


def shardopt(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, with its output; status 124 where it took too long."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]), "WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "shardopt", *arguments]
    try:
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"ended after {SECONDS} s")


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Of its output, for a row; of a command that failed, more goes to this process's errors."""
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode:
        print("\n".join(lines[-40:]), file=sys.stderr)
    return (lines[-1] if lines else "no output")[:200]
