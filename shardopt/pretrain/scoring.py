"""Scores of a model: its loss on tokens, its held-out loss, and a sample of its text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shardopt.distributed import Ranks
from shardopt.engines.base import Engine
from shardopt.errors import InputError
from shardopt.pretrain.data import HoldoutData
from shardopt.pretrain.loss import adds_router_loss, has_router_loss
from shardopt.pretrain.model import routed_experts

# A token's loss varies by two to three nats: the mean of so many is known to about 0.04.
_FEW_HELD_OUT_TOKENS = 4096
# Of the logits: what rounding changes where other tokens go to other experts; a document that is seen changes a tenth.
_MOST_LEAK = 0.02


@dataclass(frozen=True)
class Score:
    """Cross-entropy of a model on text: a sum over tokens, and what it is the sum of.

    Attributes:
        nats: the sum.
        tokens: that were predicted, ends of documents among them.
        text_bytes: UTF-8 bytes that they stand for.
        sources: the same of each source's text alone, by its label; empty where there is one source.
    """

    nats: float
    tokens: int
    text_bytes: int
    sources: Mapping[str, Score] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Mapping[str, Score], apart: bool = True) -> Score:
        """The score of some texts together, each with its label; with `sources` if it is to tell them `apart`."""
        every = parts.values()
        nats, tokens, text_bytes = (sum(getattr(one, key) for one in every) for key in ("nats", "tokens", "text_bytes"))
        return cls(nats, tokens, text_bytes, parts if apart else {})

    @property
    def loss(self) -> float:
        """Mean, nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else math.nan

    def metrics(self) -> dict[str, float]:
        """The names and values that are logged of held-out text."""
        named = {"": self, **{f"/{label}": one for label, one in self.sources.items()}}
        return {
            f"{name}{label}": value
            for label, one in named.items()
            for name, value in (("eval_loss", one.loss), ("eval_bits_per_byte", one.bits_per_byte))
        }


class Model(Protocol):
    """An engine; or what else has a model that returns its loss (see `loss_in_forward`), whole on each of `ranks`."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def ranks(self) -> Ranks: ...


def losses(engine: Model, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of `tokens` (sequences, block_size + 1): the sum of the next-token cross-entropy in nats, fp32, and the router
    loss where there is one; see `loss_in_forward`."""
    return engine.model(input_ids=tokens[:, :-1], targets=tokens[:, 1:], use_cache=False)


@torch.no_grad()
def generate(engine: Engine, tokenizer: Any, tokens: int, context: int, temperature: float = 0.8) -> str:
    """Sample `tokens` tokens of a new document. A collective, as the weights are sharded."""
    device = engine.ranks.device
    draw = torch.Generator().manual_seed(0)  # the same tokens on every rank
    ids = torch.tensor([[tokenizer.eos_token_id]], device=device)
    engine.model.eval()
    for _ in range(tokens):
        logits = engine.model(input_ids=ids[:, -context:], use_cache=False).logits[0, -1].float().cpu()
        chosen = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=draw)
        ids = torch.cat([ids, engine.ranks.from_main(chosen).to(device)[None]], dim=1)
    engine.model.train()
    return tokenizer.decode(ids[0, 1:].tolist(), skip_special_tokens=True)


@torch.no_grad()
def check_documents_apart(engine: Model, start: int, tokens: int, rows: int) -> None:
    """Raise InputError where a document of a sequence changes what the model says of the next. A collective.

    Args:
        start: the token that a document begins with.
        tokens, rows: of the sequences that are tried, at most 64 and 2 of them.
    """
    tokens, rows = min(tokens, 64), min(rows, 2)
    middle = tokens // 2
    first = (
        torch.arange(rows * tokens).view(rows, tokens) % start if start else 1 + torch.arange(tokens).repeat(rows, 1)
    )
    first[:, middle] = start
    second = first.clone()
    second[:, :middle] = first[:, :middle].flip(1)  # another document before, as long
    engine.model.eval()
    logits = [
        engine.model(input_ids=ids.to(engine.ranks.device), use_cache=False).logits[:, middle:].float()
        for ids in (first, second)
    ]
    engine.model.train()
    leak, size = (logits[0] - logits[1]).abs().max().item(), logits[0].abs().max().item()
    if engine.ranks.any(leak > _MOST_LEAK * size):
        raise InputError(
            f"data.document_mask: {type(engine.model).__name__} sees the documents before in a block all the same "
            f"(logits of up to {size:.3g} change by {leak:.3g}); leave it at false, or try model.attention=sdpa"
        )


@torch.no_grad()
def held_out(
    engine: Model, holdout: HoldoutData, blocks: int, micro_batch: int, tick: Callable[[int], None] = lambda _: None
) -> Score:
    """Score of the first `blocks` held-out blocks, whatever the number of ranks, a source at a time. A collective.

    Args:
        tick: called with the number of blocks that are done since the last call.
    """
    ranks = engine.ranks
    sums: list[float] = []
    sets = {label: numbers for label, numbers in holdout.sets(blocks).items() if len(numbers)}
    engine.model.eval()
    for numbers in sets.values():
        total = torch.zeros((), dtype=torch.float64, device=ranks.device)
        text_bytes = 0
        for start in range(0, len(numbers), ranks.world_size * micro_batch):
            first = start + ranks.rank * micro_batch
            mine = numbers[first : first + micro_batch]
            # A rank that has run out goes through the forward all the same: sharded weights are gathered in it.
            tokens = holdout.rows(mine if len(mine) else numbers[:1])
            loss, _ = losses(engine, tokens.to(ranks.device))
            if len(mine):
                total += loss.double()
                text_bytes += holdout.target_bytes(tokens)
            tick(len(numbers[start : start + ranks.world_size * micro_batch]))
        sums += [total.item(), text_bytes]
    engine.model.train()
    sums = ranks.sum(sums)
    counts = [len(numbers) * holdout.block_size for numbers in sets.values()]
    parts = {
        label: Score(nats, count, round(text_bytes))
        for label, nats, text_bytes, count in zip(sets, sums[::2], sums[1::2], counts, strict=True)
    }
    return Score.of(parts, apart=len(holdout.labels) > 1)


def limits(model: PreTrainedModel, holdout: HoldoutData, scored: int) -> Iterator[str]:
    """Warnings of a loss that is left out, and of a held-out loss that means little.

    Args:
        model: whole, on the meta device.
        scored: blocks that an evaluation scores.
    """
    config = model.config
    if (experts := routed_experts(config)) and not adds_router_loss(model):
        why = "transformers computes none for it"
        if has_router_loss(model):
            why = "model.output_router_logits=true adds it, times model.router_aux_loss_coef"
        yield (
            f"model: {config.model_type} routes tokens to {experts} experts, and no loss that balances its router is "
            f"added: some experts may be left untrained ({why})"
        )
    if holdout.n_blocks * holdout.block_size < _FEW_HELD_OUT_TOKENS:
        yield (
            f"data.holdout: only {holdout.n_blocks} blocks of {holdout.block_size} tokens are held out, too few for a "
            f"held-out loss to trust; raise data.holdout or add text"
        )
    if without := [label for label, numbers in holdout.sets(scored).items() if not len(numbers)]:
        yield (
            f"eval.batches: of the {scored} held-out blocks that are scored none is of {', '.join(without)}, which "
            f"gets no figure of its own; raise eval.batches or data.holdout"
        )
