"""Failures of one rank as the other ranks see them."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import weakref
from contextlib import nullcontext
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
    by_memory,
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


def _different(rank, world_size):
    told = []
    for width, kwargs in ((4 + rank, {}), (4, {"stage": 1 + rank}), (4, {"lr": 0.1 * (1 + rank)})):
        try:
            ZeroOptimizer(nn.Linear(4, width), AdEMAMix, **kwargs)
            told.append("nothing")
        except InputError as error:
            told.append(str(error))
    return told


def test_ranks_that_were_given_different_things():
    for told in on_ranks(2, _different):
        assert all("the ranks were given different parameters or settings" in message for message in told)


def _leaves_at_once(rank, world_size):
    module = model()
    optimizer = ZeroOptimizer(module, AdEMAMix, bucket_mb=SMALL_BUCKETS, **ADEMAMIX)
    for step in range(3):
        loss_of(module, step, 0, rank).backward()
        optimizer.step()
    if rank == 0:
        os._exit(0)
    return "done"


@pytest.mark.parametrize("attempt", range(3))
def test_a_rank_may_leave_after_its_last_step(attempt):
    pool = Pool(3)
    try:
        (alive, _), *others = pool.run(by_memory, (_leaves_at_once,), {}, 60)
    finally:
        pool.end(kill=True)
    assert not alive
    assert others == [(True, "done")] * 2


def _dropped(rank, world_size):
    module = model()
    optimizer = ZeroOptimizer(module, AdEMAMix, bucket_mb=SMALL_BUCKETS, **ADEMAMIX)
    loss_of(module, 0, 0, rank).backward()
    optimizer.step()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    freed = gone() is None
    loss_of(module, 1, 0, rank).backward()
    return freed, module.head.weight.grad is not None


def test_a_dropped_optimizer_is_freed():
    assert on_ranks(2, _dropped) == [(True, True)] * 2


def _model_drops_gradients(rank, world_size, accumulate):
    """The model's zero_grad reaches gradients that were reduced already; a copy's does not."""
    ours, other = model(), model()
    optimizer = ZeroOptimizer(ours, AdEMAMix, bucket_mb=SMALL_BUCKETS, **ADEMAMIX)
    expected = ZeroOptimizer(other, AdEMAMix, bucket_mb=SMALL_BUCKETS, **ADEMAMIX)
    for step in (0, 99, 1):
        with optimizer.accumulate() if accumulate else nullcontext():
            loss_of(ours, step, 0, rank).backward()
        if step == 99:
            ours.zero_grad()
            continue
        copy.deepcopy(ours).zero_grad()
        pickle.loads(pickle.dumps(ours)).zero_grad()
        optimizer.step()
        loss_of(other, step, 0, rank).backward()
        expected.step()
    optimizer.close()
    return all(torch.equal(w, weights(other)[n]) for n, w in weights(ours).items()), "zero_grad" in vars(ours)


@pytest.mark.parametrize("accumulate", [True, False])
def test_the_models_zero_grad_drops_gradients(accumulate):
    assert on_ranks(2, _model_drops_gradients, accumulate) == [(True, False)] * 2
