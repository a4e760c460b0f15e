"""What run folders hold, read for the page: those of runs that go on, were killed or came from older versions too."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from shardopt.errors import InputError
from shardopt.pretrain import strict_yaml
from shardopt.pretrain.events import read_events, state_after
from shardopt.pretrain.jsonl import read_objects
from shardopt.pretrain.lock import look_at
from shardopt.pretrain.metrics import read_metrics


@dataclass(frozen=True)
class Record:
    """A run as its folder tells it.

    Attributes:
        name: of the folder, with those above it where several runs have the same.
        config: as config.yaml has it.
        rows: of its metrics, one per step.
        events: oldest first; none of a run from before there were any.
        samples: text by `step`.
        data: the report on its text; None where there is none.
        running: whether a process has it now.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    data: dict[str, Any] | None
    running: bool

    @property
    def steps(self) -> int | None:
        """Those that the config asks for."""
        train = self.config.get("train")
        return train.get("steps") if isinstance(train, dict) else None

    @property
    def state(self) -> str:
        """running, finished, stopped, failed, killed, or "unfinished" where no events tell which."""
        if self.running:
            return "running"
        if self.events:
            return state_after(self.events[-1])
        return "finished" if self.rows and self.rows[-1]["step"] == self.steps else "unfinished"

    @property
    def start(self) -> dict[str, Any]:
        """The facts of the newest start; none are known of a run without events."""
        return next((event for event in reversed(self.events) if event["event"] == "start"), {})


def read(paths: Sequence[Path]) -> list[Record]:
    """The runs in `paths`: run folders, and folders of runs, such as a study's, each once.

    Raises:
        InputError: a path holds no run, or a file of a run cannot be read.
    """
    folders = {folder.resolve(): folder for path in paths for folder in runs_in(path)}
    records = [_read(folder) for folder in folders.values()]
    return [replace(one, name=name) for one, name in zip(records, _names([r.folder for r in records]), strict=True)]


def runs_in(path: Path) -> list[Path]:
    """`path` itself where it is a run's folder, else the runs in it.

    Raises:
        InputError: there is none.
    """
    if (path / "config.yaml").is_file():
        return [path]
    found = sorted((config.parent for config in path.glob("*/config.yaml")), key=lambda p: _natural(p.name))
    if not found:
        raise InputError(f"{path} holds no run: give a run's folder, such as runs/NAME, or one with runs in it")
    return found


def _read(folder: Path) -> Record:
    metrics, samples, data = (folder / name for name in ("metrics.jsonl", "samples.jsonl", "data.json"))
    try:
        config = strict_yaml.parse((folder / "config.yaml").read_text(encoding="utf-8"))
        return Record(
            folder,
            folder.name,
            config if isinstance(config, dict) else {},
            read_metrics(metrics) if metrics.exists() else [],
            read_events(folder / "events.jsonl"),
            read_objects(samples) if samples.exists() else [],
            json.loads(data.read_text(encoding="utf-8")) if data.exists() else None,
            look_at(folder / ".lock")[0] in ("held", "silent"),
        )
    except OSError as e:
        raise InputError(f"cannot read {folder}: {e.strerror or e}") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise InputError(f"{folder} has a file that is damaged: {' '.join(str(e).split())}") from e


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of paths, of one length for those with the same last part, that tell all apart."""
    paths = [folder.resolve() for folder in folders]
    names = [path.name for path in paths]
    for parts in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        counts = Counter(names)
        names = [
            name if counts[name] == 1 else "/".join(p.parts[-parts:]) for name, p in zip(names, paths, strict=True)
        ]
    return names


def _natural(name: str) -> list[str | int]:
    """seed2 before seed10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
