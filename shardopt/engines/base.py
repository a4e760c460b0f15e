"""The interface of every engine: forward, backward and step of a model spread over ranks."""

from __future__ import annotations

import abc
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardopt.distributed import Ranks
from shardopt.engines.compile import CompileName, compile_forward
from shardopt.engines.state import ModuleState, ShardedState
from shardopt.errors import InputError
from shardopt.optim.registry import OptimizerSpec

DtypeName = Literal["auto", "fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Config:
    """The checks of every engine's section of a run's config, however it is made; each names `engine.KEY`."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}  # noqa: RUF012  pydantic's own protocol

    def __post_init__(self) -> None:
        for key, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, key), get_args(hint)
            if get_origin(hint) is Literal and value not in choices:
                raise InputError(f"engine.{key}: {value!r} is not one of {', '.join(map(str, choices))}")
            if key == "bucket_mb" and value is not None and value <= 0:
                raise InputError(f"engine.bucket_mb: {value} must be greater than 0")
            if key == "replicate" and value < 1:
                raise InputError(f"engine.replicate: {value} must be at least 1")


@dataclass(frozen=True)
class EngineInputs:
    """The parts that every engine is built from.

    Args:
        ranks: the processes.
        model: with parameters on the meta device; the engine shards it as it likes.
        initialise: gives the (sharded) model storage and its first weights, in place.
        optimizer: class, hyper-parameters and parameter groups.
        blocks: the transformer blocks, in forward order (FSDP2 shards each).
        compile: run torch.compile on the forward of each block, or of the whole model.
    """

    ranks: Ranks
    model: nn.Module
    initialise: Callable[[nn.Module], None]
    optimizer: OptimizerSpec
    blocks: list[nn.Module]
    compile: CompileName = "none"


class Engine(abc.ABC):
    """A model whose gradients and optimizer state are spread over ranks in one particular way.

    Gradients are SUMS over ranks and micro-batches: the loop hands `backward` a loss that is already divided by
    the target tokens of the whole global batch, so that any split into micro-batches and ranks gives the same
    gradient.
    """

    name: ClassVar[str]
    model: nn.Module  # what forward is called on
    state: ShardedState  # what this process holds; checkpoints and reports are made from it

    @property
    def ranks(self) -> Ranks:
        return self.state.ranks

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Its param_groups carry the lr."""
        return self.state.optimizer

    @abc.abstractmethod
    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch; `last` is true for the step's last micro-batch."""

    @abc.abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Backward of this rank's share of the loss (see the class)."""

    def clip_grad_norm(self, max_norm: float | None) -> float:
        """See ShardedState.clip_grad_norm. A collective."""
        return self.state.clip_grad_norm(max_norm)

    def step(self) -> None:
        """One optimizer step on the reduced gradients. A collective."""
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.state.drop_gradients()

    def close(self) -> None:  # noqa: B027
        """Release what the engine started (hooks, streams, sub-groups)."""


class ModuleEngine(Engine):
    """An engine whose optimizer works on the module's own parameters, whole or DTensors (single, ddp, fsdp).

    Args:
        inputs: see EngineInputs; the optimizer is built on `inputs.model` as it is now.
        compute_dtype: what autocast uses in forward; "fp32" for none (FSDP2 casts by itself).
    """

    state_class: ClassVar[type[ModuleState]] = ModuleState

    def __init__(self, inputs: EngineInputs, compute_dtype: DtypeName) -> None:
        self.state = self.state_class(inputs.optimizer.build(inputs.model), inputs.model, inputs.ranks)
        autocast_forward(inputs.model, inputs.ranks.device, compute_dtype)
        compile_forward(inputs.compile, inputs.model, inputs.blocks)

    def backward(self, loss: Tensor) -> None:
        # DDP and FSDP2 average over ranks; the engine's contract is a sum.
        (loss * self.ranks.world_size).backward()


def autocast_forward(model: nn.Module, device: torch.device, name: DtypeName) -> None:
    """Run `model`'s forward under autocast if not in fp32; backward follows the forward's dtypes and stays outside."""
    if (dtype := compute_dtype(name, device, model)) != torch.float32:
        model.forward = torch.autocast(device.type, dtype)(model.forward)


def weights_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of `model`'s first parameter; fp32 where it has none."""
    return next((p.dtype for p in model.parameters()), torch.float32)


def compute_dtype(name: DtypeName, device: torch.device, model: nn.Module) -> torch.dtype:
    """The dtype of `model`'s forward and backward on `device`."""
    return settle_dtype(name, weights_dtype(model), device.type == "cuda" and torch.cuda.is_bf16_supported())


def settle_dtype(name: DtypeName, weights: torch.dtype, prefers_bf16: bool) -> torch.dtype:
    """What a name stands for: "auto" is bf16 for bf16 weights and on a device that prefers it, and fp32 elsewhere."""
    if name == "auto":
        name = "bf16" if prefers_bf16 or weights == torch.bfloat16 else "fp32"
    return DTYPES[name]


def replicated_mesh(ranks: Ranks, replicate: int) -> DeviceMesh:
    """The ranks as a mesh of `replicate` groups (replicate, shard), or of one dimension (shard) for a single group."""
    shape = (replicate, ranks.world_size // replicate)
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))
    return mesh if replicate > 1 else mesh["shard"]
