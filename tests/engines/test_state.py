"""ShardedState: what a load restores, what it refuses, and the sums over the whole model."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from shardopt import AdEMAMix, ZeroOptimizer, checkpoint
from shardopt.checkpoint import loading
from shardopt.checkpoint.document import write_document
from shardopt.distributed import Ranks
from shardopt.engines import FsdpConfig
from shardopt.engines.state import ModuleState
from shardopt.engines.zero import ZeroState
from shardopt.errors import InputError
from shardopt.optim.precision import join_fp32
from tests.distributed.pool import on_ranks
from tests.engines.test_native import batch, engine, train


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)


def step(model, optimizer, number):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(4, 6, generator=generator).to(next(model.parameters()).dtype)
    (model(x) ** 2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(steps, optimizer_class=AdEMAMix, dtype=torch.float32, **kwargs):
    model = net(dtype)
    optimizer = optimizer_class(model.named_parameters(), lr=1e-2, **kwargs)
    for number in range(steps):
        step(model, optimizer, number)
    return model, ModuleState(optimizer, model)


@pytest.mark.parametrize(
    ("optimizer_class", "kwargs"), [(AdEMAMix, {}), (AdEMAMix, {"state_dtype": "block8"}), (torch.optim.AdamW, {})]
)
def test_load_alone_restores_weights_state_and_step_counts(tmp_path, optimizer_class, kwargs):
    model, state = trained(5, optimizer_class, **kwargs)
    checkpoint.save(tmp_path / "a", state)
    other, loaded = trained(0, optimizer_class, **kwargs)
    checkpoint.load(tmp_path / "a", loaded)
    assert loaded.step_counts()["0.weight"] == {"step": 5}
    for number in range(5, 8):
        step(model, state.optimizer, number)
        step(other, loaded.optimizer, number)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_save_before_the_first_step_has_the_state(tmp_path):
    checkpoint.save(tmp_path / "a", trained(0)[1])
    _, state = trained(3)
    checkpoint.load(tmp_path / "a", state)
    assert state.step_counts()["2.bias"] == {"step": 0}


def test_load_that_fails_midway_refuses_steps_and_saves_until_one_succeeds(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "a", trained(5)[1])
    model, state = trained(2)

    def read_half(folder, metadata, stored, slices):
        slices[0].tensors[0].zero_()
        raise InputError("cannot read checkpoint: the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(loading, "read_slices", read_half)
        with pytest.raises(InputError, match="the disk is gone"):
            checkpoint.load(tmp_path / "a", state)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):  # every time, not once
        with pytest.raises(InputError, match=r"loading .*/a failed midway.*load a complete checkpoint"):
            step(model, state.optimizer, 9)
    with pytest.raises(InputError, match=r"nothing to save: loading .*/a failed midway"):
        checkpoint.save(tmp_path / "b", state)
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))
    checkpoint.load(tmp_path / "a", ModuleState(state.optimizer, model))  # another adapter of the same optimizer
    model.zero_grad()
    step(model, state.optimizer, 9)
    assert state.step_counts()["0.weight"] == {"step": 6}


def test_load_refuses_step_counts_that_are_missing_or_no_numbers(tmp_path):
    _, state = trained(2)
    checkpoint.save(tmp_path / "a", state)
    document = checkpoint.read_document(tmp_path / "a")
    kept = [s.tensors[0].clone() for s in state.slices()]
    for counts, message in (
        ({}, r"has no step counts of 0\.bias, 0\.weight, 2\.bias, 2\.weight"),
        ({"0.weight": {"step": "three"}}, "has a document that is not of this format"),
    ):
        document["checkpoint"]["step_counts"] = counts
        write_document(tmp_path / "a", document)
        with pytest.raises(InputError, match=message):
            checkpoint.load(tmp_path / "a", state)
    assert all(torch.equal(s.tensors[0], k) for s, k in zip(state.slices(), kept, strict=True))
    step(state.model, state.optimizer, 3)  # nothing had been overwritten, so nothing is refused


def test_partial_load_of_a_parameter_is_refused_by_name(tmp_path):
    """Weights without their masters, or averages without their counts, would go on wrong."""
    bf16 = {"dtype": torch.bfloat16}
    checkpoint.save(tmp_path / "a", trained(3, **bf16)[1])
    for masters, key in (("fp32", "master"), ("split", "master_low")):
        _, state = trained(1, master_weights=masters, **bf16)
        with pytest.raises(InputError, match=rf"has no 0\.bias/{key}, 0\.weight/{key}.*set optimizer as it was"):
            checkpoint.load(tmp_path / "a", state, strict=False)
    _, adamw = trained(1, torch.optim.AdamW, **bf16)
    with pytest.raises(InputError, match=r"has no 0\.bias/exp_avg"):
        checkpoint.load(tmp_path / "a", adamw, strict=False)
    _, fewer = trained(1, betas=(0.0, 0.999, 0.9999), **bf16)  # what is too much may be left
    checkpoint.load(tmp_path / "a", fewer, strict=False)
    assert fewer.step_counts()["0.weight"] == {"step": 3}


def in_fp32(state):
    """The values that split masters stand for, by name."""
    halves = {(s.name, s.kind): s.tensors[0] for s in state.slices()}
    return {
        name: join_fp32(halves[name, "weight"], low) for (name, kind), low in halves.items() if kind == "master_low"
    }


def test_split_masters_are_made_of_fp32_weights_or_masters_bit_for_bit(tmp_path):
    model, state = trained(3)
    with torch.no_grad():  # ties of bf16, and their neighbours
        ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F81FFFF, 0x3F807FFF]).int().view(torch.float32)
        model[0].weight.view(-1)[:4] = ties
    checkpoint.save(tmp_path / "fp32", state)
    split = {"master_weights": "split", "dtype": torch.bfloat16}
    _, loaded = trained(1, **split)
    with pytest.raises(InputError, match=r"or load with kinds=\{'master_low': 'weight'\}, convert=True"):
        checkpoint.load(tmp_path / "fp32", loaded)
    checkpoint.load(tmp_path / "fp32", loaded, kinds={"master_low": "weight"}, convert=True)
    assert all(torch.equal(values, model.get_parameter(name)) for name, values in in_fp32(loaded).items())
    assert len(in_fp32(loaded)) == 4

    model, state = trained(3, master_weights="fp32", dtype=torch.bfloat16)
    checkpoint.save(tmp_path / "masters", state)
    other, loaded = trained(1, **split)
    with pytest.raises(InputError, match=r"or load with kinds=\{'master_low': 'master'\}, convert=True"):
        checkpoint.load(tmp_path / "masters", loaded)
    checkpoint.load(tmp_path / "masters", loaded, kinds={"master_low": "master"}, convert=True)
    for number in (3, 4):
        for each, optimizer in ((model, state.optimizer), (other, loaded.optimizer)):
            step(each, optimizer, number)
    masters = {s.name: s.tensors[0] for s in state.slices() if s.kind == "master"}
    assert all(torch.equal(values, masters[name]) for name, values in in_fp32(loaded).items())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with torch.no_grad():  # weights that torch has rounded, to even
        masters["0.weight"].view(-1)[:4] = ties
        model[0].weight.view(-1)[:4] = ties.bfloat16()
    checkpoint.save(tmp_path / "masters", state)
    checkpoint.load(tmp_path / "masters", loaded, kinds={"master_low": "master"}, convert=True)
    assert all(torch.equal(values, masters[name]) for name, values in in_fp32(loaded).items())


def _zero_split(rank, world_size, folder):
    """The weights of a checkpoint as ZeRO's ranks together hold their halves."""
    optimizer = ZeroOptimizer(net(torch.bfloat16), AdEMAMix, lr=1e-2, master_weights="split")
    state = ZeroState(optimizer)
    checkpoint.load(folder, state, kinds={"master_low": "weight"}, convert=True)
    halves = {}
    for s in state.slices():
        if s.kind in ("weight", "master_low"):
            held = torch.zeros(s.layout.shape, dtype=torch.int16)
            s.layout.copy_to_whole(s.tensors[0].view(torch.int16), held)
            halves[s.name, s.kind] = held
    return halves


def test_split_masters_under_zero_are_the_halves_of_the_weights_that_are_loaded(tmp_path):
    model, state = trained(3)
    checkpoint.save(tmp_path / "fp32", state)
    first, second = on_ranks(2, _zero_split, tmp_path / "fp32")
    for name, param in model.named_parameters():
        assert torch.equal(first[name, "weight"], second[name, "weight"])
        low = first[name, "master_low"] + second[name, "master_low"]
        assert torch.equal(join_fp32(first[name, "weight"].view(torch.bfloat16), low), param)


def _joined_masters(rank, world_size, folder):
    """The fp32 masters that ZeRO's ranks together make of a checkpoint's split ones."""
    optimizer = ZeroOptimizer(net(torch.bfloat16), AdEMAMix, lr=1e-2, master_weights="fp32")
    state = ZeroState(optimizer)
    with pytest.raises(InputError, match=r"or load with kinds=\{'master': 'master_low'\}, convert=True"):
        checkpoint.load(folder, state)
    checkpoint.load(folder, state, kinds={"master": "master_low"}, convert=True)
    held = {}
    for s in state.slices():
        if s.kind == "master":
            held[s.name] = torch.zeros(s.layout.shape)
            s.layout.copy_to_whole(s.tensors[0], held[s.name])
    return held


def test_fp32_weights_and_masters_are_made_of_split_ones_bit_for_bit(tmp_path):
    _, state = trained(3, master_weights="split", dtype=torch.bfloat16)
    checkpoint.save(tmp_path / "split", state)
    exact = in_fp32(state)
    first, second = on_ranks(2, _joined_masters, tmp_path / "split")
    assert all(torch.equal(first[name] + second[name], values) for name, values in exact.items())

    model, loaded = trained(1)
    checkpoint.load(tmp_path / "split", loaded, kinds={"weight": "master_low"}, convert=True)
    assert all(torch.equal(param, exact[name]) for name, param in model.named_parameters())


def test_weights_without_masters_are_read_as_they_are_beside_those_made_of_masters(tmp_path):
    def frozen(dtype, **kwargs):
        model = net(dtype)
        model[0].weight.requires_grad_(False)
        state = ModuleState(AdEMAMix((p for p in model.named_parameters() if p[1].requires_grad), **kwargs), model)
        step(model, state.optimizer, 1)
        return model, state

    before, state = frozen(torch.bfloat16, master_weights="split")
    checkpoint.save(tmp_path / "split", state)
    model, loaded = frozen(torch.float32)
    with torch.no_grad():
        model[0].weight.zero_()
    checkpoint.load(tmp_path / "split", loaded, kinds={"weight": "master_low"}, convert=True)
    assert torch.equal(model[0].weight, before[0].weight.float())
    assert torch.equal(model[2].weight, in_fp32(state)["2.weight"])


def test_parameter_that_is_not_in_the_checkpoint_keeps_its_count(tmp_path):
    checkpoint.save(tmp_path / "a", trained(3)[1])
    model = net()
    model.append(nn.Linear(3, 3))
    optimizer = AdEMAMix(model.named_parameters(), lr=1e-2)
    step(model, optimizer, 0)
    state = ModuleState(optimizer, model)
    document = checkpoint.load(tmp_path / "a", state, strict=False)
    assert document["checkpoint"]["not_loaded"][0] == "3.bias/m1"
    assert (state.step_counts()["3.bias"], state.step_counts()["2.bias"]) == ({"step": 1}, {"step": 3})


def normed(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    model.register_buffer("scratch", torch.tensor([float(seed)]), persistent=False)
    return model


def test_persistent_buffers_are_saved_loaded_and_exported(tmp_path):
    model = normed()
    state = ModuleState(AdEMAMix(model.named_parameters()), model)
    model(torch.randn(9, 6) * 3 + 5)
    checkpoint.save(tmp_path / "a", state)
    other = normed(1)
    checkpoint.load(tmp_path / "a", ModuleState(AdEMAMix(other.named_parameters()), other))
    assert {n: v.tolist() for n, v in other.state_dict().items()} == {
        n: v.tolist() for n, v in model.state_dict().items()
    }
    assert other.scratch == 1.0  # not persistent
    checkpoint.export_safetensors(str(tmp_path / "b"), state.full_parameters(), state.ranks)
    exported = load_file(tmp_path / "b" / "model.safetensors")
    assert exported.keys() == model.state_dict().keys()
    assert all(torch.equal(exported[n], v) for n, v in model.state_dict().items())
    other[1].register_buffer("unknown", torch.ones(2))
    with pytest.raises(InputError, match=r"has no 1\.unknown; it was written by another model"):
        checkpoint.load(tmp_path / "a", ModuleState(AdEMAMix(other.named_parameters()), other))
    checkpoint.load(tmp_path / "a", ModuleState(AdEMAMix(other.named_parameters()), other), strict=False)


def _replicas(rank, world_size, folder):
    def made(seed=0):
        model = normed(seed)
        return model, ModuleState(AdEMAMix(model.named_parameters()), model)

    model, state = made()
    model(torch.randn(9, 6) + 5 * rank)
    checkpoint.save(folder / "a", state)
    loaded = {}
    for optimizer_class in (None, ZeroOptimizer):
        other, into = made(seed=1)
        if optimizer_class is not None:
            into = ZeroState(ZeroOptimizer(other, torch.optim.SGD, lr=1.0))
        checkpoint.load(folder / "a", into, strict=False)
        loaded[optimizer_class] = other[1].running_mean.tolist()
    with pytest.raises(InputError, match=r"0\.bias\[0\]: ranks disagree.*is DistributedDataParallel missing"):
        checkpoint.save(folder / "b", made(seed=rank)[1])
    return model[1].running_mean.tolist(), *loaded.values()


def test_of_replicas_rank_0_keeps_its_buffers_and_different_weights_are_refused(tmp_path):
    (first, *loaded), (second, *elsewhere) = on_ranks(2, _replicas, tmp_path)
    assert first != second
    assert loaded == elsewhere == [first, first]


def test_load_of_no_matching_name_is_refused(tmp_path):
    _, state = trained(1)
    checkpoint.save(tmp_path / "a", state)
    inside = nn.Sequential(net())
    with pytest.raises(InputError, match=r"none of the names here \(0\.0\.bias, .*\) is among its names \(0\.bias,"):
        checkpoint.load(tmp_path / "a", ModuleState(AdEMAMix(inside.named_parameters()), inside), strict=False)
    model = net()
    with pytest.raises(InputError, match=r"no 0, 1, 2, 3; .*build the optimizer over model\.named_parameters\(\)"):
        checkpoint.load(tmp_path / "a", ModuleState(AdEMAMix(model.parameters()), model))


def test_another_kind_of_state_is_refused_by_name(tmp_path):
    model, state = trained(1)
    zero = ZeroOptimizer(net(), AdEMAMix)
    for call, message in (
        (lambda: ModuleState(zero, model), r"is ZeroState\(optimizer\)"),
        (lambda: ZeroState(state.optimizer), r"of AdEMAMix is ModuleState\(optimizer, model\)"),
        (lambda: ModuleState(model, state.optimizer), "in this order: got Sequential and AdEMAMix"),
        (lambda: ModuleState(state.optimizer, net()), "no parameter of this model.*after fully_shard"),
        (lambda: checkpoint.save(tmp_path / "a", state.optimizer), r"state is AdEMAMix: give a ShardedState"),
        (lambda: checkpoint.load(tmp_path / "a", model), r"state is Sequential: give a ShardedState"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def _zero_masters(rank, world_size, folder):
    """bf16 weights with fp32 masters of ZeRO's own: loaded with the weights, or not at all."""

    def made(dtype):
        model = net(dtype)
        optimizer = ZeroOptimizer(model, torch.optim.AdamW, lr=1e-2)
        return model, optimizer, ZeroState(optimizer)

    def advance(model, optimizer, number):
        with optimizer.accumulate():
            (model(torch.ones(2, 6, dtype=model[0].weight.dtype) * number) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer, state = made(torch.bfloat16)
    for number in range(1, 5):
        advance(model, optimizer, number)
    checkpoint.save(folder / "bf16", state)
    other, second, loaded = made(torch.bfloat16)
    advance(other, second, 9)
    checkpoint.load(folder / "bf16", loaded)
    advance(model, optimizer, 5)
    advance(other, second, 5)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    _, _, plain = made(torch.float32)
    checkpoint.save(folder / "fp32", plain)
    try:
        checkpoint.load(folder / "fp32", loaded, strict=False, convert=True)
    except InputError as error:
        return same, str(error)
    raise AssertionError("not refused")


def test_zero_masters_are_loaded_with_the_weights_or_refused_by_name(tmp_path):
    for same, told in on_ranks(2, _zero_masters, tmp_path):
        assert same
        assert "the checkpoint has no 0.bias/master" in told


def test_norm_of_a_gradient_whose_squares_overflow_fp32():
    model, state = trained(0)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e25)
    elements = sum(p.numel() for p in model.parameters())
    assert state.clip_grad_norm(1.0) == pytest.approx(1e25 * math.sqrt(elements))
    whole = torch.cat([p.grad.view(-1).double() for p in model.parameters()])
    assert whole.norm().item() == pytest.approx(1.0, rel=1e-5)
    model[0].weight.grad[0, 0] = math.nan
    assert math.isnan(state.clip_grad_norm(1.0))


def test_gradient_with_an_infinity_has_an_infinite_norm_and_is_left_alone():
    model, state = trained(0)
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    elements = sum(p.numel() for p in model.parameters())
    assert state.clip_grad_norm(None) == pytest.approx(2.0 * math.sqrt(elements))
    model[0].weight.grad[0, 0] = math.inf
    assert state.clip_grad_norm(1.0) == math.inf
    assert (model[2].weight.grad == 2.0).all()


def _ema_and_error(rank, world_size):
    one = engine(FsdpConfig(reshard_after_forward=False), Ranks.start("cpu"), weight_ema=0.5)
    train(one, 3, 1)

    def loss():
        with torch.no_grad():
            return one.model(input_ids=batch(7)[:, :-1]).logits.double().sum().item()

    before = loss()
    averaged = None
    try:
        with one.state.use_weight_ema():
            averaged = loss()
            raise KeyError("in the evaluation")
    except KeyError:
        pass
    return before, averaged, loss()


def test_weights_are_back_when_an_evaluation_of_the_averages_fails():
    for before, averaged, after in on_ranks(2, _ema_and_error):
        assert averaged != before
        assert after == before


def _hsdp_sums(rank, world_size):
    one = engine(FsdpConfig(replicate=2), Ranks.start("cpu"))
    train(one, 3, 1)
    held = [(s.name, s.kind, s.layout, s.tensors[0].reshape(-1).double()) for s in one.state.slices()]
    whole = {}
    for pieces in one.ranks.gather(held):
        for name, kind, layout, values in pieces:
            target = whole.setdefault((name, kind), torch.zeros(layout.numel, dtype=torch.float64))
            layout.copy_to_whole(values, target)
    squares = [(kind, values.square().sum().item()) for (_, kind), values in whole.items()]
    norms = {key: math.sqrt(sum(square for kind, square in squares if kind == key)) for key in ("m1", "m2")}
    statistics = one.state.statistics()
    with one.accumulate(last=True):
        one.backward(one.model(input_ids=batch(7)[:, :-1]).logits.square().mean())
    gradient = [p.grad.full_tensor().double().square().sum().item() for p in one.model.parameters()]
    return statistics, norms, one.state.replicas, one.state.clip_grad_norm(None), math.sqrt(sum(gradient))


def test_norms_count_replicas_once():
    for statistics, norms, replicas, gradient_norm, expected in on_ranks(4, _hsdp_sums):
        assert replicas == 2
        assert gradient_norm == pytest.approx(expected)
        assert statistics["m1_norm"] == pytest.approx(norms["m1"])
        assert statistics["m2_norm"] == pytest.approx(norms["m2"])
        assert statistics["alpha"] == pytest.approx(5.0 * 3 / 10)


def strided():
    """A model whose weights and buffer are not contiguous: channels_last, and transposed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 3)).to(memory_format=torch.channels_last)
    model[2].weight = nn.Parameter(torch.randn(4, 3).t())
    model.register_buffer("table", torch.arange(6.0).view(2, 3).t())
    return model


@pytest.mark.parametrize("optimizer_class", [AdEMAMix, torch.optim.AdamW])
def test_tensors_that_are_not_contiguous_are_saved_and_loaded(tmp_path, optimizer_class):
    def step(model, optimizer, number):
        model(torch.full((2, 2, 3, 3), 0.1 * number)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    models = strided(), strided()
    optimizers = [optimizer_class(model.named_parameters(), lr=1e-2) for model in models]
    for number in range(3):
        step(models[0], optimizers[0], number)
    models[1].table.zero_()
    checkpoint.save(tmp_path / "a", ModuleState(optimizers[0], models[0]))
    checkpoint.load(tmp_path / "a", ModuleState(optimizers[1], models[1]))
    assert torch.equal(models[1].table, models[0].table)
    for number in range(3, 6):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, number)
    assert not models[1][0].weight.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
