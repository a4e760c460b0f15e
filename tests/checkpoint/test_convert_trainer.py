"""Checkpoints that HF Trainer itself writes and goes on from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shardopt import cli
from shardopt.checkpoint.convert import convert
from shardopt.checkpoint.stored import Stored
from shardopt.errors import InputError
from tests.checkpoint.test_convert import bits
from tests.integrations import training


def _trainer(folder: Path, resume: Path | None, ademamix: bool) -> dict[str, Any]:
    """Final weights and logs of a training of 4 steps that saves at 2 and 4."""
    from transformers import Trainer

    from shardopt.integrations.transformers import shardopt_optimizer
    from tests.integrations.hosts import new_job

    new_job(alone=True)
    args = training.arguments(
        folder, 1, max_steps=4, save_steps=2, save_strategy="steps", logging_steps=1, warmup_steps=1
    )
    given: dict[str, Any] = {"optimizer_cls_and_kwargs": shardopt_optimizer(args, alpha=2.0)} if ademamix else {}
    trainer = Trainer(training.model(), args, train_dataset=training.data(), **given)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        "losses": losses[-2:],
        "lr": [row["learning_rate"] for row in trainer.state.log_history if "loss" in row][-2:],
    }


@pytest.mark.parametrize("ademamix", [False, True])
def test_trainer_goes_on_from_a_converted_checkpoint_as_from_its_own(tmp_path, ademamix):
    expected = _trainer(tmp_path / "theirs", None, ademamix)
    theirs = tmp_path / "theirs/checkpoint-2"
    convert(theirs, tmp_path / "ours")
    stored = Stored(tmp_path / "ours")
    kinds = {"m1", "m2", "nu"} if ademamix else {"exp_avg", "exp_avg_sq"}
    assert {kind for _, kind in stored.keys} == {"weight"} | kinds
    assert stored.document["step"] == 2
    if not ademamix:
        saved = torch.load(theirs / "optimizer.pt", weights_only=True)
        decaying = [n for n, p in training.model().named_parameters() if p.ndim > 1]
        for number, name in enumerate(decaying):
            assert bits(stored.read(name, "exp_avg")) == bits(saved["state"][number]["exp_avg"]), name

    # Config and tokenizer lie beside a Trainer's checkpoint; ours, which came from one, has none.
    convert(theirs, tmp_path / "again/checkpoint-2", "trainer")
    assert _trainer(tmp_path / "again", tmp_path / "again/checkpoint-2", ademamix) == expected
    first, again = (load_file(tmp_path / place / "checkpoint-4/model.safetensors") for place in ("theirs", "again"))
    assert bits(first) == bits(again)
    assert bits(load_file(theirs / "model.safetensors")) == bits(
        load_file(tmp_path / "again/checkpoint-2/model.safetensors")
    )
    if not ademamix:  # AdEMAMix goes on from it by the very command that its refusal names
        with pytest.raises(InputError, match="has no shardopt folder") as refused:
            _trainer(tmp_path / "moved", theirs, True)
        command = re.findall(r"shardopt (checkpoint convert .*? --to trainer)", str(refused.value))[0]
        assert cli.main(command.replace("NEW", str(tmp_path / "new")).split()) == 0
        assert len(_trainer(tmp_path / "moved", tmp_path / "new/checkpoint-2", True)["losses"]) == 2
        return
    assert convert(tmp_path / "theirs", tmp_path / "newest").source == "trainer"  # its own files are read, too
    file = theirs / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors is damaged, or was edited"):
        convert(theirs, tmp_path / "never")
    (theirs / "shardopt-files.json").unlink()
    file.unlink()  # as under FSDP2
    with pytest.raises(InputError, match=r"has no model\.safetensors: .* Give .*/checkpoint-2/shardopt"):
        convert(theirs, tmp_path / "never")
    assert convert(theirs / "shardopt", tmp_path / "trained").source == "shardopt"
