"""Folders that take and lose their name by one rename, and are whole as long as they have it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from shardopt.checkpoint.store import sync

logger = logging.getLogger(__name__)


def swap_in(new: Path, folder: Path, previous: Path) -> None:
    """Give `new`, whose files are synced, the name `folder`; what has it is kept as `previous` until that is done.

    Killed between the two renames, a process leaves both: see `swap_back`.
    """
    if folder.exists():
        if previous.exists():
            shutil.rmtree(previous)
        previous.parent.mkdir(exist_ok=True)
        folder.rename(previous)
    new.rename(folder)
    sync(folder.parent)
    if previous.exists():
        delete(previous)


def swap_back(previous: Path, folder: Path) -> None:
    """Undo a `swap_in` that was killed between its renames; where it had come further, delete `previous`."""
    if folder.exists():
        delete(previous)
    else:
        previous.rename(folder)


def retire(folder: Path, doomed: Path) -> None:
    """Delete `folder`, which is renamed to `doomed` before; what cannot be stays, with a warning, for the next time."""
    if doomed.exists():
        delete(doomed)
    try:
        doomed.parent.mkdir(exist_ok=True)
        folder.rename(doomed)
    except OSError as error:
        warn_of(folder, error)
    else:
        delete(doomed)


def delete(folder: Path) -> None:
    """Delete what nobody reads any more; what cannot be deleted stays, with a warning, for the next time."""
    try:
        shutil.rmtree(folder)
    except OSError as error:  # NFS keeps a file that somebody has open, and says ENOTEMPTY
        warn_of(folder, error)


def warn_of(folder: Path, error: OSError) -> None:
    """Say that `folder` stays for now."""
    logger.warning("%s cannot be deleted (%s), which is tried again later", folder, error.strerror or error)
