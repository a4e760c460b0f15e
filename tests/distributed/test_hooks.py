"""Gradient hooks on our ZeRO, DDP and FSDP2: one interface, the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from shardopt import ZeroOptimizer
from shardopt.engines import gradient_hooks as hooks
from shardopt.errors import InputError
from tests.distributed.pool import on_ranks
from tests.distributed.test_zero import (
    ADEMAMIX,
    SMALL_BUCKETS,
    AdEMAMix,
    batch,
    compare,
    loss_of,
    model,
    train_ddp,
    train_zero,
    weights,
)

HOSTS = ("zero", "ddp", "fsdp")


def hosted(host, module, lr=0.05, attached=(), **zero):
    """What to call, its optimizer and the module to read weights from, with hooks attached."""
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    if host == "zero":
        optimizer = ZeroOptimizer(module, torch.optim.SGD, bucket_mb=SMALL_BUCKETS, lr=lr, **zero)
        hooks.attach(list(attached), optimizer)
        return module, optimizer
    if host == "ddp":
        wrapped = DistributedDataParallel(module, bucket_cap_mb=SMALL_BUCKETS, find_unused_parameters=True)
        hooks.attach(list(attached), wrapped)
        return wrapped, torch.optim.SGD(trained, lr=lr)
    for child in getattr(module, "blocks", []):
        fully_shard(child)
    fully_shard(module)
    hooks.attach(list(attached), module)
    return module, torch.optim.SGD(module.parameters(), lr=lr)


def whole(module):
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for n, p in module.named_parameters()}


def _same_numbers(rank, world_size):
    results = []
    for host in HOSTS:
        module = model()
        del module.unused
        called, optimizer = hosted(host, module)
        for step in range(4):
            loss_of(called, step, 0, rank).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(whole(module))
    reference = train_ddp(rank, torch.optim.SGD, {"lr": 0.05}, 4, 1)
    return [{n: (r[n] - reference[n]).abs().max().item() for n in r} for r in results], compare(reference, reference)


def test_no_hooks_change_nothing():
    differences, (_, moved) = on_ranks(2, _same_numbers)[0]
    assert moved > 0.01
    for host in differences:
        assert set(host.values()) == {0.0}


def _statistics(rank, world_size, host):
    module = model()
    statistics = hooks.GradientStatistics()
    called, optimizer = hosted(host, module, attached=[statistics])
    expected = model()
    loss_of(called, 0, 0, rank).backward()
    if host == "zero":
        optimizer.step()
    loss_of(expected, 0, 0, rank).backward()
    grads = [p.grad for p in expected.parameters() if p.grad is not None]
    local = torch.stack([g.norm() for g in grads]).square().sum()
    for grad in grads:
        dist.all_reduce(grad)
        grad.div_(world_size)
    dist.all_reduce(local)
    truth = {
        "norm": torch.stack([g.norm() for g in grads]).norm().item(),
        "largest": max(g.abs().max().item() for g in grads),
        "local_norm": (local / world_size).sqrt().item(),
    }
    return statistics.read(), truth, statistics.read()


@pytest.mark.parametrize("host", HOSTS)
def test_statistics_are_the_same_on_every_host_and_rank(host):
    (first, truth, empty), (second, _, _) = on_ranks(2, _statistics, host)
    assert first == second
    assert truth["norm"] > 0
    assert first == pytest.approx(truth, rel=1e-5)
    assert set(empty.values()) == {0.0}


def _error_feedback(rank, world_size, host, steps):
    """A constant gradient that bf16 cannot hold; the weights add up what was sent."""
    results = []
    for feedback in (False, True):
        module = nn.Linear(64, 8, bias=False)
        nn.init.zeros_(module.weight)
        target = torch.rand(8, 64, generator=torch.Generator().manual_seed(rank))
        attached = [hooks.ErrorFeedback()] if feedback else [_Bf16()]
        called, optimizer = hosted(host, module, lr=1.0, attached=attached, **{"reduce_dtype": "bf16"})
        for _ in range(steps):
            called(torch.eye(64)).mul(target.t()).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        total = target.clone()
        dist.all_reduce(total)
        results.append((whole(module)["weight"] / -steps - total / world_size).abs().max().item())
    return results


class _Bf16(hooks.GradientHook):
    """bf16 on the wire, what it loses thrown away."""

    wire_dtype = torch.bfloat16

    def before_reduce(self, bucket, flat):
        flat.copy_(flat.to(torch.bfloat16))


@pytest.mark.parametrize("host", HOSTS)
def test_error_feedback_loses_nothing_in_the_long_run(host):
    for without, with_feedback in on_ranks(2, _error_feedback, host, 64):
        assert without > 5e-4  # half an ulp near 1 is 2e-3
        assert with_feedback < without / 10


class _Watch(hooks.GradientHook):
    def __init__(self):
        self.before, self.after = [], []

    def before_reduce(self, bucket, flat):
        self.before.append((bucket, flat.dtype))

    def after_reduce(self, bucket, reduced):
        self.after.append(bucket)
        reduced.mul_(2.0)


def _own_hook(rank, world_size, stage):
    """A hook that doubles the reduced gradient moves SGD twice as far, once a step and not once a micro-batch."""
    module, plain = model(), model()
    watch = _Watch()
    hooked = ZeroOptimizer(module, torch.optim.SGD, lr=0.1, stage=stage, bucket_mb=SMALL_BUCKETS)
    hooks.attach(watch, hooked)
    other = ZeroOptimizer(plain, torch.optim.SGD, lr=0.2, stage=stage, bucket_mb=SMALL_BUCKETS)
    for m, o in ((module, hooked), (plain, other)):
        for micro in range(2):
            with o.accumulate(last=micro == 1):
                loss_of(m, 0, micro, rank).backward()
        o.step()
    count = len(hooked.buckets)
    equal = all(torch.allclose(w, weights(plain)[n], rtol=0, atol=1e-7) for n, w in weights(module).items())
    expected = [(b, torch.float32) for _ in range(stage) for b in range(count)]
    return equal, watch.before == expected, watch.after == list(range(count))


@pytest.mark.parametrize("stage", [1, 2])
def test_own_hooks_see_every_bucket_before_and_after(stage):
    assert on_ranks(2, _own_hook, stage) == [(True, True, True)] * 2


def _non_finite(rank, world_size, host):
    module = model()
    watch = hooks.NonFinite()
    called, optimizer = hosted(host, module, attached=[watch])
    answers = []
    for step in range(3):
        loss = loss_of(called, step, 0, rank)
        if step == 1 and rank == 1:
            loss = loss * float("inf")
        loss.backward()
        if host == "zero":
            optimizer.clip_grad_norm_(None)
        answers.append(watch.agreed())
        optimizer.zero_grad()
    return answers


@pytest.mark.parametrize("host", HOSTS)
def test_all_ranks_agree_on_what_is_not_finite(host):
    assert on_ranks(2, _non_finite, host) == [[False, True, False]] * 2


def _reduce_dtype(rank, world_size, hooked):
    module, expected = model(), model()
    optimizer = ZeroOptimizer(module, torch.optim.SGD, lr=0.1, reduce_dtype="bf16", bucket_mb=SMALL_BUCKETS)
    if hooked:
        hooks.attach(_Bf16(), optimizer)
    with optimizer.accumulate():
        loss_of(module, 0, 0, rank).backward()
    sent = optimizer.wire_bytes["reduce"]
    optimizer.step()
    loss_of(expected, 0, 0, rank).backward()
    equal = []
    for name, p in expected.named_parameters():
        if p.grad is not None:
            grad = p.grad.to(torch.bfloat16).float()
            dist.all_reduce(grad)
            moved = p.detach().add(grad / world_size, alpha=-0.1)
            equal.append(torch.equal(moved, weights(module)[name]))
    half = sum(b.numel for b in optimizer.buckets) // world_size * (world_size - 1) * 2
    return all(equal), len(equal) > 10, sent == half


@pytest.mark.parametrize("hooked", [False, True])
def test_bf16_on_the_wire_adds_in_fp32(hooked):
    assert on_ranks(2, _reduce_dtype, hooked) == [(True, True, True)] * 2


def _into_slices(rank, world_size, stage, micros):
    """DDP's buckets, our slices: equal to our own hooks bit for bit."""
    module = model()
    optimizer = ZeroOptimizer(module, AdEMAMix, stage=stage, gradients="delivered", bucket_mb=SMALL_BUCKETS, **ADEMAMIX)
    ddp = DistributedDataParallel(module, bucket_cap_mb=0.02, find_unused_parameters=True)
    hooks.reduce_scatter_into(optimizer, ddp)
    for step in range(5):
        for micro in range(micros):
            if stage == 1 and micro < micros - 1:
                with ddp.no_sync():
                    loss_of(ddp, step, micro, rank).backward()
                continue
            for p in module.parameters():
                if stage == 2:
                    p.grad = None
            loss_of(ddp, step, micro, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs = train_zero(rank, AdEMAMix, ADEMAMIX, 5, micros, stage=stage)
    ours = weights(module)
    # Nobody uses `unused`: DDP hands over zeros for it, so weight decay moves it.
    return [n for n in ours if not torch.equal(ours[n], theirs[n])], optimizer.wire_bytes["reduce"]


@pytest.mark.parametrize(("stage", "micros"), [(1, 2), (2, 2)])
def test_ddp_reduces_into_our_slices(stage, micros):
    for different, sent in on_ranks(2, _into_slices, stage, micros):
        assert different == ["unused.weight", "unused.bias"]
        padded = sum(p.numel() for p in model().parameters() if p.requires_grad)
        assert sent == pytest.approx(5 * stage * padded * 4 / 2, rel=0.02)


def _refused(rank, world_size):
    messages = []
    own = ZeroOptimizer(model(), torch.optim.SGD, lr=0.1)
    for action in (
        lambda: hooks.attach([hooks.NonFinite()], nn.Linear(2, 2)),
        lambda: hooks.attach([hooks.ErrorFeedback()], own),
        lambda: hooks.reduce_scatter_into(own, DistributedDataParallel(model())),
    ):
        try:
            action()
        except InputError as error:
            messages.append(str(error))
    return messages


def test_what_cannot_be_hooked_is_refused():
    kind, wire, delivered = on_ranks(2, _refused)[0]
    assert "not to Linear" in kind
    assert "reduce_dtype='bf16'" in wire
    assert 'gradients="delivered"' in delivered


def _learns(rank, world_size):
    """Statistics and feedback together on a run that goes somewhere."""
    module = model()
    statistics = hooks.GradientStatistics()
    optimizer = ZeroOptimizer(module, AdEMAMix, reduce_dtype="bf16", bucket_mb=SMALL_BUCKETS, **ADEMAMIX)
    hooks.attach([hooks.ErrorFeedback(), statistics], optimizer)
    losses = []
    for _ in range(30):
        with optimizer.accumulate():
            loss = loss_of(module, 0, 0, rank)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    read = statistics.read()
    assert module(batch(0, 0, rank)[0]).isfinite().all()
    return losses[0], losses[-1], read["norm"]


def test_training_with_hooks_learns():
    for first, last, norm in on_ranks(2, _learns):
        assert last < 0.6 * first
        assert norm > 0
