"""The samples of a step: a function of (seed, step) alone, whatever the number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shardopt.pretrain.data.packing import Blocks, Packed, chunks, is_held_out
from shardopt.pretrain.data.sources import Corpus
from shardopt.pretrain.data.tokenizers import SavedTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Divisible by 1000 and by 3, 7 and 9: proportions written with three decimals, or as thirds, are met exactly.
_PERIOD = 252_000
_STREAM_CHARACTERS = 1 << 18
_START: dict[str, Any] = {"row": 0, "epoch": 0, "place": None, "offset": 0}


def _keys(count: int, *what: object) -> np.ndarray:
    """`count` 64-bit numbers that `what` alone decides."""
    return np.frombuffer(hashlib.shake_128(repr(what).encode()).digest(8 * count), "<u8")


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64-bit integers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, *key: object) -> np.ndarray:
    """Map each of `index` by a permutation of range(n) that `key` chooses; no memory, no order of asking.

    A balanced Feistel network over the next power of four, walked until it falls below n (Black and Rogaway,
    Ciphers with Arbitrary Finite Domains, 2002), which takes fewer than four walks on average.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    rounds = _keys(8, *key)
    out = index.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = out[todo] >> half, out[todo] & low
        for round_key in rounds:
            left, right = right, left ^ (_mix(right + round_key) & low)
        out[todo] = (left << half) | right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


class Mixture:
    """The source of each sample of a run, and how many samples came from that source before it.

    Samples are numbered over the whole run. The choice repeats after `_PERIOD` samples and is spread evenly
    within: a source's k-th sample lies at a hashed place in the k-th of equal parts, so any stretch of
    samples has nearly the asked proportions, and the period has them to 1 / _PERIOD.
    """

    def __init__(self, weights: list[float], seed: int) -> None:
        share = np.asarray(weights) / np.sum(weights) * _PERIOD
        self._counts = share.astype(np.int64)
        # The largest remainders get what flooring left over; nobody is left with none.
        missing = _PERIOD - int(self._counts.sum())
        self._counts[np.argsort(self._counts - share, kind="stable")[:missing]] += 1
        self._counts[np.argmax(self._counts)] -= np.count_nonzero(self._counts == 0)
        self._counts = np.maximum(self._counts, 1)
        place = []
        for source, count in enumerate(self._counts):
            k = np.arange(count, dtype=np.uint64)
            jitter = _mix(k + _keys(1, "mixture", seed, source)) / 2.0**64
            place.append((k + jitter) / count)
        owner = np.repeat(np.arange(len(weights)), self._counts)
        self._order = owner[np.argsort(np.concatenate(place), kind="stable")]
        # How many of the same source stand before each place of the period.
        self._before = np.empty_like(self._order)
        for source, count in enumerate(self._counts):
            self._before[self._order == source] = np.arange(count)

    def __call__(self, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sample, and its number among that source's samples."""
        period, place = np.divmod(sample, len(self._order))
        source = self._order[place]
        return source, period * self._counts[source] + self._before[place]

    def count(self, source: int, samples: int) -> int:
        """Number of the first `samples` samples that come from `source`."""
        period, place = divmod(samples, len(self._order))
        return period * int(self._counts[source]) + int(np.count_nonzero(self._order[:place] == source))


class Shuffled:
    """Packed blocks, in another order every epoch; samples are numbered from 0 over all epochs."""

    def __init__(self, blocks: Blocks, *key: object) -> None:
        self._blocks, self._key = blocks, key

    def rows(self, number: np.ndarray) -> np.ndarray:
        n = self._blocks.n_blocks
        epoch, place = np.divmod(number, n)
        index = np.empty_like(place)
        for one in np.unique(epoch):
            index[epoch == one] = permute(place[epoch == one], n, *self._key, int(one))
        return self._blocks.rows(index)


class Stream:
    """Blocks of a dataset that is read in order, over and over. Every rank reads all of it.

    The state is the dataset's place before the piece of text that holds the next block's first token, and how
    far into that piece it lies; the piece is read and tokenised again on resuming. Without a state (or for a
    step before it) the stream is read from its start.
    """

    def __init__(self, corpus: Corpus, tokenizer: SavedTokenizer, holdout: float, block_size: int) -> None:
        self._corpus, self._tokenizer, self._holdout, self._size = corpus, tokenizer, holdout, block_size
        self._encode = tokenizer.encoder()
        self._window, self._window_start = np.empty((0, block_size + 1), tokenizer.dtype), 0
        self.load_state_dict(_START)

    def rows(self, number: np.ndarray) -> np.ndarray:
        return self._window[number - self._window_start]

    def advance(self, first: int, last: int) -> None:
        """Make samples first..last, those of the next step, ready for `rows`."""
        if self._window_start == first and len(self._window) == last - first and self._row == last:
            return
        if first < self._row:
            self.load_state_dict(_START)
        while self._row < first:
            self._next_block()
        window = [self._next_block() for _ in range(last - first)]
        self._window_start = first
        self._window = np.stack(window) if window else self._window[:0]

    def state_dict(self) -> dict[str, Any]:
        """JSON values; the place after the step that was drawn last."""
        state = self._pieces[0][0] if self._pieces else self._state_here()
        return {"row": self._row, "offset": self._offset, **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._row, self._offset, self._epoch = state["row"], state["offset"], state["epoch"]
        self._pieces: list[tuple[dict[str, Any], np.ndarray]] = []
        self._window = self._window[:0]
        self._start(state["place"])

    def _start(self, place: dict[str, Any] | None) -> None:
        self._dataset, self._place = self._corpus.stream(), place
        if place is not None:
            self._dataset.load_state_dict(place)
        self._texts = self._read()

    def _state_here(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "place": self._place}

    def _read(self) -> Iterator[list[str]]:
        """Training texts in pieces that depend only on where reading began, noting the place after each."""
        documents = filter(None, map(self._corpus.text, self._dataset))
        for texts in chunks(documents, _STREAM_CHARACTERS):
            if kept := [text for text in texts if not is_held_out(text, self._holdout)]:
                self._place = self._dataset.state_dict()
                yield kept

    def _next_block(self) -> np.ndarray:
        need = self._offset + self._size + 1
        while sum(len(ids) for _, ids in self._pieces) < need:
            self._pieces.append(self._next_piece())
        first = self._pieces[0][1]
        whole = first if len(first) >= need else np.concatenate([ids for _, ids in self._pieces])
        out = whole[self._offset : need]
        self._offset += self._size
        while self._pieces and self._offset >= len(self._pieces[0][1]):
            self._offset -= len(self._pieces.pop(0)[1])
        self._row += 1
        return out

    def _next_piece(self) -> tuple[dict[str, Any], np.ndarray]:
        for _ in range(2):
            state = self._state_here()
            texts = next(self._texts, None)
            if texts is not None:
                end = np.asarray([self._tokenizer.eos], self._tokenizer.dtype)
                ids = [part for text_ids in self._encode(texts) for part in (text_ids, end)]
                return state, np.concatenate([np.empty(0, self._tokenizer.dtype), *ids])
            self._epoch += 1
            self._start(None)
        raise RuntimeError(f"{self._corpus.where}: the stream gave documents before and now gives none")


def _gather(
    sources: Sequence[Blocks | Shuffled | Stream], which: np.ndarray, number: np.ndarray, size: int
) -> torch.Tensor:
    """Row `number` of source `which`, for each pair: int64, [len(which), size]."""
    out = np.empty((len(which), size), np.int64)
    for source in np.unique(which):
        mine = which == source
        out[mine] = sources[source].rows(number[mine])
    return torch.from_numpy(out)


@dataclass
class TrainData:
    """The training samples.

    Attributes:
        sources, weights: where samples come from, and the share of each; `seed` decides how they are mixed.
        block_size: target tokens of a sample, which holds one token more.
        bytes_per_token: UTF-8 bytes of text a token stands for, ends of documents counted as tokens, weighted
            as the sources are (estimated from the documents scanned where a source streams).
        tokens: of one epoch over all sources; None where a source streams.
        fingerprint: hash of the tokens and of how they are mixed and cut; equal means equal samples for equal
            (seed, step, global batch).
        corpora: what was read for each source.

    Samples are numbered over the whole run; step 0 begins with sample 0 unless `load_state_dict` says otherwise.
    """

    sources: Sequence[Shuffled | Stream]
    weights: list[float]
    saved_tokenizer: SavedTokenizer
    _: KW_ONLY
    block_size: int
    seed: int
    global_batch: int
    bytes_per_token: float
    tokens: int | None
    fingerprint: str
    corpora: list[Packed]
    _first: int = field(default=0, init=False)  # sample of step 0, though it may lie before the data's beginning

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A fresh copy, with `save_pretrained`, `decode` and `eos_token_id`."""
        return self.saved_tokenizer.load()

    @property
    def vocab_size(self) -> int:
        return self.saved_tokenizer.vocab_size

    @cached_property
    def _mixture(self) -> Mixture:
        return Mixture(self.weights, self.seed)

    @property
    def _streams(self) -> dict[int, Stream]:
        return {index: source for index, source in enumerate(self.sources) if isinstance(source, Stream)}

    def batch(self, step: int, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of the global batch of `step` (from 0): int64, [stop - start, block_size + 1].

        Inputs are [:, :-1], targets [:, 1:]; every target counts. Any split into rows gives the same rows.
        """
        first = self._samples(step)
        if not 0 <= start <= stop <= self.global_batch or first < 0:
            raise IndexError(f"rows {start}..{stop} of step {step}, but a batch has {self.global_batch} rows")
        for index, stream in self._streams.items():
            stream.advance(self._mixture.count(index, first), self._mixture.count(index, first + self.global_batch))
        which, number = self._mixture(np.arange(first + start, first + stop))
        return _gather(self.sources, which, number, self.block_size + 1)

    def _samples(self, step: int) -> int:
        """Samples before `step`."""
        return self._first + step * self.global_batch

    def state_dict(self, step: int) -> dict[str, Any]:
        """The place before `step`, the next one: JSON values, the same on every rank."""
        streams = {str(index): stream.state_dict() for index, stream in self._streams.items()}
        return {"samples": self._samples(step), "streams": streams}

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Go on at a place with `step`, whatever the global batch was until then."""
        self._first = state["samples"] - step * self.global_batch
        for index, one in state["streams"].items():
            self._streams[int(index)].load_state_dict(one)

    def begin(self, step: int) -> None:
        """Begin with the first sample at `step`."""
        self.load_state_dict({"samples": 0, "streams": {}}, step)


class HoldoutData:
    """The held-out blocks of all sources, in one fixed order mixed over them, the same for every seed.

    Attributes:
        block_size: target tokens of a block, which holds one token more.
        n_blocks: how many there are.
        tokens: how many tokens they were cut from.
    """

    def __init__(self, blocks: list[Blocks], block_size: int, tokens: int, token_bytes: np.ndarray) -> None:
        self._blocks, self.block_size = blocks, block_size
        self._starts = np.cumsum([0, *(one.n_blocks for one in blocks)])
        self.n_blocks = int(self._starts[-1])
        self.tokens, self._token_bytes = tokens, token_bytes

    def batch(self, start: int, stop: int) -> torch.Tensor:
        """Blocks start..stop: int64, [stop - start, block_size + 1]; the first are a fair sample of all."""
        if not 0 <= start <= stop <= self.n_blocks:
            raise IndexError(f"held-out blocks {start}..{stop}, but there are {self.n_blocks}")
        index = permute(np.arange(start, stop), self.n_blocks, "holdout")
        which = np.searchsorted(self._starts, index, side="right") - 1
        return _gather(self._blocks, which, index - self._starts[which], self.block_size + 1)

    def target_bytes(self, batch: torch.Tensor) -> int:
        """UTF-8 bytes of the text that the targets of `batch` stand for."""
        return int(self._token_bytes[batch[:, 1:].numpy()].sum())
