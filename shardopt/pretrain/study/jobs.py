"""Runs side by side: a process each, on the GPUs or cores there are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.progress import BarColumn, Progress, TextColumn

from shardopt.errors import InputError
from shardopt.pretrain.cores import usable_cores
from shardopt.pretrain.record import last_row
from shardopt.pretrain.report import Report, duration
from shardopt.pretrain.signals import Stop, stop_signals
from shardopt.pretrain.study.plan import Trial

_POLL_SECONDS = 0.2
# Where there is no terminal, a line of progress is not written more often.
_LINE_SECONDS = 60.0
_WINDOW_SECONDS = 120.0


def slots(jobs: int | None, runs: int, device: str) -> list[dict[str, str]]:
    """The environment of each of the processes that run at once.

    Args:
        jobs: how many; None: one on each GPU, without GPUs one on each core, and no more than there are runs.
        runs: in all.
        device: run.device of the config.
    """
    gpus: list[str] = []
    if device != "cpu" and torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    cores = usable_cores()
    count = min(jobs or len(gpus) or cores, max(1, runs))
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // count))
    return [
        {"OMP_NUM_THREADS": threads} | ({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {})
        for i in range(count)
    ]


@dataclass(frozen=True)
class Outcome:
    """How a run has ended; `reason` of one that failed: its last words."""

    trial: Trial
    status: Literal["finished", "stopped", "failed"]
    reason: str = ""


@dataclass
class _Job:
    trial: Trial
    process: subprocess.Popen[bytes]
    slot: dict[str, str]
    log: Path
    began: float


class Jobs:
    """Runs trials, as many at once as there are slots; those that are finished are left alone.

    A run that fails is told, and the others go on. SIGINT or SIGTERM stops all of them after a checkpoint.

    Args:
        trials: of a study.
        folder: of the study: its configs/ and logs/ are written.
        slots: see `slots`.
        report: the console.
    """

    def __init__(self, trials: Sequence[Trial], folder: Path, slots: Sequence[dict[str, str]], report: Report) -> None:
        self._trials, self._folder, self._report = trials, folder, report
        self._free, self._running = list(slots), list[_Job]()
        self._waiting = deque(trial for trial in trials if not trial.finished)
        self._outcomes = [Outcome(trial, "finished") for trial in trials if trial.finished]
        self._steps = {trial.name: _steps_of(trial) for trial in trials}
        self._stopping = False

    def run(self) -> tuple[list[Outcome], str | None]:
        """Run what is missing; how each has ended, and the signal that stopped them, if one did."""
        progress = _Line(self._report, sum(trial.config.train.steps for trial in self._trials))
        with stop_signals() as stop, progress.shown():
            try:
                while self._running or (self._waiting and stop.asked is None):
                    self._advance(stop)
                    progress.update(self._describe(), sum(self._steps.values()), self._left())
                    time.sleep(_POLL_SECONDS)
            finally:  # an exception here, or a second Ctrl-C
                self._signal(signal.SIGINT)
                for job in self._running:
                    job.process.wait()
        self._outcomes += [Outcome(trial, "stopped") for trial in self._waiting]
        return self._outcomes, stop.asked

    def _advance(self, stop: Stop) -> None:
        if stop.asked is not None and not self._stopping:
            self._stopping = True
            self._report.say(f"{stop.asked}: every run saves its step and stops")
            self._signal(signal.SIGTERM)
        for job in [job for job in self._running if job.process.poll() is not None]:
            self._running.remove(job)
            self._free.append(job.slot)
            self._ended(job, stop)
        while self._waiting and self._free and stop.asked is None:
            self._start(self._waiting.popleft(), self._free.pop(0))
        for job in self._running:
            self._steps[job.trial.name] = _steps_of(job.trial)

    def _start(self, trial: Trial, slot: dict[str, str]) -> None:
        config, log = (
            self._folder / kind / f"{trial.name}.{end}" for kind, end in (("configs", "yaml"), ("logs", "log"))
        )
        try:
            for path in (config, log):
                path.parent.mkdir(parents=True, exist_ok=True)
            config.write_text(trial.config.as_yaml(), encoding="utf-8")
            with log.open("ab") as out:
                process = subprocess.Popen(
                    command(config), env=os.environ | slot, stdin=subprocess.DEVNULL, stdout=out, stderr=out
                )
        except OSError as e:
            raise InputError(f"run.dir: cannot start {trial.name} in {self._folder}: {e.strerror or e}") from e
        self._running.append(_Job(trial, process, slot, log, time.monotonic()))

    def _ended(self, job: _Job, stop: Stop) -> None:
        trial, status, log = job.trial, job.process.returncode, job.log
        took = duration(time.monotonic() - job.began)
        row = last_row(trial.config.folder / "metrics.jsonl") or {}
        self._steps[trial.name] = _steps_of(trial)
        if status == 0 and trial.finished:
            outcome = Outcome(trial, "finished")
            loss = row.get("eval_loss")
            self._report.say(f"{trial.name}: held-out loss {'not finite' if loss is None else f'{loss:.4f}'} ({took})")
        elif status == 0 or stop.asked is not None:
            outcome = Outcome(trial, "stopped")
            saved = trial.checkpoint
            self._report.say(f"{trial.name}: stopped, {f'saved in {saved.name}' if saved else 'before a checkpoint'}")
        else:
            outcome = Outcome(trial, "failed", _last_words(log, status))
            self._report.warn(f"{trial.name} failed: {outcome.reason} (all of it: {log})")
        self._outcomes.append(outcome)

    def _signal(self, number: signal.Signals) -> None:
        for job in self._running:
            if job.process.poll() is None:
                job.process.send_signal(number)

    def _left(self) -> int:
        """Steps that are still to be run; those of runs that failed are not."""
        trials = [*self._waiting, *(job.trial for job in self._running)]
        return sum(trial.config.train.steps - self._steps[trial.name] for trial in trials)

    def _describe(self) -> str:
        counts = {kind: sum(outcome.status == kind for outcome in self._outcomes) for kind in ("finished", "failed")}
        failed = f", {counts['failed']} failed" if counts["failed"] else ""
        return f"{counts['finished']}/{len(self._trials)} runs{failed}"


def command(config: Path) -> list[str]:
    """What runs the run of a config file."""
    return [sys.executable, "-m", "shardopt", "pretrain", str(config)]


def _steps_of(trial: Trial) -> int:
    row = last_row(trial.config.folder / "metrics.jsonl")
    return row["step"] if row else 0


def _last_words(log: Path, status: int) -> str:
    """The line in which a process said why it ended."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("shardopt: ")]
    said = (own or lines or [""])[-1].removeprefix("shardopt: ").strip()
    how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return f"{how}{said and f', {said}'}"


class _Line:
    """The progress of all runs: one line at the bottom of a terminal, elsewhere a line now and then."""

    def __init__(self, report: Report, total: int) -> None:
        self._report, self._total = report, total
        self._passed: deque[tuple[float, int]] = deque()
        self._said = report.clock()
        self._bar: Progress | None = None
        if report.console.is_interactive and report.console.is_terminal:
            columns = BarColumn(bar_width=None), TextColumn("{task.description}", markup=False)
            self._bar = Progress(*columns, console=report.console, auto_refresh=False, expand=True)
            self._task = self._bar.add_task("", total=total)

    @contextmanager
    def shown(self) -> Iterator[None]:
        if self._bar is None:
            yield
        else:
            with self._bar:
                yield

    def update(self, runs: str, done: int, to_do: int) -> None:
        """`runs` in words, and the steps of all runs that are done and that are still to be run."""
        now = self._report.clock()
        self._passed.append((now, done))
        while now - self._passed[0][0] > _WINDOW_SECONDS:
            self._passed.popleft()
        (then, first), left = self._passed[0], ""
        if done > first:
            left = f"  {duration(to_do * (now - then) / (done - first))} left"
        text = f"{runs}  step {done:,}/{self._total:,}{left}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text, refresh=True)
        elif now - self._said >= _LINE_SECONDS:
            self._said = now
            self._report.say(text)
