"""What the other ranks see when one goes wrong."""

from __future__ import annotations

import os
import signal
from datetime import timedelta

import pytest
import torch
from torch import nn

from shardopt import AdEMAMix, ZeroOptimizer
from shardopt.engines.zero import NonFiniteGradientError, PeerError
from shardopt.errors import InputError
from tests.distributed.pool import Pool, on_ranks
from tests.distributed.test_zero import (
    ADEMAMIX,
    SMALL_BUCKETS,
    both_transports,
    loss_of,
    model,
    train_zero,
    weights,
)


def pair(body, *args):
    """Replies of two ranks of a pool that may not be used again."""
    pool = Pool(2)
    try:
        return pool.run(body, args, {}, 60)
    finally:
        pool.end(kill=True)


def _one_leaves(rank, world_size, how):
    module = model()
    optimizer = ZeroOptimizer(module, AdEMAMix, bucket_mb=SMALL_BUCKETS, timeout=timedelta(seconds=2), **ADEMAMIX)
    seen = []
    try:
        for step in range(3):
            with optimizer.accumulate():
                loss = loss_of(module, step, 0, rank)
                if step == 2 and rank == 1:
                    if how == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise FloatingPointError("this batch is broken")
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    except (PeerError, FloatingPointError) as error:
        seen.append(f"{type(error).__name__}: {error}")
    for entry in (optimizer.step, optimizer.slices, optimizer.state_dict, lambda: optimizer.accumulate().__enter__()):
        try:
            entry()
            seen.append("went on")
        except RuntimeError as error:
            seen.append(str(error))
    return seen


@pytest.mark.parametrize("how", ["raises", "killed"])
@both_transports
def test_a_rank_that_leaves(through, how):
    (good, seen), (alive, theirs) = pair(through, _one_leaves, how)
    assert good, seen
    # Which bucket, which parameters are in it, which rank did not answer.
    assert "PeerError: bucket " in seen[0]
    assert "head" in seen[0] or "blocks" in seen[0]
    assert "from rank 1 failed" in seen[0]
    assert all("stopped at an earlier failure" in s and "from rank 1" in s for s in seen[1:])
    assert alive == (how == "raises")
    if alive:
        assert theirs[0] == "FloatingPointError: this batch is broken"
        assert all("stopped at an earlier failure" in s for s in theirs[1:])


def _one_has_nan(rank, world_size, stage, clip):
    module = model()
    optimizer = ZeroOptimizer(module, AdEMAMix, stage=stage, bucket_mb=SMALL_BUCKETS, **ADEMAMIX)
    message, unchanged = "", False
    for step in (0, 1, 99, 2):
        with optimizer.accumulate():
            loss = loss_of(module, step, 0, rank)
            if step == 99 and rank == 1:
                loss = loss + (module.blocks[1][1].weight[0, 0] * float("nan")).sum()
            loss.backward()
        before = weights(module)
        norm = optimizer.clip_grad_norm_(clip) if clip else 1.0
        try:
            optimizer.step()
        except NonFiniteGradientError as error:
            message = str(error)
            unchanged = all(torch.equal(w, before[n]) for n, w in weights(module).items())
            assert not clip or norm != norm
        optimizer.zero_grad()
    return message, unchanged, weights(module)


def _without_the_bad_batch(rank, world_size, stage):
    return train_zero(rank, AdEMAMix, ADEMAMIX, 3, 1, stage=stage)


@pytest.mark.parametrize(("stage", "clip"), [(1, None), (2, None), (2, 1e9)])
@both_transports
def test_a_rank_with_nan_stops_nobody_and_spoils_nothing(through, stage, clip):
    (first, same, ours), (second, _, theirs) = on_ranks(2, through, _one_has_nan, stage, clip)
    assert first == second
    assert "blocks.1.1.weight (bucket " in first
    assert "from rank 1)" in first
    assert "no rank has taken the step" in first
    assert same
    clean = on_ranks(2, _without_the_bad_batch, stage)[0]
    assert all(torch.equal(ours[n], clean[n]) and torch.equal(theirs[n], clean[n]) for n in clean)


def _one_has_nothing(rank, world_size, accumulate):
    module = model()
    optimizer = ZeroOptimizer(module, torch.optim.SGD, lr=0.1, bucket_mb=SMALL_BUCKETS)
    expected = model()
    loss_of(expected, 0, 0, 0).backward()
    if accumulate:
        with optimizer.accumulate():
            if rank == 0:
                loss_of(module, 0, 0, rank).backward()
    elif rank == 0:
        loss_of(module, 0, 0, rank).backward()
    optimizer.step()
    after = weights(module)
    return all(
        torch.equal(after[n], p.detach().add(p.grad / 2, alpha=-0.1) if p.grad is not None else p.detach())
        for n, p in expected.named_parameters()
    )


@pytest.mark.parametrize("accumulate", [True, False])
def test_a_rank_without_any_gradient(accumulate):
    assert on_ranks(2, _one_has_nothing, accumulate) == [True, True]


def _different_models(rank, world_size):
    try:
        ZeroOptimizer(nn.Linear(4, 4 + rank), AdEMAMix)
    except InputError as error:
        return str(error)


def test_ranks_that_built_different_models():
    assert all("the ranks were given different parameters" in m for m in on_ranks(2, _different_models))
