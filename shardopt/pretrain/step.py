"""One optimizer step over the global batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardopt.engines.base import Engine
from shardopt.pretrain.meter import StepClock
from shardopt.pretrain.scoring import losses


@dataclass(frozen=True)
class Outcome:
    """What a step gave, the same on every rank.

    Attributes:
        loss: mean cross-entropy over the targets of the global batch, in nats per token.
        router_loss: what is added to it for the update, the mean over all micro-batches; None where there is none.
        norm: L2 norm of the gradient before clipping.
        taken: false where one of them is not finite: the weights and the optimizer's state are as they were.
        failed: whether any rank had no batch: the step is not taken.
        stop: whether any rank was asked to stop.
    """

    loss: float
    router_loss: float | None
    norm: float
    taken: bool
    failed: bool
    stop: bool


def take_step(
    engine: Engine,
    micros: Sequence[Tensor],
    targets: int,
    grad_clip: float | None,
    clock: StepClock,
    *,
    failed: bool,
    stop: bool,
) -> Outcome:
    """Forward and backward of this rank's micro-batches, clipping, and the update. A collective.

    Args:
        micros: token ids, each (sequences, block_size + 1), on the device.
        targets: target tokens of the global batch, over all ranks.
        clock: is told where a part of the step begins; it watches the update itself.
        failed: whether this rank's `micros` are no batch, but there so that it meets the others.
        stop: whether this rank was asked to stop.
    """
    ranks = engine.ranks
    total, router_total, routed = torch.zeros((), device=ranks.device), torch.zeros((), device=ranks.device), False
    for index, tokens in enumerate(micros):
        clock.mark("forward_backward")
        with engine.accumulate(last=index == len(micros) - 1):
            nats, router = losses(engine, tokens)
            loss = nats / targets
            total += loss.detach()
            if router is not None:  # a mean over the micro-batch, of which all are alike
                router, routed = router * (tokens[:, 1:].numel() / targets), True
                router_total += router.detach()
                loss = loss + router
            engine.backward(loss)
            clock.mark("reduce_wait")
    norm = engine.clip_grad_norm(grad_clip)
    mine = [total.item(), router_total.item(), float(failed), float(stop)]
    summed, router_summed, failures, stops = ranks.sum(mine)
    taken = all(map(math.isfinite, (norm, summed, router_summed))) and not failures
    if taken:
        clock.mark("gather_wait")
        engine.step()
    clock.mark(None)
    engine.zero_grad()
    return Outcome(summed, router_summed if routed else None, norm, taken, failures > 0, stops > 0)
