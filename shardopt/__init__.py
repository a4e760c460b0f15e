"""Sharded AdEMAMix: every rank holds a slice of m1, m2 and nu, under FSDP2, DeepSpeed and our own ZeRO-1/2.

`import shardopt` needs torch and numpy only; what communicates is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardopt.optim.ademamix import AdEMAMix
from shardopt.slices import Layout, Slice

if TYPE_CHECKING:
    from shardopt.engines.zero import ZeroOptimizer

__version__ = "0.1.0"
__all__ = ["AdEMAMix", "Layout", "Slice", "ZeroOptimizer", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "ZeroOptimizer":
        from shardopt.engines.zero import ZeroOptimizer

        return ZeroOptimizer
    raise AttributeError(f"module 'shardopt' has no attribute {name!r}")
