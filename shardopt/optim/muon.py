"""Muon for a model's hidden matrices, and AdamW for the rest of it: how everybody trains with Muon."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardopt.optim import states


class Muon(Optimizer):
    """torch's Muon for matrices, and torch's AdamW for all other parameters, as one optimizer.

    A parameter group may say `muon: True` or `False`; without it each of its parameters is a matrix where it has two
    dimensions. `hidden_matrices` says what to give to AdamW of a whole model. Jordan et al.,
    https://kellerjordan.github.io/posts/muon; Liu et al., arXiv 2502.16982, whose scale of a matrix's update
    ("match_rms_adamw") lets one lr and weight decay do for both.

    Args:
        params: parameters, (name, parameter) pairs or groups of either.
        lr, weight_decay: of both.
        momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: torch's Muon has them.
        betas, adamw_eps: of AdamW.

    Raises:
        ValueError: a value that torch's optimizers refuse, or a group for Muon with a parameter that is no matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
    ) -> None:
        both: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        muon: dict[str, Any] = {
            "momentum": momentum, "nesterov": nesterov, "ns_coefficients": ns_coefficients, "eps": eps,
            "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn,
        }  # fmt: skip
        # Their settings are checked by a parameter of no use; they get the real ones at each step.
        self._muon = torch.optim.Muon([torch.zeros(1, 1)], **both, **muon)
        self._adamw = torch.optim.AdamW([torch.zeros(1)], **both, betas=betas, eps=adamw_eps)
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        parts = [part for group in groups for part in _split(group, lambda param: param.ndim == 2)]
        for group in parts:
            if group["muon"] and (other := [p.ndim for p in map(_parameter, group["params"]) if p.ndim != 2]):
                raise ValueError(f"Muon takes matrices, and a group for it has a parameter of {other[0]} dimensions")
        defaults = {True: self._muon.defaults, False: self._adamw.defaults}
        super().__init__([{**defaults[group["muon"]], **group} for group in parts], both)

    def _parts(self) -> tuple[Optimizer, Optimizer]:
        """Both, over the groups and the state as they are now (a load puts others in their place)."""
        for part, own in (self._muon, True), (self._adamw, False):
            part.param_groups = [group for group in self.param_groups if group["muon"] is own]
            part.state = self.state
        return self._muon, self._adamw

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts():
            part.step()
        return loss

    def init_state(self) -> None:
        """Create the state of every parameter that requires grad. Counts no step, leaves existing state alone."""
        for part in self._parts():
            states.init_state(part)


def hidden_matrices(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parameter groups of a model, each cut into its hidden matrices, for Muon, and the others, for AdamW.

    No hidden matrices are embeddings, a transformers model's output head, and what has not two dimensions.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    others = {param for module in model.modules() if isinstance(module, nn.Embedding) for param in module.parameters()}
    others |= set(head.parameters()) if head is not None else set()
    return [part for group in groups for part in _split(group, lambda p: p.ndim == 2 and p not in others)]


def _split(group: dict[str, Any], is_hidden: Callable[[Tensor], bool]) -> list[dict[str, Any]]:
    if "muon" in group:
        return [group]
    params = list(group["params"])
    parts = {own: [p for p in params if is_hidden(_parameter(p)) is own] for own in (True, False)}
    return [{**group, "params": part, "muon": own} for own, part in parts.items() if part]


def _parameter(entry: Any) -> Tensor:
    """The parameter of a group's entry, which may be a pair with its name."""
    return entry[1] if isinstance(entry, tuple) else entry
