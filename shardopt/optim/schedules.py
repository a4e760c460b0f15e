"""Warm-ups of alpha and beta3 as pure functions of the step. Doubles in, doubles out.

Source: Pagliardini et al., "The AdEMAMix Optimizer", arXiv 2409.03137, section 3.1 and appendix A.1.
"""

from __future__ import annotations

import math


def alpha_at(step: int, alpha: float, warmup: int | None) -> float:
    """The weight of the slow average at step `step` (from 1): linear over `warmup` steps, then `alpha`."""
    return alpha if warmup is None else alpha * min(step / warmup, 1.0)


def beta3_at(step: int, beta3: float, beta_start: float, warmup: int | None) -> float:
    """The slow average's decay at step `step` (from 1), rising from `beta_start` to `beta3`.

    The half-life grows linearly: ln(beta) moves harmonically from ln(beta_start) to ln(beta3). For
    `beta_start` = 0 this has the limit beta3 ** (warmup / step).
    """
    if warmup is None or step >= warmup:
        return beta3
    fraction = step / warmup
    if beta_start == 0.0:
        return beta3 ** (1.0 / fraction) if fraction > 0.0 else 0.0
    start, end = math.log(beta_start), math.log(beta3)
    return math.exp(start * end / ((1.0 - fraction) * end + fraction * start))
