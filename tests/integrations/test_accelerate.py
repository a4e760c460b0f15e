"""Accelerator.prepare(model, optimizer) in a loop of one's own, on 2 gloo ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="the extra shardopt[transformers]")
from accelerate import Accelerator
from safetensors.torch import load_file

from shardopt import checkpoint
from shardopt.errors import InputError
from shardopt.integrations import accelerate as hosts
from shardopt.integrations.hosted import ZeroAdEMAMix
from tests.distributed.pool import on_ranks
from tests.integrations.hosts import fsdp_on_cpu, new_job
from tests.integrations.training import data, difference, loop, model, plugins, tensors, whole_weights

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


@pytest.mark.parametrize("host", ["ddp", "fsdp", "zero2", "zero3"])
def test_save_state_and_load_state_keep_every_ranks_state(host: str, tmp_path: Path) -> None:
    whole = on_ranks(2, saved_by_accelerate, tmp_path / "whole", host)
    for told in whole:
        assert told["lost"] > 0  # what load_state has to bring back was not there before it
        assert told["difference"] == 0.0
        assert told["m2"][0] == told["m2"][1] > 0
        assert told["saved by save_model"] in (told["parameters"], None)
    for world_size in (1, 3):
        for weights in on_ranks(world_size, loaded_from_slices, tmp_path / "whole" / "shardopt", host):
            assert difference(whole[0]["weights"], weights) == 0.0
    for told in on_ranks(2, saved_by_accelerate, tmp_path / "flipped", host, slices="damaged"):
        assert "rank-00001.data is damaged" in told["refused"]
    if host != "fsdp":  # where accelerate's own files have the state, too
        for told in on_ranks(2, saved_by_accelerate, tmp_path / "bare", host, slices="missing"):
            assert "the optimizer's state has not been loaded" in told["refused"]
    if not host.startswith("zero"):
        for told in on_ranks(2, saved_by_accelerate, tmp_path / "mixed", host, slices="of another step"):
            assert "is of step 2, and the files beside it are of step 1: load another" in told["refused"]


@pytest.mark.parametrize("wrote", [1, 2])
def test_load_state_between_one_process_and_ddp(wrote: int, tmp_path: Path) -> None:
    saved = on_ranks(wrote, saved_by_accelerate, tmp_path, "ddp")
    for told in on_ranks(3 - wrote, loaded_by_accelerate, tmp_path):
        assert told["m2"] == pytest.approx(saved[0]["m2 at the save"], rel=1e-6)
        assert told["lr"] == saved[0]["lr at the save"] == pytest.approx(1e-2 / (1 + wrote))
        assert difference(saved[0]["weights"], told["weights"]) == 0.0
    shutil.rmtree(tmp_path / "shardopt")
    for told in on_ranks(3 - wrote, loaded_by_accelerate, tmp_path):
        assert ("the optimizer's state has not been loaded" if wrote == 2 else "not saved by shardopt") in told


def loaded_by_accelerate(rank: int, world_size: int, folder: Path) -> dict[str, Any] | str:
    accelerator, net, optimizer, _ = prepared("ddp", alone=world_size == 1)
    try:
        accelerator.load_state(str(folder))
        told = {"m2": whole_m2(optimizer), "lr": optimizer.param_groups[0]["lr"]}
        told["weights"] = whole_weights(net)
        accelerator.backward(net(**{key: value[None] for key, value in data()[0].items()}).loss)
        optimizer.step()
    except InputError as error:
        return str(error)
    return told


def m2_held(optimizer: Any) -> float:
    return sum(t.double().abs().sum().item() for t in tensors(hosts.sharded_state(optimizer).optimizer, "m2"))


def whole_m2(optimizer: Any) -> float:
    state = hosts.sharded_state(optimizer)
    return sum(state.ranks.gather(m2_held(optimizer)))


def loaded_from_slices(rank: int, world_size: int, folder: Path, host: str) -> dict[str, torch.Tensor]:
    with fsdp_on_cpu(host == "fsdp"):
        _, net, optimizer, _ = prepared(host, alone=world_size == 1 and host == "ddp")
        checkpoint.load(folder, hosts.sharded_state(optimizer))
        return whole_weights(net)


def prepared(host: str, *, alone: bool = False) -> tuple[Accelerator, Any, Any, Any]:
    new_job(alone=alone)
    given = plugins(host)
    if "deepspeed_plugin" in given:  # there is no loader that says it
        given["deepspeed_plugin"].deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    accelerator = Accelerator(cpu=True, **given)
    net = model()
    optimizer = hosts.sharded_ademamix(accelerator, net, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    net, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler)
    return accelerator, net, optimizer, scheduler


def saved_by_accelerate(rank: int, world_size: int, folder: Path, host: str, slices: str = "whole") -> dict[str, Any]:
    with fsdp_on_cpu(host == "fsdp"):
        return _saved_by_accelerate(rank, world_size, folder, host, slices)


def _saved_by_accelerate(rank: int, world_size: int, folder: Path, host: str, slices: str) -> dict[str, Any]:
    """One step, save_state, another step, load_state, the same other step again."""
    accelerator, net, optimizer, scheduler = prepared(host, alone=world_size == 1)

    def step(row: int) -> dict[str, torch.Tensor]:
        batch = {key: value[None] for key, value in data()[row].items()}
        accelerator.backward(net(**batch).loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return whole_weights(net)

    step(rank)
    accelerator.save_state(str(folder))
    told: dict[str, Any] = {"parameters": len(list(net.parameters())), "saved by save_model": None}
    if host == "ddp":
        accelerator.save_model(net, str(folder / "model"))
        accelerator.wait_for_everyone()
        told["saved by save_model"] = len(load_file(folder / "model" / "model.safetensors"))
    accelerator.wait_for_everyone()
    told["weights"] = at_save = whole_weights(net)
    told["m2 at the save"], told["lr at the save"] = whole_m2(optimizer), optimizer.param_groups[0]["lr"]
    straight, sums = step(2 + rank), m2_held(optimizer)
    told["lost"] = difference(at_save, straight)
    if slices == "of another step":
        checkpoint.save(folder / "shardopt", hosts.sharded_state(optimizer))
    elif slices != "whole" and accelerator.is_main_process:
        if slices == "missing":
            shutil.rmtree(folder / "shardopt")
        else:
            file = folder / "shardopt" / "rank-00001.data"
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
    accelerator.wait_for_everyone()
    try:
        accelerator.load_state(str(folder))
        again = step(2 + rank)
    except InputError as error:
        return {"refused": str(error)}
    return told | {"difference": difference(straight, again), "m2": (sums, m2_held(optimizer))}


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
