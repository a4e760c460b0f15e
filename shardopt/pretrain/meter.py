"""What the steps since the last row of metrics gave and took."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

import torch
from torch.optim import Optimizer

from shardopt.distributed import Ranks

# Seconds a step of each, in this order.
PARTS = ("forward_backward", "reduce_wait", "update", "gather_wait")


class StepClock:
    """Adds up the time of a step's parts: the host's on the CPU; on a GPU the device's, by events, without a wait."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._part: str | None = None
        self._since: Any = None
        self._laps: list[tuple[str, Any, Any]] = []

    def mark(self, part: str | None) -> None:
        """What comes from here on, to the next mark, is `part`'s; None's is nobody's."""
        now: Any = time.perf_counter()
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        if self._part is not None:
            self._laps.append((self._part, self._since, now))
        self._part, self._since = part, now

    def watch_update(self, optimizer: Optimizer) -> None:
        """Mark the update within whatever else a step of the engine is."""
        optimizer.register_step_pre_hook(lambda *_: self.mark("update"))
        optimizer.register_step_post_hook(lambda *_: self.mark("gather_wait"))

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last call; what a GPU has not done yet is left for the next one."""
        seconds, left = dict.fromkeys(PARTS, 0.0), []
        for lap in self._laps:
            part, begin, end = lap
            if not self._cuda:
                seconds[part] += end - begin
            elif end.query():
                seconds[part] += begin.elapsed_time(end) / 1000
            else:
                left.append(lap)
        self._laps = left
        return seconds


class Meter:
    """The steps since the last row of metrics.

    Args:
        ranks: the processes.
        flops: floating-point operations of the model for one token, forward and backward.
        peak: what a device can do a second; None where that is not known.

    Attributes:
        losses: of each step.
        norm: of the last one.
        waited: seconds that this rank waited for its batches.
    """

    def __init__(self, ranks: Ranks, flops: float, peak: float | None) -> None:
        self._ranks, self._flops, self._peak = ranks, flops, peak
        self.clock = StepClock(ranks.device)
        self.clear()

    def clear(self) -> None:
        """Forget all of them."""
        self.losses: list[float] = []
        self._router_losses: list[float] = []
        self._tokens = 0
        self.norm, self.waited, self._seconds, self._began = math.nan, 0.0, 0.0, 0.0
        self.clock.read()

    def begin(self) -> None:
        self._began = time.perf_counter()

    def end(self, loss: float, norm: float, tokens: int, waited: float, router_loss: float | None = None) -> None:
        """After a step over so many tokens, of all ranks, for whose batch this rank has waited."""
        self.losses.append(loss)
        if router_loss is not None:
            self._router_losses.append(router_loss)
        self.norm = norm
        self._tokens += tokens
        self.waited += waited
        self._seconds += time.perf_counter() - self._began

    def read(self) -> dict[str, float]:
        """Their figures, and forget them: the mean losses, tokens per second, seconds a step and of its parts, each the
        largest of all ranks, and the share of the devices' peak (`mfu`) where that is known. A collective."""
        steps, rate = len(self.losses), self._tokens / self._seconds
        mine = {"step_time": self._seconds, "data_wait": self.waited, **self.clock.read()}
        largest: Counter[str] = Counter()
        for theirs in self._ranks.gather(mine):
            largest |= Counter(theirs)
        figures = {"loss": sum(self.losses) / steps, "grad_norm": self.norm, "tokens_per_second": rate}
        if self._router_losses:
            figures["router_loss"] = sum(self._router_losses) / steps
        figures |= {part: largest[part] / steps for part in mine}
        if self._peak is not None:
            figures["mfu"] = rate * self._flops / (self._peak * self._ranks.world_size)
        self.clear()
        return figures
