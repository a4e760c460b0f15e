"""The factor on the learning rate at every step of short runs, against the shapes as drawn by hand."""

import pytest

from shardopt.pretrain.schedule import ScheduleConfig, lr_factor


def factors(steps, **config):
    return [lr_factor(step, steps, ScheduleConfig(**config)) for step in range(1, steps + 1)]


def test_warm_up_rises_by_equal_steps_to_one():
    assert factors(5, name="constant", warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors(3, name="constant", warmup=0) == [1.0, 1.0, 1.0]


def test_linear_falls_by_equal_steps_to_the_lowest_rate():
    assert factors(6, name="linear", warmup=2, min_lr_ratio=0.2) == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_passes_the_middle_halfway():
    half = (1 + 2**-0.5) / 2
    expected = [1.0, half, 0.5, 1 - half, 0.0]
    assert factors(5, name="cosine", warmup=1, min_lr_ratio=0.0) == pytest.approx(expected)
    lifted = [0.1 + 0.9 * factor for factor in expected]
    assert factors(5, name="cosine", warmup=1, min_lr_ratio=0.1) == pytest.approx(lifted)


def test_wsd_is_stable_until_a_fifth_of_the_run_is_left_and_ends_by_one_minus_the_root():
    expected = [0.5, *[1.0] * 15, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0.0]
    assert factors(20, name="wsd", warmup=2, min_lr_ratio=0.0) == pytest.approx(expected)
    assert factors(20, name="wsd", warmup=2, min_lr_ratio=0.0, cooldown=4) == pytest.approx(expected)
    assert factors(20, name="wsd", warmup=2, min_lr_ratio=0.0, cooldown=1) == pytest.approx([0.5, *[1.0] * 18, 0.0])


def test_wsd_cools_down_after_its_warm_up_at_the_earliest():
    expected = [0.25, 0.5, 0.75, 1.0, 1 - 0.5**0.5, 0.0]
    assert factors(6, name="wsd", warmup=4, min_lr_ratio=0.0, cooldown=5) == pytest.approx(expected)
