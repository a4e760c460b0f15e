"""What the training loop, the checkpoints and the reports may ask of an engine."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardopt.distributed import Ranks
from shardopt.optim import states
from shardopt.optim.registry import OptimizerSpec
from shardopt.slices import Layout, Slice, layout_of, local_tensor, named_parameters

DtypeName = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class EngineInputs:
    """What every engine is built from.

    Args:
        ranks: the processes.
        model: with parameters on the meta device; the engine shards it as it likes.
        initialise: gives the (sharded) model storage and its first weights, in place.
        optimizer: class, hyper-parameters and parameter groups.
        blocks: the transformer blocks, in forward order (FSDP2 shards each).
    """

    ranks: Ranks
    model: nn.Module
    initialise: Callable[[nn.Module], None]
    optimizer: OptimizerSpec
    blocks: list[nn.Module]


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
    def init_state(self) -> None:
        """Create the optimizer's state without counting a step."""

    @abc.abstractmethod
    def slices(self) -> list[Slice]:
        """What this process holds of the weights and the optimizer's state, as the live tensors themselves.

        The state is there after `init_state`. Replicas (DDP, HSDP) each return theirs.
        """

    def step_counts(self) -> dict[str, dict[str, int | float]]:
        """Step counts and other numbers of the optimizer by parameter name, of the parameters held here."""
        return states.step_counts(self.optimizer)

    def load_step_counts(self, scalars: dict[str, dict[str, int | float]]) -> None:
        """Take over what `step_counts` gave (of all ranks together), after `init_state`."""
        states.load_step_counts(self.optimizer, scalars)

    def statistics(self) -> dict[str, Tensor]:
        """This rank's sums of squares of m1, m2 and the update; empty for an optimizer without them."""
        measure = getattr(self.optimizer, "statistics", None)
        return measure() if measure is not None else {}

    def schedule_values(self) -> dict[str, float]:
        """alpha and beta3 of the latest step; empty for an optimizer without them."""
        read = getattr(self.optimizer, "schedule_values", None)
        return read() if read is not None else {}

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
        """Called once the slices have been overwritten, to refresh what derives from them."""

    @contextmanager
    def use_weight_ema(self) -> Iterator[None]:
        """The optimizer's averaged weights in the model's place, to evaluate or export; a collective.

        The weights stay where the optimizer keeps no average of them.
        """
        if all(group.get("weight_ema") is None for group in self.optimizer.param_groups):
            yield
            return
        with self.optimizer.use_weight_ema():  # type: ignore[attr-defined]
            self.after_load()
            yield
        self.after_load()

    def close(self) -> None:  # noqa: B027
        """Release what the engine started (hooks, streams, sub-groups)."""


class ModuleEngine(Engine):
    """An engine whose optimizer works on the module's own parameters, whole or DTensors (single, ddp, fsdp).

    Args:
        inputs: see EngineInputs; the optimizer is built on `inputs.model` as it is now.
        group: the ranks over which the parameters are sharded; None where each rank holds them whole.
        compute_dtype: what autocast uses in forward; torch.float32 for none (FSDP2 casts by itself).
    """

    def __init__(self, inputs: EngineInputs, group: dist.ProcessGroup | None, compute_dtype: torch.dtype) -> None:
        self.ranks, self.group = inputs.ranks, group
        self.optimizer = inputs.optimizer.build(inputs.model)
        self._named = named_parameters(inputs.model)
        if compute_dtype != torch.float32:
            autocast_forward(inputs.model, inputs.ranks.device, compute_dtype)

    def backward(self, loss: Tensor) -> None:
        # DDP and FSDP2 average over ranks; the engine's contract is a sum.
        (loss * self.ranks.world_size).backward()

    def _local_grads(self) -> list[Tensor]:
        return [local_tensor(p.grad) for _, p in self._named if p.grad is not None]

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float | None) -> float:
        grads = self._local_grads()
        # fp32 within a tensor, double across tensors and ranks.
        norms = [n.double() for n in torch._foreach_norm(grads)] if grads else []
        square = torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)
        square = square.to(self.ranks.device)
        if self.group is not None:
            dist.all_reduce(square, group=self.group)
        norm = math.sqrt(square.item())
        if max_norm is not None and max_norm < norm < math.inf:
            torch._foreach_mul_(grads, max_norm / norm)
        return norm

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def init_state(self) -> None:
        states.init_state(self.optimizer)

    def _layouts(self) -> dict[Tensor, Layout]:
        return {param: layout_of(param, name) for name, param in self._named}

    def slices(self) -> list[Slice]:
        layouts = self._layouts()
        weights = [Slice(n, "weight", layouts[p], (local_tensor(p.detach()),)) for n, p in self._named]
        return weights + states.state_slices(self.optimizer, layouts)

    def gradient_bytes(self) -> int:
        return sum(local_tensor(p).nbytes for _, p in self._named if p.requires_grad)

    def replicas(self) -> int:
        return self.ranks.world_size // (dist.get_world_size(self.group) if self.group is not None else 1)

    @torch.no_grad()
    def full_parameters(self) -> Iterator[tuple[str, Tensor | None]]:
        from torch.distributed.tensor import DTensor

        for name, param in self._named:
            whole = param.full_tensor() if isinstance(param, DTensor) else param.detach()
            yield name, whole.cpu() if self.ranks.is_main else None


def autocast_forward(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Make `model`'s forward run under autocast; backward, which follows the forward's dtypes, stays outside."""
    model.forward = torch.autocast(device.type, dtype)(model.forward)


def compute_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The dtype of forward and backward; "auto" is bf16 on a GPU that has it and fp32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def check_choice(config: object, **allowed: tuple[object, ...]) -> None:
    """Raise InputError naming `engine.KEY` where a field of an engine's config is not among its choices."""
    from shardopt.errors import InputError

    for key, choices in allowed.items():
        if (value := getattr(config, key)) not in choices:
            raise InputError(f"engine.{key}: {value!r} is not one of {', '.join(map(str, choices))}")
