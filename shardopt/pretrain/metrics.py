"""The record of a run: metrics.jsonl, its page in W&B, and loss.png at the end.

A tracker that fails never stops training: it warns once, with the cause, goes on, and says at the end how
much was lost. Only what is known before the first step is an error: a folder that cannot be written, a W&B
mode that was asked for by name and cannot be had.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from shardopt.errors import InputError
from shardopt.pretrain.plot import draw_loss
from shardopt.pretrain.section import Section, Steps
from shardopt.pretrain.wandb_run import Status, WandbConfig, WandbRun, cause

# Bytes at the end of metrics.jsonl that hold a whole row.
_TAIL = 1 << 16


class TrackingConfig(Section):
    """Where metrics go, and how often."""

    log_every: Steps = Field(10, ge=1)
    """Steps between rows of metrics."""
    wandb: WandbConfig = WandbConfig()


class Tracker:
    """Writes one row of metrics per logged step, on rank 0; on the other ranks every method does nothing.

    Args:
        folder: the run folder.
        config: the `tracking` section.
        run_config, run_name, run_id: see `WandbRun`; the name is also the title of loss.png.
        resume_step: the step of the checkpoint that the run continues from; None where it starts afresh.
        is_main: whether this is rank 0. Construct it on all ranks under `Ranks.together`.
        warn: called with one line.

    Attributes:
        run_id: of W&B, for the checkpoints; None on other ranks and where there never was W&B.
        where: see `WandbRun.where`; None on other ranks.

    Raises:
        InputError, MissingExtraError: metrics.jsonl cannot be written, or see `WandbRun`.
    """

    def __init__(
        self,
        folder: Path,
        config: TrackingConfig,
        run_config: Mapping[str, Any],
        run_name: str,
        resume_step: int | None,
        *,
        warn: Callable[[str], None],
        run_id: str | None = None,
        is_main: bool = True,
    ) -> None:
        self.plot_path = folder / "loss.png"
        self._name, self._warn = run_name, warn
        self._last_step = resume_step
        self._failures: dict[str, int] = {}
        self._closed = not is_main
        self.run_id: str | None = None
        self.where: str | None = None
        if is_main:
            self._file = MetricsFile(folder / "metrics.jsonl", resume_step)
            self._wandb = WandbRun(folder, config.wandb, run_config, run_name, self._file.logged_step, run_id, warn)
            self.run_id, self.where = self._wandb.id, self._wandb.where

    def log(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Write the metrics of one step, held-out ones included; what is None was not measured: left out.

        Raises:
            ValueError: `step` is not beyond the last one logged. All of a step's metrics go into one call.
        """
        if self._closed:
            return
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(
                f"step {step} logged after step {self._last_step}: steps ascend, each is logged in one call"
            )
        self._last_step = step
        row = {"step": step, **{name: value for name, value in metrics.items() if value is not None}}
        self._attempt("metrics.jsonl", self._file.write, row)
        self._attempt("W&B", self._wandb.log, step, row)

    def rewind(self, step: int) -> None:
        """The run goes back to `step`: metrics.jsonl forgets what came after; W&B keeps it, and drops the new rows."""
        if self._closed or self._last_step is None:
            return
        self._attempt("metrics.jsonl", self._file.cut, step)
        self._wandb.drop_through(self._last_step)
        self._last_step = step

    def close(self, status: Status = "finished") -> None:
        """Draw loss.png, end the W&B run and say what was lost; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._file.close()
        self._attempt("loss.png", lambda: draw_loss(read_metrics(self._file.path), self.plot_path, self._name))
        self._attempt("W&B", self._wandb.finish, status)
        for sink, count in self._failures.items():
            if count > 1:
                self._warn(f"{sink}: {count} writes failed in all")

    def _attempt(self, sink: str, action: Callable[..., object], *args: Any) -> None:
        """Run `action`; a failure is warned of once per sink, and counted."""
        try:
            action(*args)
        except Exception as error:
            self._failures[sink] = self._failures.get(sink, 0) + 1
            if self._failures[sink] == 1:
                self._warn(f"{sink} failed, training goes on without it: {cause(error)}")


class MetricsFile:
    """metrics.jsonl: one JSON object per line, `step` first, written at once and whole; not finite is null.

    When the run resumes at step S the rows beyond S are cut (written aside, then renamed); when it starts
    afresh, all are. So no step stands twice.

    Attributes:
        logged_step: the last step that was in it before; 0 for none.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self.path, self._torn, self.logged_step = path, False, 0
        try:
            if path.exists():
                rows = read_metrics(path)
                self.logged_step = rows[-1]["step"] if rows else 0
                self._keep(resume_step or 0)
            self._file = self._open()
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; choose another run.dir") from error

    def cut(self, step: int) -> None:
        """Forget the rows beyond `step`."""
        os.close(self._file)
        try:
            self._keep(step)
        finally:
            self._file = self._open()

    def _keep(self, step: int) -> None:
        kept = [json.dumps(row) + "\n" for row in read_metrics(self.path) if row["step"] <= step]
        aside = self.path.with_suffix(".jsonl.tmp")
        aside.write_text("".join(kept), encoding="utf-8")
        aside.replace(self.path)

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, row: dict[str, Any]) -> None:
        if not self.path.exists():  # removed, perhaps with its folder
            os.close(self._file)
            self._file, self._torn = self._open(), False
        plain = {name: _plain(value) for name, value in row.items()}
        line = (json.dumps(plain, allow_nan=False) + "\n").encode()
        if self._torn:  # a full disk left half a line: end it, readers skip it
            line = b"\n" + line
        # One write, so that whoever follows the file sees whole lines. It may be cut short where a disk is
        # full; the second then raises with the cause.
        written = os.write(self._file, line)
        self._torn = written < len(line)
        if self._torn:
            os.write(self._file, line[written:])
            self._torn = False

    def close(self) -> None:
        os.close(self._file)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order; lines that a crash or a full disk left half-written are skipped.

    A step that stands twice (which this module never writes) keeps its last row.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def last_row(path: Path) -> dict[str, Any] | None:
    """The last whole row of a metrics.jsonl, which may be long and still be written; None where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            if isinstance(row := json.loads(line), dict) and isinstance(row.get("step"), int):
                return row
    return None


def _plain(value: float | int) -> float | int | None:
    """`value` as JSON can hold it: torch's and numpy's scalars become Python's, the non-finite null."""
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: of the GPU's memory, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage's: Linux hands a new process the peak of the one that started it.
    if (status := Path("/proc/self/status")).exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
