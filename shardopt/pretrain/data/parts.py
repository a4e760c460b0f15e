"""A corpus to token ids, part by part: by several processes, and from where a killed build stopped."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import multiprocessing
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shardopt.pretrain.data import reading
from shardopt.pretrain.data.packing import Side, chunks, is_held_out
from shardopt.pretrain.data.reading import Document, Piece, Place, Tally, in_file, merge, show
from shardopt.pretrain.data.sources import Corpus
from shardopt.pretrain.data.tokenizers import Encode, SavedTokenizer

_CHUNK_CHARACTERS = 4 << 20
_MOST_LONGEST = 5
_BEGINNING = 60
SIDES = ("train", "holdout")


@dataclass(frozen=True, order=True)
class Long:
    """One of the longest documents: tokens, UTF-8 bytes, where it stands, and how it begins."""

    tokens: int
    bytes: int
    place: Place
    beginning: str


@dataclass
class Part:
    """What a part of a corpus gave: documents, tokens and bytes of each side, and what became of its rows."""

    sides: dict[str, tuple[int, ...]]
    tally: Tally
    longest: list[Long] = field(default_factory=list)

    def save(self, path: Path) -> None:
        with _whole(path) as file:
            file.write(json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, path: Path) -> Part:
        content = json.loads(path.read_text())
        longest = [Long(**one | {"place": Place(*one["place"])}) for one in content["longest"]]
        return cls(content["sides"], Tally.of(content["tally"]), longest)


def pack_parts(
    corpus: Corpus,
    tokenizer: SavedTokenizer,
    holdout: float,
    kept: Path,
    processes: int,
    tick: Callable[[int, int], None],
) -> list[Path]:
    """Tokenise a corpus into a folder of parts, of which those that are there already are kept.

    Args:
        kept: the folder. Other processes may build the same at the same time.
        processes: that tokenise; 1: this one alone.
        tick: called with the bytes of text that are done, and of all.

    Returns:
        The files of the parts, in order.
    """
    parts = list(_parts(corpus.pieces()))
    sizes = [sum(piece.size for piece in pieces) for pieces in parts]
    files = [kept / f"{index:06}.json" for index in range(len(parts))]
    todo = [index for index, file in enumerate(files) if not file.exists()]
    done, total = sum(sizes) - sum(sizes[index] for index in todo), sum(sizes)
    tick(done, total)
    kept.mkdir(parents=True, exist_ok=True)
    with _packers(min(processes, len(todo)), corpus, tokenizer, holdout) as packed:
        for index in packed([(parts[index], files[index]) for index in todo]):
            done += sizes[todo[index]]
            tick(done, total)
    return files


def _parts(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """The pieces, small ones together."""
    part: list[Piece] = []
    for piece in pieces:
        part.append(piece)
        if sum(one.size for one in part) >= reading.PIECE_BYTES:
            yield part
            part = []
    if part:
        yield part


Task = tuple[list[Piece], Path]


@contextlib.contextmanager
def _packers(
    processes: int, corpus: Corpus, tokenizer: SavedTokenizer, holdout: float
) -> Iterator[Callable[[list[Task]], Iterator[int]]]:
    """A function that packs parts and yields the number of each when it is done, in order."""
    if processes <= 1:
        encode = tokenizer.encoder()

        def here(tasks: list[Task]) -> Iterator[int]:
            for number, (pieces, file) in enumerate(tasks):
                pack_part(corpus, pieces, tokenizer, encode, holdout, file)
                yield number

        yield here
        return
    # Forked, threads of the tokenizers library and of torch would be missing.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin, (corpus, tokenizer, holdout)) as pool:
        try:
            yield lambda tasks: pool.map(_pack, range(len(tasks)), *zip(*tasks, strict=True))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_worker: dict[str, Any] = {}


def _begin(corpus: Corpus, tokenizer: SavedTokenizer, holdout: float) -> None:
    """In a process of its own: it ends with the one that started it, even where that one is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are as many as wanted
    _worker.update(corpus=corpus, tokenizer=tokenizer, encode=tokenizer.encoder(), holdout=holdout)


def _pack(number: int, pieces: list[Piece], file: Path) -> int:
    pack_part(pieces=pieces, file=file, **_worker)
    return number


def pack_part(
    corpus: Corpus, pieces: list[Piece], tokenizer: SavedTokenizer, encode: Encode, holdout: float, file: Path
) -> None:
    """Tokenise the documents of some pieces, each to its side; `file` is written last."""
    tally = Tally()
    documents = (document for piece in pieces for document in corpus.read(piece, tally, tokenizer))
    end = np.asarray([tokenizer.eos], tokenizer.dtype).tobytes()
    counts = {side: [0, 0, 0] for side in SIDES}
    longest: list[Long] = []
    with contextlib.ExitStack() as stack:
        files = {side: stack.enter_context(_whole(_ids_file(file, side))) for side in SIDES}
        for document, ids in _encoded(documents, encode):
            content = ids.astype(tokenizer.dtype, copy=False).tobytes()
            given = document.ids is not None
            side = "holdout" if is_held_out(content if given else document.text, holdout) else "train"
            files[side].write(content + end)
            size = (1, len(ids) + 1, document.bytes if given else len(document.text.encode()))
            counts[side] = [old + new for old, new in zip(counts[side], size, strict=True)]
            beginning = " ".join(document.text[:_BEGINNING].split()) or f"ids {ids[:8].tolist()}"
            _note(longest, Long(size[1], size[2], document.place, beginning))
    Part({side: tuple(one) for side, one in counts.items()}, tally, longest).save(file)


def _encoded(documents: Iterator[Document], encode: Encode) -> Iterator[tuple[Document, np.ndarray]]:
    """Documents and their ids; texts are encoded many at a time."""
    for some in chunks(documents, _CHUNK_CHARACTERS, lambda document: document.text or " "):
        encoded = iter(encode([document.text for document in some if document.ids is None]))
        for document in some:
            yield document, next(encoded) if document.ids is None else document.ids


def _note(longest: list[Long], one: Long) -> None:
    heapq.heappush(longest, one)
    if len(longest) > _MOST_LONGEST:
        heapq.heappop(longest)


def _ids_file(part: Path, side: str) -> Path:
    return part.with_suffix(f".{side}.bin")


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that is there whole at the end, or not at all."""
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    path.parent.mkdir(parents=True, exist_ok=True)  # whoever built the same first has removed it
    with unfinished.open("wb") as file:
        yield file
    unfinished.replace(path)


@dataclass(frozen=True)
class Joined:
    """A corpus in two files: the sides, the tally of all rows, and the longest documents as JSON values."""

    sides: dict[str, Side]
    tally: Tally
    longest: list[dict[str, Any]]


def join(parts: list[Path], folder: Path) -> Joined:
    """Write parts one after another to train.bin and holdout.bin in `folder`."""
    found = [Part.load(part) for part in parts]
    sides = {}
    for side in SIDES:
        sha256 = hashlib.sha256()
        with (folder / f"{side}.bin").open("wb") as file:
            for part in parts:
                with _ids_file(part, side).open("rb") as ids:
                    for data in iter(lambda: ids.read(1 << 20), b""):
                        file.write(data)
                        sha256.update(data)
        documents, tokens, text_bytes = (sum(one.sides[side][i] for one in found) for i in range(3))
        sides[side] = Side(documents, tokens, text_bytes, sha256.hexdigest())
    tally, before = merge([one.tally for one in found])
    longest = heapq.nlargest(_MOST_LONGEST, (one for part in found for one in part.longest))
    return Joined(sides, tally, [asdict(one) | {"place": show(in_file(one.place, before))} for one in longest])
