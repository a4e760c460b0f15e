"""Gradient hooks on our ZeRO, DDP and FSDP2: one interface, the same numbers."""

from __future__ import annotations

import contextlib
import doctest
import pickle
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from shardopt import ZeroOptimizer
from shardopt.engines import gradient_hooks as hooks
from shardopt.engines.zero import NonFiniteGradientError
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
    weights,
)

HOSTS = ("zero", "ddp", "fsdp")


def hosted(host, module, lr=0.05, attached=(), **zero):
    """A forward function, its optimizer and the module that has the weights, with hooks attached."""
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


class _AddOne(hooks.GradientHook):
    """Adds to everything it is given, padding included."""

    def before_reduce(self, bucket, flat):
        flat.add_(1.0)

    def after_reduce(self, bucket, reduced):
        reduced.add_(1.0)


def _padding(rank, world_size):
    module = nn.ModuleList([nn.Linear(5, 3), nn.Linear(3, 7)])  # 61 elements in a bucket of 96 or so
    optimizer = ZeroOptimizer(module, torch.optim.SGD, lr=0.0)
    statistics = hooks.GradientStatistics()
    hooks.attach([_AddOne(), statistics], optimizer)
    with optimizer.accumulate():
        sum(p.sum() for p in module.parameters()).mul(3.0).backward()
    norm = optimizer.clip_grad_norm_(None)
    elements = sum(p.numel() for p in module.parameters())
    padding = sum(b.numel for b in optimizer.buckets) - elements
    read = statistics.read()
    # 3, and 1 before and 1 after the reduction
    return padding, norm - 5.0 * elements**0.5, read["norm"] - norm, read["local_norm"] - 4.0 * elements**0.5


def test_hook_that_writes_into_padding_does_not_change_the_norm():
    for padding, *differences in on_ranks(2, _padding):
        assert padding > 0
        assert differences == pytest.approx([0.0] * 3, abs=1e-4)


def test_statistics_that_nobody_reads_do_not_grow():
    for hook, used in ((hooks.GradientStatistics(), "read"), (hooks.NonFinite(), "agreed")):
        sizes = []
        for count in (1, 50):
            for bucket in range(count):
                hook.before_reduce(bucket, torch.ones(4))
                hook.after_reduce(bucket, torch.full((2,), 2.0))
            sizes.append(len(pickle.dumps(vars(hook))))
        assert sizes[1] < sizes[0] + 32  # pickles name storages by addresses, of some digits more or less
        if used == "read":
            assert hook.read() == pytest.approx({"norm": 408**0.5, "largest": 2.0, "local_norm": 204**0.5})
        else:
            hook.after_reduce(0, torch.tensor([1e30, 2.0]))  # whose square overflows
            assert hook.agreed() is False
            hook.after_reduce(0, torch.tensor([float("nan"), 2.0]))
            hook.after_reduce(1, torch.ones(2))
            assert (hook.agreed(), hook.agreed()) == (True, False)


def _skipped_step(rank, world_size, host, infinite):
    """Gradients whose rounding errors are large, and perhaps an infinity; nobody takes that step."""
    module, feedback = nn.Linear(64, 8, bias=False), hooks.ErrorFeedback()
    nn.init.zeros_(module.weight)
    target = torch.rand(8, 64, generator=torch.Generator().manual_seed(rank))
    called, optimizer = hosted(host, module, lr=1.0, attached=[feedback], reduce_dtype="bf16")
    for step in range(33):
        gradient = target.t().clone()
        if step == 7 and rank == 0:
            gradient.mul_(1e30)
            gradient[3, 2] = float("inf") if infinite else 1.0
        called(torch.eye(64)).mul(gradient).sum().backward()
        if step != 7:
            optimizer.step()
        elif host == "zero" and infinite:
            with contextlib.suppress(NonFiniteGradientError):
                optimizer.step()
        elif host != "zero" and not infinite:
            feedback.reset()
        optimizer.zero_grad()
    total = target.clone()
    dist.all_reduce(total)
    return (whole(module)["weight"] / -32 - total / world_size).abs().max().item()


@pytest.mark.parametrize("infinite", [True, False])
@pytest.mark.parametrize("host", HOSTS)
def test_error_feedback_forgets_a_skipped_step(host, infinite):
    for error in on_ranks(2, _skipped_step, host, infinite):
        assert error < 2e-4  # two half-ulps of bf16 in 32 steps


def _buckets_change(rank, world_size):
    """DDP lays its buckets out anew after its first backward."""
    torch.manual_seed(0)
    module = nn.ModuleList([nn.Linear(16, 16, bias=False) for _ in range(3)])
    targets = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(rank))
    for p in module.parameters():
        nn.init.zeros_(p)

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = module

        def forward(self, x):  # not in the order of registration
            return sum((self.layers[i](x) * targets[i].t()).sum() for i in (1, 2, 0))

    ddp = DistributedDataParallel(Sum(), bucket_cap_mb=1.5 * 16 * 16 * 4 / 2**20)
    seen: dict[int, list[int]] = {}

    class Sizes(hooks.GradientHook):
        def before_reduce(self, bucket, flat):
            seen.setdefault(bucket, []).append(flat.numel())

    hooks.attach([hooks.ErrorFeedback(), Sizes()], ddp)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for _ in range(32):
        ddp(torch.eye(16)).backward()
        optimizer.step()
        optimizer.zero_grad()
    total = targets.clone()
    dist.all_reduce(total)
    changed = any(len(set(sizes)) > 1 or len(sizes) != 32 for sizes in seen.values())
    error = max((p / -32 - total[i] / world_size).abs().max().item() for i, p in enumerate(module.parameters()))
    return changed, error


def test_error_feedback_follows_ddps_new_buckets():
    for changed, error in on_ranks(2, _buckets_change):
        assert changed
        assert error < 2e-4


def test_error_feedback_refuses_a_bucket_of_another_size():
    hook = hooks.ErrorFeedback()
    hook.before_reduce(0, torch.ones(4))
    with pytest.raises(InputError, match=r"4 elements and now has 6: call ErrorFeedback\.reset"):
        hook.before_reduce(0, torch.ones(6))
    hook.reset()
    hook.before_reduce(0, torch.ones(6))


class _Raises(hooks.GradientHook):
    def __init__(self, method, step):
        self.method, self.step, self.calls = method, step, 0

    def before_reduce(self, bucket, flat):
        self._maybe("before_reduce")

    def after_reduce(self, bucket, reduced):
        self._maybe("after_reduce")

    def _maybe(self, method):
        if method == self.method:
            self.calls += 1
            if self.calls == self.step:
                raise ValueError("my hook is broken")


def _one_raises(rank, world_size, host):
    seen = []
    for method in ("before_reduce", "after_reduce"):
        module = model()
        called, optimizer = hosted(host, module, attached=[_Raises(method, 2) if rank == 1 else hooks.NonFinite()])
        start = time.monotonic()
        try:
            for step in range(3):
                loss_of(called, step, 0, rank).backward()
                optimizer.step()
                optimizer.zero_grad()
            seen.append("went on")
        except RuntimeError as error:
            seen.append(f"{type(error).__name__}: {error}")
        assert time.monotonic() - start < 30  # not the group's timeout
    return seen


@pytest.mark.parametrize("host", HOSTS)
def test_hook_that_raises_on_one_rank_raises_on_all(host):
    first, second = on_ranks(2, _one_raises, host)
    for method, others, own in zip(("before_reduce", "after_reduce"), first, second, strict=True):
        assert "rank 1 failed" in others
        for message in (others, own):
            assert f"GradientHookError: _Raises.{method}, bucket " in message
            assert "my hook is broken" in message


def _refused(rank, world_size):
    messages = []
    own, used = ZeroOptimizer(model(), torch.optim.SGD, lr=0.1), hooks.NonFinite()
    ddp = DistributedDataParallel(model())
    sharded = fully_shard(model())
    for target in (own, ddp, sharded):
        hooks.attach([], target)
    hooks.attach(used, ZeroOptimizer(model(), torch.optim.SGD, lr=0.1))
    fresh, other = hooks.NonFinite(), ZeroOptimizer(model(), torch.optim.SGD, lr=0.1)
    for action in (
        lambda: hooks.attach([fresh], nn.Linear(2, 2)),
        lambda: hooks.attach([hooks.ErrorFeedback()], other),
        lambda: hooks.attach([used], other),
        lambda: hooks.attach([fresh, fresh], other),
        lambda: hooks.attach([hooks.NonFinite], other),
        lambda: hooks.attach(fresh, own),
        lambda: hooks.attach(fresh, ddp),
        lambda: hooks.attach(fresh, sharded),
    ):
        try:
            action()
        except InputError as error:
            messages.append(str(error))
    hooks.attach(fresh, other)
    return messages


def test_what_cannot_be_hooked_is_refused():
    kind, wire, used, twice, not_a_hook, *again = on_ranks(2, _refused)[0]
    assert "not to Linear" in kind
    assert "reduce_dtype='bf16'" in wire
    assert used == twice
    assert "this NonFinite is attached already" in used
    assert "is not a GradientHook object" in not_a_hook
    assert len(again) == 3
    assert all("has hooks already: attach all of them in one call" in message for message in again)


def test_example_in_the_docstring_runs():
    (example,) = doctest.DocTestFinder(recurse=False).find(hooks.attach, "attach", globs={"torch": torch})
    assert doctest.DocTestRunner().run(example) == (0, 9)


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
