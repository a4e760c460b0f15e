"""Checkpoints that DeepSpeed itself writes and goes on from."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardopt import AdEMAMix, checkpoint
from shardopt.checkpoint.convert import convert
from shardopt.checkpoint.stored import Stored
from shardopt.engines.state import ModuleState
from tests.checkpoint.test_convert import bits, groups_of, model, step
from tests.distributed.pool import on_ranks


def _engine(stage: int, cls: Any, settings: dict[str, Any]) -> tuple[Any, nn.Module]:
    from tests.integrations.hosts import no_inference_extension

    no_inference_extension()
    import deepspeed

    net = model()
    groups = [{**g, "params": [p for _, p in g["params"]]} for g in groups_of(net)]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": True},
    }
    engine, *_ = deepspeed.initialize(model=net, optimizer=cls(groups, **settings), config=config)
    return engine, net


def _held(net: nn.Module, kinds: list[str]) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    held: dict[str, Tensor] = {}
    for name, param in net.named_parameters():
        held[f"{name}/weight"] = safe_get_full_fp32_param(param).view(-1)
        held |= {f"{name}/{kind}": safe_get_full_optimizer_state(param, kind).view(-1) for kind in kinds}
    return bits(held)


def _trained(rank: int, world_size: int, folder: Path, stage: int) -> None:
    from deepspeed.checkpoint import ds_to_universal

    engine, _ = _engine(stage, torch.optim.AdamW, {"lr": 1e-2})
    for _ in range(3):
        engine.backward(engine(torch.ones(4, 5) * torch.arange(4.0).view(4, 1)).square().sum())
        engine.step()
    engine.save_checkpoint(str(folder), tag="theirs")
    ds_to_universal.main(
        types.SimpleNamespace(
            input_folder=str(folder / "theirs"), output_folder=str(folder / "universal"), num_extract_workers=1,
            num_merge_workers=1, keep_temp_folder=False, strict=False, inject_missing_state=True,
        )
    )  # fmt: skip
    engine.destroy()


def _loaded(rank: int, world_size: int, folder: Path, stage: int, kinds: list[str]) -> Any:
    cls, settings = (torch.optim.AdamW, {"lr": 1.0}) if "exp_avg" in kinds else (AdEMAMix, {"lr": 1.0})
    engine, net = _engine(stage, cls, settings)
    engine.load_checkpoint(str(folder.parent), tag=folder.name)
    steps = {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    told = _held(net, kinds), steps, [group["lr"] for group in engine.optimizer.param_groups], engine.global_steps
    engine.destroy()
    return told


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeeds_universal_checkpoint_is_read_and_deepspeed_takes_ours(tmp_path, stage):
    pytest.importorskip("deepspeed")
    on_ranks(1, _trained, tmp_path, stage)
    kinds = ["exp_avg", "exp_avg_sq"]
    ((held, _, _, _),) = on_ranks(1, _loaded, tmp_path / "universal", stage, kinds)
    convert(tmp_path / "universal", tmp_path / "ours")
    stored = Stored(tmp_path / "ours")
    assert {f"{n}/{k}": bits(stored.read(n, k).view(-1)) for n, k in stored.keys if k != "buffer"} == held
    assert {n for n, k in stored.keys if k == "buffer"} == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert all(entry == {"step": 3} for entry in stored.document["checkpoint"]["step_counts"].values())
    fresh = model()
    checkpoint.load(tmp_path / "ours", ModuleState(torch.optim.AdamW(groups_of(fresh), lr=1e-2), fresh))

    convert(tmp_path / "ours", tmp_path / "again", "deepspeed")
    ((again, steps, lrs, count),) = on_ranks(1, _loaded, tmp_path / "again", stage, kinds)
    assert (again, steps, count) == (held, {3.0}, 3)
    assert lrs == [1.0, 3e-3]  # DeepSpeed's file of settings is of its own objects: the program's stay


def test_deepspeed_takes_ademamix_under_its_own_keys_and_with_its_settings(tmp_path):
    pytest.importorskip("deepspeed")
    net = model()
    optimizer = AdEMAMix(groups_of(net), lr=1e-2, alpha=3.0)
    step(net, optimizer, 3)
    checkpoint.save(tmp_path / "ours", ModuleState(optimizer, net))
    convert(tmp_path / "ours", tmp_path / "universal", "deepspeed")
    kinds = ["m1", "m2", "nu"]
    ((held, steps, lrs, _),) = on_ranks(1, _loaded, tmp_path / "universal", 1, kinds)
    state = {f"{n}/{k}": optimizer.state[p][k].view(-1) for n, p in net.named_parameters() for k in kinds}
    assert held == bits(state | {f"{n}/weight": p.detach().view(-1) for n, p in net.named_parameters()})
    assert (steps, lrs) == ({3.0}, [1e-2, 3e-3])
    convert(tmp_path / "universal", tmp_path / "again")
    first, again = Stored(tmp_path / "ours"), Stored(tmp_path / "again")
    assert sorted(again.keys) == sorted(first.keys)
    assert all(bits(again.read(*key)) == bits(first.read(*key)) for key in first.keys)
    assert again.document["checkpoint"]["groups"] == first.document["checkpoint"]["groups"]
