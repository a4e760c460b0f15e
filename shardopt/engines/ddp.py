"""DistributedDataParallel: every rank holds everything. The other control, and the peer to beat."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from torch.nn.parallel import DistributedDataParallel

from shardopt.engines.base import Config, DtypeName, EngineInputs, ModuleEngine


@dataclass(frozen=True)
class DdpConfig(Config):
    """torch's DistributedDataParallel."""

    name: Literal["ddp"] = "ddp"
    bucket_mb: float = 25.0
    """Size of a gradient bucket."""
    compute_dtype: DtypeName = "auto"
    """Forward and backward; "auto" is bf16 (autocast) on a GPU, fp32 on the CPU."""


class DdpEngine(ModuleEngine):
    name = "ddp"

    def __init__(self, config: DdpConfig, inputs: EngineInputs) -> None:
        inputs.initialise(inputs.model)
        device = inputs.ranks.device
        # Rotary tables and the like are the same everywhere already. The argument's name depends on torch's version.
        known = inspect.signature(DistributedDataParallel).parameters
        sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        keywords: dict[str, Any] = {sync_buffers: False}
        self.model = self._ddp = DistributedDataParallel(
            inputs.model,
            device_ids=[device] if device.type == "cuda" else None,
            bucket_cap_mb=config.bucket_mb,
            gradient_as_bucket_view=True,
            **keywords,
        )
        super().__init__(inputs, config.compute_dtype)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._ddp.no_sync()
