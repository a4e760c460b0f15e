"""Sharded state: the part of a model and its optimizer on this process, whichever framework has spread them.

Engines and integrations make one `ShardedState` each; checkpoints, reports and logs know nothing else of them.
"""

from __future__ import annotations

import abc
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardopt.distributed import Ranks
from shardopt.engines.held_gradients import UnusedGradients, drop_in_fsdp, gradients_of, held_by_fsdp, placed_as
from shardopt.errors import InputError
from shardopt.optim import states
from shardopt.slices import (
    Layout,
    Slice,
    is_packed,
    layout_of,
    local_tensor,
    named_parameters,
    persistent_buffers,
    shards_of,
)

logger = logging.getLogger(__name__)


class Saveable(abc.ABC):
    """What a checkpoint is written from: slices, and the numbers beside them.

    Args:
        optimizer: the settings of its groups are kept.
        ranks: the processes; None takes those of the default process group.
    """

    def __init__(self, optimizer: Optimizer, ranks: Ranks | None = None) -> None:
        self.optimizer, self.ranks = optimizer, ranks or Ranks.current()

    @property
    def inner(self) -> Any:
        """The optimizer that keeps the state, where `optimizer` wraps one."""
        return self.optimizer

    def init(self) -> None:  # noqa: B027  there may be nothing
        """Create what is not there yet."""

    @abc.abstractmethod
    def slices(self) -> list[Slice]:
        """The weights, the buffers and the optimizer state held here, as the live tensors themselves."""

    @abc.abstractmethod
    def step_counts(self) -> dict[str, dict[str, int | float]]:
        """Step counts and other numbers of the optimizer by parameter name, of the parameters held here."""

    def holds_gradients(self) -> bool:
        """True between micro-batches: there are gradients here that no step has used yet, which no checkpoint keeps."""
        return False


class ShardedState(Saveable):
    """The weights and the optimizer state that this process holds, and the few sums over all of them.

    Args:
        optimizer: what the training loop steps; its param_groups carry the lr.
        ranks: the processes; None takes those of the default process group.
        model: the module, whose persistent buffers every rank has whole.
        trained_only: leave frozen weights and buffers out of the slices.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        ranks: Ranks | None = None,
        model: nn.Module | None = None,
        trained_only: bool = False,
    ) -> None:
        super().__init__(optimizer, ranks)
        self.model, self.trained_only = model, trained_only

    # Different in each framework

    @abc.abstractmethod
    def weight_slices(self) -> list[Slice]:
        """The weights held here, those that are not trained included unless `trained_only`."""

    @abc.abstractmethod
    def full_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """Each parameter's name and, on rank 0 alone, its whole value on the CPU; one at a time. A collective."""

    @abc.abstractmethod
    def clip_grad_norm(self, max_norm: float | None) -> float:
        """L2 norm of the whole reduced gradient before clipping, the same double on every rank. A collective.

        Scales the gradients down to `max_norm` where the norm exceeds it; None only measures. Not finite as soon as
        any element of the gradient is not finite on any rank; the gradients are then left alone.
        """

    @abc.abstractmethod
    def gradient_bytes(self) -> int:
        """Bytes of gradients that this process holds when backward has ended."""

    @property
    @abc.abstractmethod
    def replicas(self) -> int:
        """Number of ranks that hold each element of the optimizer's state (1 where it is fully sharded).

        The least where parameters differ; see `shares`.
        """

    def layouts(self) -> dict[Tensor, tuple[Layout, ...]]:
        """The elements that each parameter of the inner optimizer stands for."""
        return states.layouts_of(self.inner)

    def refresh(self) -> None:
        """Renew what derives from the weights, after they have been overwritten. A collective."""

    # The same for all

    def buffer_slices(self) -> list[Slice]:
        """The persistent buffers, whole; of those that differ between ranks a checkpoint keeps rank 0's."""
        buffers = [] if self.model is None else persistent_buffers(self.model)
        return [Slice(name, "buffer", Layout.whole(name, b.shape), (b.detach(),)) for name, b in buffers]

    def slices(self) -> list[Slice]:
        """The weights, the buffers and the optimizer state held here, as the live tensors themselves.

        The state is there after `init`. Replicas (DDP, HSDP) each return theirs.
        """
        buffers = [] if self.trained_only else self.buffer_slices()
        return self.weight_slices() + buffers + states.state_slices(self.inner, self.layouts())

    @torch.no_grad()
    def full_parameters(self) -> Iterator[tuple[str, Tensor | None]]:
        """As `full_weights`, and the persistent buffers after them."""
        yield from self.full_weights()
        for s in self.buffer_slices():
            yield s.name, self.on_main(s.tensors[0])

    def on_main(self, tensor: Tensor) -> Tensor | None:
        """`tensor` on the CPU of rank 0, and None elsewhere."""
        return tensor.cpu() if self.ranks.is_main else None

    def init(self) -> None:
        """Create the optimizer's state without counting a step; leave alone what is there."""
        with torch.inference_mode(False):  # what is made in there can never be trained on
            states.init_state(self.inner)

    def step_counts(self) -> dict[str, dict[str, int | float]]:
        return states.step_counts(self.inner, self.layouts())

    def load_step_counts(self, counts: Mapping[str, Mapping[str, int | float]]) -> None:
        """Take over what `step_counts` gave, of all ranks together, after `init`."""
        states.load_step_counts(self.inner, counts, self.layouts())

    def state_bytes(self) -> int:
        """Bytes of optimizer state on this process, padding and step counts included."""
        held = (value for state in self.inner.state.values() for value in state.values())
        return sum(local_tensor(value).nbytes for value in held if isinstance(value, Tensor))

    def statistics(self) -> dict[str, float]:
        """alpha, beta3 and the norms of m1, m2 and the update over the whole model. A collective.

        Empty for an optimizer that does not measure itself.
        """
        if not hasattr(self.inner, "statistics"):
            return {}
        sums = self.inner.statistics(self.shares())
        totals = self.total([value.item() for value in sums.values()])
        norms = {f"{key}_norm": math.sqrt(total) for key, total in zip(sums, totals, strict=True)}
        return {**self.inner.schedule_values(), **norms}

    @torch.no_grad()
    def _clip(self, grads: Mapping[float, list[Tensor]], max_norm: float | None) -> float:
        """`clip_grad_norm` of gradients that are tensors on this rank, by what their parameters count (`shares`)."""
        norm = math.sqrt(self.total([sum(share * sum_of_squares(held) for share, held in grads.items())])[0])
        if max_norm is not None and max_norm < norm < math.inf:
            torch._foreach_mul_(list(chain.from_iterable(grads.values())), max_norm / norm)
        return norm

    def shares(self) -> Callable[[Tensor], float]:
        """What a parameter's elements held here count in `total`: less than 1 where more than `replicas` hold them."""
        return lambda param: 1.0

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over the whole model of `values`, each a sum over the elements held here by `shares`. A collective."""
        replicas = self.replicas
        if replicas == self.ranks.world_size:
            return list(values)
        return [value / replicas for value in self.ranks.sum(list(values))]

    @contextmanager
    def use_weight_ema(self) -> Iterator[None]:
        """The optimizer's averaged weights in the model's place, to evaluate or export; a collective.

        The weights stay where the optimizer keeps no average of them.
        """
        if all(group.get("weight_ema") is None for group in self.optimizer.param_groups):
            yield
            return
        try:
            with self.optimizer.use_weight_ema():  # type: ignore[attr-defined]
                self.refresh()
                yield
        finally:
            self.refresh()

    def drop_gradients(self) -> None:
        """Forget the gradients, reduced or not, of all micro-batches since the last step. All ranks call it."""
        self.optimizer.zero_grad()

    @contextmanager
    def loading(self, source: object) -> Iterator[None]:
        """Around overwriting the slices: no step and no save until the block has ended without an error. A collective.

        Gradients are those of the weights before, and are dropped; with a warning where a step was still to use them.
        """
        if self.ranks.any(self.holds_gradients()) and self.ranks.is_main:
            logger.warning(
                "%s is loaded between micro-batches: their gradients, which no step has used, are of the weights "
                "before, and are dropped",
                source,
            )
        self.drop_gradients()
        refuse_steps(
            self.optimizer,
            f"loading {source} failed midway, so that weights and state are half of one checkpoint and half of "
            f"another: load a complete checkpoint before the next step",
        )
        yield
        self.refresh()
        allow_steps(self.optimizer)


class ModuleState(ShardedState):
    """Parameters that are the module's own: whole tensors (one process, DDP), or DTensors on a mesh of all processes
    (FSDP2, tensor parallelism, both).

    Args:
        optimizer: any elementwise torch optimizer over the model's parameters, best given with their names.
        model: the module, wrapped or not.
        ranks: the processes; None takes those of the default process group.
        trained_only: leave frozen weights and buffers out of the slices.

    Raises:
        InputError: another kind of optimizer, one over another model's parameters, a model in FSDP1, or quantized
            frozen weights.
    """

    model: nn.Module

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, ranks: Ranks | None = None, *, trained_only: bool = False
    ) -> None:
        from shardopt.engines.zero import ZeroOptimizer

        if isinstance(optimizer, ZeroOptimizer):
            raise InputError("a ZeroOptimizer's sharded state is ZeroState(optimizer), not a ModuleState")
        if not isinstance(optimizer, Optimizer) or not isinstance(model, nn.Module):
            given = f"{type(optimizer).__name__} and {type(model).__name__}"
            raise InputError(f"ModuleState takes an optimizer and its model, in this order: got {given}")
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise InputError(
                "the model is in FullyShardedDataParallel (FSDP1), whose flat parameters do not say which elements "
                "they hold: shard it with torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        super().__init__(optimizer, ranks, model, trained_only)
        self.refresh()
        self._unused = UnusedGradients.of(optimizer, lambda: gradients_of(self._trained()))
        # Now: while FSDP2 has a module gathered, its parameters are others than those that hold the shards.
        trained = set(self._trained())
        if trained.isdisjoint(model.parameters()):
            raise InputError(
                "the optimizer holds no parameter of this model: build it over named_parameters(), after fully_shard"
            )
        self.frozen = [] if trained_only else [(n, p) for n, p in named_parameters(model) if p not in trained]
        for name, param in self.frozen:
            if is_packed(local := local_tensor(param)):
                raise InputError(
                    f"{name} is a {type(local).__name__}, whose elements no checkpoint can hold: leave frozen "
                    f"weights out with ModuleState(optimizer, model, trained_only=True)"
                )

    def _weights(self) -> dict[Tensor, tuple[Layout, ...]]:
        return self.layouts() | {param: (layout_of(param, name),) for name, param in self.frozen}

    def weight_slices(self) -> list[Slice]:
        return states.weight_slices(self._weights())

    def _trained(self) -> Iterator[Tensor]:
        return (param for group in self.optimizer.param_groups for param in group["params"])

    def clip_grad_norm(self, max_norm: float | None) -> float:
        """As of any state. Gradients that are placed otherwise than their parameters are placed as these before: of
        tensor parallelism without FSDP2 some are partial sums, or whole."""
        share = self.shares()
        grads: dict[float, list[Tensor]] = {}
        for param in self._trained():
            if param.grad is not None:
                if (placed := placed_as(param, param.grad)) is not param.grad:
                    param.grad = placed
                grads.setdefault(share(param), []).append(local_tensor(placed))
        return self._clip(grads, max_norm)

    def holds_gradients(self) -> bool:
        return self._unused.are_there() or held_by_fsdp(self.model)

    def drop_gradients(self) -> None:
        super().drop_gradients()
        drop_in_fsdp(self.model)

    def gradient_bytes(self) -> int:
        return sum(local_tensor(param).nbytes for param in self._trained())

    @property
    def replicas(self) -> int:
        return self.ranks.world_size // max(map(shards_of, self._trained()), default=1)

    def shares(self) -> Callable[[Tensor], float]:
        most = max(map(shards_of, self._trained()), default=1)
        return lambda param: shards_of(param) / most

    def full_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        for param, (layout,) in self._weights().items():
            yield layout.name, self.on_main(param.full_tensor() if isinstance(param, DTensor) else param.detach())

    def refresh(self) -> None:
        # FSDP2 keeps the root gathered after a forward that no backward follows.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def require_state(state: object, kind: type = ShardedState) -> None:
    """Raise InputError where `state` is no ShardedState (or not of the more general `kind`)."""
    if not isinstance(state, kind):
        given = type(state).__name__
        raise InputError(f"state is {given}: give a ShardedState, as engine.state or ModuleState(optimizer, model)")


@torch.no_grad()
def sum_of_squares(tensors: Sequence[Tensor]) -> float:
    """Sum of the squares of all elements: fp32 within a tensor, double across tensors.

    Doubles throughout where that is not finite, since squares overflow in fp32 before the values do.
    """
    if not tensors:
        return 0.0
    narrow = [t for t in tensors if t.dtype.itemsize < 4]  # whose norms torch would round to their dtype
    wide = [t for t in tensors if t.dtype.itemsize >= 4]
    kinds = ((narrow, torch.float32), (wide, None))
    norms = [norm for kind, dtype in kinds if kind for norm in torch._foreach_norm(kind, 2, dtype)]
    square = torch.stack([norm.double() for norm in norms]).square().sum().item()
    if not math.isfinite(square):
        doubles = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
        square = torch.stack(doubles).square().sum().item()
    return square


@dataclass
class _Refusal:
    """A step pre-hook that raises."""

    reason: str

    def __call__(self, *_: Any) -> None:
        raise InputError(self.reason)


def refuse_steps(optimizer: Optimizer, reason: str) -> None:
    """Make `optimizer.step` raise InputError with `reason`, until the next complete load."""
    allow_steps(optimizer)
    optimizer.register_step_pre_hook(_Refusal(reason))


def allow_steps(optimizer: Optimizer) -> None:
    """Undo `refuse_steps`."""
    hooks = optimizer._optimizer_step_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Refusal)]:
        del hooks[key]


def refused_steps(optimizer: Optimizer) -> str | None:
    """The reason for which `optimizer` refuses to step; None where it does not."""
    reasons = [hook.reason for hook in optimizer._optimizer_step_pre_hooks.values() if isinstance(hook, _Refusal)]
    return reasons[0] if reasons else None
