"""A save between micro-batches says that gradients are lost; one at a step's end says nothing."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from shardopt import AdEMAMix, ZeroOptimizer, checkpoint
from shardopt.distributed import Ranks
from shardopt.engines import DdpConfig, FsdpConfig, ZeroConfig
from shardopt.engines.state import ModuleState, ShardedState
from shardopt.engines.zero import ZeroState
from tests.distributed.pool import on_ranks
from tests.engines.test_native import LENGTH, batch, engine


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


ENGINES: dict[str, Any] = {
    "ddp": DdpConfig(),
    "zero 1": ZeroConfig(stage=1),
    "zero 2": ZeroConfig(stage=2),
    "fsdp": FsdpConfig(),
    "fsdp in bf16": FsdpConfig(compute_dtype="bf16", reduce_every="step"),
}


def _held(rank: int, world_size: int) -> dict[str, list[bool]]:
    """Before, between and after the micro-batches of a step, after it, after zero_grad, and after a dropped one."""
    told = {}
    for name, config in ENGINES.items():
        one = engine(config, Ranks.start("cpu"))
        tokens = batch(0)[:, :LENGTH]

        def micro_batch(last: bool, one: Any = one, tokens: torch.Tensor = tokens) -> None:
            with one.accumulate(last=last):
                one.backward(one.model(input_ids=tokens, labels=tokens).loss)

        held = [one.state.holds_gradients()]
        for last in (False, True):
            micro_batch(last)
            held.append(one.state.holds_gradients())
        one.step()
        held.append(one.state.holds_gradients())
        one.zero_grad()
        held.append(one.state.holds_gradients())
        micro_batch(last=True)
        one.zero_grad()
        told[name] = [*held, one.state.holds_gradients()]
        one.close()
    return told


def test_engines_tell_gradients_between_micro_batches_on_every_rank():
    for told in on_ranks(2, _held):
        assert told == {name: [False, True, True, False, False, False] for name in ENGINES}
