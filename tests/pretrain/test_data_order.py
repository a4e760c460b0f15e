"""Blocks of a step: permutations, mixtures, epochs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shardopt.pretrain.data.batches import HoldoutData, Mixture, Shuffled, TrainData, permute
from shardopt.pretrain.data.packing import Blocks
from shardopt.pretrain.data.stages import Stages
from shardopt.pretrain.data.tokenizers import SavedTokenizer


def blocks_of(folder: Path, n_blocks: int, size: int, first: int = 0) -> Blocks:
    """Blocks of ascending numbers, so that a block is known by its first token."""
    folder.mkdir(exist_ok=True)
    ids = np.arange(first, first + n_blocks * size + 1, dtype=np.uint16)
    path = folder / f"{first}.bin"
    ids.tofile(path)
    return Blocks(path, ids.dtype, len(ids), size)


def train_data(sources: list[Blocks], weights: list[float], *, seed: int = 0, global_batch: int = 6) -> TrainData:
    return TrainData(
        [Shuffled(one, seed, index) for index, one in enumerate(sources)],
        Stages({str(index): weight for index, weight in enumerate(weights)}, global_batch),
        SavedTokenizer(Path(), "", 1 << 16, 0, False),
        block_size=4,
        seed=seed,
        tokens=None,
        fingerprint="",
        corpora=[],
    )


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 1023, 4096, 70_001])
def test_permutation_is_one_and_differs_by_key(n: int) -> None:
    first, again, other = (permute(np.arange(n), n, "key", key) for key in (0, 0, 1))
    assert np.array_equal(np.sort(first), np.arange(n))
    assert np.array_equal(first, again)
    if n > 16:
        assert not np.array_equal(first, other)
        assert not np.array_equal(first, np.arange(n))


def test_permutation_of_a_range_too_large_to_hold() -> None:
    n = 3 * 10**12
    out = permute(np.arange(n - 5000, n), n, 1)
    assert len(np.unique(out)) == 5000
    assert out.min() >= 0
    assert out.max() < n
    # Spread over the whole range: the mean of 5000 uniform draws has a deviation of 0.0041 n.
    assert abs(out.mean() / n - 0.5) < 0.02


def test_permutations_are_unbiased() -> None:
    """Over many keys every element goes everywhere equally often, and pairs too (chi-square, fixed keys)."""
    n, keys = 7, 4200
    places = np.stack([permute(np.arange(n), n, "bias", key) for key in range(keys)])
    single = np.stack([np.bincount(places[:, i], minlength=n) for i in range(n)])
    chi = ((single - keys / n) ** 2 / (keys / n)).sum()
    assert chi < 73  # 36 degrees of freedom: exceeded once in 4000
    pairs = np.bincount(places[:, 0] * n + places[:, 1], minlength=n * n)
    pairs = pairs[pairs > 0]
    assert len(pairs) == n * (n - 1)
    chi = ((pairs - keys / len(pairs)) ** 2 / (keys / len(pairs))).sum()
    assert chi < 77  # 41 degrees of freedom: about once in 2000


def test_every_epoch_visits_every_block_once_in_a_new_order(tmp_path: Path) -> None:
    data = train_data([blocks_of(tmp_path, 25, 4)], [1.0], global_batch=5)
    epochs = [torch.cat([data.batch(step, 0, 5) for step in range(5 * e, 5 * e + 5)]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == list(range(0, 100, 4))
        assert torch.equal(epoch - epoch[:, :1], torch.arange(5).expand(25, 5))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])
    assert epochs[0].dtype == torch.int64


def test_a_batch_may_straddle_epochs(tmp_path: Path) -> None:
    data = train_data([blocks_of(tmp_path, 7, 4)], [1.0], global_batch=5)
    rows = torch.cat([data.batch(step, 0, 5) for step in range(7)])[:, 0].tolist()
    for epoch in range(5):
        assert sorted(rows[7 * epoch : 7 * epoch + 7]) == list(range(0, 28, 4))


@pytest.mark.parametrize("splits", [1, 2, 3, 6])
def test_any_split_into_rows_gives_the_same_batch(tmp_path: Path, splits: int) -> None:
    sources = [blocks_of(tmp_path, 9, 4), blocks_of(tmp_path, 13, 4, first=1000)]
    data = train_data(sources, [0.3, 0.7])
    share = 6 // splits
    for step in (8, 3, 0):
        parts = [data.batch(step, share * rank, share * (rank + 1)) for rank in range(splits)]
        assert torch.equal(torch.cat(parts), train_data(sources, [0.3, 0.7]).batch(step, 0, 6))
    assert data.batch(0, 2, 2).shape == (0, 5)


def test_seeds_differ(tmp_path: Path) -> None:
    sources = [blocks_of(tmp_path, 50, 4), blocks_of(tmp_path, 50, 4, first=1000)]
    for weights, use in (([1.0], sources[:1]), ([1.0, 1.0], sources)):
        first, second = (train_data(use, weights, seed=seed, global_batch=40).batch(0, 0, 40) for seed in (0, 1))
        assert not torch.equal(first, second)


def test_rows_outside_the_batch_are_refused(tmp_path: Path) -> None:
    data = train_data([blocks_of(tmp_path, 9, 4)], [1.0])
    for step, start, stop in ((0, 0, 7), (0, 3, 2), (0, -1, 2), (-1, 0, 6)):
        with pytest.raises(IndexError):
            data.batch(step, start, stop)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, 0.2, 0.1], [2, 1], [1e-9, 1.0], [1.0] * 9])
def test_mixture_keeps_its_proportions(weights: list[float]) -> None:
    mixture = Mixture(weights, seed=3)
    period = 252_000
    sources = mixture(np.arange(period))
    asked = np.asarray(weights) / sum(weights)
    counts = np.bincount(sources, minlength=len(weights))
    assert np.all(counts >= 1)
    if min(asked) > 1e-3:
        assert np.array_equal(counts, np.round(asked * period))
    for stretch in range(0, 50_000, 1000):
        got = np.bincount(sources[stretch : stretch + 1000], minlength=len(weights)) / 1000
        assert np.all(np.abs(got - asked) < 0.005), stretch


def test_a_source_without_a_weight_has_no_sample() -> None:
    assert set(Mixture([2.0, 0.0, 1.0], seed=3)(np.arange(252_000)).tolist()) == {0, 2}


def test_mixture_counts_what_came_before() -> None:
    mixture = Mixture([0.25, 0.6, 0.15], seed=1)
    samples = np.concatenate([np.arange(50), np.arange(252_000 * 7 - 20, 252_000 * 7 + 20)])
    before = np.cumsum([[mixture(np.arange(252_000)) == source for source in range(3)]], axis=2)[0]
    for sample in samples.tolist():
        whole, rest = divmod(sample, 252_000)
        for source in range(3):
            counted = whole * before[source, -1] + (before[source, rest - 1] if rest else 0)
            assert mixture.count(source, range(sample)) == counted


def test_each_source_of_a_mixture_has_its_own_epochs(tmp_path: Path) -> None:
    sources = [blocks_of(tmp_path, 4, 4), blocks_of(tmp_path, 30, 4, first=1000)]
    data = train_data(sources, [1.0, 1.0], global_batch=10)
    rows = torch.cat([data.batch(step, 0, 10) for step in range(12)])[:, 0]
    small, large = rows[rows < 1000].tolist(), rows[rows >= 1000].tolist()
    assert abs(len(small) - len(large)) <= 4
    for epoch in range(len(small) // 4):
        assert sorted(small[4 * epoch : 4 * epoch + 4]) == [0, 4, 8, 12]
    assert sorted(large[:30]) == list(range(1000, 1120, 4))


def test_held_out_blocks_come_once_and_mixed(tmp_path: Path) -> None:
    sources = [blocks_of(tmp_path, 40, 4), blocks_of(tmp_path, 60, 4, first=1000)]
    data = HoldoutData(sources, 4, 402, np.arange(2000))
    rows = data.batch(0, 100)
    assert sorted(rows[:, 0].tolist()) == [*range(0, 160, 4), *range(1000, 1240, 4)]
    assert torch.equal(torch.cat([data.batch(0, 33), data.batch(33, 100)]), rows)
    assert torch.equal(data.batch(7, 8)[0], rows[7])
    assert data.target_bytes(rows[:3]) == int(rows[:3, 1:].sum())
    assert 8 <= int((rows[:40, 0] < 1000).sum()) <= 24
    with pytest.raises(IndexError):
        data.batch(90, 101)


def test_places_of_the_sources_follow_the_seed_and_differ_between_sources():
    first, second = (Mixture([1.0, 1.0], seed)(np.arange(1000)).tolist() for seed in (0, 1))
    assert first != second
    assert first != [0, 1] * 500  # as it would be if both had the same places
