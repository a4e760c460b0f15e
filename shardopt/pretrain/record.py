"""What a run has recorded in its folder, read without torch and from the end: its config, its newest metrics."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from shardopt.errors import InputError, StorageError

# Bytes of a file that are read at a time, from its end.
_TAIL = 1 << 16


def recorded_config(folder: Path) -> dict[str, Any] | None:
    """The config that a run has recorded in its folder; None where the folder is no run's.

    Raises:
        InputError: it is damaged, or cannot be read.
    """
    recorded = folder / "config.yaml"
    if not recorded.is_file():
        return None
    try:
        tree = yaml.load(recorded.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as e:
        raise StorageError(f"cannot read {recorded}: {e.strerror or e}") from e
    except (yaml.YAMLError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as e:  # !!int x
        raise InputError(f"{recorded} is damaged: {' '.join(str(e).split())}") from e
    match tree:
        case {"run": {"name": str()}, "train": {"steps": int()}, "data": dict(), "engine": {"name": str()}}:
            return tree
    return None


def newest_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a metrics.jsonl, or events of an events.jsonl, from the last one on.

    The file may be long, and still be written; there are none where there is no file.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        end, rest = file.seek(0, os.SEEK_END), b""
        while end:
            start = max(0, end - _TAIL)
            file.seek(start)
            lines = (file.read(end - start) + rest).split(b"\n")
            rest, end = (lines.pop(0) if start else b""), start
            for line in reversed(lines):
                with contextlib.suppress(ValueError, RecursionError):
                    if isinstance(row := json.loads(line), dict) and type(row.get("step")) is int:
                        yield row


def last_row(path: Path) -> dict[str, Any] | None:
    """The last whole row of a metrics.jsonl; None where there is none."""
    return next(newest_rows(path), None)
