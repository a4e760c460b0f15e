"""`shardopt runs`: the runs in a folder, those of studies in it too, and how far each has come."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast

from rich.table import Table
from rich.text import Text

from shardopt.errors import InputError, no_folder
from shardopt.pretrain.events import state_after
from shardopt.pretrain.lock import look_at
from shardopt.pretrain.record import recorded_config
from shardopt.pretrain.report import duration, one_line
from shardopt.rows import newest_rows

# Rows of metrics whose steps tell the time left.
_RECENT = 16
_STYLES = {"running": "green", "silent": "yellow", "failed": "red", "killed": "red", "damaged": "red"}
# A terminal of this width has every column, and names as long as they are.
_WIDE = 80
# Characters of a name for which a narrower one goes without other columns.
_LEAST_NAME = 8

State = Literal["new", "running", "silent", "finished", "stopped", "failed", "killed", "damaged"]
"""new: it has a config and has not begun. silent: it holds its lock, but has not renewed it. stopped: before its last
step, on request. killed: it could not say why it ended. damaged: its folder cannot be read."""


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
        raise no_folder(folder, "that of the runs, run.dir")
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
            return Listed(name, folder, "damaged", _no_config(folder)) if metrics.exists() else None
        rows = list(islice(newest_rows(metrics), _RECENT))
        holdout_loss = next(_figures(newest_rows(metrics), "eval_loss"), None)
        step, steps = _step(folder, rows), config["train"]["steps"]
        written = (metrics if metrics.exists() else folder / "config.yaml").stat().st_mtime
        state, reason = _state(folder, step >= steps, bool(rows))
    except (OSError, InputError) as error:
        return Listed(name, folder, "damaged", str(error))
    times = list(_figures(rows, "step_time"))
    return Listed(
        name,
        folder,
        state,
        reason,
        step,
        steps,
        next(_figures(rows, "loss"), None),
        holdout_loss,
        fmean(times) * (steps - step) if times and step < steps else None,
        config["engine"]["name"],
        max(0.0, time.time() - written),
    )


def _figures(rows: Iterable[dict[str, Any]], key: str) -> Iterator[float]:
    """The values of rows that have one, finite ones alone."""
    for row in rows:
        if isinstance(value := row.get(key), float) and math.isfinite(value):
            yield value


def _no_config(folder: Path) -> str:
    """Why the metrics in a folder are of no run that is known."""
    config = folder / "config.yaml"
    if not config.exists():
        return "it has metrics and no config.yaml"
    if config.is_dir():
        return "it has metrics, and its config.yaml is a folder"
    what = "is empty" if not config.read_bytes().strip() else "is not of a run of shardopt"
    return f"it has metrics, and its config.yaml {what}"


def _step(folder: Path, rows: Sequence[dict[str, Any]]) -> int:
    """The last step of the rows; of a run that is finished and has none, that of its events."""
    if rows:
        return rows[0]["step"]
    event = next(newest_rows(folder / "events.jsonl"), {})
    return event["step"] if state_after(event) == "finished" else 0


def _state(folder: Path, done: bool, begun: bool) -> tuple[State, str | None]:
    """What a run is doing, by its lock and what it has left, and why; `done`: its steps are; `begun`: it has rows."""
    lock, whose = look_at(folder / ".lock")
    if lock == "held":
        return "running", whose
    if lock == "silent":
        return "silent", f"{whose} does not renew its lock: it is suspended, or has died and another has its number"
    event = next(newest_rows(folder / "events.jsonl"), {})
    if lock == "left" or (event and state_after(event) == "killed"):
        return "killed", f"{whose or 'its process'} has died and could not say why"
    if event:
        return cast(State, state_after(event)), text if isinstance(text := event.get("text"), str) else None
    if not begun:
        return "new", None
    return ("finished" if done else "stopped"), None


def table(runs: Sequence[Listed], width: int = _WIDE) -> Table:
    """The runs for a terminal of `width` columns; a narrow one has fewer columns, and names that are cut."""
    columns = {
        "run": [one_line(run.name) for run in runs],
        "state": [Text(run.state, _STYLES.get(run.state, "")) for run in runs],
        "step": [Text("" if run.step is None else f"{run.step:,}/{run.steps:,}") for run in runs],
        "loss": [Text("" if run.loss is None else f"{run.loss:.3f}") for run in runs],
        "held-out": [Text("" if run.holdout_loss is None else f"{run.holdout_loss:.3f}") for run in runs],
        "left": [Text("" if run.seconds_left is None else duration(run.seconds_left)) for run in runs],
        "engine": [one_line(run.engine or "") for run in runs],
        "age": [Text("" if run.age is None else _age(run.age)) for run in runs],
    }
    widths = {header: max(len(header), *(cell.cell_len for cell in cells)) for header, cells in columns.items()}
    widths["run"] = min(widths["run"], _LEAST_NAME)
    wide = width >= _WIDE
    for header in () if wide else ("age", "engine", "left", "held-out", "loss", "step", "state"):
        if sum(widths[kept] + 1 for kept in columns) > width:
            del columns[header]
    # rich would take from the other columns, too, what the names are too long by.
    rest = None if wide else width - sum(widths[kept] + 1 for kept in columns if kept != "run") - 1
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("run", overflow="fold" if wide else "ellipsis", no_wrap=not wide, max_width=rest)
    for header in columns:
        if header != "run":
            table.add_column(header, justify="left" if header in ("state", "engine") else "right", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def reasons(runs: Sequence[Listed]) -> dict[str, str]:
    """Why runs have ended, or cannot be read, by their names."""
    return {run.name: f"{run.state}: {run.reason}" for run in runs if run.reason and run.state != "running"}


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
