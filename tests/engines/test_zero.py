"""The zero engine behind the interface of every engine."""

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from shardopt import AdEMAMix, ZeroOptimizer
from shardopt.distributed import Ranks
from shardopt.engines import DdpConfig, SingleConfig, ZeroConfig, build
from shardopt.engines.base import EngineInputs
from shardopt.errors import InputError
from shardopt.optim.registry import OptimizerSpec
from tests.distributed.pool import on_ranks
from tests.engines.test_native import alone, engine, fingerprint, train


def _trained(rank, world_size, config, steps, micro, clip, name="llama", **kwargs):
    one = engine(config, Ranks.start("cpu"), name, **kwargs)
    start = fingerprint(one)
    out = train(one, steps, micro, clip)
    one.close()
    return out, fingerprint(one), start


@pytest.mark.parametrize("stage", [1, 2])
def test_equals_ddp_bit_for_bit_on_two_ranks(stage):
    ddp = on_ranks(2, _trained, DdpConfig(), 15, 1, None, state_dtype="bf16")[0]
    zero = on_ranks(2, _trained, ZeroConfig(stage=stage, bucket_mb=0.01), 15, 1, None, state_dtype="bf16")[0]
    assert zero[2] == ddp[2] != ddp[1]
    assert zero[1] == ddp[1]
    assert [loss for loss, _ in zero[0]] == [loss for loss, _ in ddp[0]]
    assert [norm for _, norm in zero[0]] == pytest.approx([norm for _, norm in ddp[0]], rel=1e-6)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_losses_and_clipped_norms_equal_the_single_process(name):
    control = train(engine(SingleConfig(), alone(), name), 6, 2, 0.5)
    assert max(norm for _, norm in control) > 0.5
    for config, ranks, micro in ((ZeroConfig(stage=1), 2, 2), (ZeroConfig(replicate=2, bucket_mb=0.02), 4, 1)):
        for out, _, _ in on_ranks(ranks, _trained, config, 6, micro, 0.5, name):
            for (loss, norm), (expected_loss, expected_norm) in zip(out, control, strict=True):
                assert loss == pytest.approx(expected_loss, rel=1e-5)
                assert norm == pytest.approx(expected_norm, rel=1e-4)


def _frozen_and_resumed(rank, world_size):
    """The slices that an engine reports, and the exact run of another engine from them."""
    ranks = Ranks.start("cpu")
    config = ZeroConfig(bucket_mb=0.01)
    first = engine(config, ranks, state_dtype="bf16")
    first.state.init()
    empty = [s.tensors[0].clone() for s in first.state.slices()]
    train(first, 4, 1)
    held = first.state.slices()
    differ = any(not torch.equal(a, s.tensors[0]) for a, s in zip(empty, held, strict=True))
    second = engine(config, ranks, state_dtype="bf16")
    second.state.init()
    for ours, theirs in zip(second.state.slices(), held, strict=True):
        assert (ours.name, ours.kind, ours.layout) == (theirs.name, theirs.kind, theirs.layout)
        for a, b in zip(ours.tensors, theirs.tensors, strict=True):
            a.copy_(b)
    second.state.load_step_counts(first.state.step_counts())
    second.state.refresh()
    train(first, 3, 1)
    train(second, 3, 1)
    places = [(s.name, s.kind, s.layout.ranges, s.layout.numel) for s in held]
    statistics = first.state.statistics()
    norms = {
        k: sum(s.tensors[0].double().square().sum().item() for s in first.state.slices() if s.kind == k)
        for k in ("m1", "m2")
    }
    facts = first.state.replicas, first.state.gradient_bytes(), statistics["alpha"]
    assert first.optimizer.kernel == first.optimizer.inner.kernel in ("c", "torch")
    return places, differ, fingerprint(first) == fingerprint(second), statistics, norms, facts


@pytest.mark.parametrize("world_size", [2, 4])
def test_slices_cover_everything_once_and_carry_a_run(world_size):
    results = on_ranks(world_size, _frozen_and_resumed)
    counts: dict[tuple[str, str], torch.Tensor] = {}
    for places, *_ in results:
        for name, kind, ranges, numel in places:
            count = counts.setdefault((name, kind), torch.zeros(numel))
            for r in ranges:
                count[r.global_start : r.global_start + r.length] += 1
    assert {kind for _, kind in counts} == {"weight", "m1", "m2", "nu"}
    for (_, kind), count in counts.items():
        assert set(count.tolist()) == {float(world_size) if kind == "weight" else 1.0}
    for _, differ, equal, statistics, _, (replicas, gradients, alpha) in results:
        assert differ
        assert equal
        for kind in ("m1", "m2"):
            square = sum(norms[kind] for *_, norms, _ in results)
            assert statistics[f"{kind}_norm"] == pytest.approx(square**0.5)
        assert replicas == 1
        whole = sum(c.numel() for (_, kind), c in counts.items() if kind == "weight") * 4
        assert gradients == pytest.approx(whole / world_size, rel=0.02)
        assert alpha == pytest.approx(5.0 * 7 / 10)


def _averaged(rank, world_size):
    torch.manual_seed(0)
    module = nn.Linear(40, 40)
    optimizer = ZeroOptimizer(module, AdEMAMix, lr=0.1, weight_ema=0.9)
    trail = [module.weight.detach().clone()]
    for _ in range(5):
        with optimizer.accumulate():
            module(torch.ones(2, 40)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        trail.append(module.weight.detach().clone())
    with optimizer.use_weight_ema():
        inside = module.weight.detach().clone()
    low, high = torch.stack(trail).aminmax(dim=0)
    return (
        torch.equal(module.weight, trail[-1]),
        torch.equal(inside, trail[-1]),
        bool(((inside >= low) & (inside <= high)).all()),
        inside,
    )


def test_averaged_weights_are_gathered():
    (back, same, between, first), (_, _, _, second) = on_ranks(2, _averaged)
    assert back
    assert not same
    assert between
    assert torch.equal(first, second)


def test_settings_and_worlds_that_it_refuses():
    for settings, message in (
        ({"stage": 3}, r"engine\.stage: 3 is not 1 or 2"),
        ({"bucket_mb": -1.0}, r"engine\.bucket_mb: -1\.0 must be"),
        ({"reduce_dtype": "fp8"}, r"engine\.reduce_dtype: 'fp8'"),
        ({"replicate": 0}, r"engine\.replicate: 0 must be"),
        ({"compute_dtype": "fp16"}, r"engine\.compute_dtype: 'fp16'"),
    ):
        with pytest.raises(InputError, match=message):
            ZeroConfig(**settings)
    with pytest.raises(InputError, match=r"engine\.name: zero needs torchrun"):
        engine(ZeroConfig(), alone())


def _refused(rank, world_size):
    messages = []
    muon = OptimizerSpec(torch.optim.Muon, {}, elementwise=False, reason="it orthogonalises")
    for config, build_spec in ((ZeroConfig(replicate=2), None), (ZeroConfig(), muon)):
        try:
            if build_spec is None:
                engine(config, Ranks.start("cpu"))
            else:
                build(config, EngineInputs(Ranks.start("cpu"), nn.Linear(2, 2), lambda m: None, build_spec, []))
        except InputError as error:
            messages.append(str(error))
    return messages


def test_an_optimizer_that_is_not_elementwise_and_odd_replicas_are_refused():
    replicate, muon = on_ranks(3, _refused)[0]
    assert "engine.replicate: 2 does not divide the 3 ranks" in replicate
    assert "zero cannot shard Muon: it orthogonalises" in muon


def _bf16(rank, world_size):
    one = engine(ZeroConfig(compute_dtype="bf16", reduce_dtype="bf16"), Ranks.start("cpu"))
    out = train(one, 6, 1, 1.0)
    one.close()
    return [loss for loss, _ in out]


def test_bf16_compute_follows_fp32():
    control = [loss for loss, _ in train(engine(SingleConfig(), alone()), 6, 1, 1.0)]
    for losses in on_ranks(2, _bf16):
        assert losses == pytest.approx(control, rel=0.02)
        assert losses != control


_FAULTS = """
import resource
import torch
from torch import nn
from shardopt import AdEMAMix, ZeroOptimizer

optimizer = ZeroOptimizer(nn.Linear(1024, 1024), AdEMAMix, lr=1e-3)
for step in range(16):
    if step == 13:  # by then the heap has its shape
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    gradients = [torch.ones(2**21) for _ in range(3)]
    del gradients
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is of glibc's malloc")
def test_memory_of_gradients_stays_with_the_process_once_it_is_built():
    # A process of its own: what any test before has freed counts.
    found = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True, timeout=120)
    assert int(found.stdout) < 2**21 * 4 // 4096  # pages of one of nine tensors
