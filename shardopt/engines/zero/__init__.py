"""Our own ZeRO: optimizer state (stage 1) and gradients (stage 2) sharded over ranks, on plain torch modules."""

from shardopt.engines.zero.collectives import PeerError
from shardopt.engines.zero.engine import ZeroConfig, ZeroEngine
from shardopt.engines.zero.optimizer import NonFiniteGradientError, ZeroOptimizer

__all__ = ["NonFiniteGradientError", "PeerError", "ZeroConfig", "ZeroEngine", "ZeroOptimizer"]
