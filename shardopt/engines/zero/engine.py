"""The zero engine, and the sharded state of its ZeroOptimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer

from shardopt.distributed import Ranks
from shardopt.engines.base import Config, DtypeName, Engine, EngineInputs, autocast_forward, replicated_mesh
from shardopt.engines.compile import compile_forward
from shardopt.engines.held_gradients import UnusedGradients, gradients_of
from shardopt.engines.state import ShardedState
from shardopt.engines.zero.groups import check_settings
from shardopt.engines.zero.optimizer import ZeroOptimizer
from shardopt.engines.zero.round import RoundState
from shardopt.errors import InputError
from shardopt.optim import states
from shardopt.slices import Layout, Slice, named_parameters


@dataclass(frozen=True)
class ZeroConfig(Config):
    """Our own ZeRO: optimizer state sharded, and gradients too in stage 2."""

    name: Literal["zero"] = "zero"
    stage: Literal[1, 2] = 2
    """1 keeps whole gradients over micro-batches and reduces once a step; 2 reduces every micro-batch."""
    bucket_mb: float | None = None
    """Size of a gradient bucket; null: 25, and more from 100 ranks on, so that messages do not become short."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Gradients on the wire; sums are fp32 anyway."""
    replicate: int = 1
    """Groups of ranks that hold the same slices; the ranks are cut into this many. Shard within a node."""
    compute_dtype: DtypeName = "auto"
    """Forward and backward; "auto" is bf16 (autocast) on a GPU, fp32 on the CPU."""

    def __post_init__(self) -> None:
        check_settings("engine.", stage=self.stage, bucket_mb=self.bucket_mb, reduce_dtype=self.reduce_dtype)
        super().__post_init__()


class ZeroState(ShardedState):
    """The slices of a ZeroOptimizer and the whole weights beside them.

    Args:
        optimizer: best made with its model, whose frozen weights and buffers are held too.
        ranks: the processes; None takes those of the default process group.
        trained_only: leave frozen weights and buffers out of the slices.

    Raises:
        InputError: another kind of optimizer.
    """

    optimizer: ZeroOptimizer

    def __init__(self, optimizer: ZeroOptimizer, ranks: Ranks | None = None, *, trained_only: bool = False) -> None:
        if not isinstance(optimizer, ZeroOptimizer):
            given = type(optimizer).__name__
            raise InputError(f"ZeroState takes a ZeroOptimizer; that of {given} is ModuleState(optimizer, model)")
        super().__init__(optimizer, ranks, optimizer.model, trained_only)
        trained = [p.param for p in optimizer.flat.parameters]
        from_host = optimizer.gradients == "host"
        self._of_host = UnusedGradients.of(optimizer, lambda: gradients_of(trained)) if from_host else None

    @property
    def inner(self) -> Optimizer:
        return self.optimizer.inner

    def layouts(self) -> dict[Tensor, tuple[Layout, ...]]:
        return {param: (layout,) for param, layout in self.optimizer.layouts.items()}

    def weight_slices(self) -> list[Slice]:
        held = self.optimizer.weight_slices()
        if self.trained_only or self.model is None:
            return held
        trained = {s.name for s in held}
        frozen = [(n, p) for n, p in named_parameters(self.model) if n not in trained]
        return states.weight_slices({p: [Layout.whole(n, p.shape)] for n, p in frozen}) + held

    def clip_grad_norm(self, max_norm: float | None) -> float:
        return self.optimizer.clip_grad_norm_(max_norm)

    def holds_gradients(self) -> bool:
        waiting = self.optimizer.round.state in (RoundState.ACCUMULATED, RoundState.REDUCED)
        return waiting or (self._of_host is not None and self._of_host.are_there())

    def gradient_bytes(self) -> int:
        return self.optimizer.gradient_bytes()

    @property
    def replicas(self) -> int:
        return self.ranks.world_size // self.optimizer.reducer.comm.size

    def full_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        self.optimizer.wait()
        trained = [(p.name, p.param) for p in self.optimizer.flat.parameters]
        for name, param in trained if self.model is None else named_parameters(self.model):
            yield name, self.on_main(param.detach())


class ZeroEngine(Engine):
    name = "zero"
    state: ZeroState

    def __init__(self, config: ZeroConfig, inputs: EngineInputs) -> None:
        ranks, spec = inputs.ranks, inputs.optimizer
        inputs.initialise(inputs.model)
        self.model = inputs.model
        optimizer = ZeroOptimizer(
            spec.groups(named_parameters(self.model)),
            spec.cls,
            stage=config.stage,
            bucket_mb=config.bucket_mb,
            reduce_dtype=config.reduce_dtype,
            process_group=replicated_mesh(ranks, config.replicate) if config.replicate > 1 else None,
            model=self.model,
            # A compiled forward would take the hooks that wait in it for constants.
            overlap_gather=inputs.blocks if inputs.compile == "none" else (),
            **spec.kwargs,
        )
        optimizer.reducer.scale = 1.0  # the engine's gradients are sums
        self.state = ZeroState(optimizer, ranks)
        autocast_forward(self.model, ranks.device, config.compute_dtype)
        compile_forward(inputs.compile, self.model, inputs.blocks, optimizer.reducer.piece_bytes)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return self.state.optimizer.accumulate(last)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def close(self) -> None:
        self.state.optimizer.close()
