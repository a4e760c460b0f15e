"""Sharding engines: parameter placement and gradient reduction. One file per engine."""

from __future__ import annotations

from typing import Any

import torch

from shardopt.engines.base import Engine, EngineInputs, weights_dtype
from shardopt.engines.ddp import DdpConfig, DdpEngine
from shardopt.engines.deepspeed.config import DeepspeedConfig, check_state_dtype
from shardopt.engines.deepspeed.engine import DeepspeedEngine
from shardopt.engines.fsdp import FsdpConfig, FsdpEngine
from shardopt.engines.single import SingleConfig, SingleEngine
from shardopt.engines.zero.engine import ZeroConfig, ZeroEngine
from shardopt.errors import InputError
from shardopt.optim.ademamix import AdEMAMix
from shardopt.optim.registry import OptimizerSpec

EngineConfig = SingleConfig | DdpConfig | ZeroConfig | FsdpConfig | DeepspeedConfig

_ENGINES: list[Any] = [SingleEngine, DdpEngine, ZeroEngine, FsdpEngine, DeepspeedEngine]


def check(
    config: EngineConfig,
    optimizer: OptimizerSpec,
    world_size: int,
    distributed: bool,
    weights: torch.dtype = torch.float32,
) -> None:
    """Check an engine against the ranks, the optimizer and the weights of a run, before anything is built.

    Args:
        distributed: whether torchrun, or its like, starts the ranks.
        weights: the dtype of the trained weights.

    Raises:
        InputError: this engine cannot run on them.
    """
    name, replicate = config.name, getattr(config, "replicate", 1)
    if isinstance(config, SingleConfig) and world_size > 1:
        raise InputError(
            f"engine.name: single runs on one process, this run has {world_size}: choose ddp, zero, fsdp or deepspeed"
        )
    if not isinstance(config, SingleConfig) and not distributed:
        raise InputError(
            f"engine.name: {name} needs torchrun: add --nproc-per-node N to `shardopt pretrain`, or choose single"
        )
    if world_size % replicate:
        raise InputError(f"engine.replicate: {replicate} does not divide the {world_size} ranks of this run")
    if isinstance(config, ZeroConfig | FsdpConfig | DeepspeedConfig) and not optimizer.elementwise:
        refused = f"{name} cannot shard {optimizer.cls.__name__}: {optimizer.reason}"
        raise InputError(f"engine.name: {refused}; choose ddp or another optimizer")
    if isinstance(config, DeepspeedConfig):
        check_state_dtype("optimizer.state_dtype", optimizer.kwargs.get("state_dtype", "fp32"))
    if weights == torch.bfloat16:
        _check_narrow(config, optimizer)


def _check_narrow(config: EngineConfig, optimizer: OptimizerSpec) -> None:
    """Raise InputError where an engine cannot train bf16 weights, or would round them to nearest at every step."""
    cls = optimizer.cls.__name__
    if isinstance(config, DeepspeedConfig):
        raise InputError(
            "model.dtype: deepspeed makes bf16 weights and their fp32 masters itself, of engine.compute_dtype=bf16: "
            "leave model.dtype=fp32, or choose another engine.name"
        )
    if config.compute_dtype == "fp32":
        raise InputError("engine.compute_dtype: bf16 weights (model.dtype) are computed with in bf16, not in fp32")
    if optimizer.cls is not AdEMAMix and not isinstance(config, ZeroConfig):
        masters = "engine.name=zero (which keeps fp32 masters), " if optimizer.elementwise else ""
        raise InputError(
            f"model.dtype: {cls} on {config.name} would round bf16 weights to nearest, which loses small updates: "
            f"choose optimizer.name=ademamix, {masters}or model.dtype=fp32"
        )


def build(config: EngineConfig, inputs: EngineInputs) -> Engine:
    """The engine that `config` describes, with its model sharded, initialised and its optimizer made."""
    check(config, inputs.optimizer, inputs.ranks.world_size, inputs.ranks.distributed, weights_dtype(inputs.model))
    return next(engine for engine in _ENGINES if engine.name == config.name)(config, inputs)
