"""Sources of documents: files or a hub dataset, their key in the cache, and their documents."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import itertools
import json
import lzma
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardopt.errors import InputError, few, nearest_path
from shardopt.pretrain.data import reading
from shardopt.pretrain.data.config import DataConfig, HfSource, JsonlSource, ParquetSource, StdlibSource, TokensSource
from shardopt.pretrain.data.reading import (
    Document,
    Keys,
    Piece,
    Place,
    Tally,
    is_compressed,
    read_jsonl,
    read_parquet,
    read_text,
    split_jsonl,
    split_parquet,
)
from shardopt.pretrain.data.token_files import TokenFile, index_of, read_tokens

if TYPE_CHECKING:
    import datasets

    from shardopt.pretrain.data.tokenizers import SavedTokenizer

# Up to here a corpus is known by its content, so that a copy or a `touch` changes nothing; a larger one,
# which would take long to read at every start, by its files' paths, sizes and times.
CONTENT_KEY_BYTES = 256 << 20
_TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".bin": "tokens"}
_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)


def digest(*parts: Any) -> str:
    """A hash of JSON values, as 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


class Corpus:
    """One source of the config, found and identified but not yet read.

    Attributes:
        where, label: its place in the config (of what `keys` names), for messages, and its name.
        key: hash of everything that decides which documents it gives.
        files: what it reads, in order; empty for a hub dataset.

    Raises:
        InputError: nothing is there, or the hub cannot be reached.
    """

    def __init__(self, config: DataConfig, index: int, keys: Keys | None = None) -> None:
        self.source = config.sources[index]
        where = f"data.sources[{index}]"
        self.keys = keys or Keys(where, f"{where}.column", "data.max_broken")
        self.where, self.label = self.keys.source, config.labels[index]
        self._column, self._max_broken = getattr(self.source, "column", "text"), config.max_broken
        self.files: list[Path] = []
        self._hub_cache = config.cache_folder / "hf"
        shape = self.source.model_dump(
            mode="json", exclude={"weight", "label", "commit", "paths", "scan", "streaming", "shards"}
        )
        if isinstance(self.source, HfSource):
            self.key = digest(shape, self._hub_key())
            return
        self.files = _files(self.source, self.where)
        root = Path(sysconfig.get_path("stdlib")) if isinstance(self.source, StdlibSource) else None
        names = [path.relative_to(root).as_posix() if root else path.name for path in self.files]
        total_bytes = sum(path.stat().st_size for path in self.files)
        if total_bytes == 0:
            raise InputError(f"{self.where}: every file is empty ({few(map(str, self.files), 3)})")
        indices = (
            [path for path in map(index_of, self.files) if path.exists()]
            if isinstance(self.source, TokensSource)
            else []
        )
        names += [path.name for path in indices]
        self.key = digest(shape, _files_key([*self.files, *indices], names, total_bytes))

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which reads pieces: without what only asks the hub."""
        return {name: value for name, value in self.__dict__.items() if name != "_builder"}

    def pieces(self) -> list[Piece]:
        """All of it, in order, in pieces that can be read apart from each other."""
        if isinstance(self.source, HfSource):
            place, rows = Path(self.source.name), self._rows
            if self.source.streaming:
                return [Piece(place, 0)]
            step = max(1, len(rows) * reading.PIECE_BYTES // max(1, rows.data.nbytes))
            size = rows.data.nbytes // max(1, len(rows)) * step
            return [Piece(place, size, at, min(at + step, len(rows)), at) for at in range(0, len(rows), step)]
        split = {"jsonl": split_jsonl, "parquet": split_parquet, "tokens": self._split_tokens}.get(self.source.source)
        pieces: list[Piece] = []
        for path in self.files:
            with self._errors(f"{path} "):
                pieces += split(path) if split else [Piece(path, path.stat().st_size)]
        return pieces

    def _split_tokens(self, path: Path) -> list[Piece]:
        return self._token_file(path).pieces()

    def _token_file(self, path: Path) -> TokenFile:
        assert isinstance(self.source, TokensSource)
        return TokenFile.open(path, self.source.dtype)

    def read(self, piece: Piece, tally: Tally, tokenizer: SavedTokenizer | None = None) -> Iterator[Document]:
        """The documents of a piece, in order; `tally` counts what became of its rows.

        Args:
            tokenizer: that made the ids of a source of tokens.

        Raises:
            InputError: a malformed file; or many rows were read, none of which gives a document.
        """
        path, source = piece.path, self.source
        if getattr(source, "sample_by", None) == "document" and piece.size >= 2**31:
            raise InputError(
                f"{self.where}: {path} is over 2 GiB, too large for one document; set sample_by to paragraph or line"
            )
        with self._errors("" if isinstance(source, HfSource) else f"{path} "):
            yield from self._documents(piece, tally, tokenizer)
        tally.check_hope(self.keys)

    def _documents(self, piece: Piece, tally: Tally, tokenizer: SavedTokenizer | None) -> Iterator[Document]:
        source = self.source
        if isinstance(source, TokensSource):
            if tokenizer is None:
                raise InputError(
                    f"{self.where}: has no text to train a bpe on; set data.tokenizer to its own tokenizer"
                )
            return read_tokens(self._token_file(piece.path), piece, tally, tokenizer, self.where)
        if isinstance(source, HfSource):
            rows = self._rows if source.streaming else self._rows.select(range(piece.start, piece.stop))
            places = (Place(source.name, 0, number) for number in itertools.count(piece.first + 1))
            return tally.documents(zip(places, rows, strict=False), source.column)
        if isinstance(source, JsonlSource):
            return read_jsonl(piece, source.column, tally)
        if isinstance(source, ParquetSource):
            return read_parquet(piece, source.column, tally)
        return read_text(piece.path, getattr(source, "sample_by", "document"), tally)

    def documents(self) -> Iterator[str]:
        """The texts of all documents, in order."""
        tally = Tally()
        return (document.text for piece in self.pieces() for document in self.read(piece, tally))

    def check(self, tally: Tally, documents: int, most_broken: float) -> None:
        """Raise InputError where reading all of it gave no document, or more than `most_broken` of its rows are broken.

        Args:
            tally: of the whole corpus.
        """
        tally.check(self.keys, most_broken)
        if isinstance(self.source, TokensSource) and tally.rows <= len(self.files):
            files = few(map(str, self.files), 3)
            raise InputError(
                f"{self.where}: the end-of-text token of data.tokenizer does not part documents in {files}: take the "
                f"tokenizer that they were made with"
            )
        if documents:
            return
        if tally.skipped:
            raise InputError(f"{self.where}: no file is UTF-8 text ({few(tally.skipped_examples, 3)})")
        raise InputError(f"{self.where}: the corpus holds no text")

    def texts(self, rows: datasets.IterableDataset, tally: Tally) -> Iterator[str]:
        """The texts of a `stream`, in order; `tally` counts its rows, over several readings too.

        Raises:
            InputError: a row cannot be read, or more than the share `data.max_broken` of the rows is broken.
        """
        assert isinstance(self.source, HfSource)
        place = Place(self.source.name, 0, 0)  # a reading begins anywhere
        with self._errors():
            for document in tally.documents(((place, row) for row in rows), self._column):
                tally.check_so_far(self.keys, self._max_broken)
                yield document.text
            tally.check_so_far(self.keys, self._max_broken)

    def stream(self, shards: int = 1, index: int = 0) -> datasets.IterableDataset:
        """A hub dataset's rows in order, those of shard `index`; its `state_dict` is the place after the last row.

        A shard is every so-manyth file, or every so-manyth row where there are fewer files than shards.
        """
        from datasets.distributed import split_dataset_by_node

        assert isinstance(self.source, HfSource)
        with self._errors(), _quiet():
            rows = self._builder.as_streaming_dataset(split=self.source.split)
            if shards == 1:
                return rows
            if rows.num_shards >= shards:
                return rows.shard(num_shards=shards, index=index, contiguous=False)
            return split_dataset_by_node(rows, rank=index, world_size=shards)

    @functools.cached_property
    def _rows(self) -> Any:
        """The rows of a hub dataset; the first ones of a streaming one."""
        assert isinstance(self.source, HfSource)
        with self._errors(), _quiet():
            if self.source.streaming:
                rows = self.stream().take(self.source.scan)
            else:
                self._builder.download_and_prepare()
                rows = self._builder.as_dataset(split=self.source.split)
            column = self.source.column
            return rows.select_columns([column]) if column in (rows.column_names or ()) else rows

    @functools.cached_property
    def _builder(self) -> Any:
        import datasets

        source = self.source
        assert isinstance(source, HfSource)
        try:
            with _quiet():
                builder = datasets.load_dataset_builder(
                    source.name,
                    source.subset,
                    revision=source.commit or source.revision,
                    cache_dir=str(self._hub_cache),
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{self.where}.name: cannot open {source.name!r} ({_first_line(error)}); check name, subset "
                f"and revision, that this machine is online, and that HF_HUB_OFFLINE and HF_DATASETS_OFFLINE "
                f"are unset"
            ) from error
        splits = builder.info.splits or builder.config.data_files
        if splits and source.split.split("[")[0] not in {str(split) for split in splits}:
            raise InputError(
                f"{self.where}.split: {source.name!r} has no split {source.split!r}; "
                f"it has {', '.join(map(str, splits))}"
            )
        return builder

    def _hub_key(self) -> list[Any]:
        assert isinstance(self.source, HfSource)
        builder = self._builder
        # A hub dataset's hash is its commit; a folder's leaves out when its files were written.
        local = Path(self.source.name).is_dir() and builder.config.data_files
        times = [list(files.origin_metadata) for files in builder.config.data_files.values()] if local else []
        return [builder.config_id, builder.hash, times]

    @contextlib.contextmanager
    def _errors(self, what: str = "") -> Iterator[None]:
        import datasets
        import pyarrow

        try:
            yield
        except InputError:
            raise
        except (*_UNREADABLE, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ or error
            raise InputError(f"{self.where}: {what}cannot be read ({_first_line(cause)})") from error


def check_sources(config: DataConfig) -> None:
    """Raise InputError where a source names files that are not there; nothing is read, nor the hub asked."""
    for index, source in enumerate(config.sources):
        _files(source, f"data.sources[{index}]")


def _files(source: Any, where: str) -> list[Path]:
    if isinstance(source, HfSource):
        return []
    if not isinstance(source, StdlibSource):
        return _find(source.source, source.paths, f"{where}.paths")
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in root.rglob("*.py") if not _TEST_FOLDERS.intersection(p.relative_to(root).parts) and p.is_file()]
    if not files:
        raise InputError(f"{where}: this Python has no library sources in {root}; use source: text")
    return sorted(files)


def _find(kind: str, paths: tuple[str, ...], where: str) -> list[Path]:
    found: dict[Path, None] = {}
    for text in paths:
        path = Path(text).expanduser()
        if kind == "tokens" and not path.exists() and index_of(path.with_name(f"{path.name}.bin")).exists():
            path = path.with_name(f"{path.name}.bin")  # Megatron's own way to name the two files
        matches = files_at(path, where, text)
        if path.is_dir():
            matches = [file for file in matches if kind_of(file) == kind]
            if not matches:
                raise InputError(f"{where}: the folder {text} holds no {kind} file")
        found.update(dict.fromkeys(file.resolve() for file in sorted(matches)))
    return list(found)


def files_at(path: Path, where: str, given: str) -> list[Path]:
    """The files of a folder but hidden ones, a file itself, or those that a glob matches.

    Args:
        where, given: what the user wrote, for messages.

    Raises:
        InputError: there are none.
    """
    if path.is_dir():
        every = (file for file in path.rglob("*") if file.is_file())
        return [file for file in every if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if path.exists():
        return [path]
    # Path.glob takes no absolute pattern.
    names = glob.glob(str(path), recursive=True)  # noqa: PTH207
    if files := [file for file in map(Path, names) if file.is_file()]:
        return files
    if glob.has_magic(given):
        raise InputError(f"{where}: {given} matches no file")
    raise InputError(f"{where}: {given} does not exist{nearest_path(path)}")


def kind_of(path: Path) -> str:
    """The kind of a file in a folder: by its name, and text where that says nothing."""
    return _KINDS.get((path.with_suffix("") if is_compressed(path) else path).suffix, "text")


def _files_key(files: list[Path], names: list[str], total_bytes: int) -> list[Any]:
    if total_bytes > CONTENT_KEY_BYTES:
        stats = [(path, path.stat()) for path in files]
        return [(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]
    return [
        (name, hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest())
        for name, path in zip(names, files, strict=True)
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without datasets' own progress bars: they count files, ours counts documents."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
