"""The layout: every element owned exactly once, at any world size, without a process group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from shardopt import AdEMAMix, ZeroOptimizer
from shardopt.engines.zero.buckets import fingerprint, lay_out
from shardopt.errors import InputError

PARAMETERS = [("a", (3, 5), torch.float32), ("b", (), torch.float32), ("c", (7,), torch.bfloat16)]
PARAMETERS += [("d", (0, 4), torch.float32), ("e", (1000,), torch.float32), ("f", (33,), torch.bfloat16)]


def owners(buckets, world_size):
    """For every parameter, how many ranks own each element, from the layouts alone."""
    counts = {}
    for bucket in buckets:
        for member in bucket.members:
            counts[member.name] = torch.zeros(member.numel, dtype=torch.int)
            for rank in range(world_size):
                layout, at = bucket.owned(member, rank)
                for r in layout.ranges:
                    counts[member.name][r.global_start : r.global_start + r.length] += 1
                    # The same element, counted in the bucket, lies in the rank's part.
                    assert member.offset + r.global_start == rank * bucket.part + at + r.local_start
                assert at + layout.local_numel <= bucket.part
    return counts


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("bucket_bytes", [1, 300, 10**6])
def test_every_element_has_one_owner(world_size, bucket_bytes):
    buckets = lay_out(PARAMETERS, world_size, bucket_bytes)
    counts = owners(buckets, world_size)
    assert set(counts) == {name for name, _, _ in PARAMETERS}
    assert all((c == 1).all() for c in counts.values())
    for bucket in buckets:
        assert bucket.numel % world_size == 0
        assert all(m.offset * bucket.dtype.itemsize % 64 == 0 for m in bucket.members)
        ends = [m.offset + m.numel for m in bucket.members]
        assert all(m.offset >= end for m, end in zip(bucket.members[1:], ends, strict=False))
        for rank, messages in enumerate(bucket.messages):
            assert [m.start for m in messages] == [rank * bucket.part, *(m.start + m.length for m in messages[:-1])]
            assert messages[-1].start + messages[-1].length == (rank + 1) * bucket.part


def test_buckets_fill_in_the_order_of_backward():
    buckets = lay_out(PARAMETERS, 2, 64)
    last = [b.members[-1].index for b in buckets]
    assert last == sorted(last, reverse=True)
    for bucket in lay_out(PARAMETERS, 2, 10**6):
        assert [m.index for m in bucket.members] == sorted((m.index for m in bucket.members), reverse=True)
    assert {b.dtype for b in buckets} == {torch.float32, torch.bfloat16}
    assert fingerprint(buckets) != fingerprint(lay_out(PARAMETERS[:-1], 2, 64))
    assert fingerprint(buckets) == fingerprint(lay_out(PARAMETERS, 2, 64))


@pytest.mark.parametrize("other", [("a", (5, 3)), ("z", (3, 5))])
def test_fingerprint_tells_shapes_and_names_apart(other):
    """Neither moves an element, and a state_dict of the one is not the other's."""
    changed = [(*other, torch.float32), *PARAMETERS[1:]]
    assert fingerprint(lay_out(PARAMETERS, 2, 64)) != fingerprint(lay_out(changed, 2, 64))


def test_settings_are_refused_by_name():
    for settings, words in (
        ({"stage": 3}, "stage: 3 is not 1 or 2"),
        ({"bucket_mb": 0}, "bucket_mb: 0 must be"),
        ({"reduce_dtype": "fp16"}, "reduce_dtype: 'fp16'"),
        ({"gradients": "host"}, "needs stage=1"),
    ):
        with pytest.raises(InputError, match=words):
            ZeroOptimizer(nn.Linear(2, 2), AdEMAMix, **settings)
    with pytest.raises(InputError, match="nothing to train"):
        ZeroOptimizer(nn.Linear(2, 2).requires_grad_(False), AdEMAMix)


SIZES = {
    "1.3B": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}


@pytest.fixture
def fake_group(request):
    dist.init_process_group("fake", store=FakeStore(), rank=request.param // 3, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [s if s != "8B" else pytest.param(s, marks=pytest.mark.slow) for s in SIZES])
@pytest.mark.parametrize("fake_group", [8, 64, 1024], indirect=True)
def test_large_models_on_many_simulated_ranks(size, fake_group):
    """Layout, padding and bytes on the wire of two backwards, on the meta device."""
    with torch.device("meta"):
        config = {"vocab_size": 32000, "num_key_value_heads": 8, "tie_word_embeddings": False} | SIZES[size]
        model = LlamaForCausalLM(LlamaConfig(**config, use_cache=False))
    elements = sum(p.numel() for p in model.parameters())
    for stage, reductions in ((1, 1), (2, 2)):
        optimizer = ZeroOptimizer(model, AdEMAMix, stage=stage, lr=1e-3)
        padded = sum(b.numel for b in optimizer.buckets)
        assert elements <= padded < 1.001 * elements
        owned = [b.owned(m, rank)[0] for b in optimizer.buckets for m in b.members for rank in range(fake_group)]
        assert sum(layout.local_numel for layout in owned) == elements

        for micro in range(2):
            with optimizer.accumulate(last=micro == 1):
                torch.stack([p.sum() for p in model.parameters()]).sum().backward()
        leg = 4 * padded * (fake_group - 1) // fake_group  # fp32
        assert optimizer.wire_bytes == {"reduce": reductions * leg, "gather": 0}
        for flat in optimizer.flat.flats:
            optimizer._shard.all_gather(flat)()
        assert optimizer.wire_bytes["gather"] == leg
        optimizer.close()
