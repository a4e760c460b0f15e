"""What the training loop, the checkpoints and the reports may ask of an engine."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from shardopt.engines.ranks import Ranks
from shardopt.optim.registry import OptimizerSpec
from shardopt.slices import Layout, Slice


@dataclass(frozen=True)
class EngineInputs:
    """What every engine is built from.

    Args:
        ranks: the processes.
        model: on the meta device; engines materialise it.
        initialise: fills the parameters and buffers in place once they have storage, whole or sharded, the same
            values whatever the engine and world size.
        optimizer: class, hyper-parameters and parameter groups.
        blocks: the transformer blocks, in forward order (FSDP2 shards each).
        compute_dtype: dtype of forward and backward.
    """

    ranks: Ranks
    model: nn.Module
    initialise: Callable[[nn.Module], None]
    optimizer: OptimizerSpec
    blocks: list[nn.Module]
    compute_dtype: torch.dtype


class Engine(abc.ABC):
    """A model whose gradients and optimizer state are spread over ranks in one particular way.

    Gradients are SUMS over ranks and micro-batches: the loop hands `backward` a loss that is already divided by
    the target tokens of the whole global batch, so that any split into micro-batches and ranks gives the same
    gradient.
    """

    name: ClassVar[str]
    model: nn.Module  # what forward is called on
    optimizer: torch.optim.Optimizer  # its param_groups carry the lr
    ranks: Ranks

    @abc.abstractmethod
    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch; `last` is true for the step's last micro-batch."""

    @abc.abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Backward of this rank's share of the loss (see the class)."""

    @abc.abstractmethod
    def clip_grad_norm(self, max_norm: float | None) -> float:
        """L2 norm of the whole gradient before clipping, the same double on every rank; a collective.

        Scales the gradients down to `max_norm` where the norm exceeds it. Not finite as soon as any element of
        the gradient is not finite on any rank; the gradients are then left alone.
        """

    @abc.abstractmethod
    def step(self) -> None:
        """One optimizer step on the reduced gradients. A collective."""

    @abc.abstractmethod
    def zero_grad(self) -> None: ...

    @abc.abstractmethod
    def slices(self) -> list[Slice]:
        """What this process holds of the weights and the optimizer's state, as the live tensors themselves.

        The state exists after `init_state`. Replicas (DDP, HSDP) each return theirs.
        """

    @abc.abstractmethod
    def init_state(self) -> None:
        """Create the optimizer's state without counting a step."""

    @abc.abstractmethod
    def gradient_bytes(self) -> int:
        """Bytes of gradients that this process holds when backward has ended."""

    @abc.abstractmethod
    def replicas(self) -> int:
        """On how many ranks each element of the optimizer's state is held (1 where it is fully sharded)."""

    @abc.abstractmethod
    def full_parameters(self) -> Iterator[tuple[str, Tensor | None]]:
        """Each parameter's name and, on rank 0 alone, its whole value on the CPU; one at a time. A collective."""

    def after_load(self) -> None:  # noqa: B027  most engines have nothing to do
        """Called once the slices have been overwritten from a checkpoint, to refresh what derives from them."""

    def close(self) -> None:  # noqa: B027
        """Release what the engine started (hooks, streams, sub-groups)."""


def weight_slice(name: str, layout: Layout, weight: Tensor) -> Slice:
    return Slice(name, "weight", layout, (weight,))
