"""Files that are written aside and then take the place of the old ones, so that none is ever there in half."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Where to write what is to take the place of `target`. After an exception `target` is as it was."""
    aside = target.with_name(f"{target.name}.tmp")
    try:
        yield aside
        aside.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):  # the error that is under way is the one to be told
            aside.unlink(missing_ok=True)
        raise
