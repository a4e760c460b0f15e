"""Muon for hidden matrices with AdamW for the rest: torch's own numbers, and a run of the launcher."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from shardopt.optim import registry
from shardopt.optim.muon import Muon
from tests.distributed.pool import on_ranks
from tests.pretrain import tiny


def test_hidden_matrices_are_moved_by_torchs_muon_and_the_rest_of_a_model_by_its_adamw() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, **sizes, tie_word_embeddings=False)
    models = [AutoModelForCausalLM.from_config(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    named = dict(models[1].named_parameters())
    hidden = {name for name in named if "_proj" in name}
    assert {*named} - hidden == {
        "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
        "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight",
    }  # fmt: skip
    both = {"lr": 1e-2, "weight_decay": 0.3}
    optimizer = registry.spec("muon", **both, betas=[0.8, 0.99]).build(models[0])
    norms = [name for name in named if "norm" in name]
    others = [[named[name] for name in named if name not in hidden and (name in norms) == own] for own in (False, True)]
    adamw = [{"params": others[0]}, {"params": others[1], "weight_decay": 0.0}]
    oracle = [
        torch.optim.Muon([named[name] for name in named if name in hidden], **both, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw, **both, betas=(0.8, 0.99)),
    ]
    ids = torch.arange(24).view(2, 12)
    for _ in range(3):
        for model, steps in (models[0], [optimizer]), (models[1], oracle):
            model(ids, labels=ids).loss.backward()
            for each in steps:
                each.step()
                each.zero_grad()
    for (name, weight), other in zip(models[0].named_parameters(), named.values(), strict=True):
        assert torch.equal(weight, other), name
    state = {name: set(optimizer.state[param]) for name, param in models[0].named_parameters()}
    assert {frozenset(keys) for name, keys in state.items() if name in hidden} == {frozenset({"momentum_buffer"})}
    assert state["lm_head.weight"] == {"step", "exp_avg", "exp_avg_sq"}


def test_a_state_dict_that_is_loaded_in_mid_run_takes_the_place_of_both_states() -> None:
    nets = [nn.Linear(3, 2), nn.Linear(3, 2)]
    optimizers = [Muon(net.named_parameters(), lr=0.1) for net in nets]

    def step(number: int, scale: torch.Tensor) -> None:
        optimizers[number].zero_grad()
        (nets[number](torch.arange(3.0)) * scale).sum().backward()
        optimizers[number].step()

    for number, scale in (0, torch.tensor([1.0, 2.0])), (1, torch.tensor([-3.0, 1.0])):
        step(number, scale)
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for number in range(2):
        step(number, torch.tensor([-1.0, 5.0]))
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_a_value_that_either_refuses_is_refused_and_so_is_a_vector_for_muon() -> None:
    for wrong, message in ({"betas": (1.5, 0.9)}, "beta"), ({"momentum": -1.0}, "momentum"):
        with pytest.raises(ValueError, match=message):
            Muon([nn.Parameter(torch.zeros(2, 2))], **wrong)
    with pytest.raises(ValueError, match="Muon takes matrices, and a group for it has a parameter of 1 dimensions"):
        Muon([{"params": [nn.Parameter(torch.zeros(2))], "muon": True}])


@pytest.mark.slow  # three runs
def test_a_run_with_muon_learns_on_one_process_and_two_and_resumes_to_the_bit(tmp_path: Path) -> None:
    tiny.corpus(tmp_path / "text")
    changes = {"optimizer": "{name: muon, lr: 3e-3}", "checkpoint__every": 6, "train__steps": 12}
    alone = changes | {"engine": "{name: single}"}
    tiny.run(0, 1, tmp_path, run__name="alone", **alone)
    on_ranks(2, tiny.run, tmp_path, run__name="ddp", engine="{name: ddp}", **changes)
    losses, ddp = ([row["loss"] for row in tiny.metrics(tmp_path, name)] for name in ("alone", "ddp"))
    assert losses[-1] < 0.9 * losses[0]
    assert ddp == pytest.approx(losses, rel=1e-3)
    shutil.rmtree(tmp_path / "runs/alone/checkpoints/step-00000012")
    tiny.run(0, 1, tmp_path, run__name="alone", **alone)
    assert [row["loss"] for row in tiny.metrics(tmp_path, "alone")] == losses
