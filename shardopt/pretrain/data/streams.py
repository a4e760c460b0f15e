"""Blocks of a dataset that is read in order while a run trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from shardopt.errors import InputError
from shardopt.pretrain.data.packing import chunks, is_held_out
from shardopt.pretrain.data.reading import Tally
from shardopt.pretrain.data.sources import Corpus
from shardopt.pretrain.data.tokenizers import SavedTokenizer

logger = logging.getLogger("shardopt.data")

_STREAM_CHARACTERS = 1 << 18
_START: dict[str, Any] = {"given": 0, "epoch": 0, "place": None, "offset": 0}


class Stream:
    """Blocks of a dataset in `shards`, each read in order, over and over.

    Sample n of the run is the next block of the shard n % shards; block k of that shard has the number
    k * shards + n % shards. So which samples a step has does not depend on the number of ranks, and a rank that takes
    every k-th sample reads only the shards that hold them.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: SavedTokenizer, holdout: float, block_size: int, shards: int = 1
    ) -> None:
        encode = tokenizer.encoder()
        corpus.stream(shards, 0)  # what cannot be opened is refused at the start
        self._shards = [_Shard(corpus, tokenizer, encode, holdout, block_size, shards, i) for i in range(shards)]
        self._step = np.empty(0, np.int64)  # whose blocks are drawn, those of the shards `_drawn`
        self._drawn: set[int] = set()
        self._blocks: dict[int, np.ndarray] = {}

    @property
    def shards(self) -> int:
        return len(self._shards)

    def rows(self, number: np.ndarray) -> np.ndarray:
        """Blocks that were drawn, by their numbers."""
        return np.stack([self._blocks[one] for one in number.tolist()])

    def draw(self, number: np.ndarray, wanted: np.ndarray) -> None:
        """Make some of a step's blocks ready for `rows`.

        Args:
            number: of the step's blocks, in order.
            wanted: a mask of them. Shards that hold none of these are not read.
        """
        if not np.array_equal(self._step, number):
            self._forget(number)
        of = number % self.shards
        for index in sorted(set(of[wanted].tolist()) - self._drawn):
            shard, own = self._shards[index], number[of == index]
            if shard.given > own[0] // self.shards:
                shard.load_state_dict(_START)
            while shard.given < own[0] // self.shards:
                shard.next_block()
            for one in own.tolist():
                self._blocks[one] = shard.next_block()
            self._drawn.add(index)

    def _forget(self, step: np.ndarray) -> None:
        self._step, self._drawn, self._blocks = step, set(), {}

    def state_dict(self) -> list[dict[str, Any]]:
        """JSON values for each shard; those that this process does not read are where they were loaded."""
        return [shard.state_dict() for shard in self._shards]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        self._forget(np.empty(0, np.int64))
        for shard, one in zip(self._shards, state, strict=True):
            shard.load_state_dict(one)


class _Shard:
    """The blocks of one shard.

    The state is the dataset's place before the piece of text that holds the next block's first token, and how far into
    that piece it lies; the piece is read and tokenised again on resuming. Nothing is opened before the first block.

    Attributes:
        given: blocks, over all epochs.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: SavedTokenizer,
        encode: Callable[[list[str]], list[np.ndarray]],
        holdout: float,
        block_size: int,
        shards: int,
        index: int,
    ) -> None:
        self._corpus, self._tokenizer, self._encode = corpus, tokenizer, encode
        self._holdout, self._size, self._of = holdout, block_size, (shards, index)
        self._tally, self._warn_at = Tally(), 1
        self.load_state_dict(_START)

    def state_dict(self) -> dict[str, Any]:
        state = self._pieces[0][0] if self._pieces else self._state_here()
        return {"given": self.given, "offset": self._offset, **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given, self._offset, self._epoch = state["given"], state["offset"], state["epoch"]
        self._pieces: list[tuple[dict[str, Any], np.ndarray]] = []
        self._place = state["place"]
        self._texts: Iterator[list[str]] | None = None

    def next_block(self) -> np.ndarray:
        """The next `block_size` + 1 tokens, of which the last is the next block's first."""
        need = self._offset + self._size + 1
        while sum(len(ids) for _, ids in self._pieces) < need:
            self._pieces.append(self._next_piece())
        first = self._pieces[0][1]
        whole = first if len(first) >= need else np.concatenate([ids for _, ids in self._pieces])
        out = whole[self._offset : need]
        self.given += 1
        self._offset += self._size
        while self._pieces and self._offset >= len(self._pieces[0][1]):
            self._offset -= len(self._pieces.pop(0)[1])
        return out

    def _state_here(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "place": self._place}

    def _read(self) -> Iterator[list[str]]:
        """Training texts in pieces that depend only on where reading began, noting the place after each."""
        dataset = self._corpus.stream(*self._of)
        if self._place is not None:
            dataset.load_state_dict(self._place)
        for texts in chunks(self._corpus.texts(dataset, self._tally), _STREAM_CHARACTERS, str):
            self._warn_of_broken()
            if kept := [text for text in texts if not is_held_out(text, self._holdout)]:
                self._place = dataset.state_dict()
                yield kept

    def _warn_of_broken(self) -> None:
        """Once for a row, again for ten times as many."""
        broken = self._tally.n_broken
        if broken >= self._warn_at:
            self._warn_at = 10 ** len(str(broken))
            words = self._tally.examples[0][1]
            logger.warning(
                "%s (%s): %d of %d rows read are broken, and left out: %s",
                self._corpus.where,
                self._corpus.label,
                broken,
                self._tally.rows,
                words,
            )

    def _next_piece(self) -> tuple[dict[str, Any], np.ndarray]:
        for _ in range(2):
            if self._texts is None:
                self._texts = self._read()
            state = self._state_here()
            texts = next(self._texts, None)
            if texts is not None:
                end = np.asarray([self._tokenizer.eos], self._tokenizer.dtype)
                ids = [part for text_ids in self._encode(texts) for part in (text_ids, end)]
                return state, np.concatenate([np.empty(0, self._tokenizer.dtype), *ids])
            self._epoch, self._place, self._texts = self._epoch + 1, None, None
        where, (shards, index) = self._corpus.where, self._of
        if shards > 1:
            raise InputError(f"{where}.shards: shard {index} of {shards} gives no document to train on; take fewer")
        raise RuntimeError(f"{where}: the stream gave documents before and now gives none")
