"""The load-balancing loss of a mixture of experts: what transformers itself adds, however a step is cut."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from shardopt.pretrain import data, model
from shardopt.pretrain.model import ModelConfig, meta_model, transformers_config
from shardopt.pretrain.scoring import limits
from tests.distributed.pool import on_ranks
from tests.pretrain import tiny
from tests.pretrain.test_loss import COMMON, gradients, made, tokens

LLAMA = {"intermediate_size": 40, "num_key_value_heads": 1, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, **LLAMA},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, **LLAMA},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, **LLAMA},
    "granitemoe": {"num_local_experts": 4, "logits_scaling": 4.0, **LLAMA},
}


def their_loss(net: Any, rows: torch.Tensor) -> torch.Tensor:
    """transformers' own, of rows of block_size + 1 tokens of which the last is a target alone."""
    return net(input_ids=rows[:, :-1], labels=rows[:, :-1], shift_labels=rows[:, 1:].contiguous()).loss


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers_whole_and_in_chunks(family: str) -> None:
    if family == "granitemoe" and Version(transformers.__version__) < Version("5.17"):
        pytest.skip("GraniteMoE's own loss fails in transformers before 5.17")
    shape = FAMILIES[family] | {"output_router_logits": True}
    plain = made(family, None, **shape)
    expected = their_loss(plain, tokens())
    expected.backward()
    whole = nn.utils.get_total_norm(gradients(plain).values())
    for chunks in (1, 5):
        ours = made(family, chunks, **shape)
        inputs = {"input_ids": tokens()[:, :-1], "targets": tokens()[:, 1:], "use_cache": False}
        cross_entropy, none = ours(**inputs)
        assert none is None  # of what is held out
        nats, router = ours.train()(**inputs)
        assert torch.equal(nats, cross_entropy)
        loss = nats / tokens()[:, 1:].numel() + router
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert router.item() > 0.4
        loss.backward()
        for name, gradient in gradients(ours).items():
            theirs = gradients(plain)[name]
            assert (gradient - theirs).norm() <= 1e-5 * theirs.norm() + 1e-8 * whole, (chunks, name)


MOE = {"model_type": "mixtral", **COMMON, **FAMILIES["mixtral"], "output_router_logits": True}
RUN = {
    "model": json.dumps(MOE),
    "optimizer__lr": 0.0,  # the held-out loss is of the first weights too
    "train__steps": 1,
    "train__grad_clip": "null",
    "schedule__warmup": 0,
    "optimizer__alpha_warmup": "null",
    "optimizer__beta3_warmup": "null",
}
ENGINES = {
    "fsdp": {"engine": "{name: fsdp}", "train__loss_chunks": 4, "train__activation_checkpointing": "true"},
    "zero": {"engine": "{name: zero, bucket_mb: 0.01}"},
}


def _runs(rank: int, world_size: int, folder: Path) -> None:
    for name, changes in ENGINES.items():
        tiny.run(rank, world_size, folder, run__name=name, **RUN | changes)


def test_a_step_adds_the_mean_over_its_micro_batches_and_what_is_held_out_has_none(tmp_path: Path) -> None:
    tiny.corpus(tmp_path / "text")
    config = tiny.config(tmp_path, **RUN, engine="{name: single}")
    train, holdout = data.prepare(config.data, tiny.ALONE, 0, 8)
    shape = model.transformers_config(config.model, train.vocab_size, train.tokenizer.eos_token_id, 32)
    net = meta_model(shape)
    model.initialise(net, torch.device("cpu"), 0)
    rows = train.batch(0, 0, 8)

    def check(name: str, ranks: int) -> None:
        micros = [micro for rank in range(ranks) for micro in rows[rank::ranks].split(2)]
        net.zero_grad()
        losses = [their_loss(net, micro) for micro in micros]
        torch.stack(losses).mean().backward()
        (row,) = tiny.metrics(tmp_path, name)
        assert row["loss"] + row["router_loss"] == pytest.approx(sum(loss.item() for loss in losses) / 4, rel=1e-5), (
            name
        )
        assert row["router_loss"] > 0.4
        assert row["grad_norm"] == pytest.approx(nn.utils.get_total_norm(gradients(net).values()).item(), rel=1e-4)
        held_out = holdout.batch(0, min(8, holdout.n_blocks))
        net.config.output_router_logits = False
        assert row["eval_loss"] == pytest.approx(their_loss(net, held_out).item(), rel=1e-5)
        net.config.output_router_logits = True

    tiny.run(0, 1, tmp_path, run__name="single", **RUN, engine="{name: single}")
    check("single", 1)
    on_ranks(2, _runs, tmp_path)
    for name in ENGINES:
        check(name, 2)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"model_type": "llama"}, None),
        (MOE, None),
        (MOE | {"output_router_logits": False}, "model.output_router_logits=true adds it, times model.router_aux_loss"),
        (
            {
                "model_type": "deepseek_v3",
                "n_routed_experts": 4,
                "n_group": 1,
                "topk_group": 1,
                "moe_intermediate_size": 8,
            },
            "transformers computes none for it",
        ),
    ],
)
def test_a_router_without_its_loss_is_warned_of(shape: dict[str, Any], said: str | None) -> None:
    section = ModelConfig(
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0} | shape
    )
    holdout: Any = SimpleNamespace(n_blocks=10**6, block_size=1, sets=lambda blocks: {})
    warnings = list(limits(meta_model(transformers_config(section, 257, 256, 24)), holdout, 8))
    assert len(warnings) == (said is not None)
    if said is not None:
        assert said in warnings[0]
        assert "no loss that balances its router is added" in warnings[0]
