"""What happened to a run, line by line: its starts and ends, saves, warnings, and figures that were not finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from shardopt.pretrain.events import ENDS
from shardopt.pretrain.page.records import Record
from shardopt.pretrain.page.tables import ranks

# Of one run, and of all, so that a page of many runs stays small.
_MOST_LINES, _ALL_LINES, _LEAST_LINES = 200, 2000, 10
_NO_END = "killed: it could not say why"


@dataclass(frozen=True)
class Line:
    """One event. `kind` is a word for its style: start, save, warning, finished, interrupted or failed."""

    time: str
    step: int | None
    kind: str
    text: str


@dataclass(frozen=True)
class Story:
    """The events of a run, oldest first, and how many older ones are left out."""

    lines: list[Line]
    left_out: int


def story(record: Record, runs: int = 1) -> Story:
    """The events of `record`, one of so many `runs`; saves in a row are one line."""
    stages = [Line("", step, "start", text) for step, text in record.stages]
    lines = [*_not_finite(record), *stages, *_lines(record)]
    most = max(_LEAST_LINES, min(_MOST_LINES, _ALL_LINES // runs))
    return Story(lines[-most:], max(0, len(lines) - most))


def _lines(record: Record) -> Iterable[Line]:
    before: Mapping[str, Any] | None = None
    for kind, group in groupby(record.events, key=lambda event: event["event"]):
        events = list(group)
        if kind == "save":
            yield _saves(events)
        else:
            for event in events:
                if kind == "start" and before is not None and before["event"] not in ENDS:
                    yield Line("", None, "failed", _NO_END)
                yield Line(_time(event), event["step"], kind, _words(event))
                before = event
        before = events[-1]
    if record.state == "killed":
        yield Line("", None, "failed", _NO_END)


def _saves(events: Sequence[Mapping[str, Any]]) -> Line:
    steps = [event["step"] for event in events]
    if len(steps) == 1:
        return Line(_time(events[0]), steps[0], "save", "saved a checkpoint")
    text = f"saved {len(steps):,} checkpoints, from step {steps[0]:,} on"
    return Line(_time(events[-1]), steps[-1], "save", text)


def _words(event: Mapping[str, Any]) -> str:
    text = str(event.get("text", ""))
    if event["event"] == "start":
        about, origin = event.get("about", {}), event.get("origin", {})
        known = [
            ranks(about) if "world_size" in about else "",
            *(str(about.get(name, "")) for name in ("device", "engine")),
            *(f"{name} {about[name]}" for name in ("shardopt", "torch") if name in about),
            f"commit {about['git_commit'][:10]}" if about.get("git_commit") else "",
            *(f"{name}: {value}" for name, value in origin.items()),
        ]
        return ", ".join([f"resumed at step {event['step']:,}" if event["step"] else "started", *filter(None, known)])
    if event["event"] == "interrupted":
        return f"stopped by {text}" if text else "stopped"
    if event["event"] == "failed":
        return f"failed: {text}" if text else "failed"
    return text or event["event"]


def _not_finite(record: Record) -> Iterable[Line]:
    """A line for each figure that a row has as null."""
    steps: dict[str, list[int]] = {}
    for row in record.rows:
        for key, value in row.items():
            if value is None:
                steps.setdefault(key, []).append(row["step"])
    for key, at in steps.items():
        more = f" and {len(at) - 1:,} more rows, up to step {at[-1]:,}" if len(at) > 1 else ""
        yield Line("", at[0], "warning", f"{key} is not finite at step {at[0]:,}{more}")


def _time(event: Mapping[str, Any]) -> str:
    return datetime.fromtimestamp(event["time"], UTC).strftime("%Y-%m-%d %H:%M:%S")
