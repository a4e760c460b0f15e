"""Find the newest checkpoint that is, byte for byte, what was written; set damaged ones aside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from shardopt.checkpoint import folders
from shardopt.checkpoint.blocks import DamagedError, FileRecord, check_file, reading
from shardopt.checkpoint.document import read_document
from shardopt.checkpoint.index import read_index
from shardopt.checkpoint.store import as_folder, exists
from shardopt.checkpoint.stored import SLICES, complete_in, step_of
from shardopt.distributed import Ranks
from shardopt.errors import InputError


def latest_intact(root: str | Path, ranks: Ranks, warn: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest checkpoint under `root` of which every byte is what was written; None where there is none.

    Newer ones that are damaged are renamed to NAME.damaged, so that a run may write their steps again. Nothing is
    deleted. A collective: every rank reads its share of the files.

    Args:
        root: a folder of checkpoints, or not there yet.
        ranks: the processes.
        warn: gets a sentence for each damaged checkpoint, on every rank.

    Raises:
        InputError: a file cannot be read now (which is not taken for damage), or one is of another version; on every
            rank, and nothing is renamed.
    """
    root = as_folder(root)

    def newest() -> str | None:
        return next((folder.name for folder in folders.step_folders(root).values()), None)

    while (name := ranks.ask_main(newest)) is not None:
        reason = find_damage(root / name, ranks)
        if reason is None:
            return root / name
        aside = ranks.ask_main(partial(_set_aside, root / name))
        before = ranks.ask_main(newest)
        warn(
            f"{reason}. It is set aside as {aside}, and {'the one before it is used' if before else 'it was the last'}"
        )
    return None


def _set_aside(folder: Path) -> Path:
    with reading(folder):
        return folders.set_aside(folder)


def find_damage(folder: str | Path, ranks: Ranks) -> str | None:
    """A sentence about what is damaged in a checkpoint, the same on every rank; None where all is as it was written.

    A collective: every rank reads its share of the files.

    Raises:
        InputError: a file cannot be read now, or the checkpoint is of another version; on every rank.
    """
    folder = as_folder(folder)

    def survey() -> tuple[str, dict[str, FileRecord]] | str:
        """Rank 0 reads the document and the index, and sees that all data files are there; or says what is damaged."""
        try:
            document = read_document(folder)
            folders.check_name(folder, document)
            index = read_index(folder, document)
            index.check_files(folder, index.records)
        except DamagedError as error:
            return str(error)
        return index.save_id, index.records

    surveyed = ranks.ask_main(survey)
    if isinstance(surveyed, str):
        return surveyed
    save_id, records = surveyed

    def check() -> None:
        """Every rank checks an equal share of the blocks."""
        every = [(name, number) for name, record in records.items() for number in range(record.blocks)]
        first, last = (len(every) * i // ranks.world_size for i in (ranks.rank, ranks.rank + 1))
        mine: dict[str, list[int]] = {}
        for name, number in every[first:last]:
            mine.setdefault(name, []).append(number)
        for name, numbers in mine.items():
            with reading(folder / name):
                if not exists(folder / name):
                    raise InputError(
                        f"rank {ranks.rank} does not see {folder / name}, which rank 0 sees: the folder (run.dir, of a "
                        f"run) must be on a file system that all nodes share"
                    )
            check_file(folder / name, save_id, records[name], numbers)

    return first_damage(check, ranks)


def refuse_damage(folder: Path, ranks: Ranks) -> None:
    """Raise DamagedError where a checkpoint is not what was written, naming an older one that is. A collective."""
    if (reason := find_damage(folder, ranks)) is not None:
        raise DamagedError(f"{reason}. {_older_whole(folder, ranks)}")


@contextmanager
def naming_whole(folder: Path) -> Iterator[None]:
    """Around what reads a checkpoint in one process: where it is damaged, the error names an older one that is not."""
    try:
        yield
    except DamagedError as error:
        raise DamagedError(f"{error}. {_older_whole(folder, Ranks.current())}") from error


def _older_whole(folder: Path, ranks: Ranks) -> str:
    """Which of the checkpoints beside `folder` is the newest before it that is whole, in words. A collective."""

    def older() -> list[Path]:
        root, step = folder.parent.parent if folder.name == SLICES else folder.parent, step_of(folder)
        return [] if step is None else [there for n, there in complete_in(root).items() if n < step]

    for there in reversed(ranks.ask_main(older)):
        if find_damage(there, ranks) is None:
            return f"The newest older one that is whole is {there}"
    return "No older one beside it is whole"


def first_damage(check: Callable[[], None], ranks: Ranks) -> str | None:
    """Run `check` on every rank: the first rank's damage, in words; None where no rank finds any. A collective.

    Raises:
        InputError: on some rank it is not damage but another error, which may hide what is wrong.
    """

    def found() -> str | None:
        try:
            check()
        except DamagedError as error:
            return str(error)
        return None

    return next(filter(None, ranks.gather(ranks.together(found))), None)
