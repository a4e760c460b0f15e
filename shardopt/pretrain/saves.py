"""What a run does about a save that a disk or a store does not take."""

from __future__ import annotations

from collections.abc import Callable

from shardopt.checkpoint import Saver
from shardopt.errors import StorageError

_FAILED_SAVES = 3


def attempt(saver: Saver, warn: Callable[[str], None], save: Callable[[], None], last: bool = False) -> None:
    """Save with `saver`, or wait for a save. Where it is not taken the run is warned and goes on.

    Raises:
        StorageError: it is the `last` save, or none of `_FAILED_SAVES` in a row was taken.
    """
    try:
        save()
    except StorageError as error:
        failed = saver.failed
        if failed >= _FAILED_SAVES:
            raise StorageError(f"{error}. The run ends, since {failed} saves in a row have failed") from error
        if last:
            raise
        warn(f"{error}. The run goes on, and saves again later ({failed} in a row have failed)")
