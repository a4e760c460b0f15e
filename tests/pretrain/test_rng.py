import random

import numpy as np
import pytest
import torch

from shardopt.pretrain import rng


def draw():
    """Numbers of every generator, an odd count of normal ones: both Python and numpy then keep the second of a pair."""
    return [torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]


@pytest.fixture(autouse=True)
def as_before():
    saved = rng.capture(0)
    yield
    rng.restore(0, saved)


def test_restored_generators_go_on_as_they_would_have():
    rng.seed_all(5)
    first = draw()
    saved = rng.capture(3)
    assert all(key.startswith("rng/rank-00003/") for key in saved)
    expected = [draw(), draw()]
    assert expected[0] != first
    rng.seed_all(6)  # no generator stands where it stood, and none has half of a pair left
    rng.restore(3, rng.capture(7) | saved)
    assert [draw(), draw()] == expected


def test_seed_decides_the_numbers_of_every_generator_and_ranks_and_steps_differ():
    drawn = []
    for seed in ((1,), (2,), (1, 0), (1, 1), (1, 1, 40), (1, 11), (1,)):
        rng.seed_all(*seed)
        drawn.append(draw())
    assert drawn.pop() == drawn[0]
    for numbers in zip(*drawn, strict=True):
        assert len({str(number) for number in numbers}) == len(drawn)
