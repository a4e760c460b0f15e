"""ZeroOptimizer's state machine: any sequence of public calls on two ranks gives the numbers of one process, a refusal
where the round does not allow the call, or, after a failure, an error for good. Never a deadlock."""

from __future__ import annotations

import math
import traceback
from datetime import timedelta

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shardopt import AdEMAMix, ZeroOptimizer
from shardopt.engines.zero import NonFiniteGradientError
from shardopt.errors import InputError
from tests.distributed.pool import Pool, on_ranks
from tests.fuzz import budget

OPTIONS = {"lr": 0.05, "eps": 1e-2, "alpha": 3.0, "alpha_warmup": 4, "weight_decay": 0.1, "weight_ema": 0.5}
BOTH = (0, 1)


class Net(nn.Module):
    """Two branches, of which a loss may use one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(2))

    def loss(self, number: int, rank: int, factor: float) -> torch.Tensor:
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(10 * number + rank))
        branches = (self.left, self.right) if number % 3 else (self.left,)
        return sum((branch(x) - rank).square().mean() for branch in branches) * factor


class OneProcess:
    """The same calls without sharding: what each is expected to do."""

    def __init__(self, module: Net) -> None:
        self.module, self.reduced, self.clip = module, False, 1.0
        self.optimizer = AdEMAMix(module.named_parameters(), **OPTIONS)

    def micro_batch(self, number, ranks, factors):
        if self.reduced:
            return "InputError"
        for rank in ranks:
            (self.module.loss(number, rank, factors[rank]) / 2).backward()
        return "done"

    def norm(self):
        squares = sum(p.grad.double().square().sum().item() for p in self.module.parameters() if p.grad is not None)
        return math.sqrt(squares) * self.clip

    def clip_grad_norm(self, most):
        norm, self.reduced = self.norm(), True
        if most is not None and most < norm < math.inf:
            self.clip *= most / norm
        return norm

    def step(self):
        finite = math.isfinite(self.norm())
        for p in self.module.parameters():
            if p.grad is not None:
                p.grad *= self.clip
        if finite:
            self.optimizer.step()
        self.zero_grad()
        return "done" if finite else "NonFiniteGradientError"

    def zero_grad(self):
        self.optimizer.zero_grad()
        self.reduced, self.clip = False, 1.0
        return "done"


def told(action):
    try:
        result = action()
    except (InputError, NonFiniteGradientError) as error:
        return type(error).__name__
    return result if isinstance(result, float) else "done"


FACTORS = st.tuples(*[st.sampled_from([1.0, 1.0, 1.0, 1.0, math.nan, 0.0])] * 2)
CALLS = st.one_of(
    st.tuples(st.just("backward"), FACTORS),
    st.tuples(st.just("accumulate"), st.booleans(), st.sampled_from([BOTH, BOTH, (0,), (1,), ()]), FACTORS),
    st.tuples(st.just("clip_grad_norm_"), st.none() | st.sampled_from([1e-3, 0.5, 100.0])),
    *[st.tuples(st.just(name)) for name in ("step", "step", "zero_grad", "state_dict", "slices", "use_weight_ema")],
    *[st.tuples(st.just(name)) for name in ("init_state", "wait")],
)
REFUSED = ("step", "zero_grad", "state_dict", "slices", "accumulate", "use_weight_ema", "init_state")


def _refused(optimizer, name):
    """What is answered where a micro-batch is under way, or the weights are the averaged ones."""
    if name in ("accumulate", "use_weight_ema"):
        return told(lambda: getattr(optimizer, name)().__enter__())
    return told(getattr(optimizer, name))


def _ours(optimizer, module, rank, number, call):
    """Make the call: what it said; and what was let through inside a block that should not have been."""
    name, *arguments = call
    let_through = []
    if name == "backward":
        return told(module.loss(number, rank, arguments[0][rank]).backward), []
    if name == "accumulate":
        last, ranks, factors = arguments

        def micro_batch():
            with optimizer.accumulate(last):
                if rank in ranks:
                    module.loss(number, rank, factors[rank]).backward()
                    let_through.extend(each for each in REFUSED if _refused(optimizer, each) != "InputError")

        return told(micro_batch), let_through
    if name == "use_weight_ema":

        def averaged():
            with optimizer.use_weight_ema():
                let_through.extend(each for each in REFUSED if each != "slices" and _refused(optimizer, each) == "done")

        return told(averaged), let_through
    return told(lambda: getattr(optimizer, name)(*arguments)), []


def _expected(one, number, call):
    name, *arguments = call
    if name == "backward":
        return one.micro_batch(number, BOTH, arguments[0])
    if name == "accumulate":
        return one.micro_batch(number, arguments[1], arguments[2])
    if name == "clip_grad_norm_":
        return one.clip_grad_norm(*arguments)
    return getattr(one, name)() if name in ("step", "zero_grad") else "done"


def _made(rank, options):
    torch.manual_seed(rank)  # rank 0's weights must win
    module = Net()
    return module, ZeroOptimizer(module, AdEMAMix, bucket_mb=1e-4, **options, **OPTIONS)


def _run(rank, world_size, options, calls):
    """Both ways; the first difference, or none."""
    try:
        module, optimizer = _made(rank, options)
        torch.manual_seed(0)
        one = OneProcess(Net())
        for number, call in enumerate(calls):
            said, let_through = _ours(optimizer, module, rank, number, call)
            expected = _expected(one, number, call)
            same = said == expected or (
                isinstance(said, float) and (math.isclose(said, expected, rel_tol=1e-4, abs_tol=1e-7)
                                             or (said != said and not math.isfinite(expected)))
            )  # fmt: skip
            if not same or let_through:
                return f"call {number}, {call}: {said}, and not {expected}; inside went through {let_through}"
            for (name, ours), theirs in zip(module.named_parameters(), one.module.parameters(), strict=True):
                if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6):
                    return f"after call {number}, {call}: {name} is off by {(ours - theirs).abs().max()}"
        optimizer.close()
        return None
    except Exception:
        return traceback.format_exc()


STAGES = st.sampled_from([{"stage": 1}, {"stage": 2}, {"stage": 2, "reduce_dtype": "fp32"}])


@budget(12)
@given(STAGES, st.lists(CALLS, min_size=6, max_size=24))
def test_any_sequence_of_calls_gives_the_numbers_of_one_process(options, calls):
    assert on_ranks(2, _run, options, calls, timeout=60) == [None, None]


class BrokenError(Exception):
    pass


def _break(optimizer, module, number, how):
    """A micro-batch that fails on this rank."""

    def raise_(_):
        raise BrokenError

    if how == "forward":
        with optimizer.accumulate():
            raise BrokenError
    hidden = module.left[0](torch.ones(1, 3))
    hidden.register_hook(raise_)
    loss = module.left[2](hidden).sum() + module.right(torch.ones(1, 3)).sum()
    if how == "backward":
        loss.backward()
    else:
        with optimizer.accumulate(last=how == "last"):
            loss.backward()


def _fails(rank, world_size, options, before, failing, how, after):
    """One rank fails: what each call said from then on, and whether weights changed."""
    module, optimizer = _made(rank, options | {"timeout": timedelta(seconds=1)})
    for number, call in enumerate(before):
        _ours(optimizer, module, rank, number, call)
    optimizer.zero_grad()
    optimizer.wait()
    weights = [p.detach().clone() for p in module.parameters()]
    said = []

    def attempt(action):
        try:
            action()
            said.append("done")
        except Exception as error:
            said.append(type(error).__name__)

    number = len(before)
    if rank == failing:
        attempt(lambda: _break(optimizer, module, number, how))
    elif how == "backward":
        attempt(lambda: module.loss(1, rank, 1.0).backward())
    else:
        attempt(lambda: _ours(optimizer, module, rank, 1, ("accumulate", how != "middle", BOTH, (1.0, 1.0))))
    for name in (*after, "step", "step"):
        attempt(lambda name=name: getattr(optimizer, name)(*[None][: name == "clip_grad_norm_"]))
    same = all(torch.equal(p, w) for p, w in zip(module.parameters(), weights, strict=True))
    return said, same


@budget(2)
@given(
    STAGES,
    st.lists(CALLS, max_size=4),
    st.sampled_from(BOTH),
    st.sampled_from(["forward", "last", "middle", "backward"]),
    st.lists(st.sampled_from(["zero_grad", "state_dict", "slices", "clip_grad_norm_"]), max_size=2),
)
def test_after_a_failure_on_one_rank_nobody_steps_and_nobody_waits_for_ever(options, before, failing, how, after):
    pool = Pool(2)
    try:
        replies = pool.run(_fails, (options, before, failing, how, after), {}, timeout=60)
    finally:
        pool.end(kill=True)
    for rank, (good, reply) in enumerate(replies):
        assert good, reply
        said, unchanged = reply
        assert unchanged, "a step was taken"
        assert said[-1] == "RuntimeError", said
        assert said[-2] in ("RuntimeError", "PeerError"), said
        if rank == failing:
            assert said[0] == "BrokenError"
            assert all(
                word == "RuntimeError" or name == "zero_grad" for name, word in zip(after, said[1:], strict=False)
            )
