"""The record of a run: metrics.jsonl, its pages in W&B and TensorBoard, and loss.png at the end.

A tracker that fails never stops training: it warns once, with the cause, goes on, and says at the end how
much was lost. Only what is known before the first step is an error: a folder that cannot be written, a W&B
mode that was asked for by name and cannot be had.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from shardopt.errors import InputError
from shardopt.pretrain.events import EventsFile
from shardopt.pretrain.plot import draw_loss
from shardopt.pretrain.record import read_metrics, summary
from shardopt.pretrain.replacing import replacing
from shardopt.pretrain.report import Holdings
from shardopt.pretrain.sink import EventKind, Sink, Status
from shardopt.pretrain.tensorboard import TensorboardLog
from shardopt.pretrain.tracking import TrackingConfig
from shardopt.pretrain.wandb_run import WandbRun, cause


class Tracker:
    """Writes one row of metrics per logged step to every sink, on rank 0; on the other ranks every method does nothing.

    The sinks are metrics.jsonl, W&B, and TensorBoard where it is asked for; samples of text are kept in samples.jsonl,
    what happens to the run in events.jsonl.

    Args:
        folder: the run folder.
        config: the `tracking` section.
        run_config, run_name, run_id: see `WandbRun`; the name is also the title of loss.png.
        resume_step: the step of the checkpoint that the run continues from; None where it starts afresh.
        about: facts about the run; see `about`.
        is_main: whether this is rank 0. Construct it on all ranks under `Ranks.together`.
        warn: called with one line.

    Attributes:
        run_id: of W&B, for the checkpoints; None on other ranks and where there never was W&B.
        where: by the name of a sink, its page or the command that shows it.

    Raises:
        InputError, MissingExtraError: metrics.jsonl cannot be written, or see `WandbRun` and `TensorboardLog`.
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
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.plot_path = folder / "loss.png"
        self._name, self._warn, self._about = run_name, warn, dict(about or {})
        self._last_step = resume_step
        self._failures: dict[str, int] = {}
        self._closed = not is_main
        self._sinks: list[Sink] = []
        self.run_id: str | None = None
        if is_main:
            self._file = MetricsFile(folder / "metrics.jsonl", resume_step)
            if resume_step is None and (lost := self._file.logged_step):
                warn(
                    f"{folder} has metrics up to step {lost:,}, but there is no checkpoint: the run begins anew, and "
                    f"so do its metrics"
                )
            samples = MetricsFile(folder / "samples.jsonl", resume_step, keeps="text")
            told = {**run_config, "about": self._about}
            wandb = WandbRun(folder, config.wandb, told, run_name, self._file.logged_step, run_id, warn, samples.read())
            self._sinks = [self._file, samples, EventsFile(folder / "events.jsonl"), wandb]
            if config.tensorboard:
                self._sinks.append(TensorboardLog(folder, resume_step or 0, self._about))
            self.run_id = wandb.id

    @property
    def where(self) -> dict[str, str]:
        return {sink.name: sink.where for sink in self._sinks if sink.where is not None}

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
        self._all(lambda sink: sink.log(step, row))

    def sample(self, step: int, text: str) -> None:
        """Record text that the model has written after `step`."""
        if not self._closed:
            self._all(lambda sink: sink.sample(step, text))

    def start(self, step: int, held: Holdings, origin: Mapping[str, object]) -> None:
        """Record a start that goes on after `step`, with the memory of each rank and where a branch comes from."""
        facts = {"about": self._about, "memory": held.as_dict(), "origin": {k: str(v) for k, v in origin.items()}}
        self.event("start", step, **facts)

    def warned(self, text: str) -> None:
        """Record a warning, at the last step that was logged."""
        self.event("warning", self._last_step or 0, text=text)

    def event(self, kind: EventKind, step: int, **facts: Any) -> None:
        """Record what has happened after `step`."""
        if not self._closed:
            self._all(lambda sink: sink.event(kind, step, facts))

    def keep(self, checkpoint: Path, export: Path | None) -> None:
        """Hand the newest checkpoint, and the export if there is one, to the sinks that keep them."""
        if not self._closed:
            self._all(lambda sink: sink.keep("checkpoint", checkpoint))
            if export is not None:
                self._all(lambda sink: sink.keep("export", export))

    def rewind(self, step: int) -> None:
        """The run goes back to `step`: the files forget what came after; W&B keeps it, and drops the new rows."""
        if self._closed or (last := self._last_step) is None:
            return
        self._all(lambda sink: sink.rewind(step, last))
        self._last_step = step

    def close(self, status: Status = "finished", reason: str = "") -> None:
        """Draw loss.png, end the sinks and say what was lost; a second call does nothing.

        Args:
            reason: why a run that is not finished has ended.
        """
        if self._closed:
            return
        self.event(status, self._last_step or 0, **({"text": reason} if reason else {}))
        self._closed = True
        rows: list[dict[str, Any]] = []
        self._attempt("metrics.jsonl", lambda: rows.extend(self._file.read()))
        self._attempt("loss.png", lambda: draw_loss(rows, self.plot_path, self._name))
        self._all(lambda sink: sink.close(status, summary(rows)))
        for sink, count in self._failures.items():
            if count > 1:
                self._warn(f"{sink}: {count} writes failed in all")

    def _all(self, action: Callable[[Sink], object]) -> None:
        for sink in self._sinks:
            self._attempt(sink.name, partial(action, sink))

    def _attempt(self, name: str, action: Callable[[], object]) -> None:
        """Run `action`; a failure is warned of once per sink, and counted."""
        try:
            action()
        except Exception as error:
            self._failures[name] = self._failures.get(name, 0) + 1
            if self._failures[name] == 1:
                self._warn(f"{name} failed, training goes on without it: {cause(error)}")


class MetricsFile(Sink):
    """A file of one JSON object per line, `step` first, written at once and whole; not finite is null.

    When the run resumes at step S the rows beyond S are cut (written aside, then renamed); when it starts
    afresh, all are. So no step stands twice.

    Args:
        path: of the file; one of samples is there once there is one.
        resume_step: see `Tracker`.
        keeps: what is written in it: rows of metrics, or samples of text.

    Attributes:
        logged_step: the last step that was in it before; 0 for none.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: Path, resume_step: int | None, keeps: Literal["metrics", "text"] = "metrics") -> None:
        self.name, self.path, self._keeps = path.name, path, keeps
        self._torn, self.logged_step = False, 0
        self._file: int | None = None
        try:
            if path.exists():
                rows = read_metrics(path)
                self.logged_step = rows[-1]["step"] if rows else 0
                self._keep(resume_step or 0)
            if keeps == "metrics":
                self._file = self._open()
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; choose another run.dir") from error

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        if self._keeps == "metrics":
            self._write(row)

    def sample(self, step: int, text: str) -> None:
        if self._keeps == "text":
            self._write({"step": step, "text": text})

    def rewind(self, step: int, last: int) -> None:
        self._end()
        if self.path.exists():
            self._keep(step)

    def close(self, status: Status, summary: Mapping[str, float | int]) -> None:
        self._end()

    def read(self) -> list[dict[str, Any]]:
        """Its rows; see `read_metrics`."""
        return read_metrics(self.path) if self.path.exists() else []

    def _end(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _keep(self, step: int) -> None:
        kept = [json.dumps(row) + "\n" for row in read_metrics(self.path) if row["step"] <= step]
        with replacing(self.path) as aside:
            aside.write_text("".join(kept), encoding="utf-8")

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._file is None or not self.path.exists():  # removed, perhaps with its folder
            self._end()
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


def _plain(value: float | int | str) -> float | int | str | None:
    """`value` as JSON can hold it: torch's and numpy's scalars become Python's, the non-finite null."""
    if isinstance(value, int | str):
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
