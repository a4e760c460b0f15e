"""Files of one JSON object a line with its `step`, read from the end."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Bytes of a file that are read at a time, from its end.
_TAIL = 1 << 16


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
