"""What Trainer's best model, other hosts and other programs get out of a checkpoint-N."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra shardopt[transformers]")
from transformers.trainer_utils import SaveStrategy

from shardopt.checkpoint.stored import Stored
from shardopt.errors import InputError
from shardopt.integrations.accelerate import sharded_state
from tests.distributed.pool import on_ranks
from tests.integrations.hosts import fsdp_on_cpu, new_job, no_inference_extension
from tests.integrations.training import (
    arguments,
    build,
    deepspeed_config,
    difference,
    refused,
    tell,
    train,
    whole_weights,
)

# With "best" turned around, the first checkpoint is the best one, and the last steps are undone.
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}


def best_and_on(rank: int, world_size: int, folder: Path, host: str, **options: Any) -> dict[str, Any]:
    """Load the best checkpoint at the end: what it and the optimizer then hold; and train on from there."""
    new_job()
    if host == "fsdp":
        options |= {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    elif host.startswith("zero"):
        no_inference_extension()
        options["deepspeed"] = deepspeed_config(int(host.removeprefix("zero")))
    with fsdp_on_cpu(host == "fsdp"):
        trainer = build(arguments(folder, world_size, **BEST, **options), "Trainer", {"weight_ema": 0.5})
        trainer.train()
        held = sharded_state(trainer.optimizer)
        told = {"best": tell(trainer), "counts": held.step_counts(), "folder": trainer.state.best_model_checkpoint}
        with held.use_weight_ema():
            told["ema"] = whole_weights(trainer.model_wrapped)
        if not host.startswith("zero"):  # under which Trainer itself trains once
            try:
                trainer.args.load_best_model_at_end, trainer.args.save_strategy = False, SaveStrategy.NO
                trainer.train()
            except InputError as error:
                told["refused"] = str(error)
            told["after"] = tell(trainer)
    del trainer, held
    new_job()
    gc.collect()
    return told


@pytest.mark.parametrize("host", ["ddp", "fsdp", "zero2"])
def test_the_best_models_averages_and_counts_come_back_with_it(host: str, tmp_path: Path) -> None:
    told = on_ranks(2, best_and_on, tmp_path, host)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6"]  # not 4: rotated
    best = Stored(tmp_path / "checkpoint-2" / "shardopt")
    assert told[0]["folder"] == str(tmp_path / "checkpoint-2")
    for name, weight in told[0]["best"]["weights"].items():
        assert torch.equal(weight.view(-1), best.read(name, "weight").view(-1))
        assert torch.equal(told[0]["ema"][name].view(-1), best.read(name, "weight_ema").view(-1))
    assert {count["step"] for count in told[0]["counts"].values()} == {2}
    m2 = sum(best.read(name, "m2").double().abs().sum().item() for name in best.parameters)
    assert sum(rank["best"]["sums"]["m2"] for rank in told) == pytest.approx(m2, rel=1e-6)
    if host == "zero2":
        return
    if host == "ddp":  # on CPU ranks accelerate copies the weights again, away from ZeRO's buckets
        assert "was moved or replaced after ZeroOptimizer was built" in told[0]["refused"]
        return
    assert told[0].get("refused") is None
    assert told[0]["after"]["step"] == 6
    assert difference(told[0]["best"]["weights"], told[0]["after"]["weights"]) > 1e-3


def test_best_weights_without_their_state_are_not_trained_on(tmp_path: Path) -> None:
    for told in on_ranks(2, best_and_on, tmp_path, "ddp", save_only_model=True):
        assert "save_only_model keeps no state: make a new Trainer" in told["refused"]
        assert difference(told["best"]["weights"], told["after"]["weights"]) == 0.0


@pytest.mark.parametrize(("wrote", "reads"), [("ddp", "fsdp"), ("fsdp", "ddp"), ("zero2", "ddp"), ("ddp", "zero3")])
def test_trainer_resumes_what_another_host_wrote(wrote: str, reads: str, tmp_path: Path) -> None:
    straight = on_ranks(2, train, tmp_path, host=wrote, save_strategy="steps", save_steps=3)
    last = str(tmp_path / "checkpoint-3")
    resumed = on_ranks(2, train, tmp_path / "on", host=reads, resume=last, trainer="AdEMAMixTrainer")
    assert difference(straight[0]["weights"], resumed[0]["weights"]) < 1e-5
    assert resumed[0]["logs"][-1]["learning_rate"] == straight[0]["logs"][-1]["learning_rate"]
    if (wrote, reads) == ("zero2", "ddp"):  # Trainer alone would begin the schedule anew
        for told in on_ranks(2, refused, tmp_path / "on", host=reads, resume=last):
            assert "was written under deepspeed, and this is ddp" in told
