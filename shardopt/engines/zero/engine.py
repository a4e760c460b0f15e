"""The zero engine: ZeroOptimizer behind the interface of every engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from shardopt.engines.base import DtypeName, Engine, EngineInputs, autocast_forward, check_choice, compute_dtype
from shardopt.engines.zero.groups import check_settings
from shardopt.engines.zero.optimizer import ZeroOptimizer
from shardopt.errors import InputError
from shardopt.slices import Layout, Slice, named_parameters


@dataclass(frozen=True)
class ZeroConfig:
    """Our own ZeRO: optimizer state sharded, and gradients too in stage 2."""

    name: Literal["zero"] = "zero"
    stage: Literal[1, 2] = 2
    """1 keeps whole gradients over micro-batches and reduces once a step; 2 reduces every micro-batch."""
    bucket_mb: float = 25.0
    """Size of a gradient bucket."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Gradients on the wire; sums are fp32 anyway."""
    replicate: int = 1
    """Groups of ranks that hold the same slices; the ranks are cut into this many. Shard within a node."""
    compute_dtype: DtypeName = "auto"
    """Forward and backward; "auto" is bf16 (autocast) on a GPU, fp32 on the CPU."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    def __post_init__(self) -> None:
        check_settings("engine.", stage=self.stage, bucket_mb=self.bucket_mb, reduce_dtype=self.reduce_dtype)
        check_choice(self, compute_dtype=("auto", "fp32", "bf16"))
        if self.replicate < 1:
            raise InputError(f"engine.replicate: {self.replicate} must be at least 1")


class ZeroEngine(Engine):
    name = "zero"
    optimizer: ZeroOptimizer

    def __init__(self, config: ZeroConfig, inputs: EngineInputs) -> None:
        ranks, spec = inputs.ranks, inputs.optimizer
        if not ranks.distributed:
            raise InputError("engine.name: zero needs torchrun (or choose engine.name=single)")
        if ranks.world_size % config.replicate:
            raise InputError(
                f"engine.replicate: {config.replicate} does not divide the {ranks.world_size} ranks of this run"
            )
        if not spec.elementwise:
            raise InputError(
                f"engine.name: zero cannot shard {spec.cls.__name__}: {spec.reason}; choose ddp or another optimizer"
            )
        inputs.initialise(inputs.model)
        self.ranks, self.model = ranks, inputs.model
        self._named = named_parameters(inputs.model)
        self._replicate = config.replicate
        mesh = None
        if config.replicate > 1:
            mesh = init_device_mesh(
                ranks.device.type,
                (config.replicate, ranks.world_size // config.replicate),
                mesh_dim_names=("replicate", "shard"),
            )
        groups = spec.groups(self._named)
        if not groups:
            raise InputError("the model has no trainable parameter: set requires_grad on at least one")
        try:
            self.optimizer = ZeroOptimizer(
                groups,
                spec.cls,
                stage=config.stage,
                bucket_mb=config.bucket_mb,
                reduce_dtype=config.reduce_dtype,
                process_group=mesh,
                model=self.model,
                overlap_gather=inputs.blocks,
                **spec.kwargs,
            )
        except TypeError as error:
            raise InputError(f"{spec.cls.__name__}: {error}") from error
        self.optimizer.reducer.scale = 1.0  # the engine's gradients are sums
        if (dtype := compute_dtype(config.compute_dtype, ranks.device)) != torch.float32:
            autocast_forward(self.model, ranks.device, dtype)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return self.optimizer.accumulate(last)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm(self, max_norm: float | None) -> float:
        return self.optimizer.clip_grad_norm_(max_norm)

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def init_state(self) -> None:
        self.optimizer.init_state()

    def slices(self) -> list[Slice]:
        trained = self.optimizer.slices()
        names = {s.name for s in trained if s.kind == "weight"}
        frozen = [Slice(n, "weight", Layout.whole(n, p.shape), (p.detach(),)) for n, p in self._named if n not in names]
        return frozen + trained

    def statistics(self) -> dict[str, Tensor]:
        measure = getattr(self.optimizer.inner, "statistics", None)
        return measure() if measure is not None else {}

    def schedule_values(self) -> dict[str, float]:
        read = getattr(self.optimizer.inner, "schedule_values", None)
        return read() if read is not None else {}

    def gradient_bytes(self) -> int:
        return self.optimizer.gradient_bytes()

    def replicas(self) -> int:
        return self._replicate

    @torch.no_grad()
    def full_parameters(self) -> Iterator[tuple[str, Tensor | None]]:
        self.optimizer.wait()
        for name, param in self._named:
            yield name, param.detach().cpu() if self.ranks.is_main else None

    def close(self) -> None:
        self.optimizer.close()
