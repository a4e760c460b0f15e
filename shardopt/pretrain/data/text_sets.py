"""Named sets of text to score, each read once from its beginning to its end, in constant memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardopt.errors import InputError, few
from shardopt.pretrain.data.config import DataConfig
from shardopt.pretrain.data.packing import chunks
from shardopt.pretrain.data.reading import Keys, Tally, is_compressed, merge, show
from shardopt.pretrain.data.sources import Corpus, files_at, kind_of
from shardopt.pretrain.data.tokenizers import SavedTokenizer

logger = logging.getLogger("shardopt.data")

_CHUNK_CHARACTERS = 1 << 20
_COMPRESSION = 4  # about, of text: for the time left alone


@dataclass(frozen=True)
class TextSet:
    """A named set of text: sources of one kind each, and their size in bytes, about."""

    label: str
    corpora: list[Corpus]
    size: int

    @classmethod
    def of(cls, given: str, column: str) -> TextSet:
        """What the user wrote: PATH, or LABEL=PATH, of a file, a folder, or files that a glob matches.

        Raises:
            InputError: there is no such file, or none of text.
        """
        label, equals, text = given.partition("=")
        if not equals or Path(given).exists():
            label, text = "", given
        where, path = f"--data {text}", Path(text).expanduser()
        kinds: dict[str, list[str]] = {}
        for file in sorted(files_at(path, "--data", text)):
            kinds.setdefault(kind_of(file), []).append(str(file))
        if "tokens" in kinds and not path.is_dir():
            raise InputError(f"{where}: holds token ids; bits per byte are of text")
        kinds.pop("tokens", None)
        if not kinds:
            raise InputError(f"{where}: the folder holds no text")
        sources: list[dict[str, Any]] = [
            {"source": kind, "paths": paths} | ({} if kind == "text" else {"column": column})
            for kind, paths in sorted(kinds.items())
        ]
        config = DataConfig.model_validate({"sources": sources})
        keys = Keys(where, "--column", "--max-broken")
        corpora = [Corpus(config, index, keys) for index in range(len(sources))]
        files = [file for corpus in corpora for file in corpus.files]
        size = sum(file.stat().st_size * (_COMPRESSION if is_compressed(file) else 1) for file in files)
        return cls(label or path.name or str(path), corpora, size)


def text_sets(given: Sequence[str], column: str) -> list[TextSet]:
    """A set for each thing that the user wrote.

    Raises:
        InputError: see `TextSet.of`; two have one name.
    """
    sets = [TextSet.of(each, column) for each in given]
    labels = [one.label for one in sets]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise InputError(f"--data: two sets are named {twice}; name them, as in --data NAME=PATH")
    return sets


class Reader:
    """The documents of a set as one stream of ids, and what became of its rows.

    Attributes:
        text_bytes, tokens: of the documents that were read so far, their ends among the tokens.
    """

    def __init__(self, texts: TextSet, tokenizer: SavedTokenizer) -> None:
        self._texts, self._tokenizer, self._encode = texts, tokenizer, tokenizer.encoder()
        self._read: list[tuple[Tally, int]] = []
        self.text_bytes = self.tokens = 0

    def blocks(self, block_size: int) -> Iterator[np.ndarray]:
        """Windows of block_size + 1 ids, block_size apart, the last one shorter; as a run packs its text, but that
        the first token and the tail are targets too."""
        end = np.asarray([self._tokenizer.eos], self._tokenizer.dtype)
        rest = end
        for ids in self._ids():
            rest = np.concatenate([rest, ids, end])
            while len(rest) > block_size:
                yield rest[: block_size + 1]
                rest = rest[block_size:]
        if len(rest) > 1:
            yield rest

    def _ids(self) -> Iterator[np.ndarray]:
        for corpus in self._texts.corpora:
            tallies, documents = [], 0
            for piece in corpus.pieces():
                tallies.append(tally := Tally())
                for some in chunks(corpus.read(piece, tally), _CHUNK_CHARACTERS, lambda document: document.text):
                    documents += len(some)
                    texts = [document.text for document in some]
                    for text, ids in zip(texts, self._encode(texts), strict=True):
                        self.text_bytes += len(text.encode())
                        self.tokens += len(ids) + 1
                        yield ids.astype(self._tokenizer.dtype, copy=False)
            self._read.append((merge(tallies)[0], documents))

    def check(self, most_broken: float) -> None:
        """See `Corpus.check`; of a set that is read to its end. What was left out is a warning."""
        for corpus, (tally, documents) in zip(self._texts.corpora, self._read, strict=True):
            corpus.check(tally, documents, most_broken)
            if tally.skipped:
                files = few(tally.skipped_examples, 3)
                logger.warning("%s: skipped %d files that are not UTF-8 text (%s)", corpus.where, tally.skipped, files)
            if tally.n_broken:
                place, words = tally.examples[0]
                message = "%s: %d of %d rows are broken: %s %s"
                logger.warning(message, corpus.where, tally.n_broken, tally.rows, show(place), words)
