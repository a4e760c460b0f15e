"""Gradients that are there between calls of a training loop, in the places where torch keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardopt.slices import local_tensor


class UnusedGradients:
    """Tells gradients that a step has used, and that may stay until zero_grad, from those that wait for a step.

    A step post-hook, which marks the gradients with the version that they have: whatever is added changes it.

    Args:
        gradients: gives those that are there.
    """

    def __init__(self, gradients: Callable[[], Iterable[Tensor]]) -> None:
        self.gradients = gradients
        self()  # nobody knows of those from before

    @classmethod
    def of(cls, optimizer: Optimizer, gradients: Callable[[], Iterable[Tensor]]) -> UnusedGradients:
        """That of `optimizer`, which has one only, however many look at it."""
        known = [hook for hook in optimizer._optimizer_step_post_hooks.values() if isinstance(hook, cls)]
        if not known:
            optimizer.register_step_post_hook(made := cls(gradients))
        return known[0] if known else made

    def __call__(self, *_: Any) -> None:
        for gradient in self.gradients():  # a DTensor's own version does not change with its shard's
            gradient._shardopt_used = local_tensor(gradient)._version  # type: ignore[attr-defined]

    def are_there(self) -> bool:
        """True where a gradient that is not zero waits for a step."""
        here = ((getattr(gradient, "_shardopt_used", None), local_tensor(gradient)) for gradient in self.gradients())
        return any(used != local._version and bool(local.any()) for used, local in here)


def gradients_of(params: Iterable[Tensor]) -> list[Tensor]:
    """The `.grad` of those that have one."""
    return [param.grad for param in params if param.grad is not None]


def placed_as(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient placed as its parameter, to which partial sums are added up. A collective, where it is not yet."""
    if not isinstance(param, DTensor) or not isinstance(grad, DTensor) or grad.placements == param.placements:
        return grad
    return grad.redistribute(placements=param.placements)


def fsdp_groups(module: nn.Module) -> Iterator[Any]:
    """The groups of parameters that FSDP2 gathers and reduces together, of `module` itself; torch has no public name.

    Of a module that FSDP2 does not know there is none.
    """
    if isinstance(module, FSDPModule):
        state: Any = module._get_fsdp_state()
        if hasattr(state, "_fsdp_param_groups"):
            yield from state._fsdp_param_groups
        elif state._fsdp_param_group is not None:  # torch 2.11 has one at most
            yield state._fsdp_param_group


def held_by_fsdp(model: nn.Module) -> bool:
    """True where FSDP2 keeps gradients of earlier micro-batches out of sight: whole ones, which no rank has reduced
    (set_requires_gradient_sync), or sums that wait for the other replicas (set_requires_all_reduce)."""
    for group in (group for module in model.modules() for group in fsdp_groups(module)):
        if group._partial_reduce_output is not None:
            return True
        if any(p.unsharded_accumulated_grad is not None or _whole_gradient(p) is not None for p in group.fsdp_params):
            return True
    return False


def drop_in_fsdp(model: nn.Module) -> None:
    """Forget the gradients that `held_by_fsdp` finds, which zero_grad does not see."""
    for group in (group for module in model.modules() for group in fsdp_groups(module)):
        group._partial_reduce_output = None
        getattr(group, "_partial_reduce_output_layout", {}).clear()  # since torch 2.15: whose sums lie where
        for p in group.fsdp_params:
            if _whole_gradient(p) is not None:
                p._unsharded_param.grad = None
            if p.unsharded_accumulated_grad is not None:  # since torch 2.15 the same tensor, which cannot be set
                p.unsharded_accumulated_grad = None


def _whole_gradient(param: Any) -> Tensor | None:
    return getattr(getattr(param, "_unsharded_param", None), "grad", None)
