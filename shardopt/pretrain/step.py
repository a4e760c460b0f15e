"""One optimizer step over the global batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardopt.engines.base import Engine
from shardopt.pretrain.scoring import token_loss_sum


@dataclass(frozen=True)
class Outcome:
    """What a step gave, the same on every rank.

    Attributes:
        loss: mean over the targets of the global batch, in nats per token.
        norm: L2 norm of the gradient before clipping.
        taken: false where one of them is not finite: the weights and the optimizer's state are as they were.
        stop: whether any rank was asked to stop.
    """

    loss: float
    norm: float
    taken: bool
    stop: bool


def take_step(engine: Engine, micros: Sequence[Tensor], targets: int, grad_clip: float | None, stop: bool) -> Outcome:
    """Forward and backward of this rank's micro-batches, clipping, and the update. A collective.

    Args:
        micros: token ids, each (sequences, block_size + 1).
        targets: target tokens of the global batch, over all ranks.
        stop: whether this rank was asked to stop.
    """
    ranks = engine.ranks
    total = torch.zeros((), device=ranks.device)
    for index, tokens in enumerate(micros):
        with engine.accumulate(last=index == len(micros) - 1):
            loss = token_loss_sum(engine, tokens.to(ranks.device, non_blocking=True)) / targets
            engine.backward(loss)
        total += loss.detach()
    norm = engine.clip_grad_norm(grad_clip)
    summed, stops = ranks.sum([total.item(), float(stop)])
    taken = math.isfinite(norm) and math.isfinite(summed)
    if taken:
        engine.step()
    engine.zero_grad()
    return Outcome(summed, norm, taken, stops > 0)
