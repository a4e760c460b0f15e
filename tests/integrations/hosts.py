"""Reset of accelerate, transformers and DeepSpeed between the tests that share a rank process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


def new_job(alone: bool = False) -> None:
    """Forget accelerate's singletons, so that the next Accelerator starts as in a new process.

    Args:
        alone: without the variables of a launcher either, as `python script.py`.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    if alone:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)


@contextlib.contextmanager
def fsdp_on_cpu(wanted: bool = True) -> Iterator[None]:
    """Let accelerate run FSDP2 on CPU ranks, where it silently stays with DDP.

    It takes the FSDP plug-in for accelerator back ends only; after its state has been made for several CPU
    processes, the state is told what it would be on GPUs. All that follows is accelerate's real path, on gloo.
    """
    if not wanted:
        yield
        return
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def initialise(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        new = not AcceleratorState._shared_state
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if new and plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = plugin

    with mock.patch.object(AcceleratorState, "__init__", initialise):
        yield


def no_inference_extension() -> None:
    """Keep DeepSpeed on CPU from compiling, for a minute, what only its inference uses."""
    from shardopt.engines.deepspeed.engine import _import

    _import(torch.device("cpu"))
