"""`shardopt runs`: the runs in a folder, those of studies in it too, and how far each has come."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast

from rich.table import Table

from shardopt.errors import InputError, nearest_path
from shardopt.pretrain.events import state_after
from shardopt.pretrain.lock import look_at
from shardopt.pretrain.record import newest_rows, recorded_config
from shardopt.pretrain.report import duration, printable

# Rows of metrics whose steps tell the time left.
_RECENT = 16
_STYLES = {"running": "green", "silent": "yellow", "failed": "red", "killed": "red", "damaged": "red"}

State = Literal["running", "silent", "finished", "stopped", "failed", "killed", "damaged"]
"""silent: it holds its lock, but has not renewed it. stopped: before its last step, on request. killed: it could not
say why it ended. damaged: its folder cannot be read."""


@dataclass(frozen=True)
class Listed:
    """A run in a list; what is None is not known.

    Attributes:
        name: its folder, below the one that is listed.
        reason: why it has failed, who has killed it, what is damaged.
        step, steps: done, of those that the config says.
        loss, holdout_loss: the newest of its metrics, nats per token.
        seconds_left: that the steps still to be done take at the rate of the last ones.
        age: seconds since it has written metrics, or begun.
    """

    name: str
    folder: Path
    state: State
    reason: str | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    holdout_loss: float | None = None
    seconds_left: float | None = None
    engine: str | None = None
    age: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"folder": str(self.folder)}


SORTS: dict[str, Callable[[Listed], Any]] = {
    "age": lambda run: (run.age is None, run.age),
    "name": lambda run: run.name,
    "loss": lambda run: (run.loss is None, run.loss),
    "held-out": lambda run: (run.holdout_loss is None, run.holdout_loss),
}


def list_runs(folder: Path, sort: str = "age") -> list[Listed]:
    """The runs in `folder`, which may be a folder of runs, a study's, or a run's own; other folders are left out.

    Args:
        sort: a key of `SORTS`, the least first; those that run come before all others under age.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give that of the runs, run.dir{nearest_path(folder)}")
    found = (_listed(run, name) for run, name in _candidates(folder, folder.absolute().name))
    runs = sorted((run for run in found if run is not None), key=lambda run: run.name)
    return sorted(runs, key=SORTS[sort])


def _candidates(folder: Path, name: str, depth: int = 0) -> Iterator[tuple[Path, str]]:
    """Folders that may be a run's, `folder` itself or below it, in a study's too, and their names."""
    readable = os.access(folder, os.R_OK | os.X_OK)
    if not readable or any((folder / file).is_file() for file in ("config.yaml", "metrics.jsonl")):
        yield folder, name
    elif depth < 2:
        for inner in folder.iterdir():
            if inner.is_dir() and not inner.name.startswith("."):
                yield from _candidates(inner, f"{name}/{inner.name}" if depth else inner.name, depth + 1)


def _listed(folder: Path, name: str) -> Listed | None:
    """The run in a folder; None where it is another program's."""
    metrics = folder / "metrics.jsonl"
    try:
        config = recorded_config(folder)
        if config is None:
            return (
                None if not metrics.exists() else Listed(name, folder, "damaged", "it has metrics and no config.yaml")
            )
        rows = list(islice(newest_rows(metrics), _RECENT))
        scored = (row for row in newest_rows(metrics) if isinstance(row.get("eval_loss"), float))
        holdout_loss = next((row["eval_loss"] for row in scored), None)
        step, steps = rows[0]["step"] if rows else 0, config["train"]["steps"]
        written = (metrics if metrics.exists() else folder / "config.yaml").stat().st_mtime
        state, reason = _state(folder, step >= steps)
    except (OSError, InputError) as error:
        return Listed(name, folder, "damaged", str(error))
    times = [row["step_time"] for row in rows if isinstance(row.get("step_time"), float)]
    return Listed(
        name,
        folder,
        state,
        reason,
        step,
        steps,
        next((row["loss"] for row in rows if isinstance(row.get("loss"), float)), None),
        holdout_loss,
        fmean(times) * (steps - step) if times and step < steps else None,
        config["engine"]["name"],
        max(0.0, time.time() - written),
    )


def _state(folder: Path, done: bool) -> tuple[State, str | None]:
    """What a run is doing, by its lock and what it has left, and why; `done`: its steps are."""
    lock, whose = look_at(folder / ".lock")
    if lock == "held":
        return "running", whose
    if lock == "silent":
        return "silent", f"{whose} does not renew its lock: it is suspended, or has died and another has its number"
    event = next(newest_rows(folder / "events.jsonl"), {})
    if lock == "left" or (event and state_after(event) == "killed"):
        return "killed", f"{whose or 'its process'} has died and could not say why"
    if event:
        return cast(State, state_after(event)), event.get("text")
    return ("finished" if done else "stopped"), None


def table(runs: Sequence[Listed]) -> Table:
    """The runs for a terminal of 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    for header in ("step", "loss", "held-out", "left"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    table.add_column("age", justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            printable(run.name),
            f"[{_STYLES[run.state]}]{run.state}[/]" if run.state in _STYLES else run.state,
            "" if run.step is None else f"{run.step:,}/{run.steps:,}",
            "" if run.loss is None else f"{run.loss:.3f}",
            "" if run.holdout_loss is None else f"{run.holdout_loss:.3f}",
            "" if run.seconds_left is None else duration(run.seconds_left),
            printable(run.engine or ""),
            "" if run.age is None else _age(run.age),
        )
    return table


def reasons(runs: Sequence[Listed]) -> dict[str, str]:
    """Why runs have ended, or cannot be read, by their names."""
    return {run.name: f"{run.state}: {run.reason}" for run in runs if run.reason and run.state != "running"}


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
