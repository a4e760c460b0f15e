"""The deepspeed engine: deepspeed.initialize with our optimizer as its client, behind the interface of every engine."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from shardopt.engines.base import Engine, EngineInputs, compute_dtype
from shardopt.engines.compile import compile_forward
from shardopt.engines.deepspeed.config import DeepspeedConfig
from shardopt.engines.deepspeed.layouts import Flat
from shardopt.engines.deepspeed.state import COUNTS, DeepspeedState
from shardopt.errors import InputError, MissingExtraError
from shardopt.slices import named_parameters


class DeepspeedEngine(Engine):
    name = "deepspeed"
    state: DeepspeedState
    _deepspeed: Any  # its engine, which is the model too

    def __init__(self, config: DeepspeedConfig, inputs: EngineInputs) -> None:
        ranks, spec, model = inputs.ranks, inputs.optimizer, inputs.model
        for name, param in named_parameters(model):
            if not param.dim():
                raise InputError(f"parameter {name} has no dimension, as DeepSpeed needs: give it the shape (1,)")
        deepspeed = _import(ranks.device)
        dtype = compute_dtype(config.dtype_name(), ranks.device, model)
        inputs.initialise(model)
        optimizer = spec.build(model)
        named = named_parameters(model)
        # DeepSpeed makes its masters from the weights that it has rounded to bf16.
        exact = {n: p.detach().to("cpu", copy=True) for n, p in named if p.requires_grad and dtype != torch.float32}
        merged = config.merged(dtype == torch.bfloat16, pin_memory=ranks.device.type == "cuda")
        try:
            with redirect_stdout(io.StringIO()):  # memory statistics and the like, printed whatever the log level
                self._deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=merged)
        except (ValueError, AssertionError) as error:
            raise InputError(f"engine.config: DeepSpeed refuses this configuration: {error}") from error
        compile_forward(inputs.compile, model, inputs.blocks)
        self.model = self._deepspeed
        self.state = DeepspeedState(self.model, optimizer, model, ranks)
        self.state.fill_groups()
        with torch.no_grad():
            for flat in self.state.flats:
                for layout in flat.layouts:
                    if layout.name in exact:
                        layout.copy_from_whole(flat.tensor, exact[layout.name])
        trained = {name: param for name, param in named if param.requires_grad}
        self._trained = list(trained)
        self._whole: list[tuple[dict[str, Any], list[Tensor]]] = []
        self._hooks: list[Any] = [
            p.register_post_accumulate_grad_hook(lambda _, name=n: self.state.used.add(name))
            for n, p in trained.items()
        ]
        self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
        self._hooks.append(optimizer.register_step_post_hook(self._after_step))

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks; the engine's contract is a sum.
        self._deepspeed.backward(loss * self.ranks.world_size, scale_wrt_gas=False)

    def clip_grad_norm(self, max_norm: float | None) -> float:
        norm = super().clip_grad_norm(max_norm)
        # DeepSpeed takes zeros for a parameter that had no gradient on any rank.
        users = self.ranks.sum([float(name in self.state.used) for name in self._trained])
        self.state.unused = {name for name, count in zip(self._trained, users, strict=True) if not count}
        return norm

    def step(self) -> None:
        with self.state.in_groups(False):
            self._deepspeed.step()
        if not self._deepspeed.was_step_applied():
            raise RuntimeError("DeepSpeed skipped a step whose gradient is finite")
        self.state.missed.update(self.state.unused)

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Step each parameter by itself where some had no gradient, now or before: no decay, no count for these."""
        self._whole = []
        if not (self.state.unused or self.state.missed):
            return
        flats = {id(flat.tensor): flat for flat in self.state.flats}
        for group in optimizer.param_groups:
            self._whole.append((group, group["params"]))
            group["params"] = [piece for p in group["params"] for piece in self._pieces(flats[id(p)])]

    def _pieces(self, flat: Flat) -> Iterator[Tensor]:
        """The parameters in a flat partition one by one, as views with state of their own."""
        whole = flat.tensor
        for name, piece, layout in self.state.pieces(flat):
            start = piece.storage_offset() - whole.storage_offset()
            if name not in self.state.unused and whole.grad is not None:
                piece.grad = whole.grad.narrow(0, start, piece.numel())
            self.optimizer.state[piece] = {
                key: value - self.state.missed[name]
                if key in COUNTS
                else value.narrow(0, start, piece.numel())
                if isinstance(value, Tensor) and value.shape == whole.shape
                else value
                for key, value in self.optimizer.state[whole].items()
            }
            self.state.tell(piece, (layout,))
            yield piece

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for group, whole in self._whole:
            for piece in group["params"]:
                del optimizer.state[piece]
                self.state.tell(piece, None)
            group["params"] = whole
            for flat in whole:
                for key in COUNTS & optimizer.state[flat].keys():
                    optimizer.state[flat][key] += 1
        self._whole = []

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._deepspeed.destroy()
        if self.ranks.owns_group and dist.is_initialized():
            # DeepSpeed keeps groups of its own beyond the default one, and would use them again in a later run.
            from deepspeed import comm

            comm.destroy_process_group()


def _import(device: torch.device) -> ModuleType:
    """DeepSpeed, on the kind of device that this run uses, with its notices (not its warnings) turned off.

    Raises:
        MissingExtraError: it is not installed.
        InputError: it was imported before for another kind of device.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "deepspeed", "deepspeed") from error
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    accelerator = get_accelerator()
    if accelerator.device_name() != device.type:
        found = accelerator.device_name()
        raise InputError(f"run.device is {device.type}, DeepSpeed's is {found}: export DS_ACCELERATOR={device.type}")
    if device.type == "cpu":
        # Else the first collective compiles an extension, for a minute, that only inference uses.
        builder = accelerator.create_op_builder("ShareMemCommBuilder")
        if builder is not None:
            deepspeed.ops.__compatible_ops__[builder.NAME] = False
    logger.addFilter(_is_news)
    for call in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f".*{call}` is deprecated", category=FutureWarning)
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()  # what is intended here
