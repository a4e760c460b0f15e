"""The engines made of torch's own parts: single, ddp, fsdp."""

import gc
import hashlib
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from shardopt.distributed import Ranks
from shardopt.engines import DdpConfig, FsdpConfig, SingleConfig, ZeroConfig, build
from shardopt.engines.base import EngineInputs
from shardopt.errors import InputError
from shardopt.optim import registry
from shardopt.pretrain.model import ModelConfig, blocks_of, initialise, meta_model, transformers_config
from tests.distributed.pool import on_ranks

VOCABULARY, LENGTH = 61, 16
MODELS = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    # GPT-2 scales some weights from their parent module, and its Conv1D is not a Linear.
    "gpt2": {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8},
    "apertus": {"model_type": "apertus", "num_key_value_heads": 2},
}
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = COMMON | {"intermediate_size": 40}


def meta(name, **changes):
    shape = COMMON if name == "gpt2" else LLAMA_LIKE
    section = ModelConfig(**(shape | MODELS[name] | changes))
    return meta_model(transformers_config(section, VOCABULARY, 0, LENGTH))


def engine(config, ranks, name="llama", optimizer="ademamix", weights=None, **kwargs):
    model = meta(name)
    spec = registry.spec(optimizer, **({"lr": 1e-2, "alpha_warmup": 10, "beta3_warmup": 10} | kwargs))
    return build(
        config,
        EngineInputs(ranks, model, lambda m: initialise(m, ranks.device, 3, weights), spec, blocks_of(model)),
    )


def alone():
    return Ranks(0, 1, 0, torch.device("cpu"), False)


def batch(step, rows=4):
    return torch.randint(0, VOCABULARY, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def train(one, steps, micro=2, clip=None):
    """Losses and norms of `steps` steps on 4 rows over all ranks, in `micro` micro-batches a rank."""
    ranks, out = one.ranks, []
    for step in range(steps):
        mine = batch(step).chunk(ranks.world_size)[ranks.rank].chunk(micro)
        total = 0.0
        for i, tokens in enumerate(mine):
            with one.accumulate(last=i == len(mine) - 1):
                logits = one.model(input_ids=tokens[:, :-1]).logits
                loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum") / (4 * LENGTH)
                one.backward(loss)
            total += loss.item()
        norm = one.clip_grad_norm(clip)
        one.step()
        one.zero_grad()
        out.append((ranks.sum([total])[0], norm))
    return out


def fingerprint(one):
    return {n: hashlib.sha256(p.numpy().tobytes()).hexdigest() for n, p in one.state.full_parameters() if p is not None}


def _fingerprint(rank, world_size, config, name):
    return fingerprint(engine(config, Ranks.start("cpu"), name))


@pytest.mark.parametrize("name", MODELS)
def test_initial_weights_are_the_same_on_every_engine_and_world_size(name):
    expected = fingerprint(engine(SingleConfig(), alone(), name))
    for config, world_size in ((DdpConfig(), 2), (FsdpConfig(), 2), (FsdpConfig(), 3), (FsdpConfig(replicate=2), 4)):
        assert on_ranks(world_size, _fingerprint, config, name)[0] == expected


@pytest.mark.parametrize("name", MODELS)
def test_initialisation_is_what_transformers_does(name):
    """The same distribution a tensor, the same constants, buffers and ties as a model built the ordinary way."""
    from transformers import AutoModelForCausalLM

    ours = meta(name)
    initialise(ours, torch.device("cpu"), 3)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(ours.config)
    for (n, a), (m, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert n == m
        if a.unique().numel() <= 1 or b.unique().numel() <= 1:
            assert torch.equal(a, b), n
        else:
            # 4 standard errors of a standard deviation estimated from this many elements, on either side.
            assert a.std().item() == pytest.approx(b.std().item(), rel=8 / (2 * a.numel()) ** 0.5), n
            assert abs(a.mean().item()) < 5 * b.std().item() / a.numel() ** 0.5, n
            assert not torch.equal(a, b)
    assert dict(ours.named_buffers()).keys() == dict(theirs.named_buffers()).keys()
    for n, buffer in ours.named_buffers():
        assert torch.equal(buffer, dict(theirs.named_buffers())[n]), n
    tied = ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    assert tied == (theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_no_token_sees_those_that_it_is_to_predict(model_type):
    config = transformers_config(ModelConfig(model_type=model_type, **LLAMA_LIKE), VOCABULARY, 0, LENGTH)
    model = meta_model(config)
    initialise(model, torch.device("cpu"), 3)
    model.eval()
    tokens = batch(0)[:, :LENGTH]
    changed = tokens.clone()
    changed[:, LENGTH // 2 :] = 1
    with torch.no_grad():
        before, after = model(input_ids=tokens).logits, model(input_ids=changed).logits
    torch.testing.assert_close(before[:, : LENGTH // 2], after[:, : LENGTH // 2], rtol=0, atol=1e-5)
    assert not torch.equal(before, after)


def test_a_parameter_that_nothing_initialises_is_refused_by_name():
    model = meta("llama")
    model.model.norm.register_parameter("gain", torch.nn.Parameter(torch.empty(3, device="meta")))
    with pytest.raises(InputError, match=r"does not say how model\.norm\.gain of LlamaForCausalLM is initialised"):
        initialise(model, torch.device("cpu"), 0)


def test_weights_of_a_folder_are_read_by_ranges(tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    saved = AutoModelForCausalLM.from_config(meta("llama-tied").config)
    saved.save_pretrained(tmp_path)
    expected = {n: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for n, p in saved.named_parameters()}
    assert on_ranks(3, _loaded, str(tmp_path))[0] == expected
    saved.config.save_pretrained(tmp_path / "bare")
    wider = transformers_config(ModelConfig(path=str(tmp_path), intermediate_size=48), VOCABULARY, 0, LENGTH)
    with pytest.raises(InputError, match=r"model\.path: .*mlp.* of shape .*40.*, the model's is .*48"):
        initialise(meta_model(wider), torch.device("cpu"), 0, str(tmp_path))
    deeper = transformers_config(ModelConfig(path=str(tmp_path), num_hidden_layers=3), VOCABULARY, 0, LENGTH)
    with pytest.raises(InputError, match=r"model\.path: no weights for model\.layers\.2"):
        initialise(meta_model(deeper), torch.device("cpu"), 0, str(tmp_path))


def _loaded(rank, world_size, path):
    return fingerprint(engine(FsdpConfig(), Ranks.start("cpu"), "llama-tied", weights=path))


def _whole_tensors_seen(rank, world_size):
    """The largest total of live fp32 parameter storage while an FSDP2 engine is built, in parameters."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.device.type == "cpu" and not types:
                sizes.append(out.numel())
            return out

    with Watch():
        one = engine(FsdpConfig(), Ranks.start("cpu"))
    total = sum(p.numel() for p in one.model.parameters())
    held = sum(p.to_local().numel() for p in one.model.parameters())
    return max(sizes), max(p.numel() for p in one.model.parameters()), held, total


def test_no_rank_ever_makes_more_than_one_whole_parameter():
    for largest_made, largest_parameter, held, total in on_ranks(2, _whole_tensors_seen):
        assert largest_made <= largest_parameter
        assert held <= 0.52 * total


def _trained(rank, world_size, config, steps, micro, clip, name="llama", optimizer="ademamix", **kwargs):
    one = engine(config, Ranks.start("cpu"), name, optimizer, **kwargs)
    out = train(one, steps, micro, clip)
    return out, fingerprint(one)


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
def test_fsdp_equals_ddp_bit_for_bit_on_two_ranks(state_dtype):
    """A sum of two has one order, so nothing differs: fp32 without clipping, one micro-batch."""
    ddp = on_ranks(2, _trained, DdpConfig(), 20, 1, None, state_dtype=state_dtype)
    for config in (FsdpConfig(), FsdpConfig(reshard_after_forward=False)):
        fsdp = on_ranks(2, _trained, config, 20, 1, None, state_dtype=state_dtype)
        assert fsdp[0][1] == ddp[0][1]
        assert [loss for loss, _ in fsdp[0][0]] == [loss for loss, _ in ddp[0][0]]


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_clipped_norms_equal_the_single_process(name):
    control = train(engine(SingleConfig(), alone(), name), 8, 2, 0.5)
    assert max(norm for _, norm in control) > 0.5  # something was clipped
    cases = (FsdpConfig(), 2, 1), (FsdpConfig(), 2, 2), (FsdpConfig(replicate=2), 4, 1), (DdpConfig(), 2, 2)
    for config, world_size, micro in cases:
        for out, _ in on_ranks(world_size, _trained, config, 8, micro, 0.5, name):
            for (loss, norm), (expected_loss, expected_norm) in zip(out, control, strict=True):
                assert loss == pytest.approx(expected_loss, rel=1e-5)
                assert norm == pytest.approx(expected_norm, rel=1e-4)


def _each_way(rank, world_size, configs):
    return [_trained(rank, world_size, config, 8, 2, None) for config in configs]


def test_fsdp_over_micro_batches_equals_what_sums_in_the_same_order_bit_for_bit():
    """Reducing each micro-batch is what ZeRO-2 does, reducing once what DDP does; the two differ by rounding."""
    each, once = FsdpConfig(), FsdpConfig(reduce_every="step")
    results = on_ranks(2, _each_way, [each, ZeroConfig(stage=2), once, DdpConfig()])[0]
    weights = [held for _, held in results]
    assert weights[0] == weights[1]
    assert weights[2] == weights[3]
    assert weights[0] != weights[2]
    norms = [[norm for _, norm in out] for out, _ in results]
    assert norms[0] == pytest.approx(norms[2], rel=1e-6)


def _live_bytes():
    """`_seen_bytes`, once gloo's threads have let go of what they have just reduced."""
    last, now = None, _seen_bytes()
    while now != last:
        time.sleep(0.1)
        last, now = now, _seen_bytes()
    return now


def _seen_bytes():
    """Of the memory behind all tensors that there are, and behind the gradients that autograd keeps in them."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu"]
    tensors += [x.grad for x in tensors if x.is_leaf and type(x.grad) is torch.Tensor]
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


def _held_between_micro_batches(rank, world_size, config):
    """Bytes that a step's first micro-batches leave, what the engine says of them, and all-reduces by micro-batch."""
    one = engine(config, Ranks.start("cpu"))
    reduced, real = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        reduced[-1] += 1
        return real(tensor, *args, **kwargs)

    def micro_batch(last):
        reduced.append(0)
        with one.accumulate(last):
            one.backward(one.model(input_ids=batch(rank)[:1, :-1]).logits.square().mean())

    micro_batch(last=True)  # lays out what stays
    one.zero_grad()
    reduced.clear()
    before = _live_bytes()
    with mock.patch.object(dist, "all_reduce", counted):
        micro_batch(last=False)
        micro_batch(last=False)
        held = _live_bytes() - before
        micro_batch(last=True)
    whole = sum(p.numel() for p in one.model.parameters()) * 4
    return held / whole, one.state.gradient_bytes() / whole, reduced


@pytest.mark.parametrize(
    ("changes", "ranks", "share", "all_reduces"),
    [
        ({}, 2, 0.5, [0, 0, 0]),
        ({"reduce_every": "step"}, 2, 1.0, [0, 0, 0]),
        ({"replicate": 2}, 4, 0.5, [0, 0, 3]),  # two blocks and the root
        ({"replicate": 2, "reduce_dtype": "bf16"}, 4, 0.5, [3, 3, 3]),
    ],
)
def test_fsdp_holds_what_it_says_between_micro_batches(changes, ranks, share, all_reduces):
    for held, said, reduced in on_ranks(ranks, _held_between_micro_batches, FsdpConfig(**changes)):
        assert held == pytest.approx(share, abs=0.03)
        assert said == pytest.approx(share, abs=0.03)
        assert reduced == all_reduces


class Experts(torch.nn.Module):
    """Two linear layers, of which a forward uses one, or both where `expert` is None."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8, bias=False) for _ in range(2))

    def forward(self, x, expert):
        return sum(e(x) for e in self.experts) if expert is None else self.experts[expert](x)


@torch.no_grad()
def _initialised(model):
    model.to_empty(device="cpu")
    for param in model.parameters():
        getattr(param, "_local_tensor", param).fill_(0.5)


def _other_experts(rank, world_size, config, used, dropped=()):
    with torch.device("meta"):
        model = Experts()
    spec = registry.spec("adamw", lr=0.1)
    one = build(config, EngineInputs(Ranks.start("cpu"), model, _initialised, spec, []))
    for expert in dropped:
        with one.accumulate(last=False):
            one.backward(one.model(torch.ones(1, 8), expert).sum())
    one.zero_grad()
    try:
        for i, expert in enumerate(used):
            with one.accumulate(last=i == len(used) - 1):
                one.backward(one.model(torch.full((1, 8), 1.0 + rank), expert).sum() * (i + 1))
    except InputError as error:
        return str(error)
    return [None if p.grad is None else p.grad.full_tensor().unique().tolist() for p in one.model.parameters()]


def test_fsdp_sums_over_micro_batches_that_use_other_weights_or_refuses_them():
    total = 1.0 + 2.0 + 3.0 + 4.0  # over ranks
    assert on_ranks(2, _other_experts, FsdpConfig(), [0, 1])[0] == [[3.0], [6.0]]
    hybrid = FsdpConfig(replicate=2)
    for dropped in ((), (None,)):
        assert on_ranks(4, _other_experts, hybrid, [1], dropped)[0] == [None, [total]]
    assert on_ranks(4, _other_experts, hybrid, [None, None])[0] == [[3 * total]] * 2
    assert on_ranks(4, _other_experts, FsdpConfig(replicate=2, reduce_every="step"), [0, 1])[0] == [
        [total],
        [2 * total],
    ]
    for used in ([0, 1], [0, 0]):
        refused = on_ranks(4, _other_experts, hybrid, used, fresh=True)
        assert all(
            "engine.replicate: a parameter of the root module got no gradient in a micro-batch" in r for r in refused
        )


def _fed(rank, world_size, rows, state_dtype):
    """AdEMAMix on DTensors and on whole tensors, both given the same gradients, over uneven and empty shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from shardopt import AdEMAMix

    mesh = init_device_mesh("cpu", (world_size,))
    draw = torch.Generator().manual_seed(rows)
    whole = torch.nn.Parameter(torch.randn(rows, 5, generator=draw))
    shard = torch.nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [Shard(0)]))
    kwargs = {"lr": 1e-2, "weight_decay": 0.1, "alpha_warmup": 5, "beta3_warmup": 5, "state_dtype": state_dtype}
    reference, sharded = AdEMAMix([("w", whole)], **kwargs), AdEMAMix([("w", shard)], **kwargs)
    for _ in range(7):
        whole.grad = torch.randn(rows, 5, generator=draw)
        shard.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
        reference.step()
        sharded.step()
    same = torch.equal(shard.full_tensor(), whole)
    for key in ("m1", "m2", "nu"):
        same &= torch.equal(sharded.state[shard][key].full_tensor(), reference.state[whole][key])
    return same, sharded.state[shard]["m1"].to_local().numel()


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 2, 4, 7])
def test_sharded_state_equals_unsharded_bit_for_bit_given_the_same_gradients(rows, state_dtype):
    results = on_ranks(3, _fed, rows, state_dtype)
    assert all(same for same, _ in results)
    assert sum(held for _, held in results) == rows * 5


def _not_finite(rank, world_size):
    one = engine(FsdpConfig(), Ranks.start("cpu"))
    before = fingerprint(one)
    with one.accumulate(True):
        loss = one.model(input_ids=batch(0)[:, :-1]).logits.sum()
        one.backward(loss * (float("nan") if rank == 1 else 1.0))
    norm = one.clip_grad_norm(1.0)
    one.zero_grad()
    return norm, fingerprint(one) == before


def test_one_ranks_nan_is_every_ranks_nan():
    for norm, unchanged in on_ranks(2, _not_finite):
        assert norm != norm
        assert unchanged


def test_engines_refuse_worlds_they_are_not_for():
    with pytest.raises(InputError, match=r"engine\.name: fsdp needs torchrun: add --nproc-per-node N to"):
        engine(FsdpConfig(), alone())
    with pytest.raises(InputError, match=r"engine\.name: ddp needs torchrun"):
        engine(DdpConfig(), alone())
    with pytest.raises(InputError, match=r"engine\.bucket_mb: -1 must be"):
        DdpConfig(bucket_mb=-1)
    with pytest.raises(InputError, match=r"engine\.reduce_dtype: 'fp8' is not one of fp32, bf16"):
        FsdpConfig(reduce_dtype="fp8")


def _bf16(rank, world_size, config):
    one = engine(config, Ranks.start("cpu"))
    out = train(one, 6, 1, 1.0)
    return [loss for loss, _ in out], {s.tensors[0].dtype for s in one.state.slices() if s.kind == "weight"}


@pytest.mark.parametrize(
    "config", [FsdpConfig(compute_dtype="bf16", reduce_dtype="bf16"), DdpConfig(compute_dtype="bf16")]
)
def test_bf16_compute_follows_fp32_and_keeps_fp32_weights(config):
    control = [loss for loss, _ in train(engine(SingleConfig(), alone()), 6, 1, 1.0)]
    for losses, dtypes in on_ranks(2, _bf16, config):
        assert losses == pytest.approx(control, rel=0.02)
        assert losses != control
        assert dtypes == {torch.float32}
