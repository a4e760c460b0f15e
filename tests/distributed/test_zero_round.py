"""ZeroOptimizer's round over ranks: mistakes, exceptions and strange company give an error on every rank or the
right numbers. One launch of two ranks runs many cases, since most of a launch is imports."""

from __future__ import annotations

import gc
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from shardopt import AdEMAMix, ZeroOptimizer
from shardopt.engines.gradient_hooks import GradientHook, attach
from tests.distributed.pool import Pool, on_ranks
from tests.distributed.test_zero import (
    ADEMAMIX,
    SMALL_BUCKETS,
    by_memory,
    loss_of,
    model,
    over_sockets,
    train_ddp,
    weights,
)


def told(action) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in b)


def one_step(module, optimizer, step, rank):
    with optimizer.accumulate():
        loss_of(module, step, 0, rank).backward()
    optimizer.step()
    optimizer.zero_grad()


# Numbers


def _weight_ema_left_by_an_exception(rank):
    module, other = model(), model()
    optimizer = ZeroOptimizer(module, AdEMAMix, bucket_mb=SMALL_BUCKETS, weight_ema=0.5, **ADEMAMIX)
    plain = ZeroOptimizer(other, AdEMAMix, bucket_mb=SMALL_BUCKETS, weight_ema=0.5, **ADEMAMIX)
    for step in range(2):
        one_step(module, optimizer, step, rank)
        one_step(other, plain, step, rank)
    before, inside = weights(module), {}
    try:
        with optimizer.use_weight_ema():
            inside = weights(module)
            if rank == 1:
                raise FloatingPointError("this batch is broken")
    except FloatingPointError:
        pass
    restored = equal(weights(module), before) and not equal(inside, before)
    one_step(module, optimizer, 2, rank)
    one_step(other, plain, 2, rank)
    return restored and equal(weights(module), weights(other))


def _norm_forgotten_by_ddps_zero_grad(rank):
    module = model()
    optimizer = ZeroOptimizer(module, AdEMAMix, stage=1, gradients="host", bucket_mb=SMALL_BUCKETS, **ADEMAMIX)
    ddp = DistributedDataParallel(module, find_unused_parameters=True)
    taken = 0
    for step in (0, 99, 1, 2):
        loss = loss_of(ddp, step, 0, rank)
        (loss * float("nan") if step == 99 else loss).backward()
        if torch.tensor(optimizer.clip_grad_norm_(None)).isfinite():
            optimizer.step()
            taken += 1
        ddp.zero_grad()
    return taken == 3 and equal(weights(module), train_ddp(rank, AdEMAMix, ADEMAMIX, 3, 1))


NUMBERS = [_weight_ema_left_by_an_exception, _norm_forgotten_by_ddps_zero_grad]


def _run(rank, world_size, cases):
    return {case.__name__: case(rank) for case in cases}


def test_numbers_are_right_after_what_went_wrong():
    expected = {case.__name__: True for case in NUMBERS}
    assert on_ranks(2, _run, NUMBERS) == [expected, expected]


def _in_one_backward(rank, world_size, bucket_mb):
    """Two optimizers, each over a part of the model, met by autograd in the same order and another on each rank."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = (
                nn.Sequential(nn.Linear(9, 30), *[nn.Linear(30, 30) for _ in range(3)], nn.Linear(30, 7))
                for _ in range(2)
            )

        def forward(self, x, first_left):
            # Autograd goes through the latest forward first.
            parts = (self.left, self.right) if first_left else (self.right, self.left)
            return sum(part(x).square().mean() for part in parts)

    def made():
        torch.manual_seed(0)
        return Two()

    module, other = made(), made()
    timeout = timedelta(seconds=10)
    optimizers = [
        ZeroOptimizer(list(part.named_parameters()), torch.optim.SGD, bucket_mb=bucket_mb, lr=0.1, timeout=timeout)
        for part in (module.left, module.right)
    ]
    one = ZeroOptimizer(other, torch.optim.SGD, lr=0.1)
    for step in range(4):
        x = torch.randn(4, 9, generator=torch.Generator().manual_seed(10 * step + rank))
        first_left = rank == 0 or step % 2 == 0
        module(x, first_left).backward()
        other(x, first_left).backward()
        for optimizer in (*optimizers, one):
            optimizer.step()
    return equal(weights(module), weights(other))


@pytest.mark.parametrize("through", [by_memory, over_sockets])
def test_two_optimizers_in_one_backward(through):
    for bucket_mb in (25, 0.002):  # of one bucket, and of more than may be in flight
        assert on_ranks(2, through, _in_one_backward, bucket_mb) == [True, True]


# Weights in flight


class Direct(nn.Module):
    """Blocks of which the second's forward is called past its hooks, and uses a child's weight as a mere tensor."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30)) for _ in range(3))
        self.functional = functional

    def forward(self, x):
        x = checkpoint(self.blocks[0].forward, x, use_reentrant=False)
        if self.functional:
            x = nn.functional.linear(x, self.blocks[1][0].weight)
        return self.blocks[2](x).square().mean()


def _weights_in_flight(rank, world_size):
    def made(functional):
        torch.manual_seed(0)
        return Direct(functional)

    def trained(module, steps, **overlap):
        optimizer = ZeroOptimizer(module, torch.optim.SGD, lr=0.1, bucket_mb=0.001, **overlap)
        for step in range(steps):
            module(torch.full((2, 30), 0.1 * step + rank)).backward()
            optimizer.step()
        return optimizer

    module, other = made(False), made(False)
    optimizer = trained(module, 4, overlap_gather=module.blocks)
    trained(other, 4)
    in_flight = len(optimizer._gather.in_flight)
    before = weights(module)  # some have not arrived
    del optimizer
    gc.collect()
    arrived = equal(weights(module), weights(other))

    loaded = made(False)
    optimizer = trained(loaded, 2, overlap_gather=loaded.blocks)
    saved = {name: torch.full_like(value, 0.25) for name, value in loaded.blocks.state_dict().items()}
    trained_again = made(False)
    optimizer = trained(trained_again, 2, overlap_gather=trained_again.blocks)
    trained_again.blocks.load_state_dict(saved)
    optimizer.wait()
    kept = equal(weights(trained_again.blocks), saved)

    functional = made(True)
    message = told(lambda: trained(functional, 3, overlap_gather=functional.blocks))
    return in_flight > 3 and len(before) == 12, arrived, kept, message


def test_weights_in_flight_arrive_before_anybody_uses_them():
    for in_flight, arrived, kept, message in on_ranks(2, over_sockets, _weights_in_flight, fresh=True):
        assert in_flight
        assert arrived
        assert kept
        assert "blocks.1.0.weight was used in a forward before its updated weights had arrived" in message


# Refusals


def _refused(rank, world_size):
    messages = {}
    module = model()
    optimizer = ZeroOptimizer(module, AdEMAMix, bucket_mb=SMALL_BUCKETS, **ADEMAMIX)
    ddp = DistributedDataParallel(module, find_unused_parameters=True)
    before = weights(module)
    loss_of(ddp, 0, 0, rank).backward()
    messages["DDP around the model"] = told(optimizer.step)
    messages["and again"] = told(optimizer.step)
    messages["nothing moved"] = equal(weights(module), before)
    messages["DDP given"] = told(lambda: ZeroOptimizer(DistributedDataParallel(nn.Linear(2, 2)), AdEMAMix))

    def step_of(mistake):
        module = model()
        host = {"stage": 1, "gradients": "host"} if mistake in ("no DDP", "no_sync forgotten") else {}
        optimizer = ZeroOptimizer(module, torch.optim.SGD, bucket_mb=SMALL_BUCKETS, lr=0.1, **host)
        if mistake == "no_sync forgotten":
            ddp = DistributedDataParallel(module, find_unused_parameters=True)
            with ddp.no_sync():
                loss_of(ddp, 0, 0, rank).backward()
        else:
            loss_of(module, 0, 0, rank).backward()
        if mistake == "lr" and rank == 1:
            optimizer.param_groups[0]["lr"] = 0.2
        if mistake == "added on one rank" and rank == 1:
            module.another = nn.Linear(2, 2)
        before = weights(module)
        message = told(optimizer.step)
        return message if equal(weights(module), before) else "weights moved"

    for mistake in ("no DDP", "no_sync forgotten", "lr", "added on one rank"):
        messages[mistake] = step_of(mistake)

    def differ(cls=AdEMAMix, **kwargs):
        return told(lambda: ZeroOptimizer(nn.Linear(4, 4), cls, **kwargs))

    messages["a dict"] = differ(state_dtype={"m1": "bf16", "m2": ["fp32", "bf16"][rank]})
    messages["a list"] = differ(betas=[0.9, 0.999, [0.99, 0.9][rank]])
    messages["a tensor"] = differ(lr=torch.tensor([0.1, 0.2][rank]))
    messages["None"] = differ(alpha_warmup=[None, 5][rank])
    messages["the class"] = differ([torch.optim.SGD, torch.optim.Adagrad][rank], lr=0.1)
    messages["bucket_mb"] = differ(bucket_mb=1 + rank)
    parameters = [[("weight", nn.Parameter(torch.ones(3 + rank)))], [("bias", nn.Parameter(torch.ones(3)))]]
    messages["a group's option"] = told(
        lambda: ZeroOptimizer([{"params": parameters[1], "foreach": bool(rank)}], torch.optim.SGD, lr=0.1)
    )
    messages["shapes"] = told(lambda: ZeroOptimizer(parameters[0], torch.optim.SGD, lr=0.1))
    messages["alike"] = differ(state_dtype={"m2": "bf16", "m1": "fp32"}, lr=torch.tensor(0.1), betas=[0.9, 0.99, 0.9])
    messages["one rank's own mistake"] = differ([AdEMAMix, torch.optim.Muon][rank])
    return messages


def test_what_cannot_work_is_refused_on_every_rank():
    both = on_ranks(2, _refused, fresh=True)
    for rank, messages in enumerate(both):
        assert " has a .grad after" in messages["DDP around the model"]
        assert "DistributedDataParallel" in messages["DDP around the model"]
        assert "stopped at an earlier failure" in messages["and again"]
        assert messages["nothing moved"]
        assert "the module inside DistributedDataParallel" in messages["DDP given"]
        for mistake in ("no DDP", "no_sync forgotten"):
            assert messages[mistake].startswith("InputError: "), messages[mistake]
            assert "different gradients" in messages[mistake]
            assert "DistributedDataParallel" in messages[mistake]
            assert "no_sync" in messages[mistake]
        assert messages["lr"].startswith("InputError: the ranks have different lr")
        assert "another.weight was frozen or not there" in messages["added on one rank"]
        for name, words in {
            "a dict": "state_dtype is {'m1': 'bf16', 'm2': 'fp32'} on rank 0",
            "a list": "betas is [0.9, 0.999, 0.99] on rank 0 and [0.9, 0.999, 0.9] on rank 1",
            "a tensor": "lr is torch.float32 0.1",
            "None": "alpha_warmup is None on rank 0 and 5 on rank 1",
            "the class": "optimizer_class is SGD on rank 0 and Adagrad on rank 1",
            "bucket_mb": "bucket_mb is 1 on rank 0 and 2 on rank 1",
            "a group's option": "foreach of group 0 is False on rank 0 and True on rank 1",
            "shapes": "parameters is [['weight', [3], torch.float32]] on rank 0",
        }.items():
            assert "the ranks were given different parameters or settings: " + words in messages[name], name
        assert messages["alike"] == "nothing"
        muon = messages["one rank's own mistake"]
        assert ("rank 1 cannot build its ZeroOptimizer: " in muon) == (rank == 0)
        assert "Muon cannot be sharded" in muon


# One rank fails: the other is told which, and does not wait for ever


class _Broken(GradientHook):
    def __init__(self, where: str) -> None:
        self.where = where

    def before_reduce(self, bucket, flat):
        if self.where == "before_reduce":
            raise FloatingPointError("this hook is broken")

    def after_reduce(self, bucket, reduced):
        if self.where == "after_reduce":
            raise FloatingPointError("this hook is broken")


def _one_fails(rank, world_size):
    seen = {}
    for where in ("after_reduce", "before_reduce", "backward", "norm", "inner step"):
        module = model()
        optimizer = ZeroOptimizer(module, AdEMAMix, bucket_mb=SMALL_BUCKETS, timeout=timedelta(seconds=2), **ADEMAMIX)
        one_step(module, optimizer, 0, rank)
        attach(_Broken(where if rank == 1 else ""), optimizer)

        def step(where=where, module=module, optimizer=optimizer):
            loss = loss_of(module, 1, 0, rank)
            if rank == 1 and where == "backward":
                module.blocks[1].register_full_backward_hook(lambda *_: (_ for _ in ()).throw(FloatingPointError("b")))
                loss = loss_of(module, 1, 0, rank)
            if rank == 1 and where == "inner step":
                optimizer.param_groups[0]["weight_decay"] = "much"
            loss.backward()
            if rank == 1 and where == "norm":
                module.scale.grad = torch.ones(1)
            optimizer.step()

        seen[where] = [told(step), told(optimizer.step), told(optimizer.slices)]
    return seen


def test_a_rank_that_raises_is_named_to_the_others():
    pool = Pool(2)
    try:
        (fine, seen), (also, theirs) = pool.run(by_memory, (_one_fails,), {}, 100)
    finally:
        pool.end(kill=True)
    assert fine, seen
    assert also, theirs
    for where, (first, *later) in seen.items():
        assert first.startswith("RuntimeError: " if "reduce" in where else "PeerError: "), where
        assert "rank 1" in first
        assert all("stopped at an earlier failure" in message for message in later)
        assert not theirs[where][0].startswith(("nothing", "PeerError"))
        assert all("stopped at an earlier failure" in message for message in theirs[where][1:])
    assert "rank 1 failed before the step: " in seen["norm"][0]
    assert "scale has a .grad after" in seen["norm"][0]
