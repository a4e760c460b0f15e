"""Optimizers to compare AdEMAMix with that torch does not ship, written to be read rather than to be fast.

Both are elementwise and work on whatever part of a parameter is here: whole tensors, flat slices, the local
part of a DTensor, empty ones included. Both decouple the weight decay: θ ← θ − lr (u + λ θ).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from shardopt.errors import InputError
from shardopt.optim.schedules import beta3_at
from shardopt.slices import local_tensor


class _Elementwise(Optimizer, abc.ABC):
    """The step around an update of one parameter; subclasses say the update and what its state starts as."""

    @abc.abstractmethod
    def _check(self, group: dict[str, Any]) -> None:
        """Refuse hyper-parameters out of range."""

    @abc.abstractmethod
    def _fresh_state(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]: ...

    @abc.abstractmethod
    def _direction(self, group: dict[str, Any], state: dict[str, Any], t: int, grad: Tensor) -> Tensor:
        """Move the averages to step `t` (from 1) and return u, a tensor of the caller's to change."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, and refuses hyper-parameters out of range and parameters that are not fp32 or fp64."""
        name = type(self).__name__
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _require("lr", group["lr"], 0.0, math.inf)
        _require("weight_decay", group["weight_decay"], 0.0, math.inf)
        _require("eps", group["eps"], 0.0, math.inf)
        if len(group["betas"]) != 2:
            raise InputError(f"betas must be two numbers, got {group['betas']!r}")
        for i, beta in enumerate(group["betas"]):
            _require(f"betas[{i}]", beta, 0.0, 1.0)
        self._check(group)
        for param in group["params"]:
            if param.dtype not in (torch.float32, torch.float64):
                raise InputError(
                    f"{name} keeps no master weights, so its parameters must be float32 or float64, got {param.dtype}"
                )

    @torch.no_grad()
    def init_state(self) -> None:
        """Create the state of every trainable parameter that has none, without counting a step."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.requires_grad:
                    self._state_of(group, param)

    def _state_of(self, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)  # as torch's own: read without a sync
            state.update(self._fresh_state(group, param))
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss, with gradients on.

        Raises:
            InputError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr = float(group["lr"])
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise InputError(f"{type(self).__name__} takes no sparse gradients: use dense embeddings")
                fresh = param not in self.state
                weight, grad = local_tensor(param), local_tensor(param.grad)
                state = self._state_of(group, param)
                if fresh and lr == 0 and not grad.any():
                    continue  # torch.distributed.checkpoint makes state by such a step: it must not count
                state["step"] += 1
                local = {key: local_tensor(value) for key, value in state.items()}
                if group["maximize"]:
                    grad = -grad
                u = self._direction(group, local, int(state["step"]), grad)
                if lr != 0:
                    weight.sub_(u.add_(weight, alpha=group["weight_decay"]), alpha=lr)
        return loss


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

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        initial_accumulator: float = 1e-6,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "initial_accumulator": initial_accumulator,
                "maximize": maximize,
            },
        )

    def _check(self, group: dict[str, Any]) -> None:
        _require("initial_accumulator", group["initial_accumulator"], 0.0, math.inf)

    def _fresh_state(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        return {"m1": torch.zeros_like(param), "nu": torch.full_like(param, group["initial_accumulator"])}

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

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.99, 0.95),
        alpha: float = 0.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        beta1_warmup: int | None = None,
        min_beta1: float = 0.9,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "alpha": alpha,
                "eps": eps,
                "weight_decay": weight_decay,
                "beta1_warmup": beta1_warmup,
                "min_beta1": min_beta1,
                "maximize": maximize,
            },
        )

    def _check(self, group: dict[str, Any]) -> None:
        _require("alpha", group["alpha"], 0.0, math.inf)
        if group["beta1_warmup"] is None:
            return
        _require("beta1_warmup", group["beta1_warmup"], 1, math.inf)
        if not 0 <= group["min_beta1"] <= group["betas"][0]:
            raise InputError(
                f"min_beta1 must be in [0, betas[0]] = [0, {group['betas'][0]}] with beta1_warmup, "
                f"got {group['min_beta1']}"
            )

    def _fresh_state(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        return {"m1": torch.zeros_like(param), "nu": torch.zeros_like(param)}

    def _direction(self, group: dict[str, Any], state: dict[str, Any], t: int, grad: Tensor) -> Tensor:
        beta1, beta2 = group["betas"]
        beta1 = beta3_at(t, beta1, group["min_beta1"], group["beta1_warmup"])  # same shape of warm-up
        m1, nu = state["m1"], state["nu"]
        m1.mul_(beta1).add_(grad)
        nu.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (nu / (1 - beta2**t)).sqrt_().add_(group["eps"])
        return torch.add(m1, grad, alpha=group["alpha"]).div_(denominator)


def _require(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, str) or not low <= value < high:
        raise InputError(f"{name} must be in [{low:g}, {high:g}), got {value!r}")
