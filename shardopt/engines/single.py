"""One process that holds everything: the control that every sharded run is compared with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

from shardopt.engines.base import Config, DtypeName, EngineInputs, ModuleEngine


@dataclass(frozen=True)
class SingleConfig(Config):
    """Plain torch on one process."""

    name: Literal["single"] = "single"
    compute_dtype: DtypeName = "auto"
    """Forward and backward; "auto" is bf16 (autocast) on a GPU, fp32 on the CPU."""


class SingleEngine(ModuleEngine):
    name = "single"

    def __init__(self, config: SingleConfig, inputs: EngineInputs) -> None:
        inputs.initialise(inputs.model)
        self.model = inputs.model
        super().__init__(inputs, config.compute_dtype)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()
