"""torch.compile of blocks and of the whole model, under every engine."""

from __future__ import annotations

import shutil
from unittest import mock

import pytest
import torch
from torch import nn

from shardopt import AdEMAMix, ZeroOptimizer
from shardopt.distributed import Ranks
from shardopt.engines import DdpConfig, DeepspeedConfig, FsdpConfig, SingleConfig, ZeroConfig, build
from shardopt.engines import compile as compiling
from shardopt.engines.base import EngineInputs
from shardopt.engines.zero.transports import shared_memory
from shardopt.errors import InputError
from shardopt.optim import registry
from shardopt.pretrain.model import blocks_of, initialise
from tests.allocations import peak_of_cpu_memory
from tests.distributed.pool import on_ranks
from tests.engines.test_native import alone, meta, train

ENGINES = {
    "ddp": DdpConfig(),
    "zero": ZeroConfig(bucket_mb=0.02),
    "zero-1": ZeroConfig(stage=1),
    "fsdp": FsdpConfig(),
    "deepspeed": DeepspeedConfig(stage=2, compute_dtype="fp32"),
}
graphs: list[object] = []


def counted(module, inputs):
    graphs.append(module)
    return torch._dynamo.lookup_backend("aot_eager")(module, inputs)


def engine(config, ranks, what, checkpointing=False):
    model = meta("llama")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    spec = registry.spec("ademamix", lr=1e-2, alpha_warmup=10, beta3_warmup=10)
    return build(
        config, EngineInputs(ranks, model, lambda m: initialise(m, ranks.device, 3), spec, blocks_of(model), what)
    )


def _losses(rank, world_size, config, checkpointing=False):
    """Losses of a few steps by what is compiled, and the number of graphs."""
    results = {}
    for what in ("none", "blocks", "model"):
        torch._dynamo.reset()
        graphs.clear()
        with mock.patch.object(compiling, "BACKEND", counted):
            one = engine(config, Ranks.start("cpu"), what, checkpointing)
            results[what] = [loss for loss, _ in train(one, 3, 2, 1.0)], len(graphs)
            one.close()
    return results


# ddp and zero-1 are left to the slow tier: what is compiled there is what zero has compiled
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ("ddp", "zero-1") else ()) for n in ENGINES]
)
def test_losses_are_the_same_whatever_is_compiled(name):
    results = on_ranks(2, _losses, ENGINES[name], name == "zero", fresh="deepspeed" in name)[0]
    expected, none = results["none"]
    assert none == 0
    for what in ("blocks", "model"):
        losses, compiled = results[what]
        assert compiled > 0
        assert losses == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == 3


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_code_of_inductor_has_the_same_gradients():
    block = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    model, x = nn.Sequential(block), torch.randn(2, 8)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiling.compile_forward("blocks", model, [block])
    model(x).sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


def test_machine_without_a_compiler_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"train\.compile: torch\.compile needs the C\+\+ compiler no-such-compiler"):
        engine(SingleConfig(), alone(), "blocks")


def _overlapped(rank, world_size):
    """Losses, plain and compiled, of a model whose layers wait for their own weights."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
        with mock.patch.object(shared_memory, "_process_vm_readv", return_value=None):
            optimizer = ZeroOptimizer(model, torch.optim.SGD, lr=0.1, bucket_mb=0.02, overlap_gather=list(model))
        if compiled:
            model.forward = torch.compile(model.forward, backend="aot_eager")
        losses = []
        for step in range(4):
            loss = model(torch.ones(2, 64) * (1 + rank + step)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results.append(losses)
        optimizer.close()
    return results


def test_compiled_model_waits_for_weights_in_flight_at_every_step():
    for plain, compiled in on_ranks(2, _overlapped):
        assert compiled == pytest.approx(plain, rel=1e-5)
        assert len(set(plain)) == 4


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256, bias=False) for _ in range(16))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def _peak(rank, world_size, bucket_bytes):
    """Peak of a compiled backward's memory, in gradients of the whole model, in ZeRO's second step."""
    torch._dynamo.reset()
    model = Stack()
    optimizer = ZeroOptimizer(model, AdEMAMix, bucket_mb=1)
    with mock.patch.object(compiling, "BACKEND", "aot_eager"):
        compiling.compile_forward("model", model, [], bucket_bytes)
        for _ in range(2):
            loss = model(torch.ones(1, 256)).sum()
            with peak_of_cpu_memory() as peak:
                loss.backward()
            optimizer.step()
    return peak.nbytes / sum(p.nbytes for p in model.parameters())


def test_whole_compiled_model_gives_its_gradients_bucket_by_bucket():
    for whole, pieces in zip(on_ranks(2, _peak, None), on_ranks(2, _peak, 2**20), strict=True):
        assert whole > 0.95
        assert pieces < 0.6  # 4 buckets in all; two in flight, and one that a piece gives at once on top
