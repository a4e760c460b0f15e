"""Checkpoint folders: written, recognised, replaced and cleaned up, whatever is killed when.

On this machine's file systems a folder under its final name is always whole: it gets that name by one rename after
every byte is on the disk, and it loses it by one rename before anything in it is deleted.

    .NAME.partial     being written, or left by a run that died
    .NAME.previous    what NAME held before, for the moment between two renames
    .NAME.deleting    on its way out

A store (`store`) has no rename. There a folder is a checkpoint from the moment its document is put, which names its
files, until the document is deleted, which is done first. Files have the save's id in their names, so that those of two
saves lie beside each other while one replaces the other; what no document names is left by a run that died.
"""

from __future__ import annotations

import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from shardopt.checkpoint import renaming
from shardopt.checkpoint.blocks import DamagedError, reading
from shardopt.checkpoint.document import DOCUMENT, read_document, records_of, write_bytes
from shardopt.checkpoint.store import as_folder, delete, delete_all, exists, is_local, listing, move, put_file, sync
from shardopt.errors import InputError, StorageError, few

logger = logging.getLogger(__name__)

_ASIDE = re.compile(r"\.(.+)\.(partial|previous|deleting)")
_STEP = re.compile(r"(?:step-(\d+)|\.step-(\d+)\.previous)")
_TRAINERS_STEP = re.compile(r"checkpoint-(\d+)")
_LAST = (DOCUMENT, "config.json", "model.safetensors.index.json")  # without which nobody takes a folder for whole
_OF_A_SAVE = re.compile(r".+-[0-9a-f]{32}\.\w+")  # see document.name_in


_writers: dict[Path, threading.Thread] = {}
"""Who has begun to write a folder."""


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step in the name of a checkpoint's folder; None where it is another name."""
    match = _STEP.fullmatch(name)
    return int(match[1] or match[2]) if match else None


def trainers_step_of(name: str) -> int | None:
    """The step in the name of a checkpoint folder of HF Trainer; None where it is another name."""
    match = _TRAINERS_STEP.fullmatch(name)
    return int(match[1]) if match else None


def final_name(name: str) -> str:
    """The name that a folder will have, or had, given that under which it is written or set aside."""
    match = _ASIDE.fullmatch(name)
    return match[1] if match else name


def is_complete(folder: Path) -> bool:
    """True where all files that the checkpoint's document lists are there, with the sizes they were written with."""
    try:
        return _incomplete(folder) is None
    except InputError:
        return False


def _incomplete(folder: Path) -> DamagedError | None:
    """What is wrong with a checkpoint, as far as its name and the sizes of its files tell.

    Raises:
        InputError: the folder cannot be read now, or is of another version.
    """
    try:
        document = read_document(folder)
        check_name(folder, document)
        with reading(folder):
            there = listing(folder)
        for name, record in records_of(document).items():
            if name not in there:
                raise DamagedError(f"{folder / name} is missing")
            if there[name] != record.size:
                raise DamagedError(f"{folder / name} is damaged: it has another size")
    except DamagedError as error:
        return error
    return None


def is_replaceable(folder: Path) -> bool:
    """True where all that lies in a folder is a complete checkpoint."""
    return is_complete(folder) and not _strangers(folder)


def _strangers(folder: Path) -> list[str]:
    """What a checkpoint's folder holds beside the checkpoint; what is left there of other saves, in a store, is not."""
    named = {DOCUMENT, *records_of(read_document(folder))}
    with reading(folder):
        beside = listing(folder).keys() - named
    return [name for name in beside if is_local(folder) or not _OF_A_SAVE.fullmatch(name)]


def check_name(folder: Path, document: dict[str, Any]) -> None:
    """Raise DamagedError where a checkpoint lies under the name of another step than it was saved as."""
    saved_as = document["checkpoint"]["name"]
    if step_of(folder.name) not in (None, step_of(saved_as)):
        raise DamagedError(f"{folder} is not of the step in its name: it was saved as {saved_as}")


def step_folders(root: Path) -> dict[int, Path]:
    """Everything under `root` that has the name of a checkpoint, by its step, newest first; in a store what has a
    document, too."""
    found: dict[int, Path] = {}
    with reading(root):
        # Sorted by name, ".step-….previous" comes before "step-…", which then takes its place.
        for name in sorted(listing(root)):
            step = step_of(name)
            if step is not None and (is_local(root) or exists(root / name / DOCUMENT)):
                found[step] = root / name
    return dict(sorted(found.items(), reverse=True))


def complete_steps(root: Path) -> list[Path]:
    """Every complete checkpoint under `root`, newest first, each step once."""
    return [folder for folder in step_folders(root).values() if is_complete(folder)]


def latest(root: str | Path) -> Path | None:
    """The complete checkpoint under `root` with the highest step; None where there is none.

    Half-written folders are ignored. Sizes of files are compared and nothing more; `latest_intact` reads them. Reads
    the disk alone: ask on rank 0 for all (`ranks.ask_main(lambda: latest(root))`), since a network file system may show
    ranks different moments.

    Raises:
        InputError: the disk cannot be read now, or a newer checkpoint is of another version.
    """
    return next((folder for folder in step_folders(as_folder(root)).values() if _incomplete(folder) is None), None)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that its step can be written again; its new name."""
    name = folder.name.removeprefix(".").removesuffix(".previous")
    aside = folder.with_name(f"{name}.damaged")
    while exists(aside):
        aside = aside.with_name(aside.name + "-again")
    if is_local(folder):
        return folder.rename(aside)
    # The document last: without one, the files that a process which dies here has not moved would be cleaned up.
    for file in sorted(listing(folder), key=lambda file: file == DOCUMENT):
        move(folder / file, aside / file)
    return aside


def partial_of(folder: Path) -> Path:
    """The folder to write in before it gets the name `folder`; in a store `folder` itself."""
    return _aside(folder, "partial") if is_local(folder) else folder


def check_writable(root: Path) -> None:
    """Raise InputError where no checkpoint can be written under `root`."""
    if is_local(root):
        begin(root / "probe").rmdir()
        del _writers[root / "probe"]
        return
    try:
        write_bytes(root / ".probe", b"")
        delete(root / ".probe")
    except OSError as error:
        raise _unwritable(root, error) from error


def begin(folder: Path) -> Path:
    """Make `partial_of(folder)`, new and empty, and return it; in a store there is nothing to make.

    Raises:
        StorageError: it cannot be made.
        InputError: it has no name, or lies in a checkpoint; another thread is writing it, or a folder of a store holds
            something else.
    """
    if folder.name in ("", ".."):
        raise InputError(f"{folder} cannot be written itself: name a folder in it")
    if is_local(folder) and (folder.parent / DOCUMENT).exists():
        raise InputError(f"{folder} lies in a checkpoint: name a folder elsewhere")
    partial = partial_of(folder)
    writer = _writers.setdefault(folder, threading.current_thread())
    if writer is not threading.current_thread() and writer.is_alive():
        raise InputError(f"{folder} is being written by another thread of this process: save to it one after the other")
    _writers[folder] = threading.current_thread()
    try:
        _begin(folder, partial)
    except BaseException:
        _writers.pop(folder, None)
        raise
    return partial


def _begin(folder: Path, partial: Path) -> None:
    if not is_local(folder):
        with reading(folder):
            there = listing(folder)
        strangers = [name for name in there if name != DOCUMENT and not _OF_A_SAVE.fullmatch(name)]
        if strangers or (DOCUMENT in there and _incomplete(folder) is not None):
            raise _occupied(folder)
        return
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(folder.parent, error) from error


def _unwritable(root: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot write to {root}: {error.strerror or error}; name another folder (for a run: run.dir or checkpoint.dir)"
    )


def _occupied(folder: Path) -> InputError:
    return InputError(f"{folder} holds something else: move it away, or choose another folder")


def abandon(folder: Path) -> None:
    """Delete what was being written for `folder`, after a failure that is being raised."""
    if is_local(folder):
        shutil.rmtree(partial_of(folder), ignore_errors=True)
    else:
        _sweep(folder)
    _writers.pop(folder, None)


@contextmanager
def made_here(folder: Path) -> Iterator[Path]:
    """`folder` itself or, in the place of one in a store, a temporary one of that name on this machine, from which
    `publish` copies."""
    if is_local(folder):
        yield folder.absolute()
        return
    with TemporaryDirectory(prefix="shardopt-") as scratch:
        yield Path(scratch) / folder.name


def publish(partial: Path, folder: Path, replaceable: Callable[[Path], bool]) -> None:
    """Give `partial`, whose files are synced, the name `folder`; what had that name is deleted after that.

    In a store the document, put last, has made it complete already, and the files of the save before are deleted;
    what was made on this machine is copied there, what makes it complete last.

    Raises:
        InputError: `folder` holds something that is not `replaceable`.
    """
    try:
        _publish(partial, folder, replaceable)
    finally:
        _writers.pop(folder, None)


def _publish(partial: Path, folder: Path, replaceable: Callable[[Path], bool]) -> None:
    if not is_local(folder):
        if partial == folder:
            _sweep(folder)
        else:
            _copy(partial, folder, replaceable)
        return
    sync(partial)
    if folder.exists():
        if not any(folder.iterdir()):
            folder.rmdir()
        elif not replaceable(folder):
            raise _occupied(folder)
    renaming.swap_in(partial, folder, _aside(folder, "previous"))


def _copy(source: Path, target: Path, replaceable: Callable[[Path], bool]) -> None:
    """Copy a local file or folder into a store; while it is replaced, `target` lacks what makes it complete."""
    if source.is_file():
        put_file(source, target)
        return
    before = listing(target)
    if before and not replaceable(target):
        raise _occupied(target)
    for name in _LAST:
        if name in before:
            delete(target / name)
    files = {path.relative_to(source).as_posix(): path for path in sorted(source.rglob("*")) if path.is_file()}
    for name in sorted(files, key=lambda name: name in _LAST):
        put_file(files[name], target / name)
    for name in before.keys() - {name.partition("/")[0] for name in files} - set(_LAST):
        delete(target / name)


def remove(folder: Path) -> None:
    """Delete a checkpoint; killed halfway, nothing that looks complete is left."""
    if not is_local(folder):
        try:
            delete(folder / DOCUMENT)
            delete_all(folder)
        except FileNotFoundError:  # the document was all
            pass
        except OSError as error:
            renaming.warn_of(folder, error)
        return
    renaming.retire(folder, _aside(folder, "deleting"))


def _sweep(folder: Path) -> None:
    """Delete the files of saves, in a folder of a store, that its document does not name; all where it has none.

    What cannot be told or deleted now stays, with a warning, for the next time.
    """
    try:
        there = listing(folder)
        named = records_of(read_document(folder)) if DOCUMENT in there else {}
        for name in there:
            if _OF_A_SAVE.fullmatch(name) and name not in named:
                delete(folder / name)
    except InputError as error:  # a document that cannot be read, or is damaged, which is not for us to say
        logger.warning("%s is not cleaned up: %s", folder, error)
    except OSError as error:
        renaming.warn_of(folder, error)


def clean(root: Path) -> None:
    """Put `root` in order after a run that died: leftovers go, one caught mid-replacement comes back."""
    if not is_local(root):
        with reading(root):
            names = listing(root)
        for name in names:
            if step_of(name) is not None:
                _sweep(root / name)
        return
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        match = _ASIDE.fullmatch(folder.name)
        if not match or not _STEP.fullmatch(match[1]):
            continue
        if match[2] == "previous":
            renaming.swap_back(folder, root / match[1])
        else:
            renaming.delete(folder)


def prune(root: Path, checkpoints: Iterable[Path]) -> None:
    """Delete these checkpoints under `root`, and what could not be deleted before; a failure is a warning.

    One that holds something else, too, stays.
    """
    for leftover in sorted(root.glob(".step-*.deleting")) if is_local(root) else []:
        renaming.delete(leftover)
    for folder in checkpoints:
        try:
            strangers = _strangers(folder)
        except InputError as error:
            logger.warning("%s is not deleted: %s", folder, error)
            continue
        if strangers:
            logger.warning("%s is not deleted, since it holds something else, too: %s", folder, few(strangers))
        else:
            remove(folder)


def _aside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")
