"""torch.compile of an engine's blocks or of its whole model."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import compile as torch_compile
from torch import nn

from shardopt.errors import InputError

CompileName = Literal["none", "blocks", "model"]
BACKEND = "inductor"


def compile_forward(
    what: CompileName, model: nn.Module, blocks: Sequence[nn.Module], bucket_bytes: float | None = None
) -> None:
    """Run torch.compile on the forward, and with it the backward, of each block or of the model.

    Modules keep their names and identity, and their hooks stay outside.

    Args:
        what: the modules.
        model: with its parameters on the device they are trained on.
        blocks: its transformer blocks.
        bucket_bytes: cut a whole model's graph so that its backward gives gradients of about so many bytes at a time;
            None leaves them to come all at once.

    Raises:
        InputError: this machine has no compiler for torch.compile.
    """
    if what == "none":
        return
    on_cpu = next(model.parameters()).device.type == "cpu"
    cxx = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # where torch.compile looks, too
    if (shutil.which(cxx) if on_cpu else importlib.util.find_spec("triton")) is None:
        needed = f"the C++ compiler {cxx}" if on_cpu else "the package triton"
        raise InputError(f"train.compile: torch.compile needs {needed}: install it, or set train.compile=none")
    for module in blocks if what == "blocks" else [model]:
        cut = what == "model" and bucket_bytes is not None
        backend: Any = _in_pieces(int(bucket_bytes or 0)) if cut else BACKEND
        module.forward = torch_compile(module.forward, backend=backend)


def _in_pieces(bucket_bytes: int) -> Callable[..., Any]:
    """A backend that cuts a graph as torch does under DistributedDataParallel, and gives the pieces to BACKEND."""
    from torch._dynamo.backends.distributed import DDPOptimizer
    from torch._dynamo.backends.registry import lookup_backend

    class Pieces(DDPOptimizer):
        def add_param(self, bucket: Any, param: nn.Parameter, name: str) -> None:
            super().add_param(bucket, param, name)
            # ZeRO's weights are views, and torch takes the size of what lies behind them.
            bucket.size += param.nbytes - param.untyped_storage().nbytes()

    return Pieces(bucket_bytes, lookup_backend(BACKEND), bucket_bytes).compile_fn
