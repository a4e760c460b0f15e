"""A run of the launcher goes on in HF Trainer: from its exported weights, or with its optimizer's state."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra shardopt[transformers]")
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from shardopt import cli
from shardopt.checkpoint.stored import Stored, locate
from shardopt.integrations.accelerate import sharded_state
from shardopt.integrations.transformers import shardopt_optimizer
from tests.integrations import training
from tests.integrations.hosts import new_job
from tests.pretrain import tiny

DOCS = Path("docs/transformers.md").read_text(encoding="utf-8")


class Begin(TrainerCallback):
    """What the weights and the optimizer's state are when the first step begins, and the lr of each step."""

    step: int | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.step is None:
            self.lrs: list[float] = []
            self.step = state.global_step
            held = sharded_state(kwargs["optimizer"])
            self.counts = {count["step"] for count in held.step_counts().values()}
            self.values = {(s.name, s.kind): s.tensors[0].detach().clone().flatten() for s in held.slices()}
        self.lrs.append(kwargs["optimizer"].param_groups[0]["lr"])


def test_commands_of_the_page_take_a_run_to_trainer_bit_for_bit(tmp_path: Path, monkeypatch: Any) -> None:
    (block,) = re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL)
    tiny.corpus(tmp_path / "text")
    settings = {"engine": "{name: single}", "optimizer__state_dtype": "{m1: bf16}", "train__steps": 3}
    tiny.run(0, 1, tmp_path, run__name="mine", **settings)
    stored = Stored(locate(tmp_path / "runs/mine"))
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert (program, cli.main(arguments)) == ("shardopt", 0)

    def train(resume: str | None) -> Begin:
        new_job(alone=True)
        args = training.arguments(tmp_path / "out", 1, max_steps=5)
        begin = Begin()
        trainer = Trainer(
            AutoModelForCausalLM.from_pretrained("mine"), args, train_dataset=training.data(), callbacks=[begin],
            optimizer_cls_and_kwargs=shardopt_optimizer(args, state_dtype={"m1": "bf16"}),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == 5
        for (name, kind), value in begin.values.items():
            if kind == "weight" or resume:
                assert torch.equal(value, stored.read(name, kind).flatten()), (name, kind)
        return begin

    finetuned, resumed = train(None), train("out/checkpoint-3")
    assert (finetuned.step, finetuned.counts) == (0, set())  # no state yet
    assert (resumed.step, resumed.counts) == (3, {3})
    assert resumed.values.keys() == set(stored.keys)
    assert resumed.values["model.norm.weight", "m1"].dtype == torch.bfloat16
    assert resumed.values["model.norm.weight", "m1"].any()
    of_the_run = stored.document["checkpoint"]["groups"][0]["lr"]
    assert resumed.lrs == [of_the_run, finetuned.lrs[4]]
    assert 0 < of_the_run != finetuned.lrs[3]
