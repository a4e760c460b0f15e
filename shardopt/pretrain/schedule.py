"""Learning-rate schedules: the factor on the optimizer's lr, a pure function of the run's step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from shardopt.pretrain.section import Section, Steps, in_unit


class ScheduleConfig(Section):
    """A linear warm-up, then the shape called `name`, down to `min_lr_ratio` of the optimizer's lr."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """wsd: warm-up, stable, then a cooldown by 1 − sqrt over the last `cooldown` steps (arXiv 2405.18392)."""
    warmup: Steps = Field(100, ge=0)
    """Steps over which lr rises linearly; step 1 has lr / warmup."""
    min_lr_ratio: Annotated[float, in_unit("share of lr")] = Field(0.01, ge=0, le=1)
    """lr of the last step, as a share of the full lr. Not used by constant."""
    cooldown: Steps | None = Field(None, ge=1)
    """wsd only: steps of the cooldown; None is a fifth of the run."""


_DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "wsd": lambda progress: 1 - math.sqrt(progress),
}


def lr_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """Factor on the lr at `step` (1 is the first) of a run of `steps`; `min_lr_ratio` at the last step."""
    if step < config.warmup:
        return step / config.warmup
    if config.name == "constant":
        return 1.0
    start = config.warmup
    if config.name == "wsd":
        cooldown = config.cooldown if config.cooldown is not None else max(1, steps // 5)
        start = max(start, steps - cooldown)
    if step <= start:
        return 1.0
    progress = min(1.0, (step - start) / max(1, steps - start))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * _DECAYS[config.name](progress)
