"""FSDP2: `fully_shard` on each transformer block and on the root; parameters are DTensors sharded by rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from shardopt.engines.base import DTYPES, Config, DtypeName, EngineInputs, ModuleEngine, compute_dtype, replicated_mesh


@dataclass(frozen=True)
class FsdpConfig(Config):
    """torch's FSDP2: weights, gradients and optimizer state are all sharded."""

    name: Literal["fsdp"] = "fsdp"
    replicate: int = 1
    """Groups of ranks that hold the same shards (HSDP); the ranks are cut into this many. 1 is plain FSDP."""
    reshard_after_forward: bool = True
    """Free the gathered weights of a block after its forward and gather them again in backward: less memory."""
    compute_dtype: DtypeName = "auto"
    """Forward and backward; "auto" is bf16 on a GPU, fp32 on the CPU. The sharded weights stay fp32."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Gradients on the wire."""


class FsdpEngine(ModuleEngine):
    name = "fsdp"

    def __init__(self, config: FsdpConfig, inputs: EngineInputs) -> None:
        ranks, model = inputs.ranks, inputs.model
        mesh = replicated_mesh(ranks, config.replicate)
        compute = compute_dtype(config.compute_dtype, ranks.device)
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=DTYPES[config.reduce_dtype])
        for block in inputs.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=config.reshard_after_forward, mp_policy=policy)
        # The root is needed again as soon as backward starts, so it stays gathered.
        fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        inputs.initialise(model)
        self.model = model
        super().__init__(inputs, "fp32")

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        self.model.set_is_last_backward(last)
        yield
