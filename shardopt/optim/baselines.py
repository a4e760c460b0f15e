"""Optimizers to compare AdEMAMix with that torch does not ship, written to be read rather than to be fast.

Both are elementwise and work on whatever part of a parameter is here: whole tensors, flat slices, the local
part of a DTensor, empty ones included. Both decouple the weight decay: θ ← θ − lr (u + λ θ).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from shardopt.errors import InputError
from shardopt.optim.checked import CheckedOptimizer, Stored
from shardopt.optim.schedules import beta3_at
from shardopt.optim.schema import HyperParameter, decay, decays, learning_rate, number, switch, warmup
from shardopt.slices import local_tensor


class _Elementwise(CheckedOptimizer):
    """The step around an update of one parameter, whose state is m1 (from 0) and nu; subclasses say the update."""

    @abc.abstractmethod
    def _direction(self, group: dict[str, Any], state: dict[str, Any], t: int, grad: Tensor) -> Tensor:
        """Move the averages to step `t` (from 1) and return u, a tensor of the caller's to change."""

    def _check_parameter(self, group: Mapping[str, Any], param: Tensor, name: str) -> None:
        if param.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"{type(self).__name__} keeps no master weights, so its parameters must be float32 or float64: {name} "
                f"is {param.dtype}"
            )

    def _stored(self, group: Mapping[str, Any], param: Tensor) -> dict[str, Stored]:
        local = local_tensor(param.detach())
        return dict.fromkeys(("m1", "nu"), Stored(local.dtype, local.shape))

    def _update(self) -> None:
        graded = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(param.grad.is_sparse for _, param in graded):
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients: use dense embeddings")
        for group, param in graded:
            lr = float(group["lr"])
            weight, grad = local_tensor(param), local_tensor(param.grad)
            state = self.state.get(param) or self._create_state(group, param)
            state["step"] += 1
            local = {key: local_tensor(value) for key, value in state.items()}
            if group["maximize"]:
                grad = -grad
            u = self._direction(group, local, int(state["step"]), grad)
            if lr != 0:
                weight.sub_(u.add_(weight, alpha=group["weight_decay"]), alpha=lr)


class Yogi(_Elementwise):
    """Adam whose second moment moves by at most (1 − β2) g² in a step, whichever way.

    nu ← nu − (1 − β2) sign(nu − g²) g², where Adam has (nu − g²) for sign(nu − g²) g²; the first moment and
    both bias corrections as in Adam. Zaheer et al., Adaptive Methods for Nonconvex Optimization, 2018.

    Args:
        params: parameters, (name, parameter) pairs or groups of either.
        lr: learning rate, ≥ 0.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment, ≥ 0; the paper's 1e-3.
        weight_decay: decoupled, ≥ 0.
        initial_accumulator: what the second moment starts at, ≥ 0; the first starts at 0.
        maximize: ascend.

    Raises:
        InputError: a hyper-parameter out of range, or a parameter that is neither fp32 nor fp64.
    """

    hyper_parameters: ClassVar = {
        "lr": HyperParameter(1e-2, learning_rate),
        "betas": HyperParameter((0.9, 0.999), decays(2)),
        "eps": HyperParameter(1e-3, number),
        "weight_decay": HyperParameter(0.0, number),
        "initial_accumulator": HyperParameter(1e-6, number),
        "maximize": HyperParameter(False, switch),
    }

    def __init__(self, params: Any, *positional: Any, **hyper_parameters: Any) -> None:
        super().__init__(params, *positional, **hyper_parameters)

    def _create_state(self, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
        state = super()._create_state(group, param)
        local_tensor(state["nu"]).fill_(group["initial_accumulator"])
        return state

    def _direction(self, group: dict[str, Any], state: dict[str, Any], t: int, grad: Tensor) -> Tensor:
        beta1, beta2 = group["betas"]
        m1, nu, square = state["m1"], state["nu"], grad * grad
        m1.mul_(beta1).add_(grad, alpha=1 - beta1)
        nu.addcmul_((nu - square).sign_(), square, value=-(1 - beta2))
        denominator = (nu / (1 - beta2**t)).sqrt_().add_(group["eps"])
        return (m1 / (1 - beta1**t)).div_(denominator)


class SimplifiedAdEMAMix(_Elementwise):
    """AdEMAMix with one momentum: a long sum of gradients plus `alpha` times the newest.

    m1 ← β1 m1 + g (a sum, not an average, and without bias correction: lr is 1 − β1 times what an average
    would take); nu as in Adam with its bias correction; u = (alpha g + m1) / (sqrt(nu / (1 − β2^t)) + eps).
    Morwani et al., arXiv 2502.02431.

    Args:
        params: parameters, (name, parameter) pairs or groups of either.
        lr: learning rate, ≥ 0.
        betas: decay of the momentum and of the second moment, each in [0, 1).
        alpha: weight of the newest gradient beside the momentum, ≥ 0; smaller for larger batches.
        eps: added to the root of the second moment, ≥ 0.
        weight_decay: decoupled, ≥ 0.
        beta1_warmup: steps over which β1 grows from `min_beta1`, its half-life linearly; None, or ≥ 1.
        min_beta1: where β1 starts when it is warmed up, in [0, β1].
        maximize: ascend.

    Raises:
        InputError: a hyper-parameter out of range, or a parameter that is neither fp32 nor fp64.
    """

    hyper_parameters: ClassVar = {
        "lr": HyperParameter(1e-4, learning_rate),
        "betas": HyperParameter((0.99, 0.95), decays(2)),
        "alpha": HyperParameter(0.0, number),
        "eps": HyperParameter(1e-8, number),
        "weight_decay": HyperParameter(0.0, number),
        "beta1_warmup": HyperParameter(None, warmup),
        "min_beta1": HyperParameter(0.9, decay),
        "maximize": HyperParameter(False, switch),
    }

    def __init__(self, params: Any, *positional: Any, **hyper_parameters: Any) -> None:
        super().__init__(params, *positional, **hyper_parameters)

    def _check_settings(self, group: dict[str, Any]) -> None:
        super()._check_settings(group)
        beta1, low = group["betas"][0], group["min_beta1"]
        if group["beta1_warmup"] is not None and low > beta1:
            raise InputError(f"min_beta1 must be in [0, betas[0]] = [0, {beta1}] with beta1_warmup, got {low}")

    def _direction(self, group: dict[str, Any], state: dict[str, Any], t: int, grad: Tensor) -> Tensor:
        beta1, beta2 = group["betas"]
        beta1 = beta3_at(t, beta1, group["min_beta1"], group["beta1_warmup"])  # same shape of warm-up
        m1, nu = state["m1"], state["nu"]
        m1.mul_(beta1).add_(grad)
        nu.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (nu / (1 - beta2**t)).sqrt_().add_(group["eps"])
        return torch.add(m1, grad, alpha=group["alpha"]).div_(denominator)
