"""Accelerator.prepare(model, optimizer) in a loop of one's own, on 2 gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="the extra shardopt[transformers]")
from accelerate import Accelerator

from shardopt.errors import InputError
from shardopt.integrations import accelerate as hosts
from shardopt.integrations.hosted import ZeroAdEMAMix
from tests.distributed.pool import on_ranks
from tests.integrations.hosts import new_job
from tests.integrations.training import data, difference, loop, model

HOSTS = ("ddp", "fsdp", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_ranks(1, loop, tmp_path_factory.mktemp("alone") / "slices")[0]


@pytest.mark.parametrize("host", HOSTS)
def test_two_ranks_are_one_process_and_go_on_from_their_slices(host: str, alone: dict, tmp_path: Path) -> None:
    two = on_ranks(2, loop, tmp_path / "whole", host=host)
    assert difference(two[0]["weights"], alone["weights"]) < 1e-5
    assert max(rank["held"]["m2"] for rank in two) < 0.55 * alone["held"]["m2"]
    assert sum(rank["held"]["m2"] for rank in two) >= alone["held"]["m2"]
    assert two[0]["parameters"] == ({"DTensor"} if host == "fsdp" else {"Parameter"})
    assert two[0]["statistics"]["alpha"] == alone["statistics"]["alpha"] == 2.0
    assert two[0]["statistics"]["m2_norm"] == pytest.approx(alone["statistics"]["m2_norm"], rel=1e-4)
    on_ranks(2, loop, tmp_path / "half", host=host, steps=3)
    resumed = on_ranks(2, loop, tmp_path / "half", host=host, begin=3)
    assert difference(two[0]["weights"], resumed[0]["weights"]) == 0.0


@pytest.mark.parametrize("host", ["ddp", "fsdp", "zero2"])
def test_gradient_accumulation(host: str, alone: dict, tmp_path: Path) -> None:
    two = on_ranks(2, loop, tmp_path / "slices", host=host, accumulate=2)[0]
    assert difference(two["weights"], alone["weights"]) < 1e-5


@pytest.mark.parametrize(("wrote", "reads"), [("ddp", "zero3"), ("zero2", "fsdp"), ("fsdp", "ddp")])
def test_slices_move_between_hosts(wrote: str, reads: str, alone: dict, tmp_path: Path) -> None:
    on_ranks(2, loop, tmp_path / "half", host=wrote, steps=3)
    resumed = on_ranks(2, loop, tmp_path / "half", host=reads, begin=3)
    assert difference(alone["weights"], resumed[0]["weights"]) < 1e-5


def test_load_state_alone_leaves_rank_0s_optimizer_and_is_refused(tmp_path: Path) -> None:
    for told in on_ranks(2, saved_by_accelerate_alone, tmp_path):
        assert "the optimizer's state has not been loaded" in told


def saved_by_accelerate_alone(rank: int, world_size: int, folder: Path) -> str:
    new_job()
    accelerator = Accelerator(cpu=True)
    net = model()
    optimizer = hosts.sharded_ademamix(accelerator, net, lr=1e-2)
    net, optimizer = accelerator.prepare(net, optimizer)
    batch = {key: value[None] for key, value in data(1)[0].items()}
    accelerator.backward(net(**batch).loss)
    optimizer.step()
    # As safetensors it could not even be read: the weights are views of buckets.
    accelerator.save_state(str(folder), safe_serialization=False)
    accelerator.wait_for_everyone()
    accelerator.load_state(str(folder))
    try:
        optimizer.step()
    except InputError as error:
        return str(error)
    raise AssertionError("not refused")


def test_an_optimizer_of_anothers() -> None:
    with pytest.raises(InputError, match="AdamW does not hold an optimizer that sharded_ademamix made"):
        hosts.sharded_state(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]))


def test_weights_loaded_after_the_host_has_copied_the_parameters_are_those_trained() -> None:
    made = model()
    optimizer = ZeroAdEMAMix([{"params": list(made.named_parameters())}], made, lr=1e-9, alpha=0.0)
    for param in made.parameters():
        param.data = param.data.clone()  # as accelerate does, from "cpu" to "cpu:0"
    loaded = {name: torch.full_like(value, 0.25) for name, value in made.state_dict().items()}
    made.load_state_dict(loaded)
    made(**{name: value[None] for name, value in data()[0].items()}).loss.backward()
    optimizer.step()
    for name, param in made.named_parameters():
        torch.testing.assert_close(param.detach(), loaded[name], rtol=0, atol=1e-6)
