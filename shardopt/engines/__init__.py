"""Who holds what, and how gradients get there. One file an engine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from shardopt.engines.ddp import DdpConfig
from shardopt.engines.deepspeed.config import DeepspeedConfig
from shardopt.engines.fsdp import FsdpConfig
from shardopt.engines.single import SingleConfig
from shardopt.engines.zero.engine import ZeroConfig

if TYPE_CHECKING:
    from shardopt.engines.base import Engine, EngineInputs

EngineConfig = SingleConfig | DdpConfig | ZeroConfig | FsdpConfig | DeepspeedConfig

# The class that each configuration builds, imported when it is chosen.
_ENGINES = {
    SingleConfig: "shardopt.engines.single:SingleEngine",
    DdpConfig: "shardopt.engines.ddp:DdpEngine",
    ZeroConfig: "shardopt.engines.zero:ZeroEngine",
    FsdpConfig: "shardopt.engines.fsdp:FsdpEngine",
    DeepspeedConfig: "shardopt.engines.deepspeed.engine:DeepspeedEngine",
}


def build(config: EngineConfig, inputs: EngineInputs) -> Engine:
    """The engine that `config` describes, with its model sharded, initialised and its optimizer made."""
    module, name = _ENGINES[type(config)].split(":")
    return getattr(importlib.import_module(module), name)(config, inputs)
