"""Between micro-batches a save says that gradients are lost, and a load drops them; after a step neither does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from shardopt import AdEMAMix, ZeroOptimizer, checkpoint
from shardopt.distributed import Ranks
from shardopt.engines import DdpConfig, FsdpConfig, ZeroConfig
from shardopt.engines.state import ModuleState, ShardedState
from shardopt.engines.zero import ZeroState
from tests.distributed.pool import on_ranks
from tests.engines.test_native import LENGTH, batch, engine, fingerprint


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def warned(caplog: Any, folder: Any, state: ShardedState) -> bool:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        checkpoint.save(folder, state)
    return any("is saved between micro-batches" in message for message in caplog.messages)


@pytest.mark.parametrize("cls", [AdEMAMix, torch.optim.AdamW])
def test_plain_loop_is_warned_only_of_gradients_that_no_step_has_used(cls, tmp_path, caplog):
    model = net()
    optimizer = cls(model.named_parameters(), lr=1e-2)
    state = ModuleState(optimizer, model)

    def backward() -> None:
        model(torch.ones(2, 3)).square().sum().backward()

    assert not warned(caplog, tmp_path / "a", state)
    backward()
    assert warned(caplog, tmp_path / "a", state)
    optimizer.step()
    assert not warned(caplog, tmp_path / "a", state)  # before zero_grad
    assert not warned(caplog, tmp_path / "a", ModuleState(optimizer, model))
    backward()  # added to the same gradients
    assert warned(caplog, tmp_path / "a", state)
    assert warned(caplog, tmp_path / "a", ModuleState(optimizer, model))
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert not warned(caplog, tmp_path / "a", state)
    backward()
    assert warned(caplog, tmp_path / "a", state)
    optimizer.zero_grad()
    assert not warned(caplog, tmp_path / "a", state)
    assert len(optimizer._optimizer_step_post_hooks) == 1


def test_state_that_is_made_for_the_save_takes_gradients_for_used(tmp_path, caplog):
    model = net()
    optimizer = AdEMAMix(model.named_parameters(), lr=1e-2)
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    assert not warned(caplog, tmp_path / "a", ModuleState(optimizer, model))


@pytest.mark.parametrize("gradients", ["own", "host"])
def test_zero_optimizer_in_a_plain_loop(gradients, tmp_path, caplog):
    model = net()
    optimizer = ZeroOptimizer(model, AdEMAMix, stage=1, lr=1e-2, gradients=gradients)
    state = ZeroState(optimizer)
    for _ in range(2):
        assert not warned(caplog, tmp_path / "a", state)
        model(torch.ones(2, 3)).square().sum().backward()
        assert warned(caplog, tmp_path / "a", state)
        optimizer.clip_grad_norm_(1.0)
        assert warned(caplog, tmp_path / "a", state)
        optimizer.step()
        assert not warned(caplog, tmp_path / "a", state)
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["plain", "zero", "zero of a host"])
def test_a_load_drops_the_gradients_of_the_weights_before_and_says_so(kind, tmp_path, caplog):
    model, control = net(), net()
    state: ShardedState
    if kind == "plain":
        state = ModuleState(AdEMAMix(model.named_parameters(), lr=1e-2), model)
    else:
        gradients: Any = "host" if "host" in kind else "own"
        state = ZeroState(ZeroOptimizer(model, AdEMAMix, stage=1, lr=1e-2, gradients=gradients))
    expected = AdEMAMix(control.named_parameters(), lr=1e-2)
    checkpoint.save(tmp_path / "a", state)
    checkpoint.load(tmp_path / "a", state)
    assert caplog.messages == []
    model(torch.full((2, 3), 7.0)).square().sum().backward()
    checkpoint.load(tmp_path / "a", state)
    (said,) = caplog.messages
    assert said.startswith(f"{tmp_path / 'a'} is loaded between micro-batches")
    assert said.endswith("are dropped")
    for optimizer, net_ in ((state.optimizer, model), (expected, control)):
        net_(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    assert torch.equal(model.weight, control.weight)
    checkpoint.load(tmp_path / "a", state)  # gradients that a step has used
    assert len(caplog.messages) == 1
    assert all(param.grad is None for param in model.parameters())


ENGINES: dict[str, Any] = {
    "ddp": DdpConfig(),
    "zero 1": ZeroConfig(stage=1),
    "zero 2": ZeroConfig(stage=2),
    "fsdp": FsdpConfig(),
    "fsdp in bf16": FsdpConfig(compute_dtype="bf16", reduce_every="step"),
    "fsdp in replicas": FsdpConfig(replicate=2),
}


def _micro_batch(one: Any, last: bool, step: int = 0) -> None:
    tokens = batch(step)[:, :LENGTH]
    with one.accumulate(last=last):
        one.backward(one.model(input_ids=tokens, labels=tokens).loss)


def _held(rank: int, world_size: int) -> dict[str, list[bool]]:
    """Before, between and after the micro-batches of a step, after it, after zero_grad, and after a dropped one."""
    told = {}
    for name, config in ENGINES.items():
        one = engine(config, Ranks.start("cpu"))
        held = [one.state.holds_gradients()]
        for last in (False, True):
            _micro_batch(one, last)
            held.append(one.state.holds_gradients())
        one.step()
        held.append(one.state.holds_gradients())
        one.zero_grad()
        held.append(one.state.holds_gradients())
        for last in (False, True):
            _micro_batch(one, last)
        one.zero_grad()
        told[name] = [*held, one.state.holds_gradients()]
        one.close()
    return told


def test_engines_tell_gradients_between_micro_batches_on_every_rank():
    for told in on_ranks(2, _held):
        assert told == {name: [False, True, True, False, False, False] for name in ENGINES}


def _first_step(one: Any) -> dict[str, str]:
    for last in (False, True):
        _micro_batch(one, last)
    one.step()
    return fingerprint(one)


def _loaded(rank: int, world_size: int, folder: Path) -> list[str]:
    """The engines whose first step gradients that were dropped, by a load or by zero_grad, have changed."""
    differ = []
    for name, config in ENGINES.items():
        one = engine(config, Ranks.start("cpu"))
        checkpoint.save(folder / name, one.state)
        expected = _first_step(one)
        checkpoint.load(folder / name, one.state)
        for dropped in ("load", "zero_grad"):
            _micro_batch(one, last=False, step=1)
            if dropped == "load":
                checkpoint.load(folder / name, one.state)
            else:
                one.zero_grad()
            if one.state.holds_gradients():
                differ.append(f"{name} after {dropped}")
        if _first_step(one) != expected:
            differ.append(name)
        one.close()
    return differ


def test_no_engine_keeps_a_gradient_over_a_load_or_zero_grad(tmp_path):
    assert on_ranks(2, _loaded, tmp_path) == [[], []]
