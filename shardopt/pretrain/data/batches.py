"""The samples of a step: a function of (seed, step) alone, whatever the number of ranks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shardopt.pretrain.data.packing import Blocks, Packed
from shardopt.pretrain.data.streams import Stream
from shardopt.pretrain.data.tokenizers import SavedTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Divisible by 1000 and by 3, 7 and 9: proportions written with three decimals, or as thirds, are met exactly.
_PERIOD = 252_000


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

    def count(self, source: int, samples: range) -> int:
        """How many of `samples` come from `source`."""
        cycle = len(self._order) // math.gcd(len(self._order), samples.step)  # after which the places come again
        places = samples.start + samples.step * np.arange(min(cycle, len(samples)))
        found = self._order[places % len(self._order)] == source
        whole, rest = divmod(len(samples), cycle)
        return whole * int(np.count_nonzero(found)) + int(np.count_nonzero(found[:rest]))


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

    def batch(self, step: int, start: int, stop: int, every: int = 1) -> torch.Tensor:
        """Rows start, start + every, ... < stop of the global batch of `step` (from 0): int64, [rows, block_size + 1].

        Inputs are [:, :-1], targets [:, 1:]; every target counts. Any split into rows gives the same rows.
        """
        first = self._samples(step)
        if not 0 <= start <= stop <= self.global_batch or first < 0:
            raise IndexError(f"rows {start}..{stop} of step {step}, but a batch has {self.global_batch} rows")
        samples = np.arange(first, first + self.global_batch)
        which, number = self._mixture(samples)
        rows = slice(start, stop, every)
        asked = np.zeros(self.global_batch, bool)
        asked[rows] = True
        for index, stream in self._streams.items():
            own, count = which == index, partial(self._mixture.count, index)
            stream.draw(range(first, first + self.global_batch), samples[own], number[own], asked[own], count)
        return _gather(self.sources, which[rows], number[rows], self.block_size + 1)

    def _samples(self, step: int) -> int:
        """Samples before `step`."""
        return self._first + step * self.global_batch

    @property
    def streams_in_shards(self) -> bool:
        """Whether ranks read different parts of the text, so that one's `state_dict` is not the whole place."""
        return any(stream.shards > 1 for stream in self._streams.values())

    def state_dict(self, step: int) -> dict[str, Any]:
        """The place before `step`, the next one: JSON values. See `merge_places`."""
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


def merge_places(places: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The place of a run whose ranks are at `places` (each a `TrainData.state_dict`) after the same step."""
    streams = {
        index: [max(shards, key=lambda shard: shard["samples"]) for shards in zip(*of_ranks, strict=True)]
        for index in places[0]["streams"]
        for of_ranks in [[place["streams"][index] for place in places]]
    }
    return places[0] | {"streams": streams}


class HoldoutData:
    """The held-out blocks of all sources, in one fixed order mixed over them, the same for every seed.

    Attributes:
        block_size: target tokens of a block, which holds one token more.
        n_blocks: how many there are.
        tokens: how many tokens they were cut from.
        labels: of the sources.
    """

    def __init__(
        self,
        blocks: list[Blocks],
        block_size: int,
        tokens: int,
        token_bytes: np.ndarray,
        labels: Sequence[str] | None = None,
    ) -> None:
        self._blocks, self.block_size = blocks, block_size
        self.labels = list(labels) if labels is not None else [str(index) for index in range(len(blocks))]
        self._starts = np.cumsum([0, *(one.n_blocks for one in blocks)])
        self.n_blocks = int(self._starts[-1])
        self.tokens, self._token_bytes = tokens, token_bytes

    def batch(self, start: int, stop: int) -> torch.Tensor:
        """Blocks start..stop: int64, [stop - start, block_size + 1]; the first are a fair sample of all."""
        if not 0 <= start <= stop <= self.n_blocks:
            raise IndexError(f"held-out blocks {start}..{stop}, but there are {self.n_blocks}")
        return self.rows(np.arange(start, stop))

    def rows(self, numbers: np.ndarray) -> torch.Tensor:
        """Blocks by their numbers in that order: int64, [len(numbers), block_size + 1]."""
        index, which = self._find(numbers)
        return _gather(self._blocks, which, index - self._starts[which], self.block_size + 1)

    def _find(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where blocks stand among those of all sources, one source after another, and whose they are."""
        index = permute(numbers, self.n_blocks, "holdout")
        return index, np.searchsorted(self._starts, index, side="right") - 1

    def sets(self, blocks: int) -> dict[str, np.ndarray]:
        """The numbers of each source's blocks among the first `blocks`, in order, by the source's label."""
        numbers = np.arange(blocks)
        _, which = self._find(numbers)
        return {label: numbers[which == index] for index, label in enumerate(self.labels)}

    def target_bytes(self, batch: torch.Tensor) -> int:
        """UTF-8 bytes of the text that the targets of `batch` stand for."""
        return int(self._token_bytes[batch[:, 1:].numpy()].sum())
