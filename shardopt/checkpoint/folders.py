"""Checkpoint folders: written aside, renamed when whole, recognised, replaced and cleaned up.

A folder under its final name is always whole, whatever was killed when: it gets that name by one rename after
every byte is on the disk, and it loses it by one rename before anything in it is deleted.

    .NAME.partial     being written, or left by a run that died
    .NAME.previous    what NAME held before, for the moment between two renames
    .NAME.deleting    on its way out
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardopt.errors import InputError

DOCUMENT = "checkpoint.json"
INDEX = "index.json"
FORMAT = 4

_ASIDE = re.compile(r"\.(.+)\.(partial|previous|deleting)")
_STEP = re.compile(r"(?:step-(\d+)|\.step-(\d+)\.previous)")


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def read_document(folder: str | Path) -> dict[str, Any]:
    """A checkpoint's JSON: what the caller of `save` gave, and under "checkpoint" what was written.

    `document["checkpoint"]` has `format`, `torch`, `world_size`, `parameters` ({name: {shape, kinds: {kind: {dtypes,
    and format and layouts where it is a block format}}}}), `step_counts` ({name: {"step": 3, ...}}), `extras` (their
    keys) and `files` ({name: bytes}).

    Raises:
        InputError: not a checkpoint, or one that this version cannot read.
    """
    path = Path(folder) / DOCUMENT
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        written = document["checkpoint"]
        version = written["format"]
    except FileNotFoundError:
        raise InputError(f"{folder} is not a complete checkpoint: it has no {DOCUMENT}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not the document of a shardopt checkpoint ({error!r})") from error
    if version != FORMAT:
        raise InputError(
            f"{folder} has checkpoint format {version!r}, this shardopt reads format {FORMAT}: "
            f"load it with the version that wrote it"
        )
    return document


def is_complete(folder: Path) -> bool:
    """True where everything that the checkpoint's document lists is there, with the size it was written with."""
    try:
        files = read_document(folder)["checkpoint"]["files"]
        return (folder / INDEX).is_file() and all(
            (folder / name).stat().st_size == size for name, size in files.items()
        )
    except (InputError, OSError, KeyError, AttributeError, TypeError):
        return False


def complete_steps(root: Path) -> list[Path]:
    """Every complete checkpoint under `root`, newest first, each step once."""
    found: dict[int, Path] = {}
    # Sorted by name, ".step-….previous" comes before "step-…", which then takes its place.
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        match = _STEP.fullmatch(folder.name)
        if match and is_complete(folder):
            found[int(match[1] or match[2])] = folder
    return [found[step] for step in sorted(found, reverse=True)]


def latest(root: str | Path) -> Path | None:
    """The complete checkpoint under `root` with the highest step; None where there is none.

    Half-written folders are ignored. Reads the disk and nothing else: ask on rank 0 and broadcast the answer
    (`ranks.from_main(latest(root))`), since a network file system may show ranks different moments.
    """
    complete = complete_steps(Path(root))
    return complete[0] if complete else None


def partial_of(folder: Path) -> Path:
    """The folder to write in before it gets the name `folder`."""
    return _aside(folder, "partial")


def begin(folder: Path) -> Path:
    """Make `partial_of(folder)`, new and empty, and return it.

    Raises:
        InputError: it cannot be made.
    """
    partial = partial_of(folder)
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder.parent}: {error.strerror}; change run.dir") from error
    return partial


def abandon(folder: Path) -> None:
    """Delete what was being written for `folder`, after a failure that is being raised."""
    shutil.rmtree(partial_of(folder), ignore_errors=True)


def publish(partial: Path, folder: Path, replaceable: Callable[[Path], bool]) -> None:
    """Give `partial`, whose files are synced, the name `folder`; what had that name is deleted after that.

    Raises:
        InputError: `folder` holds something that is not `replaceable`.
    """
    sync(partial)
    previous = _aside(folder, "previous")
    if folder.exists():
        if any(folder.iterdir()):
            if not replaceable(folder):
                raise InputError(f"{folder} holds something else: move it away, or choose another folder")
            if previous.exists():
                shutil.rmtree(previous)
            folder.rename(previous)
        else:
            folder.rmdir()
    partial.rename(folder)
    sync(folder.parent)
    if previous.exists():
        shutil.rmtree(previous)


def remove(folder: Path) -> None:
    """Delete a checkpoint; killed halfway, nothing that looks complete is left."""
    doomed = _aside(folder, "deleting")
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def clean(root: Path) -> None:
    """Put `root` in order after a run that died: leftovers go, one caught mid-replacement comes back."""
    for folder in sorted(root.iterdir()):
        match = _ASIDE.fullmatch(folder.name)
        if not match or not _STEP.fullmatch(match[1]):
            continue
        if match[2] == "previous" and not (root / match[1]).exists():
            folder.rename(root / match[1])
        else:
            shutil.rmtree(folder)


def prune(root: Path, keep: int, written: Path) -> None:
    """Delete all but the `keep` newest complete checkpoints and the one just `written`."""
    for folder in complete_steps(root)[keep:]:
        if folder != written:
            remove(folder)


def write_json(path: Path, content: Any) -> None:
    """`content` as strict JSON, on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make the contents of a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")
