"""Hooks of a ZeroOptimizer on its model, so that nothing is read, replaced or forgotten behind its back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from shardopt.errors import InputError

if TYPE_CHECKING:
    from shardopt.engines.zero.flat import WeightGather
    from shardopt.engines.zero.micro_batches import MicroBatches
    from shardopt.engines.zero.optimizer import ZeroOptimizer


class Hook:
    """A method as a hook of the model, which must not keep the optimizer alive; in a copy of the model it is idle."""

    def __init__(self, method: Callable[..., None], *args: Any) -> None:
        self.method, self.args = weakref.WeakMethod(method), args

    @_disable_dynamo  # torch.compile would do it once, as it traces; torch.compiler.disable imports it, for a second
    def __call__(self, *_: Any) -> None:
        if (method := self.method()) is not None:
            method(*self.args)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (_do_nothing,)


def _do_nothing(*_: Any) -> None:
    pass


class _ZeroGrad:
    """A model's `zero_grad` that also drops what ZeroOptimizers have taken; a copy of the model has the plain one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.optimizers: weakref.WeakSet[ZeroOptimizer] = weakref.WeakSet()
        model.zero_grad = self  # type: ignore[method-assign]

    def __call__(self, set_to_none: bool = True) -> None:
        model = self.model()
        assert model is not None
        for optimizer in list(self.optimizers):
            optimizer.zero_grad()
        type(model).zero_grad(model, set_to_none)

    def remove(self, optimizer: ZeroOptimizer) -> None:
        self.optimizers.discard(optimizer)
        model = self.model()
        if model is not None and not self.optimizers and model.__dict__.get("zero_grad") is self:
            del model.zero_grad

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.model(), "zero_grad")  # a copy has its class's, until its own attributes are set


# By the identity of the parameter: the ZeroOptimizer that has made it a view of its buckets.
_owners = torch.utils.weak.WeakIdKeyDictionary()


def _is_owned(param: Tensor) -> bool:
    owner = _owners.get(param)
    return owner is not None and owner() is not None


def refuse_owned(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise InputError naming the first parameter of another ZeroOptimizer, which would go on taking its gradients."""
    for name, param in named:
        if _is_owned(param):
            raise InputError(f"{name} belongs to another ZeroOptimizer: call close() on that one first")


class Guards:
    """The hooks of one optimizer on its model and parameters; `remove` takes them off."""

    def __init__(self, optimizer: ZeroOptimizer, micro_batches: MicroBatches) -> None:
        self.optimizer, self.parameters = weakref.ref(optimizer), micro_batches.flat.parameters
        self.handles: list[Any] = []
        for index, p in enumerate(self.parameters):
            _owners[p.param] = self.optimizer
            self.handles.append(p.param.register_post_accumulate_grad_hook(Hook(micro_batches.on_gradient, index)))
        self.zero_grad: _ZeroGrad | None = None
        self.model = model = optimizer.model
        self.trainable = set() if model is None else {p for p in model.parameters() if p.requires_grad}
        if model is not None:
            held = model.__dict__.get("zero_grad")
            self.zero_grad = held if isinstance(held, _ZeroGrad) else _ZeroGrad(model)
            self.zero_grad.optimizers.add(optimizer)

    def refuse_untrained(self) -> None:
        """Raise InputError naming a parameter that is trainable since construction only, and in no ZeroOptimizer."""
        for name, param in self.model.named_parameters() if self.model is not None else ():
            if param.requires_grad and param not in self.trainable and not _is_owned(param):
                mistake = "was frozen or not there when ZeroOptimizer was built, so that nobody trains it"
                raise InputError(f"{name} {mistake}: freeze it, or close() this ZeroOptimizer and build another")

    def wait_for_weights(self, gather: WeightGather, model: nn.Module, overlapped: Sequence[nn.Module]) -> None:
        """Make what reads or replaces weights by way of a module wait for those that are in flight.

        Args:
            gather: gets the order of its buckets from here, too.
            overlapped: modules that are alone in using their own weights; the model's forward does not wait for them.
        """
        bucket_of: dict[Tensor, int] = {p.param: p.bucket.index for p in self.parameters}

        def buckets_of(params: Iterable[Tensor]) -> list[int]:
            return sorted({bucket_of[p] for p in params if p in bucket_of}, reverse=True)

        covered = {m for module in overlapped for m in module.modules()}
        # Weights of an overlapped module's own children are waited for by the children too, since activation
        # checkpointing may call its `forward`, past its hooks; weights of its own then have nobody but the model.
        early = [m for m in model.modules() if m not in covered or next(m.children(), None) is not None]
        needs = [(model, buckets_of(p for m in early for p in m.parameters(recurse=False)))]
        needs += [(m, buckets_of(m.parameters())) for m in overlapped]
        gather.order = list(dict.fromkeys(b for _, buckets in needs for b in buckets))
        needs += [(m, buckets_of(m.parameters(recurse=False))) for m in model.modules() if m is not model]
        for module, buckets in needs:
            if buckets:
                self.handles.append(module.register_forward_pre_hook(Hook(gather.wait, buckets)))
        for module in model.modules():
            self.handles.append(module.register_state_dict_pre_hook(Hook(gather.wait)))
            self.handles.append(module.register_load_state_dict_pre_hook(Hook(gather.wait)))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self.zero_grad is not None and (optimizer := self.optimizer()) is not None:
            self.zero_grad.remove(optimizer)
        for p in self.parameters:
            if _owners.get(p.param) is self.optimizer:
                del _owners[p.param]
