"""docs/recipes/nanogpt.md on 2 ranks: DDP and ZeRO, beside one process with the whole batch and torch's AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.pool import on_ranks
from tests.recipes.page import names_of

SETTINGS = {"lr": 1e-2, "alpha": 8.0, "alpha_warmup": 6, "beta3_warmup": 6}
STEPS, VOCABULARY, WIDTH = 6, 11, 8


class GPT(nn.Module):
    """Its head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, bias=False, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        h = self.embed(x)
        return self.head(self.norm(h + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]))


def rows(step: int, micro: int) -> torch.Tensor:
    """The 4 sequences of a micro-batch, of which each of 2 ranks takes 2."""
    start = torch.randint(VOCABULARY, (4, 1), generator=torch.Generator().manual_seed(2 * step + micro))
    return (start + torch.arange(7)) % VOCABULARY


def batches(rank: int, world_size: int) -> Any:
    def batch_of(step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
        own = rows(step, micro)[rank::world_size]
        return own[:, :-1], own[:, 1:]

    return batch_of


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _loops(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    page = names_of("nanogpt")
    own, told, ended = batches(rank, world_size), {}, {}
    for name, make in {
        "ddp": page["WithDDP"],
        "zero 1": lambda model, **kwargs: page["WithZero"](model, stage=1, **kwargs),
        "zero 2": page["WithZero"],
    }.items():
        made = make(GPT(), **SETTINGS)
        told[name] = page["train"](made, own, STEPS, until=3)
        page["save"](folder / name, made, 3)
        told[name] += page["train"](made, own, STEPS, begin=3)
        ended[name] = weights(made.model)
        for other in {name, "ddp"}:  # a checkpoint of its own, and one of DDP
            again = make(GPT(), **SETTINGS)
            begin = page["resume"](folder / other, again)
            page["train"](again, own, STEPS, begin=begin)
            told[f"{name} from {other}"] = (weights(again.model) - ended[name]).abs().max().item()
            getattr(again.optimizer, "close", int)()
        getattr(made.optimizer, "close", int)()
    told |= {f"{name} to ddp": (ended[name] - ended["ddp"]).abs().max().item() for name in ended}

    model = GPT()  # one process that has the whole batch
    alone = page["WithZero"].__new__(page["WithDDP"])
    alone.model, alone.micro_batch = model, lambda last: torch.enable_grad()
    alone.optimizer = page["AdEMAMix"](page["decay_groups"](model, 0.1), **SETTINGS)
    page["train"](alone, batches(0, 1), STEPS)
    told["alone"] = (weights(model) - ended["ddp"]).abs().max().item()

    model = GPT()  # with alpha 0 it is AdamW
    ours = page["WithDDP"](model, lr=1e-2, alpha=0.0)
    page["train"](ours, own, STEPS)
    peer = page["WithDDP"](GPT())
    groups = page["decay_groups"](peer.model.module, 0.1)
    peer.optimizer = torch.optim.AdamW(groups)
    page["train"](peer, own, STEPS)
    told["adamw"] = (weights(model) - weights(peer.model)).abs().max().item()
    told["groups"] = [(g["weight_decay"], g["param_names"]) for g in peer.optimizer.param_groups]
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, _loops, tmp_path_factory.mktemp("nanogpt"))


def test_ddp_and_zero_learn_the_same(told: list[dict[str, Any]]) -> None:
    for rank in told:
        assert rank["ddp"][-1] < 0.9 * rank["ddp"][0]
        for name in ("zero 1", "zero 2"):  # torch's clipping divides by the norm and 1e-6
            assert rank[name] == pytest.approx(rank["ddp"], rel=1e-5)
            assert rank[f"{name} to ddp"] < 1e-5
        assert rank["alone"] < 1e-4
        assert rank["adamw"] < 1e-5


def test_each_resumes_its_own_checkpoint_exactly_and_ddps(told: list[dict[str, Any]]) -> None:
    for rank in told:
        for name in ("ddp", "zero 1", "zero 2"):
            assert rank[f"{name} from {name}"] == 0.0
            assert rank[f"{name} from ddp"] < 1e-5


def test_matrices_decay_and_a_tied_weight_is_in_one_group(told: list[dict[str, Any]]) -> None:
    (decay, decaying), (none, others) = told[0]["groups"]
    assert (decay, none) == (0.1, 0.0)
    assert decaying == ["embed.weight", "attention.in_proj_weight", "attention.out_proj.weight"]
    assert others == ["norm.weight", "norm.bias"]
