"""The samples of a step: a function of (seed, step) alone, whatever the number of ranks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shardopt.pretrain.data.packing import Blocks, Packed
from shardopt.pretrain.data.stages import Stages
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
    """The source of each sample of a run.

    Samples are numbered over the whole run. The choice repeats after `_PERIOD` samples and is spread evenly
    within: a source's k-th sample lies at a hashed place in the k-th of equal parts, so any stretch of
    samples has nearly the asked proportions, and the period has them to 1 / _PERIOD.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        share = np.asarray(weights) / np.sum(weights) * _PERIOD
        counts = share.astype(np.int64)
        # The largest remainders get what flooring left over; nobody who has a weight is left with none.
        missing = _PERIOD - int(counts.sum())
        counts[np.argsort(counts - share, kind="stable")[:missing]] += 1
        lost = (counts == 0) & (share > 0)
        counts[np.argmax(counts)] -= np.count_nonzero(lost)
        counts[lost] = 1
        place = []
        for source, count in enumerate(counts):
            k = np.arange(count, dtype=np.uint64)
            jitter = _mix(k + _keys(1, "mixture", seed, source)) / 2.0**64
            place.append((k + jitter) / count)
        owner = np.repeat(np.arange(len(weights)), counts)
        self._order = owner[np.argsort(np.concatenate(place), kind="stable")]

    def __call__(self, sample: np.ndarray) -> np.ndarray:
        """The source of each sample."""
        return self._order[sample % len(self._order)]

    def count(self, source: int, samples: range) -> int:
        """How many of `samples` come from `source`."""
        cycle = len(self._order) // math.gcd(len(self._order), samples.step)  # after which the places come again
        places = samples.start + samples.step * np.arange(min(cycle, len(samples)))
        found = self._order[places % len(self._order)] == source
        whole, rest = divmod(len(samples), cycle)
        return whole * int(np.count_nonzero(found)) + int(np.count_nonzero(found[:rest]))


class Shuffled:
    """Packed blocks, in another order every epoch; samples are numbered from 0 over all epochs."""

    shards = 1

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


@dataclass(frozen=True)
class _Place:
    """What came before a step.

    Attributes:
        samples: of all sources.
        drawn: of each source, for each of its shards.
    """

    step: int
    samples: int
    drawn: list[list[int]]


@dataclass
class TrainData:
    """The training samples.

    Attributes:
        sources, stages: where samples come from, how many a step has, and the weights by which they are mixed; `seed`
            decides the order.
        block_size: target tokens of a sample, which holds one token more.
        tokens: of one epoch over all sources; None where a source streams.
        fingerprint: hash of the tokens and of how they are mixed at first and cut; equal means equal samples for equal
            (seed, stages, step).
        corpora: what was read for each source.

    Samples are numbered over the whole run; step 0 begins with sample 0 unless `load_state_dict` says otherwise.
    """

    sources: Sequence[Shuffled | Stream]
    stages: Stages
    saved_tokenizer: SavedTokenizer
    _: KW_ONLY
    block_size: int
    seed: int
    tokens: int | None
    fingerprint: str
    corpora: list[Packed]
    _loaded: _Place = field(init=False)  # where everything that is asked for begins
    _last: _Place = field(init=False)  # a step that was asked for, from where the next is near
    _mixtures: dict[tuple[float, ...], Mixture] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.begin(0)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A fresh copy, with `save_pretrained`, `decode` and `eos_token_id`."""
        return self.saved_tokenizer.load()

    @property
    def vocab_size(self) -> int:
        return self.saved_tokenizer.vocab_size

    def bytes_per_token(self, step: int) -> float:
        """UTF-8 bytes of text a token of `step` stands for, ends of documents counted as tokens, by the sources'
        weights (estimated from the documents scanned where a source streams)."""
        sizes = (one.train.bytes / one.train.tokens for one in self.corpora)
        return sum(share * size for share, size in zip(self.stages.at(step).shares, sizes, strict=True))

    def _mixture(self, weights: tuple[float, ...]) -> Mixture:
        if weights not in self._mixtures:
            self._mixtures[weights] = Mixture(weights, self.seed)
        return self._mixtures[weights]

    @property
    def _streams(self) -> dict[int, Stream]:
        return {index: source for index, source in enumerate(self.sources) if isinstance(source, Stream)}

    def batch(self, step: int, start: int, stop: int, every: int = 1) -> torch.Tensor:
        """Rows start, start + every, ... < stop of the global batch of `step` (from 0): int64, [rows, block_size + 1].

        Inputs are [:, :-1], targets [:, 1:]; every target counts. Any split into rows gives the same rows.
        """
        place, stage = self._place(step), self.stages.at(step)
        if not 0 <= start <= stop <= stage.global_batch:
            raise IndexError(f"rows {start}..{stop} of step {step}, but its batch has {stage.global_batch} rows")
        samples = np.arange(place.samples, place.samples + stage.global_batch)
        which = self._mixture(stage.weights)(samples)
        number = np.empty_like(samples)
        for index, source in enumerate(self.sources):
            for shard, drawn in enumerate(place.drawn[index]):
                own = (which == index) & (samples % source.shards == shard)
                number[own] = shard + source.shards * (drawn + np.arange(np.count_nonzero(own)))
        rows = slice(start, stop, every)
        asked = np.zeros(stage.global_batch, bool)
        asked[rows] = True
        for index, stream in self._streams.items():
            stream.draw(number[which == index], asked[which == index])
        return _gather(self.sources, which[rows], number[rows], self.block_size + 1)

    def _place(self, step: int) -> _Place:
        """What came before `step`: steps by steps of one stage from the nearest place that is known.

        Raises:
            IndexError: `step` is before that from which the data goes on.
        """
        if step < self._loaded.step:
            raise IndexError(f"step {step}, but the data begins at step {self._loaded.step}")
        place = self._last if self._last.step <= step else self._loaded
        for stage, steps in self.stages.between(place.step, step):
            mixture, stop = self._mixture(stage.weights), place.samples + steps * stage.global_batch
            drawn = [
                [
                    count
                    + mixture.count(index, range(place.samples + (shard - place.samples) % len(own), stop, len(own)))
                    for shard, count in enumerate(own)
                ]
                for index, own in enumerate(place.drawn)
            ]
            place = _Place(place.step + steps, stop, drawn)
        self._last = place
        return place

    @property
    def streams_in_shards(self) -> bool:
        """Whether ranks read different parts of the text, so that one's `state_dict` is not the whole place."""
        return any(stream.shards > 1 for stream in self._streams.values())

    def state_dict(self, step: int) -> dict[str, Any]:
        """The place before `step`, the next one: JSON values. See `merge_places`."""
        place = self._place(step)
        streams = {str(index): stream.state_dict() for index, stream in self._streams.items()}
        return {"samples": place.samples, "drawn": place.drawn, "streams": streams}

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Go on at a place with `step`, whatever the stages were until then."""
        self._loaded = self._last = _Place(step, state["samples"], state["drawn"])
        for index, one in state["streams"].items():
            self._streams[int(index)].load_state_dict(one)

    def begin(self, step: int) -> None:
        """Begin with the first sample at `step`."""
        self._loaded = self._last = _Place(step, 0, [[0] * source.shards for source in self.sources])


def merge_places(places: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The place of a run whose ranks are at `places` (each a `TrainData.state_dict`) after the same step."""
    streams = {
        index: [max(shards, key=lambda shard: shard["given"]) for shards in zip(*of_ranks, strict=True)]
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
