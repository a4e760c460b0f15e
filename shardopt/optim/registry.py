"""Optimizers by name: which class, whether any element of it may be cut off, and which parameters decay."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardopt import slices
from shardopt.errors import InputError, did_you_mean
from shardopt.optim.ademamix import AdEMAMix
from shardopt.optim.baselines import SimplifiedAdEMAMix, Yogi
from shardopt.optim.muon import Muon, hidden_matrices

Arrange = Callable[[nn.Module, list[dict[str, Any]]], list[dict[str, Any]]]


@dataclass(frozen=True)
class OptimizerSpec:
    """A class, its hyper-parameters and how a model's parameters fall into groups.

    Args:
        cls: the optimizer's class.
        kwargs: its hyper-parameters, all but `params`.
        elementwise: an element's update needs only its own weight, gradient and state, so that state may be
            sharded at any element boundary.
        reason: why not, where it is not elementwise; one clause, for a refusal's message.
        arrange: the parameter groups that the class wants of a model, given those that it would get.
    """

    cls: type[Optimizer]
    kwargs: dict[str, Any]
    elementwise: bool = True
    reason: str = ""
    arrange: Arrange | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Every hyper-parameter with its value, the class's defaults included."""
        return {k: p.default for k, p in inspect.signature(self.cls).parameters.items() if k != "params"} | self.kwargs

    def groups(self, named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """Torch-style parameter groups of (name, parameter) pairs, in the order given.

        Matrices and larger (ndim >= 2) decay; norms and biases get `weight_decay` 0.0. One group where
        nothing decays. Frozen parameters are left out, and so are empty groups. DTensors never share a group
        with ordinary tensors: torch's fused and foreach steps fail on the mix.
        """
        from torch.distributed.tensor import DTensor

        default = inspect.signature(self.cls).parameters.get("weight_decay")
        weight_decay = self.kwargs.get("weight_decay", default.default if default else 0.0)
        members: dict[tuple[bool, bool], list[tuple[str, nn.Parameter]]] = {}
        for name, param in named:
            if param.requires_grad:
                key = (bool(weight_decay) and param.ndim < 2, isinstance(param, DTensor))
                members.setdefault(key, []).append((name, param))
        return [
            {"params": pairs, **({"weight_decay": 0.0 if exempt else weight_decay} if weight_decay else {})}
            for (exempt, _), pairs in sorted(members.items(), key=lambda item: item[0])
        ]

    def build(self, model: nn.Module) -> Optimizer:
        """The optimizer over `model`'s trainable parameters, under their canonical names.

        Raises:
            InputError: nothing to train, or a parameter that the class refuses.
        """
        groups = self.groups(slices.named_parameters(model))
        groups = groups if self.arrange is None else self.arrange(model, groups)
        if not groups:
            raise InputError("the model has no trainable parameter: set requires_grad on at least one")
        try:
            return self.cls(groups, **self.kwargs)
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.cls.__name__}: {error}") from error


class UnknownKeyError(InputError):
    """A hyper-parameter that the optimizer does not have."""


_known: dict[str, OptimizerSpec] = {}  # with presets for kwargs


def register(
    name: str,
    cls: type[Optimizer],
    elementwise: bool = True,
    *,
    reason: str = "",
    preset: dict[str, Any] | None = None,
    arrange: Arrange | None = None,
) -> None:
    """Make an optimizer known by `name`.

    Args:
        name: what a configuration says.
        cls, elementwise, reason, arrange: see `OptimizerSpec`; a class that is not elementwise must say why.
        preset: hyper-parameters that differ from the class's own defaults; the user's go before them.

    Raises:
        ValueError: the name is taken, or the reason is missing.
    """
    if name in _known:
        raise ValueError(f"an optimizer named {name!r} is already registered")
    if not elementwise and not reason:
        raise ValueError(f"{name}: say in `reason` why it cannot be sharded at any element boundary")
    _known[name] = OptimizerSpec(cls, preset or {}, elementwise, reason, arrange)


def names() -> tuple[str, ...]:
    """All known names, in alphabetical order."""
    return tuple(sorted(_known))


def defaults(name: str) -> dict[str, Any]:
    """The hyper-parameters of the named optimizer and their defaults."""
    return _arguments(_known[name]) | _known[name].kwargs


def _arguments(known: OptimizerSpec) -> dict[str, Any]:
    return {key: p.default for key, p in inspect.signature(known.cls).parameters.items() if key != "params"}


def spec(name: str, **kwargs: Any) -> OptimizerSpec:
    """The named optimizer with its hyper-parameters, checked by building one over a single weight.

    Lists, as YAML has them, become tuples.

    Raises:
        UnknownKeyError: hyper-parameters that the class does not have; the message names the nearest known ones.
        InputError: an unknown name, or a value that the class refuses (the message is the class's own).
    """
    if name not in _known:
        raise InputError(f"unknown optimizer {name!r}; known: {', '.join(names())}{did_you_mean(name, names())}")
    found = _known[name]
    allowed = _arguments(found)
    if unknown := [key for key in kwargs if key not in allowed]:
        known = f"it has: {', '.join(allowed)}{did_you_mean(unknown[0], allowed)}"
        raise UnknownKeyError(f"optimizer {name} has no {', '.join(map(repr, unknown))}; {known}")
    for key, value in kwargs.items():
        if isinstance(value, str) and value.lower() == "none" and allowed[key] is None:
            raise InputError(f"optimizer {name}: {key} is the text {value!r}: for none at all, write null")
        if isinstance(value, str) and isinstance(allowed[key], int | float):
            if value.lower().lstrip("+-") in ("nan", "inf"):
                raise InputError(f"optimizer {name}: {key} must be a finite number, got {value}")
            raise InputError(f"optimizer {name}: {key} must be a number, got the text {value!r}")
        if isinstance(value, list | tuple) and isinstance(allowed[key], tuple) and len(value) != len(allowed[key]):
            raise InputError(f"optimizer {name}: {key} must be {len(allowed[key])} numbers, got {value}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in (found.kwargs | kwargs).items()}
    try:
        found.cls([("trial", nn.Parameter(torch.zeros(1, 1)))], **values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"optimizer {name}: {error}") from error
    return replace(found, kwargs=values)


register("ademamix", AdEMAMix)
register("yogi", Yogi)
register("simplified_ademamix", SimplifiedAdEMAMix)
# One pass over memory where torch has one that takes DTensors too (its fused SGD does not). On a CPU its last bit
# depends on where a tensor ends, so shards agree with the whole bit for bit only with fused=False.
register("adamw", torch.optim.AdamW, preset={"fused": True})
register("adam", torch.optim.Adam, preset={"fused": True})
register("amsgrad", torch.optim.Adam, preset={"fused": True, "amsgrad": True})
register("sgd", torch.optim.SGD)
register("rmsprop", torch.optim.RMSprop)
register("adadelta", torch.optim.Adadelta)
register("adafactor", torch.optim.Adafactor, False, reason="it averages squared gradients over whole rows and columns")
register(
    "muon", Muon, elementwise=False, reason="it orthogonalises the momentum of a whole matrix", arrange=hidden_matrices
)
