"""AdEMAMix as a torch optimizer: hyper-parameters, state and bookkeeping; the arithmetic is in the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from shardopt.errors import InputError
from shardopt.optim import reference, states
from shardopt.optim.reference import Scalars, scalars_at
from shardopt.slices import Layout, local_tensor

StateDtype = str | Mapping[str, str]
_CHUNK = 1 << 16


class AdEMAMix(Optimizer):
    """AdEMAMix (Pagliardini et al., arXiv 2409.03137): AdamW with a second, slow average of the gradient.

    Args: see the table in docs/optimizer.md.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        alpha_warmup: int | None = None,
        beta3_warmup: int | None = None,
        eps_root: float = 0.0,
        second_moment: str = "adam",
        maximize: bool = False,
        state_dtype: StateDtype = "fp32",
        master_weights: str | None = None,
        average_decay: float | None = None,
        kernel: str = "auto",
        capturable: bool = False,
        seed: int = 0,
    ) -> None:
        if state_dtype != "fp32" or master_weights is not None or average_decay is not None or capturable:
            raise InputError("state_dtype, master_weights, average_decay and capturable: not yet")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha_warmup": alpha_warmup,
            "beta3_warmup": beta3_warmup,
            "eps_root": eps_root,
            "second_moment": second_moment,
            "maximize": maximize,
            "state_dtype": state_dtype,
            "master_weights": master_weights,
            "average_decay": average_decay,
            "capturable": capturable,
            "seed": seed,
        }
        self.explicit_layouts: dict[Tensor, Layout | Sequence[Layout]] = {}
        self._scheduled = {"alpha": 0.0, "beta3": 0.0}
        super().__init__(params, defaults)

    @property
    def kernel(self) -> str:
        """The kernel in use."""
        return "torch"

    def set_layout(self, param: Tensor, layout: Layout | Sequence[Layout]) -> None:
        """Say which elements of which parameter(s) the local tensor `param` holds, before the first step.

        A flat partition that holds several parameters takes a sequence, whose local starts count in `param`.
        """
        self.explicit_layouts[param] = layout

    def schedule_values(self) -> dict[str, float]:
        """alpha and beta3 as the latest step used them (first group)."""
        return dict(self._scheduled)

    @torch.no_grad()
    def init_state(self) -> None:
        """Create the state of every parameter that requires grad; counts no step, leaves existing state alone."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.requires_grad and not self.state.get(param):
                    self._create_state(param, group)

    def _create_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[param]
        state["step"] = 0
        for key in ("m1", "m2", "nu"):
            if key != "m1" or group["betas"][0] != 0.0:
                state[key] = _like(param, torch.zeros_like(local_tensor(param), dtype=torch.float32))
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step on the parameters that have a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._only_creates_state():
            self.init_state()
            return loss
        first = True
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise InputError(
                        "AdEMAMix does not take sparse gradients: build the embedding with sparse=False"
                    )
                state = self.state[param] or self._create_state(param, group)
                state["step"] += 1
                if "schedule_step" in state:
                    state["schedule_step"] += 1
                s = self._scalars(group, state)
                if first:
                    self._scheduled, first = {"alpha": s.alpha, "beta3": s.beta3}, False
                _update_in_place(local_tensor(param), local_tensor(param.grad), state, s)
        return loss

    def _only_creates_state(self) -> bool:
        """torch.distributed.checkpoint makes state by a step without state, lr = 0 and zero gradients."""
        if any(self.state.values()) or any(float(group["lr"]) != 0.0 for group in self.param_groups):
            return False
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return bool(grads) and not any(bool(local_tensor(g).any()) for g in grads)

    def _scalars(self, group: dict[str, Any], state: dict[str, Any]) -> Scalars:
        step = int(state["step"])
        return scalars_at(
            step,
            int(state.get("schedule_step", step)),
            **{
                key: group[key]
                for key in (
                    "betas alpha eps weight_decay alpha_warmup beta3_warmup eps_root second_moment maximize"
                ).split()
            },
            lr=float(group["lr"]),
        )

    @torch.no_grad()
    def statistics(self) -> dict[str, Tensor]:
        """LOCAL sums of squares (0-d float64) of m1, m2 and the update u, from the state as it stands."""
        sums = {key: torch.zeros((), dtype=torch.float64) for key in ("m1", "m2", "update")}
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state.get(param)
                if not state or not state["step"]:
                    continue
                s = self._scalars(group, state)
                m2, nu = local_tensor(state["m2"]), local_tensor(state["nu"])
                m1 = local_tensor(state["m1"]) if "m1" in state else torch.zeros_like(m2)
                sums["m1"] += m1.double().square().sum().cpu()
                sums["m2"] += m2.double().square().sum().cpu()
                sums["update"] += reference.direction(m1, m2, nu, s).double().square().sum().cpu()
        return sums

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        raise InputError("averaged_weights needs average_decay: not yet")
        yield


def _like(param: Tensor, local: Tensor) -> Tensor:
    """`local` as a DTensor of `param`'s placement where `param` is one, so that hosts treat the state like it."""
    from torch.distributed.tensor import DTensor

    if not isinstance(param, DTensor):
        return local
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def _update_in_place(weight: Tensor, grad: Tensor, state: dict[str, Any], s: Scalars) -> None:
    m1, m2, nu = (local_tensor(state[k]) if k in state else None for k in ("m1", "m2", "nu"))
    new = reference.update(weight.float(), grad.float(), m1, m2, nu, s)
    if not math.isclose(s.lr, 0.0, abs_tol=0.0):
        weight.copy_(new[0])
    for old, value in ((m1, new[1]), (m2, new[2]), (nu, new[3])):
        if old is not None and value is not None:
            old.copy_(value)
