"""What run folders hold, read for the page: those of runs that go on, were killed or came from older versions too."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from shardopt.errors import InputError
from shardopt.pretrain import strict_yaml
from shardopt.pretrain.events import read_events, state_after
from shardopt.pretrain.lock import look_at
from shardopt.pretrain.record import read_metrics
from shardopt.rows import read_objects, unreadable_lines

_T = TypeVar("_T")


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
        damage: what of its files cannot be read, a line for each file, which begins with its name.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    data: dict[str, Any] | None
    running: bool
    damage: list[str]

    def section(self, name: str) -> dict[str, Any]:
        """A section of the config; empty where it has none."""
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}

    @property
    def steps(self) -> int | None:
        """Those that the config asks for."""
        steps = self.section("train").get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def step(self) -> int:
        """The last one that its metrics tell, or where there are none its events."""
        return next((one["step"] for one in [*self.rows[-1:], *self.events[-1:]]), 0)

    @property
    def stages(self) -> list[tuple[int, str]]:
        """The stages that the run has come to after its first: their `from_step`, and what changes there."""
        stages, begun = self.section("train").get("stages"), []
        for stage in stages if isinstance(stages, list) else ():
            match stage:
                case {"from_step": int(step)} if step < self.step:
                    told = {key: value for key, value in stage.items() if key != "from_step" and value is not None}
                    begun.append((step, f"stage from step {step + 1:,}: {_in_words(told)}"))
        return begun

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
        InputError: a path holds no run.
    """
    folders = {folder.resolve(): folder for path in paths for folder in runs_in(path)}
    records = [_read(folder) for folder in folders.values()]
    return [replace(one, name=name) for one, name in zip(records, _names([r.folder for r in records]), strict=True)]


def runs_in(path: Path) -> list[Path]:
    """`path` itself where it is a run's folder, else the runs in it, those without a config.yaml too.

    Raises:
        InputError: there is none, or `path` is a run's without a config.yaml.
    """
    if (path / "config.yaml").is_file():
        return [path]
    if (path / "metrics.jsonl").is_file():
        raise InputError(f"{path / 'config.yaml'}: there is none, so that nothing tells what run this is: restore it")
    inner = {file.parent for name in ("config.yaml", "metrics.jsonl") for file in path.glob(f"*/{name}")}
    found = sorted(inner, key=lambda p: _natural(p.name))
    if not found:
        raise InputError(f"{path} holds no run: give a run's folder, such as runs/NAME, or one with runs in it")
    return found


def _read(folder: Path) -> Record:
    damage: list[str] = []

    def part(name: str, read: Callable[[Path], _T], nothing: _T, needed: bool = False) -> _T:
        """What a file says; what cannot be read is told in `damage`, and the page does without it."""
        file = folder / name
        try:
            return read(file) if needed or file.exists() else nothing
        except OSError as e:
            damage.append(f"{name} cannot be read: {e.strerror or e}")
        except (yaml.YAMLError, ValueError, RecursionError) as e:
            damage.append(f"{name} is damaged: {' '.join(str(e).split())}")
        return nothing

    def lines(name: str, read: Callable[[Path], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        if count := part(name, unreadable_lines, 0):
            damage.append(f"{name}: {count:,} line{'s' * (count != 1)} cannot be read")
        return part(name, read, [])

    return Record(
        folder,
        folder.name,
        part("config.yaml", _config, {}, needed=True),
        lines("metrics.jsonl", read_metrics),
        lines("events.jsonl", read_events),
        lines("samples.jsonl", read_objects),
        part("data.json", lambda file: json.loads(file.read_text(encoding="utf-8")), None),
        part(".lock", lambda file: look_at(file)[0] in ("held", "silent"), False),
        list(dict.fromkeys(damage)),
    )


def _config(file: Path) -> dict[str, Any]:
    config = strict_yaml.parse(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError("it holds no sections")
    return config


def _in_words(values: dict[str, Any]) -> str:
    parts = []
    for key, value in values.items():
        inner = ", ".join(f"{name} {one}" for name, one in value.items()) if isinstance(value, dict) else value
        parts.append(f"{key} {inner}")
    return "; ".join(parts)


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
