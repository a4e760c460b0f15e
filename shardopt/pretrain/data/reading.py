"""Documents of files, one after another, with their places; what is broken is counted and passed over."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from shardopt.errors import InputError

# Larger files are read in pieces, which several processes can take.
PIECE_BYTES = 16 << 20
_COLUMN, _TYPE = "no column", "not text"
_MOST_EXAMPLES = 100
# So many rows without a good one: the config is wrong, and nobody waits for the end of the corpus to be told.
_HOPELESS = 1000


class Place(NamedTuple):
    """Where a document stands: a row (from 1) of a file, counted from `start` of it; row 0 is the whole file."""

    path: str
    start: int
    row: int


class Document(NamedTuple):
    """A text; or the ids that it became elsewhere, with the UTF-8 bytes that they stand for."""

    text: str
    place: Place
    ids: np.ndarray | None = None
    bytes: int = 0


@dataclass(frozen=True)
class Piece:
    """Part of a corpus: bytes start..stop of a jsonl file, row groups of a parquet one, rows of a dataset, or a file.

    Attributes:
        size: bytes, about.
        first: rows of the file before this piece, where they are known.
        whole: whether it is all of the file.
    """

    path: Path
    size: int
    start: int = 0
    stop: int = 0
    first: int = 0
    whole: bool = True


class Keys(NamedTuple):
    """What the user wrote, for errors to name: of a source, of its column, and of the share of rows that may be
    broken."""

    source: str
    column: str
    broken: str


class RowError(Exception):
    """A row that gives no text: why, as a kind of error that is counted, and in words."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(words)
        self.kind = kind


def text_in(row: Any, column: str) -> str:
    """The text of one row, "" where it is null.

    Raises:
        RowError: the row is one, or has no such column, or it is not text.
    """
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError("no JSON object", f"is no JSON object but {type(row).__name__}")
    if column not in row:
        raise RowError(_COLUMN, f"there is no column {column!r}; there are {', '.join(sorted(map(str, row)))}")
    text = row[column]
    if not isinstance(text, str | None):
        raise RowError(_TYPE, f"{column!r} holds {type(text).__name__}, not text")
    return text or ""


@dataclass
class Tally:
    """What became of the rows that were read.

    Attributes:
        rows: all of them, those that gave no document too. A whole file is a row where it is one document.
        empty: rows without text, null ones too.
        broken: rows by what was wrong with them.
        examples: place and words of the first of these.
        skipped, skipped_examples: how many files are not UTF-8 text, and the first of them.
        lines: [path, start, lines read] of each piece of a file, from which the number of a row in the file follows.
    """

    rows: int = 0
    empty: int = 0
    broken: dict[str, int] = field(default_factory=dict)
    examples: list[tuple[Place, str]] = field(default_factory=list)
    skipped: int = 0
    skipped_examples: list[str] = field(default_factory=list)
    lines: list[tuple[str, int, int]] = field(default_factory=list)

    def refuse(self, place: Place, kind: str, words: str) -> None:
        """Count a broken row."""
        self.broken[kind] = self.broken.get(kind, 0) + 1
        if len(self.examples) < _MOST_EXAMPLES:
            self.examples.append((place, words))

    def skip(self, path: Path) -> None:
        """Count a file that is not UTF-8 text."""
        self.skipped += 1
        if len(self.skipped_examples) < _MOST_EXAMPLES:
            self.skipped_examples.append(str(path))

    def documents(self, rows: Iterable[tuple[Place, Any]], column: str) -> Iterator[Document]:
        """The documents among rows, counting the others; no more is read where many rows give none."""
        for place, row in rows:
            self.rows += 1
            try:
                text = text_in(row, column)
            except RowError as error:
                self.refuse(place, error.kind, str(error))
                if self.rows >= _HOPELESS and self.n_broken >= self.rows:
                    return
                continue
            if (document := self.document(text, place)) is not None:
                yield document

    def document(self, text: str, place: Place) -> Document | None:
        """The document of a text; None, and counted, for an empty one. Half a character becomes U+FFFD."""
        if not text:
            self.empty += 1
            return None
        try:
            text.encode()
        except UnicodeEncodeError:
            self.refuse(place, "lone surrogate", "holds half of a character, a lone surrogate, which became U+FFFD")
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return Document(text, place)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Tally:
        """From JSON values, those of `dataclasses.asdict`."""
        return cls(**values | {"examples": [(Place(*place), words) for place, words in values["examples"]]})

    @property
    def n_broken(self) -> int:
        return sum(self.broken.values())

    def check_hope(self, keys: Keys) -> None:
        """Raise InputError where many rows were read and each was broken."""
        if self.rows >= _HOPELESS and self.n_broken >= self.rows:
            self.check(keys, 0.0)

    def check_so_far(self, keys: Keys, most: float) -> None:
        """As `check`, for a source that is still being read: of its first rows as many may be broken as of 1,000."""
        if self.n_broken > most * max(self.rows, _HOPELESS):
            self.check(keys, most)

    def check(self, keys: Keys, most: float) -> None:
        """Raise InputError where more than the share `most` of the rows is broken."""
        broken = self.n_broken
        if broken <= most * self.rows:
            return
        place, words = self.examples[0]
        for kind in (_COLUMN, _TYPE):
            if self.broken.get(kind) == self.rows:
                raise InputError(f"{keys.column}: {words} ({show(place)})")
        listed = "; ".join(f"{show(place)} {words}" for place, words in self.examples[:3])
        more = f"; and {broken - 3:,} more" if broken > 3 else ""
        count = f"{broken:,} of {self.rows:,} rows cannot be read"
        raise InputError(f"{keys.source}: {count}, more than the share {keys.broken} = {most:g}: {listed}{more}")


def show(place: Place) -> str:
    return f"{place.path}:{place.row}" if place.row else place.path


def merge(tallies: list[Tally]) -> tuple[Tally, dict[tuple[str, int], int]]:
    """The tallies of all pieces as one, in order, and the rows of a file that stand before each piece of it."""
    total, seen, before = Tally(), dict[str, int](), dict[tuple[str, int], int]()
    for tally in tallies:
        for path, start, lines in tally.lines:
            before[path, start] = seen.get(path, 0)
            seen[path] = seen.get(path, 0) + lines
    for tally in tallies:
        total.rows += tally.rows
        total.empty += tally.empty
        total.skipped += tally.skipped
        total.skipped_examples += tally.skipped_examples
        for kind, count in tally.broken.items():
            total.broken[kind] = total.broken.get(kind, 0) + count
        total.examples += [(in_file(place, before), words) for place, words in tally.examples]
    del total.examples[_MOST_EXAMPLES:], total.skipped_examples[_MOST_EXAMPLES:]
    return total, before


def in_file(place: Place, before: dict[tuple[str, int], int]) -> Place:
    """`place` with the number of its row in the whole file; see `merge`."""
    return Place(place.path, 0, place.row + before.get((place.path, place.start), 0))


# ---------------------------------------------------------------- files


def open_bytes(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed by its name."""
    if path.suffix == ".zst":  # which fsspec reads with one more package alone
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 20)
    import fsspec

    return fsspec.open(str(path), "rb", compression="infer").open()


def is_text(path: Path) -> bool:
    """True for UTF-8 without NUL, which no text has and most other files do."""
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8") as file:
        try:
            return not any("\0" in chunk for chunk in iter(lambda: file.read(1 << 20), ""))
        except UnicodeDecodeError:
            return False


def read_text(path: Path, sample_by: str, tally: Tally) -> Iterator[Document]:
    """The documents of a text file: the file, its paragraphs or its lines. Line ends become newlines."""
    if not is_text(path):
        tally.skip(path)
        return
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8") as file:
        cuts: Iterable[tuple[int, str]]
        if sample_by == "document":
            cuts = [(0, file.read())]
        elif sample_by == "line":
            cuts = ((number, line.removesuffix("\n")) for number, line in enumerate(file, 1))
        else:
            cuts = _paragraphs(file)
        for row, text in cuts:
            tally.rows += 1
            if (document := tally.document(text, Place(str(path), 0, row))) is not None:
                yield document


def _paragraphs(file: io.TextIOWrapper) -> Iterator[tuple[int, str]]:
    """What stands between blank lines, with the number of its first line."""
    row, rest = 1, ""
    while chunk := file.read(1 << 20):
        *paragraphs, rest = (rest + chunk).split("\n\n")
        for text in paragraphs:
            yield row, text
            row += text.count("\n") + 2
    yield row, rest


def split_jsonl(path: Path) -> list[Piece]:
    """A jsonl file in pieces of `PIECE_BYTES`; one that is compressed, or is an array, whole."""
    size = path.stat().st_size
    if size <= PIECE_BYTES or is_compressed(path) or _is_array(path):
        return [Piece(path, size)]
    starts = range(0, size, PIECE_BYTES)
    return [Piece(path, min(PIECE_BYTES, size - at), at, at + PIECE_BYTES, whole=False) for at in starts]


def is_compressed(path: Path) -> bool:
    return path.suffix in (".gz", ".bz2", ".xz", ".zst", ".lzma", ".zip")


def _is_array(path: Path) -> bool:
    with open_bytes(path) as file:
        return file.read(1 << 10).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def read_jsonl(piece: Piece, column: str, tally: Tally) -> Iterator[Document]:
    """The documents of a jsonl file, or of the lines that begin in a piece of it."""
    if piece.whole and _is_array(piece.path):
        return tally.documents(_array(piece.path), column)
    return tally.documents(_lines(piece, tally), column)


def _array(path: Path) -> Iterator[tuple[Place, Any]]:
    with open_bytes(path) as file:
        try:
            rows = json.loads(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            rows = [RowError("not JSON", f"is not JSON ({_first_line(error)})")]
    for number, row in enumerate(rows, 1):
        yield Place(str(path), 0, number), row


def _lines(piece: Piece, tally: Tally) -> Iterator[tuple[Place, Any]]:
    path, at, number = str(piece.path), piece.start, 0
    with open_bytes(piece.path) as file:
        if at:  # the line that is under way belongs to the piece before
            file.seek(at - 1)
            at += len(file.readline()) - 1
        for line in file:
            if not piece.whole and at >= piece.stop:
                break
            at += len(line)
            number += 1
            place = Place(path, piece.start, number)
            try:
                text = line.decode("utf-8-sig" if number == 1 and not piece.start else "utf-8")
                if text.isspace():
                    continue
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                row = RowError("not JSON", f"is not JSON ({_first_line(error)})")
            yield place, row
    if not piece.whole:
        tally.lines.append((path, piece.start, number))


def split_parquet(path: Path) -> list[Piece]:
    """The row groups of a parquet file, in pieces of about `PIECE_BYTES`."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
    pieces: list[Piece] = []
    size = start = rows = first = 0
    for stop, group in enumerate(groups, 1):
        size, rows = size + group.total_byte_size, rows + group.num_rows
        if size >= PIECE_BYTES or stop == len(groups):
            pieces.append(Piece(path, size, start, stop, first, whole=stop - start == len(groups)))
            size, start, first = 0, stop, rows
    return pieces


def read_parquet(piece: Piece, column: str, tally: Tally) -> Iterator[Document]:
    """The documents of some row groups."""
    from pyarrow import parquet

    def rows() -> Iterator[tuple[Place, Any]]:
        number = piece.first
        with parquet.ParquetFile(piece.path) as file:
            known = file.schema_arrow.names
            names = [column] if column in known else []
            for batch in file.iter_batches(1024, row_groups=range(piece.start, piece.stop), columns=names):
                for row in batch.to_pylist() if names else [dict.fromkeys(known)] * batch.num_rows:
                    number += 1
                    yield Place(str(piece.path), piece.start, number), row

    return tally.documents(rows(), column)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
