"""Errors caused by user input, told apart from defects of shardopt."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path


class InputError(ValueError):
    """Something the user wrote, pointed to or launched cannot work.

    The message names the thing to change. The command line prints it as one line, without a traceback, and
    exits with status 2 on every rank.
    """


class StorageError(InputError):
    """A disk, a network or a store cannot be written or read now; it may be later."""


class NonFiniteError(RuntimeError):
    """Weights, optimizer state, losses or gradients are not finite, on every rank; the message says which."""


class MissingExtraError(ImportError):
    """A feature was asked for whose optional packages are not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Install it with: pip install 'shardopt[{extra}]'")


@contextlib.contextmanager
def writing(what: Path | str, key: str = "run.dir") -> Iterator[None]:
    """Around what writes in the run folder, or where `key` says: a disk's error is a StorageError that says `what`."""
    try:
        yield
    except OSError as e:
        raise StorageError(f"{key}: cannot write {what}: {e.strerror or e}") from e


def did_you_mean(word: object, known: Iterable[str], prefix: str = "", cutoff: float = 0.6) -> str:
    """ "; did you mean ...?", or nothing where none of `known` is like `word`."""
    near = difflib.get_close_matches(str(word), list(known), 1, cutoff)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def nearest_path(path: Path) -> str:
    """ "; did you mean ...?" for a local path that is not there, or nothing where none beside it is like it."""
    names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    beside = [name for name in names if name != path.name]
    return did_you_mean(path.name, beside, "" if path.parent == Path() else f"{path.parent}/")


def no_folder(path: Path, give: str) -> InputError:
    """The error of a local path that is not the folder that was to be given.

    Args:
        give: which one, such as "a run's folder".
    """
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return InputError(f"{path} is a config: give the run's folder, such as runs/NAME")
    if path.exists():
        return InputError(f"{path} is not a folder: give {give}")
    return InputError(f"{path} does not exist: give {give}{nearest_path(path)}")


def few(items: Iterable[str], limit: int = 5) -> str:
    """The first few of `items`, and how many more there are."""
    listed = sorted(items)
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more} more" if more > 0 else "")
