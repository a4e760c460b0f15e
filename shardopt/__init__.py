"""Sharded AdEMAMix: every rank holds a slice of m1, m2 and nu, under FSDP2, DeepSpeed and our own ZeRO-1/2.

`import shardopt` imports nothing else: each name below brings its module, and torch and numpy, when it is first asked
for, so that `shardopt --help` waits for neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardopt.engines.zero import ZeroOptimizer
    from shardopt.optim.ademamix import AdEMAMix
    from shardopt.slices import Layout, Slice

__version__ = "0.1.0"
__all__ = ["AdEMAMix", "Layout", "Slice", "ZeroOptimizer", "__version__"]

_MODULES = {
    "AdEMAMix": "shardopt.optim.ademamix",
    "Layout": "shardopt.slices",
    "Slice": "shardopt.slices",
    "ZeroOptimizer": "shardopt.engines.zero",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if name in ("errors", "optim", "slices"):
        return importlib.import_module(f"shardopt.{name}")
    raise AttributeError(f"module 'shardopt' has no attribute {name!r}")
