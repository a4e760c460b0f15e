"""One process that holds everything: the control that every sharded run is compared with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

from shardopt.engines.base import DtypeName, EngineInputs, ModuleEngine, check_choice, compute_dtype


@dataclass(frozen=True)
class SingleConfig:
    """Plain torch on one process."""

    name: Literal["single"] = "single"
    compute_dtype: DtypeName = "auto"
    """Forward and backward; "auto" is bf16 (autocast) on a GPU, fp32 on the CPU."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  pydantic's own protocol

    def __post_init__(self) -> None:
        check_choice(self, compute_dtype=("auto", "fp32", "bf16"))


class SingleEngine(ModuleEngine):
    name = "single"

    def __init__(self, config: SingleConfig, inputs: EngineInputs) -> None:
        inputs.initialise(inputs.model)
        self.model = inputs.model
        super().__init__(inputs, compute_dtype(config.compute_dtype, inputs.ranks.device))

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()
