"""docs/recipes/torchtitan.md with the classes of the torchtitan that is installed, on 2 gloo ranks under FSDP2."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from shardopt import AdEMAMix, checkpoint
from shardopt.checkpoint.convert import convert
from shardopt.engines.state import ModuleState
from shardopt.errors import InputError
from tests.distributed.pool import on_ranks
from tests.recipes.page import names_of

if importlib.util.find_spec("torchtitan") is None:
    pytest.skip("torchtitan is in the dev extra", allow_module_level=True)

SETTINGS = {"alpha": 8.0, "alpha_warmup": 10_000, "beta3_warmup": 10_000, "state_dtype": {"m2": "bf16"}}


@dataclass
class Spec:
    """Stand-in for a TrainSpec, of which the page's function replaces one field."""

    build_optimizers_fn: Any = None


@dataclass
class TrainState:
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def model() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9, bias=False), nn.Tanh(), nn.Linear(9, 3))
    for layer in (net[0], net[2]):
        fully_shard(layer)
    return fully_shard(net)


class Training:
    """What torchtitan's Trainer makes of its config: model, optimizers, schedulers and checkpoints."""

    def __init__(self, folder: Path, exclude: tuple[str, ...] = ()) -> None:
        from torchtitan.components.checkpoint import CheckpointManager
        from torchtitan.components.optimizer import OptimizersContainer

        self.model, self.state = model(), TrainState()
        given = {"enable": True, "folder": "", "interval": 3, "exclude_from_loading": list(exclude)}
        given["keep_latest_k"] = 0
        objects = {"dataloader": None, "model_parts": [self.model], "sd_adapter": None, "base_folder": str(folder)}
        if hasattr(OptimizersContainer, "Config"):
            from torchtitan.components.optimizer import LRSchedulersContainer

            self.optimizers = names_of("torchtitan", 1)["everything"].build(model_parts=[self.model])
            schedule = LRSchedulersContainer.Config(warmup_steps=2)
            self.schedulers = schedule.build(optimizers=self.optimizers, training_steps=8)
            given["folder"] = "."
            make: Any = CheckpointManager.Config(**given).build
        else:
            from torchtitan.components.lr_scheduler import build_lr_schedulers
            from torchtitan.config import Checkpoint, LRScheduler, Optimizer

            build = names_of("torchtitan", 0)["with_ademamix"](Spec()).build_optimizers_fn
            self.optimizers = build([self.model], Optimizer(name="AdEMAMix", lr=3e-4), None)
            self.schedulers = build_lr_schedulers(self.optimizers, LRScheduler(warmup_steps=2), 8)
            make, objects["checkpoint_config"] = CheckpointManager, Checkpoint(**given)
        self.checkpoints = make(
            **objects,
            optimizers=self.optimizers,
            lr_schedulers=self.schedulers,
            states={"train_state": self.state},
        )

    def step(self) -> float:
        self.state.step += 1
        loss = loss_of(self.model, self.state.step)
        self.optimizers.step()
        self.schedulers.step()
        self.optimizers.zero_grad()
        return loss


def loss_of(net: nn.Module, step: int) -> float:
    rank = torch.distributed.get_rank()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(rank)) + 0.01 * step
    loss = net(x).square().mean()
    loss.backward()
    return loss.item()


def whole(entries: dict[str, Any]) -> dict[str, Any]:
    return {key: v.full_tensor() if hasattr(v, "full_tensor") else v for key, v in entries.items()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    a, b = whole(a), whole(b)
    equal = (torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)
    return a.keys() == b.keys() and all(equal)


def _train_and_resume(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    training = Training(folder)
    begun = {value for key, value in training.optimizers.state_dict().items() if key.endswith(".step")}
    group = dict(training.optimizers.optimizers[0].param_groups[0])
    lrs, losses = [], []
    for _ in range(6):
        lrs.append(training.schedulers.schedulers[0].get_last_lr()[0])
        losses.append(training.step())
        if training.state.step == 3:
            training.checkpoints.save(3)
    net = model()  # in a loop of one's own
    given = {key: group[key] for key in ("betas", "weight_decay", *SETTINGS)}
    optimizer = AdEMAMix(net.named_parameters(), **given)
    plain = []
    for step, lr in enumerate(lrs, 1):
        optimizer.param_groups[0]["lr"] = lr
        plain.append(loss_of(net, step))
        optimizer.step()
        optimizer.zero_grad()
    checkpoint.save(folder / "plain", ModuleState(optimizer, net), {"step": 6})
    training.checkpoints.save(6)
    resumed = Training(folder)
    assert resumed.checkpoints.load(3)
    again = [resumed.step() for _ in range(3)]
    return {
        "begun": begun,
        "losses": losses,
        "plain": plain,
        "again": again,
        "equal": same(training.model.state_dict(), net.state_dict()),
        "resumed": same(training.model.state_dict(), resumed.model.state_dict())
        and same(training.optimizers.state_dict(), resumed.optimizers.state_dict()),
        "settings": {key: group[key] for key in SETTINGS},
    }


def _load_both(rank: int, world_size: int, folder: Path, converted: Path, number: int) -> tuple[bool, bool, int, int]:
    theirs, ours = Training(folder), Training(converted, exclude=("lr_scheduler", "dataloader"))
    assert theirs.checkpoints.load(number)
    assert ours.checkpoints.load(number)
    expected, loaded = theirs.optimizers.state_dict(), ours.optimizers.state_dict()
    state = [{k: v for k, v in entries.items() if k.startswith("state.")} for entries in (expected, loaded)]
    equal = same(theirs.model.state_dict(), ours.model.state_dict()) and same(*state)
    with_settings = same(expected, loaded)
    ours.step()
    (step,) = {state["step"] for state in ours.optimizers.optimizers[0].state.values()}
    return equal, with_settings, ours.state.step, step


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("titan")
    return folder, on_ranks(2, _train_and_resume, folder)


def test_its_container_trains_as_a_plain_loop_and_its_checkpoints_resume_exactly(trained: Any) -> None:
    for told in trained[1]:
        assert told["settings"] == SETTINGS
        assert told["begun"] == {0}  # a state_dict before the first step counts none
        assert told["losses"] == told["plain"]
        assert told["equal"]
        assert told["losses"][-1] < told["losses"][0]
        assert told["again"] == told["losses"][3:]
        assert told["resumed"]


def test_its_checkpoint_becomes_ours_and_one_of_its_again(trained: Any, tmp_path: Path) -> None:
    folder, _ = trained
    convert(folder / "step-3", tmp_path / "ours")
    document = checkpoint.read_document(tmp_path / "ours")
    assert (document["step"], document["host"]) == (3, "torchtitan")
    assert document["checkpoint"]["parameters"].keys() == {"0.weight", "2.weight", "2.bias"}
    convert(tmp_path / "ours", tmp_path / "step-3", "torchtitan")
    for equal, settings, step, counted in on_ranks(2, _load_both, folder, tmp_path, 3):
        assert equal
        assert settings
        assert (step, counted) == (4, 4)


def test_a_checkpoint_of_a_loop_of_ones_own_goes_on_in_torchtitan(trained: Any, tmp_path: Path) -> None:
    folder, _ = trained
    convert(folder / "plain", tmp_path / "step-6", "torchtitan")
    for equal, _, step, counted in on_ranks(2, _load_both, folder, tmp_path, 6):
        assert equal
        assert (step, counted) == (7, 7)


def _refusals(rank: int, world_size: int) -> list[str] | None:
    import shardopt.integrations.torchtitan as ours

    if not hasattr(ours, "build_optimizers"):
        return None
    from torchtitan.config import Optimizer

    balanced = nn.Linear(2, 2)
    balanced.moe = SimpleNamespace(load_balance_coeff=1e-3)
    right = Optimizer(name="AdEMAMix")
    told = []
    for net, section, ft, settings in [
        (nn.Linear(2, 2), Optimizer(), None, {}),
        (nn.Linear(2, 2), right, None, {"lr": 1.0}),
        (nn.Linear(2, 2), replace(right, early_step_in_backward=True), None, {}),
        (nn.Linear(2, 2), right, SimpleNamespace(enabled=True), {}),
        (balanced, right, None, {}),
    ]:
        with pytest.raises(InputError) as error:
            ours.build_optimizers([net], section, None, ft, **settings)
        told.append(str(error.value))
    return told


def test_what_cannot_be_right_is_refused_by_the_key_to_change() -> None:
    told = on_ranks(2, _refusals)[0]
    if told is None:
        pytest.skip("torchtitan 0.2 alone has these settings")
    keys = ["optimizer.name", "[optimizer] section", "early_step_in_backward", "fault_tolerance", "load_balance_coeff"]
    for message, key in zip(told, keys, strict=True):
        assert key in message


def test_the_step_by_which_torchtitan_creates_state_counts_none() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = AdEMAMix([("w", weight)], lr=0.1)

    def init_optim_state(optim: torch.optim.Optimizer) -> None:  # as torchtitan 0.3 has it
        weight.grad = torch.zeros_like(weight)
        optim.param_groups[0]["lr"] = 0.0
        optim.step(closure=None)

    init_optim_state(optimizer)
    assert optimizer.state[weight]["step"] == 0


@pytest.mark.parametrize("name", ["ademamix", "AdEMAMixContainer", "build_optimizers"])
def test_what_another_torchtitan_has_is_refused_with_both_versions(name: str) -> None:
    from importlib.metadata import version

    from shardopt.integrations import torchtitan

    installed = version("torchtitan")
    if (needed := torchtitan._NEEDS[name]) == installed[: len(needed)]:
        assert name in vars(torchtitan)
        return
    with pytest.raises(ImportError, match=rf"^{name} needs torchtitan {needed}; {installed} is installed$"):
        exec(f"from shardopt.integrations.torchtitan import {name}")
