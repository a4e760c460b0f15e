"""Files of one JSON object a line, which a process that is killed may leave with half a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_objects(path: Path) -> list[dict[str, Any]]:
    """The objects of a file in order; lines that a crash or a full disk left half-written are skipped."""
    return [value for line in path.read_bytes().split(b"\n") if (value := _object(line)) is not None]


def unreadable_lines(path: Path) -> int:
    """Lines of a file that are no objects, but for the beginning of one at its end, which may still be written."""
    *whole, last = path.read_bytes().split(b"\n")
    lines = whole if last.startswith(b"{") else [*whole, last]
    return sum(_object(line) is None for line in lines if line.strip())


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # "[[[[", of a file that is something else
        return None
    return value if isinstance(value, dict) else None
