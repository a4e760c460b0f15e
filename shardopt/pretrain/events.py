"""events.jsonl: what has happened to a run, in the order of time: starts, saves, warnings, ends."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardopt.pretrain.sink import EventKind, Sink
from shardopt.rows import read_objects


class EventsFile(Sink):
    """A file of one JSON object per event: `time` (seconds since 1970), `event` (its kind), `step`, and facts.

    It is added to and never cut, so that it tells every start; one without an end after it was killed.
    """

    def __init__(self, path: Path) -> None:
        self.name, self.path = path.name, path

    def event(self, kind: EventKind, step: int, facts: Mapping[str, Any]) -> None:
        line = json.dumps({"time": round(time.time(), 3), "event": kind, "step": step, **facts}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = line if file.read() == b"\n" else "\n" + line  # a full disk left half a line: end it
            file.write(line.encode())


ENDS = {"finished": "finished", "interrupted": "stopped", "failed": "failed"}
"""The kinds of events with which a start ends, and the state in which each leaves the run."""


def state_after(event: Mapping[str, Any]) -> str:
    """finished, stopped, failed, or killed: what a run is whose last event this is, and that no process has now."""
    return ENDS.get(event.get("event", ""), "killed")


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; none where there is no such file."""
    rows = read_objects(path) if path.exists() else []
    whole = {"time": int | float, "event": str, "step": int}
    return [row for row in rows if all(isinstance(row.get(key), kind) for key, kind in whole.items())]
