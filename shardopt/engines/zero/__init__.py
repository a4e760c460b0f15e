"""Our own ZeRO: optimizer state (stage 1) and gradients (stage 2) sharded over ranks, on plain torch modules."""

from shardopt.engines.zero.agreement import NonFiniteGradientError
from shardopt.engines.zero.engine import ZeroConfig, ZeroEngine, ZeroState
from shardopt.engines.zero.optimizer import ZeroOptimizer
from shardopt.engines.zero.transports import PeerError

__all__ = ["NonFiniteGradientError", "PeerError", "ZeroConfig", "ZeroEngine", "ZeroOptimizer", "ZeroState"]
