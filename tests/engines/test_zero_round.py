"""ZeroOptimizer in one process: which calls its round allows, and how it stands with torch's own interfaces."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

from shardopt import AdEMAMix, ZeroOptimizer
from shardopt.engines.gradient_hooks import GradientHook, attach
from shardopt.engines.zero.round import Round, RoundState
from shardopt.errors import InputError


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(5, 5, dtype=dtype) for _ in range(3)])


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    return model(x.to(dtype)).float().square().mean()


def train(model: nn.Module, optimizer: ZeroOptimizer, steps: range) -> None:
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def expected_after(steps: range, **kwargs) -> nn.Module:
    model = mlp()
    train(model, ZeroOptimizer(model, AdEMAMix, lr=0.1, **kwargs), steps)
    return model


def refusal(action) -> str:
    with pytest.raises(InputError) as caught:
        action()
    return str(caught.value)


def test_backward_after_clipping_is_refused_every_time_and_the_step_is_right():
    model = mlp()
    optimizer = ZeroOptimizer(model, AdEMAMix, lr=0.1)
    loss_of(model, 0).backward()
    optimizer.clip_grad_norm_(None)
    for _ in range(2):
        assert "backward is not allowed in state REDUCED: " in refusal(loss_of(model, 7).backward)
        assert "optimizer.step() or optimizer.zero_grad()" in refusal(optimizer.accumulate().__enter__)
    optimizer.step()
    train(model, optimizer, range(1, 3))
    assert same_weights(model, expected_after(range(3)))


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
def test_calls_inside_accumulate_are_refused_and_the_micro_batch_is_right(stage, last):
    model = mlp()
    optimizer = ZeroOptimizer(model, AdEMAMix, stage=stage, lr=0.1)
    with optimizer.accumulate(last):
        optimizer.zero_grad()  # nothing has come yet
        loss_of(model, 0).backward()
        for call in (
            optimizer.step,
            lambda: optimizer.clip_grad_norm_(1.0),
            optimizer.zero_grad,
            model.zero_grad,
            optimizer.accumulate().__enter__,
            optimizer.use_weight_ema().__enter__,
            optimizer.slices,
            optimizer.state_dict,
            lambda: optimizer.load_state_dict({}),
            optimizer.init_state,
            lambda: optimizer.add_hook(GradientHook()),
        ):
            assert "leave the accumulate() block" in refusal(call)
    optimizer.step()
    train(model, optimizer, range(1, 3))
    assert same_weights(model, expected_after(range(3)))


def test_calls_inside_use_weight_ema_are_refused_and_training_goes_on():
    model = mlp()
    optimizer = ZeroOptimizer(model, AdEMAMix, lr=0.1, weight_ema=0.5)
    train(model, optimizer, range(2))
    for _ in range(2):
        with optimizer.use_weight_ema():
            for call in (
                optimizer.step,
                optimizer.zero_grad,
                optimizer.state_dict,
                loss_of(model, 5).backward,
                optimizer.use_weight_ema().__enter__,
            ):
                assert "leave the use_weight_ema() block" in refusal(call)
    train(model, optimizer, range(2, 4))
    assert same_weights(model, expected_after(range(4), weight_ema=0.5))


def test_calls_from_a_gradient_hook_are_refused():
    model = mlp()
    optimizer = ZeroOptimizer(model, AdEMAMix, lr=0.1)
    told = []

    class Steps(GradientHook):
        def after_reduce(self, bucket, reduced):
            told.extend(refusal(call) for call in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)))

    attach(Steps(), optimizer)
    train(model, optimizer, range(2))
    assert len(told) == 4
    assert all("is not allowed in state REDUCING: a gradient hook called it" in message for message in told)
    assert same_weights(model, expected_after(range(2)))


def raising_at(model: nn.Sequential, layer: int) -> torch.Tensor:
    """A loss whose backward raises on reaching the output of `layer`."""

    def forward(x):
        for i, module in enumerate(model):
            x = module(x)
            if i == layer:
                x.register_hook(lambda gradient: (_ for _ in ()).throw(FloatingPointError("broken")))
        return x.square().mean()

    return forward(torch.ones(1, 5))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_exception_in_a_backward_stops_the_optimizer(stage, inside):
    model = mlp()
    optimizer = ZeroOptimizer(model, AdEMAMix, stage=stage, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    if inside:  # and the exception is swallowed there
        block = optimizer.accumulate()
        block.__enter__()
        with pytest.raises(FloatingPointError):
            raising_at(model, 0).backward()
        with pytest.raises(RuntimeError, match="stopped at an earlier failure"):
            block.__exit__(None, None, None)
    else:
        with pytest.raises(FloatingPointError):
            raising_at(model, 0).backward()
    optimizer.zero_grad()
    for call in (
        optimizer.step,
        optimizer.slices,
        optimizer.state_dict,
        lambda: loss_of(model, 0).backward(),
        lambda: optimizer.accumulate().__enter__(),
    ):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"stopped at an earlier failure .*a backward raised"):
                call()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    optimizer.close()


def reentrant(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    x = x.requires_grad_()
    for layer in model:
        x = checkpoint(layer, x, use_reentrant=True)
    return x.square().mean()


@pytest.mark.parametrize("times", [1, 2])
def test_reentrant_checkpointing_without_accumulate_reduces_once_a_backward(times):
    model, other = mlp(), mlp()
    optimizer = ZeroOptimizer(model, AdEMAMix, lr=0.1, bucket_mb=1e-4)
    plain = ZeroOptimizer(other, AdEMAMix, lr=0.1, bucket_mb=1e-4)
    for step in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        for _ in range(times):
            reentrant(model, x.clone()).backward()
            assert optimizer.reducer.idle
            other(x).square().mean().backward()
        assert optimizer.reducer.rounds == times
        optimizer.step()
        plain.step()
    assert same_weights(model, other)


def test_block_checkpointed_twice_without_accumulate_gets_the_sum_of_both_gradients():
    """Each use is a backward of its own within the whole one, and the first has sent its bucket."""
    model, other = mlp(), mlp()
    optimizer = ZeroOptimizer(model, AdEMAMix, lr=0.1, bucket_mb=1e-4)
    plain = ZeroOptimizer(other, AdEMAMix, lr=0.1, bucket_mb=1e-4)
    for step in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        reentrant(nn.Sequential(*model, *model), x.clone()).backward()
        other(other(x)).square().mean().backward()
        assert optimizer.clip_grad_norm_(None) == pytest.approx(plain.clip_grad_norm_(None), rel=1e-6)
        optimizer.step()
        plain.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_exception_after_a_reentrant_checkpoint_stops_the_optimizer():
    model = mlp()
    optimizer = ZeroOptimizer(model, AdEMAMix, lr=0.1)
    x = torch.ones(1, 5, requires_grad=True)
    x.register_hook(lambda gradient: (_ for _ in ()).throw(FloatingPointError("broken")))
    with pytest.raises(FloatingPointError):
        checkpoint(model, x, use_reentrant=True).sum().backward()
    with pytest.raises(RuntimeError, match=r"stopped at an earlier failure .*a backward raised"):
        optimizer.step()


@pytest.mark.parametrize("order", [(True, False), (False, False), (True, True)])
def test_stage_1_reduces_what_followed_the_last_micro_batch(order):
    model, other = mlp(), mlp()
    optimizer = ZeroOptimizer(model, AdEMAMix, stage=1, lr=0.1)
    plain = ZeroOptimizer(other, AdEMAMix, stage=1, lr=0.1)
    for step in range(3):
        for micro, last in enumerate(order):
            with optimizer.accumulate(last=last):
                loss_of(model, step * 2 + micro).backward()
            loss_of(other, step * 2 + micro).backward()
        optimizer.step()
        plain.step()
        assert all(p.grad is None for p in model.parameters())
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_two_optimizers_over_one_parameter_are_refused_until_the_first_is_closed():
    model = mlp()
    first = ZeroOptimizer(model, AdEMAMix, lr=0.1)
    for _ in range(2):
        assert "0.weight belongs to another ZeroOptimizer: call close()" in refusal(
            lambda: ZeroOptimizer(model, AdEMAMix, lr=0.1)
        )
    train(model, first, range(1))
    first.close()
    second = ZeroOptimizer(model, torch.optim.SGD, lr=0.1)
    first.close()
    assert "belongs to another" in refusal(lambda: ZeroOptimizer(model, AdEMAMix))
    expected = expected_after(range(1))
    plain = torch.optim.SGD(expected.parameters(), lr=0.1)
    loss_of(expected, 1).backward()
    plain.step()
    train(model, second, range(1, 2))
    assert same_weights(model, expected)


def test_models_zero_grad_reaches_both_of_its_optimizers():
    model = mlp()
    parts = [
        ZeroOptimizer(list(layer.named_parameters()), torch.optim.SGD, model=model, lr=0.1)
        for layer in (model[0], model[1])
    ]
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, 0).backward()
    model.zero_grad()
    for optimizer in parts:
        assert optimizer.clip_grad_norm_(None) == 0.0
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    parts[0].close()
    assert "zero_grad" in vars(model)
    parts[1].close()
    assert "zero_grad" not in vars(model)


def _by_model(model, saved):
    model.load_state_dict(saved)


def _by_submodule(model, saved):
    for i, layer in enumerate(model):
        layer.load_state_dict({k.removeprefix(f"{i}."): v for k, v in saved.items() if k.startswith(f"{i}.")})


def _by_data(model, saved):
    for name, param in model.named_parameters():
        param.data.copy_(saved[name])


@pytest.mark.parametrize("load", [_by_model, _by_submodule, _by_data])
@pytest.mark.parametrize(("cls", "kwargs"), [(torch.optim.AdamW, {}), (AdEMAMix, {"master_weights": "fp32"})])
def test_masters_follow_weights_that_were_loaded(load, cls, kwargs):
    model = mlp(torch.bfloat16)
    optimizer = ZeroOptimizer(model, cls, lr=1e-2, **kwargs)
    train(model, optimizer, range(2))
    saved = {name: torch.randn(value.shape).to(value.dtype) for name, value in model.state_dict().items()}
    load(model, saved)
    held = {s.name: s for s in optimizer.slices() if s.kind == "master"}
    assert len(held) == len(saved)
    for name, value in saved.items():
        assert torch.equal(held[name].tensors[0].view(-1), value.float().view(-1))
    load(model, {name: value + 1 for name, value in saved.items()})
    for group in optimizer.param_groups:
        group["lr"] = 1e-6
        group["weight_decay"] = 0.0
    train(model, optimizer, range(2, 3))
    assert all(torch.equal(p, saved[name] + 1) for name, p in model.named_parameters())


def test_masters_keep_what_is_below_a_bf16_ulp_where_weights_were_left_alone():
    model, other = mlp(torch.bfloat16), mlp(torch.bfloat16)
    optimizer, plain = (ZeroOptimizer(m, torch.optim.SGD, lr=1e-3) for m in (model, other))
    for step in range(6):
        train(other, plain, range(step, step + 1))
        train(model, optimizer, range(step, step + 1))
        model[2].load_state_dict(model[2].state_dict())
    for a, b in zip(optimizer.flat.masters.values(), plain.flat.masters.values(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, a.bfloat16().float())


def test_state_dict_and_load_hooks_are_called_once_and_may_change_it():
    model = mlp()
    optimizer = ZeroOptimizer(model, torch.optim.AdamW, lr=0.1)
    train(model, optimizer, range(1))
    called = []
    optimizer.register_state_dict_pre_hook(lambda o: called.append("before save"))
    optimizer.register_state_dict_post_hook(lambda o, saved: called.append("after save") or {**saved, "mine": 3})
    optimizer.register_load_state_dict_pre_hook(
        lambda o, saved: called.append("before load") or {k: v for k, v in saved.items() if k != "mine"}
    )
    optimizer.register_load_state_dict_post_hook(lambda o: called.append("after load"))
    saved = optimizer.state_dict()
    assert saved["mine"] == 3
    optimizer.load_state_dict(saved)
    assert called == ["before save", "after save", "before load", "after load"]


def test_step_hooks_are_called_once():
    model = mlp()
    optimizer = ZeroOptimizer(model, AdEMAMix, lr=0.1)
    loss_of(model, 0).backward()
    called = []
    handles = [
        optimizer.register_step_pre_hook(lambda o, *_: called.append(("own before", o))),
        optimizer.register_step_post_hook(lambda o, *_: called.append(("own after", o))),
        register_optimizer_step_pre_hook(lambda o, *_: called.append(("global before", o))),
        register_optimizer_step_post_hook(lambda o, *_: called.append(("global after", o))),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(name for name, _ in called) == ["global after", "global before", "own after", "own before"]
    assert all(o is optimizer for _, o in called)


def test_grad_scaler_is_refused_by_name_before_anything_moves():
    model = mlp()
    optimizer = ZeroOptimizer(model, torch.optim.SGD, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(model, 0)).backward()
    for _ in range(2):
        assert "GradScaler" in refusal(lambda: scaler.step(optimizer))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    idle = torch.amp.GradScaler("cpu", enabled=False)
    idle.scale(loss_of(model, 0)).backward()
    idle.step(optimizer)
    assert not torch.equal(before[0], model[0].weight)


@pytest.mark.parametrize("mistake", ["unfrozen", "added", "replaced"])
def test_step_refuses_parameter_that_trains_since_construction(mistake):
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = ZeroOptimizer(model, AdEMAMix, lr=0.1)
    train(model, optimizer, range(1))
    before = [p.detach().clone() for p in model.parameters()]
    if mistake == "unfrozen":
        name, layer = "0.weight", model[0].requires_grad_(True)
    elif mistake == "added":
        name, layer = "3.weight", model.append(nn.Linear(5, 5))[3]
    else:
        layer = nn.Linear(5, 5)
        model[1], name = layer, "1.weight"
    loss_of(model, 1).backward()
    assert f"{name} was frozen or not there when ZeroOptimizer was built" in refusal(optimizer.step)
    if mistake == "unfrozen":
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    optimizer.close()
    model.zero_grad()
    start = layer.weight.detach().clone()
    train(model, ZeroOptimizer(model, AdEMAMix, lr=0.1), range(1, 2))
    assert not torch.equal(layer.weight, start)


def test_parts_of_a_model_may_train_elsewhere():
    model = mlp()
    model[1].requires_grad_(False)
    optimizer = ZeroOptimizer(list(model[0].named_parameters()), AdEMAMix, model=model, lr=0.1)
    plain = torch.optim.SGD(model[2].parameters(), lr=0.1)
    train(model, optimizer, range(1))
    model[1].requires_grad_(True)
    later = ZeroOptimizer(list(model[1].named_parameters()), AdEMAMix, model=model, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, 1).backward()
    for each in (optimizer, later, plain):
        each.step()
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_step_refuses_gradients_of_a_host_that_were_clipped_after_they_were_measured():
    model = mlp()
    optimizer = ZeroOptimizer(model, torch.optim.SGD, stage=1, gradients="host", lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, 0).backward()
    for _ in range(2):
        assert optimizer.clip_grad_norm_(None) == pytest.approx(float(nn.utils.get_total_norm(grads_of(model))))
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    for call in (optimizer.step, lambda: optimizer.clip_grad_norm_(None)):
        assert "gradients have changed since clip_grad_norm_() took them" in refusal(call)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert optimizer.clip_grad_norm_(None) == pytest.approx(1e-3, rel=1e-3)
    optimizer.step()


def test_parameter_without_a_gradient_from_the_host_has_none_of_the_step_before():
    model = mlp()
    optimizer = ZeroOptimizer(model, torch.optim.SGD, stage=1, gradients="host", lr=1.0)
    train(model, optimizer, range(1))
    optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model[1], 1).backward()
    assert optimizer.clip_grad_norm_(None) == pytest.approx(float(nn.utils.get_total_norm(grads_of(model))))
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert moved == [False, False, True, True, False, False]


def grads_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("given", ["AdEMAMix", torch.optim.SGD(mlp().parameters()), len])
def test_what_is_no_optimizer_class_is_refused(given):
    assert "optimizer_class must be a class" in refusal(lambda: ZeroOptimizer(mlp(), given))
    assert "optimizer_class must be a class" in refusal(lambda: ZeroOptimizer(AdEMAMix, mlp()))


@pytest.mark.parametrize("given", [True, [True], ["blocks"]])
def test_overlap_gather_that_is_no_modules_is_refused(given):
    assert "overlap_gather" in refusal(lambda: ZeroOptimizer(mlp(), AdEMAMix, overlap_gather=given))


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_of_the_optimizer_are_refused(copier):
    optimizer = ZeroOptimizer(mlp(), AdEMAMix)
    assert "cannot be copied or pickled" in refusal(lambda: copier(optimizer))


def test_replacing_groups_or_state_is_refused():
    optimizer = ZeroOptimizer(mlp(), AdEMAMix, lr=0.5)
    assert "param_groups cannot be replaced" in refusal(lambda: setattr(optimizer, "param_groups", []))
    assert "state cannot be replaced" in refusal(lambda: setattr(optimizer, "state", {}))
    assert "another parameter group" in refusal(lambda: optimizer.add_param_group({"params": [optimizer.buckets]}))
    assert optimizer.param_groups[0]["lr"] == 0.5


class NormalisedSGD(torch.optim.SGD):
    """Not elementwise; its default lr moves nothing that bf16 could show."""

    def __init__(self, params, lr=1e-4):
        super().__init__(params, lr=lr)

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = param.grad / param.grad.norm()
        return super().step(closure)


def test_elementwise_trial_does_not_depend_on_the_default_dtype():
    model = mlp()
    torch.set_default_dtype(torch.bfloat16)
    try:
        for cls in (torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop):
            ZeroOptimizer(model, cls, lr=1e-3).close()
        assert "cannot be sharded: its update" in refusal(lambda: ZeroOptimizer(model, NormalisedSGD))
    finally:
        torch.set_default_dtype(torch.float32)


def test_backward_of_a_forward_before_the_step_raises_as_torchs_optimizers_do():
    model = mlp()
    optimizer = ZeroOptimizer(model, torch.optim.SGD, lr=0.1)
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_round_returns_to_idle_after_the_step():
    model = mlp()
    optimizer = ZeroOptimizer(model, AdEMAMix, lr=0.1)
    states = [optimizer.round.state]
    with optimizer.accumulate():
        states.append(optimizer.round.state)
        loss_of(model, 0).backward()
    states.append(optimizer.round.state)
    optimizer.clip_grad_norm_(1.0)
    states.append(optimizer.round.state)
    optimizer.step()
    states.append(optimizer.round.state)
    names = [RoundState.IDLE, RoundState.ACCUMULATING, RoundState.ACCUMULATED, RoundState.REDUCED, RoundState.IDLE]
    assert states == names


def test_exception_in_accumulate_stops_the_optimizer():
    model = mlp()
    optimizer = ZeroOptimizer(model, AdEMAMix, lr=0.1)
    with pytest.raises(KeyError), optimizer.accumulate():
        raise KeyError("in the forward")
    with pytest.raises(RuntimeError, match="stopped at an earlier failure"):
        optimizer.step()


def test_round_names_its_first_failure_and_forgets_dropped_gradients():
    current = Round(state=RoundState.ACCUMULATED, unsent=True)
    current.drop()
    assert (current.state, current.unsent) == (RoundState.IDLE, False)
    first = KeyError("first")
    current.fail(first)
    current.fail(KeyError("second"))
    assert current.failure == "KeyError: 'first'"
    references = sys.getrefcount(first)
    del current
    assert sys.getrefcount(first) == references  # nor its frames, with the tensors in them


def test_masters_are_rounded_to_the_weights_and_loaded_with_the_state():
    model = mlp(torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = ZeroOptimizer(model, torch.optim.SGD, lr=0.5)
    train(model, optimizer, range(3))
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    for bucket, master in optimizer.flat.masters.items():
        assert torch.equal(master.bfloat16(), optimizer.flat.own(bucket))
    train(model, optimizer, range(3, 5))
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    for bucket, master in optimizer.flat.masters.items():
        assert torch.equal(master, state["masters"][bucket])


def test_masters_of_elements_left_alone_keep_what_is_below_a_bf16_ulp():
    model = mlp(torch.bfloat16)
    optimizer = ZeroOptimizer(model, torch.optim.SGD, lr=1e-3)
    train(model, optimizer, range(3))
    before = {s.name: s.tensors[0].clone() for s in optimizer.slices() if s.kind == "master"}
    with torch.no_grad():
        model[0].weight[0, 0] = 7.0
    after = {s.name: s.tensors[0] for s in optimizer.slices() if s.kind == "master"}
    assert after["0.weight"][0] == 7.0
    assert torch.equal(after["0.weight"][1:], before["0.weight"][1:])
