"""The guard against spikes of the loss: back to the last checkpoint, and on without the batches since."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from shardopt import checkpoint
from shardopt.engines.state import ShardedState
from shardopt.pretrain.data import Batches
from shardopt.pretrain.progress import Progress, resume
from shardopt.pretrain.section import Section, Steps, in_unit


class LossSpikeConfig(Section):
    """Go back to the last checkpoint when the loss jumps, and on from there without the batches since."""

    above: Annotated[float, in_unit("nats a token")] = Field(gt=0)
    """How far over the mean of the last `window` losses a step's loss is a spike, in nats per token."""
    window: Steps = Field(64, ge=2)
    """Steps in that mean; before there are as many, no loss is a spike, however large."""
    rewinds: Annotated[int, in_unit("times")] = Field(3, ge=1)
    """How often a run goes back; a later spike is a warning."""

    def is_spike(self, progress: Progress, loss: float) -> bool:
        """Whether `loss` is a spike; if not, `progress` remembers it. One that is not finite is neither."""
        recent = progress.recent
        if not math.isfinite(loss):
            return False
        if len(recent) == self.window and loss > sum(recent) / self.window + self.above:
            return True
        self._remember(progress, loss)
        return False

    def _remember(self, progress: Progress, loss: float) -> None:
        progress.recent = [*progress.recent, loss][-self.window :]

    def rewind(
        self,
        progress: Progress,
        loss: float,
        root: Path,
        state: ShardedState,
        batches: Batches,
        seed: int,
        warn: Callable[[str], None],
    ) -> Progress | None:
        """Load the newest checkpoint under `root` after a spike, `loss`. A collective.

        Returns:
            How far the run is then, which leaves out the batches up to the spike; None, with a warning, where it goes
            on instead, with that loss in the mean.
        """
        mean = sum(progress.recent) / self.window
        jumped = (
            f"step {progress.step:,}: the loss has jumped by more than {self.above:g} nats ({mean:.2f} → {loss:.2f})"
        )
        found = checkpoint.latest_intact(root, state.ranks, warn)
        if found is None or progress.rewinds >= self.rewinds:
            why = "there is no checkpoint yet" if found is None else f"it has gone back {progress.rewinds} times"
            warn(f"{jumped}, and the run goes on: {why}")
            self._remember(progress, loss)
            return None
        place = batches.state_dict(progress.step)
        back, _ = resume(found, state, batches, seed)
        batches.load_state_dict(place, back.step)
        back.rewinds = progress.rewinds + 1
        left_out = progress.step - back.step
        warn(f"{jumped}: back to step {back.step:,}, and on without the {left_out} batches since")
        return back
