"""Documents to flat streams of token ids on disk, and back as blocks through a memory map."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from shardopt.errors import InputError
from shardopt.pretrain.data.reading import Tally
from shardopt.pretrain.data.sources import digest

logger = logging.getLogger(__name__)

# Part of every key: raise it when the code gives other tokens for the same corpus.
FORMAT = 4
_ABANDONED_SECONDS = 24 * 3600
_PARTS_KEPT_SECONDS = 30 * 24 * 3600

T = TypeVar("T")


def is_held_out(text: str | bytes, holdout: float) -> bool:
    """True for a document that is kept out of training: decided by its text alone, whatever the corpus, seed or order.

    So exact copies always fall on the same side, in one source or in several. Of ids, their bytes stand for the text.
    """
    content = text.encode() if isinstance(text, str) else text
    hashed = hashlib.blake2b(content, digest_size=8, person=b"holdout").digest()
    return int.from_bytes(hashed, "little") < holdout * 2**64


@dataclass(frozen=True)
class Side:
    """The train or the held-out half of a packed source. `bytes` counts UTF-8 bytes of text."""

    documents: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Packed:
    """A packed source in the cache: train.bin and holdout.bin, flat token ids, `eos` after each document.

    Attributes:
        corpus: its key.
        tally: what became of its rows.
        longest: its longest documents: tokens, bytes, place, beginning.
    """

    folder: Path
    corpus: str
    dtype: str
    train: Side
    holdout: Side
    tally: Tally
    longest: list[dict[str, Any]]

    @classmethod
    def open(cls, folder: Path) -> Packed:
        meta = read_meta(folder)
        sides = {side: Side(**meta[side]) for side in ("train", "holdout")}
        return cls(folder=folder, **meta | sides | {"tally": Tally.of(meta["tally"])})

    @property
    def documents(self) -> int:
        return self.train.documents + self.holdout.documents

    @property
    def skipped(self) -> int:
        """Files that are not UTF-8 text."""
        return self.tally.skipped

    def blocks(self, side: str, block_size: int) -> Blocks:
        return Blocks(self.folder / f"{side}.bin", np.dtype(self.dtype), getattr(self, side).tokens, block_size)


class Blocks:
    """Windows of block_size + 1 tokens, block_size apart, over a memory-mapped file.

    Neighbouring blocks share one token, the target of the first and the input of the second, so every token
    but the file's first is a target once. The tail that fills no block is left out.

    Raises:
        DamagedError: the file is missing or has another size than was written.
    """

    def __init__(self, path: Path, dtype: np.dtype, tokens: int, block_size: int) -> None:
        self.n_blocks = max(0, (tokens - 1) // block_size)
        self._size = block_size
        if not path.exists() or path.stat().st_size != tokens * dtype.itemsize:
            raise DamagedError(path.parent)
        ids = np.memmap(path, dtype, "r") if tokens else np.empty(0, dtype)
        self._windows = (
            np.lib.stride_tricks.sliding_window_view(ids, block_size + 1)[::block_size] if self.n_blocks else None
        )

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Blocks `index`, shape [n, block_size + 1], in the dtype on disk."""
        if self._windows is None:
            raise IndexError("there is no block")
        return self._windows[index]


def chunks(documents: Iterable[T], characters: int, text: Callable[[T], str]) -> Iterator[list[T]]:
    """The documents in lists of at least `characters` in all, the last one shorter."""
    found: list[T] = []
    size = 0
    for document in documents:
        found.append(document)
        size += len(text(document))
        if size >= characters:
            yield found
            found, size = [], 0
    if found:
        yield found


class DamagedError(InputError):
    """A folder of the cache is not what was written to it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"data.cache: {folder} is damaged; remove that folder")


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_meta(folder: Path, meta: dict[str, Any], checksums: dict[str, str]) -> None:
    """End a build: write meta.json, with the `checksum` of every other file and of itself."""
    content = {"meta": meta, "files": checksums}
    (folder / "meta.json").write_text(json.dumps({**content, "checksum": digest(content)}, indent=1))


def read_meta(folder: Path, verify: bool = False) -> dict[str, Any]:
    """The meta that was written to a finished build, empty where there is none.

    Args:
        verify: read every file, and compare it with its checksum.

    Raises:
        DamagedError: the folder is there, but not what was written to it.
        InputError: it cannot be read.
    """
    try:
        content = json.loads((folder / "meta.json").read_text())
        whole = content.pop("checksum") == digest(content)
        if whole and verify:
            whole = all(checksum(folder / name) == sha256 for name, sha256 in content["files"].items())
    except FileNotFoundError:
        if folder.exists():
            raise DamagedError(folder) from None
        return {}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(folder) from None
    except OSError as error:
        raise InputError(f"data.cache: cannot read {folder} ({error.strerror})") from error
    if not whole:
        raise DamagedError(folder)
    return content["meta"]


def is_built(folder: Path) -> bool:
    """Whether the cache has `folder`, whole; a damaged one is removed, with a warning."""
    try:
        return bool(read_meta(folder, verify=True))
    except DamagedError:
        logger.warning("data.cache: %s is damaged, and is built again", folder)
    doomed = folder.parent / f".building-{uuid.uuid4().hex}"  # which a run that has it open goes on reading
    try:
        folder.rename(doomed)
    except OSError as error:
        raise InputError(f"data.cache: cannot remove {folder}, which is damaged ({error.strerror})") from error
    shutil.rmtree(doomed, ignore_errors=True)
    return False


@contextlib.contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder` that takes its place at the end, unless another process was first.

    Raises:
        InputError: it cannot be written.
    """
    building = folder.parent / f".building-{uuid.uuid4().hex}"
    try:
        building.mkdir(parents=True)
        _remove_abandoned(folder.parent)
        yield building
        # Renaming fails if somebody was first, and theirs is as good.
        if not read_meta(folder):
            with contextlib.suppress(FileExistsError):
                building.rename(folder)
    except OSError as error:
        raise InputError(f"data.cache: cannot write {folder} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    """Remove what killed builds left; one still alive has written within the day. Parts wait to be gone on with."""
    for name, seconds in ((".building-*", _ABANDONED_SECONDS), (".parts-*", _PARTS_KEPT_SECONDS)):
        for old in parent.glob(name):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - max(path.stat().st_mtime for path in [old, *old.iterdir()]) > seconds:
                    shutil.rmtree(old, ignore_errors=True)
