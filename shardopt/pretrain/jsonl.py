"""Files of one JSON object a line, which a process that is killed may leave with half a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_objects(path: Path) -> list[dict[str, Any]]:
    """The objects of a file in order; lines that a crash or a full disk left half-written are skipped."""
    objects = []
    for line in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # "[[[[", of a file that is something else
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects
