"""The AdEMAMix update in plain torch: for reading, and the oracle that every kernel is held against.

Nothing here knows about storage formats, parameter groups or devices: `update` takes the exact state in any
floating dtype and returns the new one. Scalars are Python doubles. The order of the operations below is the
contract with the kernels: each rounds once, none is contracted, so that in fp32 all of them agree bit for bit.

The averages are written x + (1 - beta) (g - x). That is beta x + (1 - beta) g, but in fp32 it keeps the rate: 1 - beta
is formed in double, where fp32(0.9999) is 1.7e-4 of 1 - beta away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shardopt.optim.precision import square_root
from shardopt.optim.schedules import alpha_at, beta3_at
from shardopt.optim.schema import Scalars

# The square of a large fp32 gradient is held here, so that nu stays finite in every format (also rounded up to bf16):
# an infinite nu would turn into inf - inf. A power of two near the end of the range.
LARGEST_SQUARE = 2.0**127


def scalars_at(
    group: Mapping[str, Any], step: int, schedule_step: int | None = None, lr: float | None = None
) -> Scalars:
    """The scalars of step `step` (from 1) under the hyper-parameters of `group`.

    Args:
        schedule_step: step of the schedules, which differs after a switch from AdamW.
        lr: in the place of the group's.
    """
    beta1, beta2, beta3 = group["betas"]
    scheduled = step if schedule_step is None else schedule_step
    weight_ema = group["weight_ema"]
    lr = float(group["lr"]) if lr is None else lr
    alpha = alpha_at(scheduled, group["alpha"], group["alpha_warmup"])
    correction2 = bias_correction(beta2, step)
    scale = math.sqrt(correction2)
    return Scalars(
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        beta3=beta3_at(scheduled, beta3, beta1, group["beta3_warmup"]),
        alpha=alpha,
        m1_factor=lr * bias_correction(beta1, step) / scale,
        m2_factor=lr * alpha / scale,
        eps=group["eps"] / scale,
        eps_root=group["eps_root"] / correction2,
        decay=lr * group["weight_decay"],
        weight_ema_rate=0.0 if weight_ema is None else (1.0 if step == 1 else 1.0 - weight_ema),
        yogi=group["second_moment"] == "yogi",
        maximize=group["maximize"],
    )


def scalars_of(group: Mapping[str, Any], step: int, schedule_step: int) -> Scalars:
    """A parameter group's scalars at a step (from 1). A step on the device (capturable) stands as 0."""
    lr = group["lr"]
    on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
    known = 0.0 if on_device and not step else float(lr)  # reading a device's tensor would break a capture
    found = scalars_at(group, max(1, step), max(1, schedule_step), lr=known)
    if not step and group["weight_ema"] is not None:
        found = found._replace(weight_ema_rate=1.0 - group["weight_ema"])  # the kernel knows the first step itself
    return found


def bias_correction(beta: float, step: int) -> float:
    """1 / (1 - beta ** step), accurate for beta close to 1."""
    return 1.0 if beta == 0.0 else -1.0 / math.expm1(step * math.log(beta))


def average(x: Tensor, new: Tensor, beta: float) -> Tensor:
    """beta x + (1 - beta) new, from the side of the larger share.

    With a small beta, x + (1 - beta) (new - x) would leave the rounding error of a large x in a small result.
    """
    return x + (new - x) * (1.0 - beta) if beta >= 0.5 else new + (x - new) * beta


def update(weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], s: Scalars) -> tuple[Tensor, dict[str, Tensor]]:
    """The new weight and state, all of one shape and floating dtype; there is no m1 where beta1 is 0.

    With lr = 0 the weight is returned as it came: not even the sign of a zero moves.
    """
    g = -grad if s.maximize else grad
    new = {"m2": average(state["m2"], g, s.beta3)}
    if "m1" in state:
        new["m1"] = average(state["m1"], g, s.beta1)
    squared = g * g
    if squared.dtype == torch.float32:
        squared = squared.clamp(max=LARGEST_SQUARE)
    nu = state["nu"]
    if s.yogi:
        new["nu"] = nu - torch.sign(nu - squared) * (squared * (1.0 - s.beta2))
    else:
        new["nu"] = average(nu, squared, s.beta2)
    if s.lr != 0.0:
        weight = weight - (direction(new.get("m1", g), new["m2"], new["nu"], s) + weight * s.decay)
    if "weight_ema" in state:
        new["weight_ema"] = state["weight_ema"] + (weight - state["weight_ema"]) * s.weight_ema_rate
    return weight, new


def direction(m1: Tensor, m2: Tensor, nu: Tensor, s: Scalars) -> Tensor:
    """lr u, the update before weight decay: u itself with the scalars of lr = 1."""
    return (m1 * s.m1_factor + m2 * s.m2_factor) / (square_root(nu + s.eps_root) + s.eps)
