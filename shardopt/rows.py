"""Files of one JSON object a line, such as metrics.jsonl, which a process that is killed may leave with half a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Bytes of a file that are read at a time, from its end.
_TAIL = 1 << 16


def read_objects(path: Path) -> list[dict[str, Any]]:
    """The objects of a file in order; lines that a crash or a full disk left half-written are skipped."""
    return [value for line in path.read_bytes().split(b"\n") if (value := _object(line)) is not None]


def unreadable_lines(path: Path) -> int:
    """Lines of a file that are no objects, but for the beginning of one at its end, which may still be written."""
    *whole, last = path.read_bytes().split(b"\n")
    lines = whole if last.startswith(b"{") else [*whole, last]
    return sum(_object(line) is None for line in lines if line.strip())


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
                if (row := _object(line)) is not None and type(row.get("step")) is int:
                    yield row


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # "[[[[", of a file that is something else
        return None
    return value if isinstance(value, dict) else None
