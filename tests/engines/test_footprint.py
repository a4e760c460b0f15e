"""What a rank holds and sends by arithmetic, against engines on real ranks and on simulated ones."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from shardopt import AdEMAMix, ZeroOptimizer
from shardopt.distributed import Ranks
from shardopt.engines import DdpConfig, DeepspeedConfig, FsdpConfig, SingleConfig, ZeroConfig
from shardopt.engines.base import EngineInputs
from shardopt.engines.footprint import Parameter, footprint, state_bytes
from shardopt.engines.fsdp import FsdpEngine
from shardopt.optim import registry
from shardopt.slices import local_tensor, named_parameters
from tests.distributed.pool import on_ranks
from tests.engines.test_native import LENGTH, alone, batch, engine, meta

MICROS = 2
# Every part of the state in another format.
OPTIMIZER = {"state_dtype": {"m1": "bf16", "m2": "block8", "nu": "block16"}, "weight_ema": 0.99}
FLAT = {"state_dtype": {"m1": "bf16"}, "weight_ema": 0.99}  # of flat partitions


def parameters(model):
    blocks = {p: i for i, block in enumerate(model.model.layers) for p in block.parameters()}
    return [Parameter(name, tuple(p.shape), blocks.get(p)) for name, p in named_parameters(model)]


def measured(config, ranks, optimizer):
    """Bytes by kind of slice, of gradients at most, of what DeepSpeed calls the weights, and sent in a step."""
    one = engine(config, ranks, **optimizer)
    trained = [p for group in one.optimizer.param_groups for p in group["params"]]
    gradients = 0
    with counted() as sent:
        for i in range(MICROS):
            tokens = batch(i, rows=2)
            with one.accumulate(last=i == MICROS - 1):
                one.backward(one.model(input_ids=tokens[:, :-1]).logits.square().mean() / LENGTH)
            there = sum(local_tensor(p.grad).nbytes for p in trained if p.grad is not None)
            gradients = max(gradients, there, one.state.gradient_bytes())
        one.clip_grad_norm(None)
        one.step()
    if config.name == "zero":
        sent = one.optimizer.wire_bytes
    kinds = Counter()
    for piece in one.state.slices():
        kinds[piece.kind] += piece.nbytes
    weights = sum(p.nbytes for p in one.state.model.parameters())
    one.close()
    return {"kinds": dict(kinds), "gradients": gradients, "weights": weights, "sent": dict(sent)}


@contextmanager
def counted():
    """The bytes that a rank sends by torch's own collectives, in a ring: FSDP2's."""
    sent = Counter()

    def counting(leg, call, output, input, **kwargs):
        ranks = dist.get_world_size(kwargs.get("group"))
        sent[leg] += max(output.nbytes, input.nbytes) * (ranks - 1) // ranks
        return call(output, input, **kwargs)

    legs = {"all_gather_into_tensor": "gather", "all_gather_single": "gather"}
    legs |= {"reduce_scatter_tensor": "reduce", "reduce_scatter_single": "reduce"}  # names before and in torch 2.13
    with ExitStack() as stack:
        for name, leg in legs.items():
            if (call := getattr(dist, name, None)) is not None:
                stack.enter_context(mock.patch.object(dist, name, partial(counting, leg, call)))
        yield sent


def _measured(rank, world_size, cases):
    return [measured(config, Ranks.current(), optimizer) for config, optimizer in cases]


def compare(config, optimizer, found, world_size):
    """The plan of the rank that holds most, against what the ranks have measured."""
    model = meta("llama")
    planned = footprint(config, parameters(model), world_size, MICROS, torch.float32, native=False)
    state = state_bytes(registry.spec("ademamix", **optimizer), planned.shards)
    for kind, nbytes in state.items():
        assert max(one["kinds"][kind] for one in found) == pytest.approx(nbytes, rel=0.05), (config, kind)
    assert max(one["gradients"] for one in found) == pytest.approx(planned.gradients, rel=0.05), config
    weights = max(one["kinds"]["weight"] for one in found)
    if config.name == "deepspeed":
        assert weights == pytest.approx(planned.masters, rel=0.05), config
        if config.stage < 3:
            assert max(one["weights"] for one in found) == pytest.approx(planned.weights, rel=0.05), config
    else:
        assert weights == pytest.approx(planned.weights, rel=0.05), config
    if config.name == "zero" and config.replicate == 1:
        assert found[0]["sent"] == {"reduce": planned.reduce, "gather": planned.gather}, config
    if config.name == "fsdp" and config.replicate == 1:
        for leg in ("reduce", "gather"):
            assert found[0]["sent"][leg] == pytest.approx(getattr(planned, leg), rel=0.05), (config, leg)


def test_one_process_holds_what_is_planned():
    compare(SingleConfig(), OPTIMIZER, [measured(SingleConfig(), alone(), OPTIMIZER)], 1)


ALIKE = [DdpConfig(), ZeroConfig(stage=1), ZeroConfig(), FsdpConfig()]
REPLICATED = [ZeroConfig(replicate=2), FsdpConfig(replicate=2)]
OTHERS = [FsdpConfig(reduce_every="step"), FsdpConfig(reshard_after_forward=False), ZeroConfig(reduce_dtype="bf16")]


@pytest.mark.parametrize(
    ("world_size", "configs"), [(2, ALIKE), (4, ALIKE + REPLICATED), pytest.param(2, OTHERS, marks=pytest.mark.slow)]
)
def test_ranks_hold_and_send_what_is_planned(world_size, configs):
    found = on_ranks(world_size, _measured, [(config, OPTIMIZER) for config in configs])
    for number, config in enumerate(configs):
        compare(config, OPTIMIZER, [of_rank[number] for of_rank in found], world_size)


@pytest.mark.slow  # it imports DeepSpeed on every rank
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_deepspeeds_ranks_hold_what_is_planned(world_size):
    configs = [DeepspeedConfig(stage=stage) for stage in (1, 2, 3)]
    found = on_ranks(world_size, _measured, [(config, FLAT) for config in configs], timeout=300)
    for number, config in enumerate(configs):
        compare(config, FLAT, [of_rank[number] for of_rank in found], world_size)


SIZES = {
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}


@pytest.mark.parametrize(
    ("world_size", "size"),
    [(64, "small"), (1024, "small"), *(pytest.param(n, "8B", marks=pytest.mark.slow) for n in (64, 1024))],
)
def test_simulated_ranks_hold_and_send_what_is_planned(world_size, size):
    """Rank 0 of torch's fake process group, on the meta device, by the path that NCCL takes."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        config = LlamaConfig(vocab_size=32000, tie_word_embeddings=False, **SIZES[size], use_cache=False)
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        listed = parameters(model)
        fp32 = registry.spec("ademamix")
        for stage in (1, 2):
            planned = footprint(ZeroConfig(stage=stage), listed, world_size, 1, torch.bfloat16)
            optimizer = ZeroOptimizer(model, AdEMAMix, stage=stage, lr=1e-3)
            with optimizer.accumulate():
                torch.stack([p.sum() for p in model.parameters()]).sum().backward()
            for flat in optimizer.flat.flats:
                optimizer._shard.all_gather(flat)()
            assert optimizer.wire_bytes == {"reduce": planned.reduce, "gather": planned.gather}
            assert optimizer.gradient_bytes() == planned.gradients
            assert optimizer.reducer.peak_bytes <= planned.buckets
            assert sum(flat.nbytes for flat in optimizer.flat.flats) == planned.weights
            optimizer.init_state()
            held = Counter()
            for piece in optimizer.slices():
                held[piece.kind] += piece.nbytes
            assert {key: held[key] for key in ("m1", "m2", "nu")} == state_bytes(fp32, planned.shards)
            optimizer.close()

        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        planned = footprint(FsdpConfig(), listed, world_size, 1, torch.float32)
        ranks = Ranks(0, world_size, 0, torch.device("cpu"), True)
        one = FsdpEngine(FsdpConfig(), EngineInputs(ranks, model, lambda m: None, fp32, list(model.model.layers)))
        one.state.init()
        held = Counter()
        for piece in one.state.slices():
            held[piece.kind] += piece.nbytes
        assert held.pop("weight") == planned.weights
        assert one.state.gradient_bytes() == planned.gradients
        assert {key: held[key] for key in ("m1", "m2", "nu")} == state_bytes(fp32, planned.shards)
    finally:
        dist.destroy_process_group()
