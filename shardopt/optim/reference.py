"""The AdEMAMix update in plain torch: for reading, and the oracle that every kernel is held against.

Nothing here knows about storage formats, parameter groups or devices: `update` takes the exact state in any
floating dtype and returns the new one. Scalars are Python doubles. The order of the operations below is the
contract with the kernels: each rounds once, none is contracted, so that in fp32 all of them agree bit for bit.

The averages are written x + (1 - beta) (g - x). That is beta x + (1 - beta) g, but in fp32 it keeps the rate: 1 - beta
is formed in double, where fp32(0.9999) is 1.7e-4 of 1 - beta away.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from shardopt.optim.schedules import alpha_at, beta3_at

# The square of a large fp32 gradient is held here, so that nu stays finite in every format (also rounded up to bf16):
# an infinite nu would turn into inf - inf. A power of two near the end of the range.
LARGEST_SQUARE = 2.0**127


class Scalars(NamedTuple):
    """What one step needs to know about one parameter besides its tensors."""

    lr: float
    beta1: float
    beta2: float
    beta3: float  # of this step
    alpha: float  # of this step
    bias_correction1: float  # 1 / (1 - beta1 ** t)
    bias_correction2: float  # 1 / (1 - beta2 ** t)
    eps: float
    eps_root: float
    weight_decay: float
    weight_ema_rate: float = 0.0  # 1 - weight_ema; 1 at the first step, where the average starts
    yogi: bool = False
    maximize: bool = False


def scalars_at(
    step: int,
    schedule_step: int,
    *,
    lr: float,
    betas: tuple[float, float, float],
    alpha: float,
    eps: float,
    weight_decay: float,
    alpha_warmup: int | None = None,
    beta3_warmup: int | None = None,
    eps_root: float = 0.0,
    second_moment: str = "adam",
    maximize: bool = False,
    weight_ema: float | None = None,
) -> Scalars:
    """The scalars of step `step` (from 1); the schedules are at `schedule_step` (differs after a switch)."""
    beta1, beta2, beta3 = betas
    return Scalars(
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        beta3=beta3_at(schedule_step, beta3, beta1, beta3_warmup),
        alpha=alpha_at(schedule_step, alpha, alpha_warmup),
        bias_correction1=bias_correction(beta1, step),
        bias_correction2=bias_correction(beta2, step),
        eps=eps,
        eps_root=eps_root,
        weight_decay=weight_decay,
        weight_ema_rate=0.0 if weight_ema is None else (1.0 if step == 1 else 1.0 - weight_ema),
        yogi=second_moment == "yogi",
        maximize=maximize,
    )


def bias_correction(beta: float, step: int) -> float:
    """1 / (1 - beta ** step), accurate for beta close to 1."""
    return 1.0 if beta == 0.0 else -1.0 / math.expm1(step * math.log(beta))


def update(
    weight: Tensor,
    grad: Tensor,
    m1: Tensor | None,
    m2: Tensor,
    nu: Tensor,
    s: Scalars,
    weight_ema: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """New (weight, m1, m2, nu, weight_ema), all of one shape and floating dtype; `m1` is None when beta1 is 0.

    With lr = 0 the weight is returned as it came: not even the sign of a zero moves.
    """
    g = -grad if s.maximize else grad
    if m1 is not None:
        m1 = m1 + (g - m1) * (1.0 - s.beta1)
    m2 = m2 + (g - m2) * (1.0 - s.beta3)
    squared = g * g
    if squared.dtype == torch.float32:
        squared = squared.clamp(max=LARGEST_SQUARE)
    if s.yogi:
        nu = nu - torch.sign(nu - squared) * (squared * (1.0 - s.beta2))
    else:
        nu = nu + (squared - nu) * (1.0 - s.beta2)
    if s.lr != 0.0:
        weight = weight - (direction(g if m1 is None else m1, m2, nu, s) + weight * s.weight_decay) * s.lr
    if weight_ema is not None:
        weight_ema = weight_ema + (weight - weight_ema) * s.weight_ema_rate
    return weight, m1, m2, nu, weight_ema


def direction(m1: Tensor, m2: Tensor, nu: Tensor, s: Scalars) -> Tensor:
    """u, the update before learning rate and weight decay."""
    denominator = square_root(nu * s.bias_correction2 + s.eps_root) + s.eps
    return (m1 * s.bias_correction1 + m2 * s.alpha) / denominator


def square_root(x: Tensor) -> Tensor:
    """Correctly rounded, which torch's own is not on a CPU with MKL (a fifth of the fp32 results are an ulp off)."""
    if x.dtype == torch.float32 and x.device.type == "cpu":
        return torch.sqrt(x.double()).float()
    return torch.sqrt(x)
