"""The `tracking` section: what a run records, how often, and where."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shardopt.pretrain.section import Section, Steps


class WandbConfig(Section):
    """The W&B run: mode, project and labels."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: as WANDB_MODE says; without it online where there is an API key, else offline. Never asks."""
    project: str = "shardopt"
    """Project that the run belongs to."""
    entity: str | None = None
    """User or team; None: the account's default."""
    group: str | None = None
    """Group of runs that W&B shows as one; None: none."""
    tags: tuple[str, ...] = ()
    """Words to find the run by."""
    notes: str | None = None
    """What the run is for; shown beside it."""
    artifacts: Literal["none", "export", "all"] = "none"
    """Files that W&B keeps at the end of a start: the export, or the newest checkpoint too. Both may be large."""


class TrackingConfig(Section):
    """The record of a run: metrics.jsonl, and the trackers that have the same rows."""

    log_every: Steps = Field(10, ge=1)
    """Steps between rows of metrics."""
    layers_every: Steps | None = Field(None, ge=1)
    """Steps between measurements of each layer's gradient norm and update-to-weight ratio; null: none. Such a step
    holds a copy of the local weights while it updates them, and reads weights twice and gradients once more."""
    noise_scale: bool = False
    """Measure the gradient noise scale at every step; needs the engine ddp, zero or fsdp on several ranks, or
    single with several micro-batches."""
    sample_every: Steps | None = Field(None, ge=1)
    """Steps between samples of text, of eval.sample_tokens each; there is always one at the end. null: that one."""
    tensorboard: bool = False
    """Write the folder tensorboard/, for `tensorboard --logdir RUN`."""
    wandb: WandbConfig = WandbConfig()

    def samples_at(self, step: int) -> bool:
        """Whether text is sampled after `step`."""
        return self.sample_every is not None and step % self.sample_every == 0
