"""Sharded state of our ZeRO: whole weights, and a rank's slices of masters and optimizer state."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from shardopt.distributed import Ranks
from shardopt.engines.state import ShardedState
from shardopt.engines.zero.optimizer import ZeroOptimizer
from shardopt.slices import Layout, Slice, named_parameters


class ZeroState(ShardedState):
    """The slices of a ZeroOptimizer and the whole weights beside them.

    Args:
        optimizer: best made with its model, whose frozen weights are held too.
        ranks: the processes; None takes those of the default process group.
        trained_only: leave frozen weights out of the slices.
    """

    optimizer: ZeroOptimizer

    def __init__(self, optimizer: ZeroOptimizer, ranks: Ranks | None = None, *, trained_only: bool = False) -> None:
        super().__init__(optimizer, ranks)
        self.trained_only = trained_only

    @property
    def inner(self) -> Optimizer:
        return self.optimizer.inner

    def layouts(self) -> dict[Tensor, tuple[Layout, ...]]:
        return {param: (layout,) for param, layout in self.optimizer.layouts.items()}

    def slices(self) -> list[Slice]:
        held = self.optimizer.slices()
        if self.trained_only or self.optimizer.model is None:
            return held
        trained = {s.name for s in held if s.kind == "weight"}
        frozen = [(n, p) for n, p in named_parameters(self.optimizer.model) if n not in trained]
        return [Slice(n, "weight", Layout.whole(n, p.shape), (p.detach(),)) for n, p in frozen] + held

    def clip_grad_norm(self, max_norm: float | None) -> float:
        return self.optimizer.clip_grad_norm_(max_norm)

    def gradient_bytes(self) -> int:
        return self.optimizer.gradient_bytes()

    @property
    def replicas(self) -> int:
        group = self.optimizer.shard_group
        return self.ranks.world_size // (1 if group is None else dist.get_world_size(group))

    @torch.no_grad()
    def full_parameters(self) -> Iterator[tuple[str, Tensor | None]]:
        self.optimizer.wait()
        model = self.optimizer.model
        trained = [(p.layout.name, p.param) for p in self.optimizer.flat.parameters]
        for name, param in trained if model is None else named_parameters(model):
            yield name, param.detach().cpu() if self.ranks.is_main else None
