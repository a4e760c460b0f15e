"""The deepspeed engine: deepspeed.initialize with our optimizer as its client, behind the interface of every engine."""

from __future__ import annotations

import io
import logging
import math
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
from shardopt.engines.deepspeed.config import DeepspeedConfig
from shardopt.engines.deepspeed.layouts import Flat, Partitions
from shardopt.errors import InputError, MissingExtraError
from shardopt.optim import precision, states
from shardopt.slices import Layout, Slice, named_parameters

# What the state counts, of all our optimizers and torch's.
_COUNTS = {"step", "schedule_step"}


class DeepspeedEngine(Engine):
    name = "deepspeed"
    _deepspeed: Any  # its engine, which is the model too

    def __init__(self, config: DeepspeedConfig, inputs: EngineInputs) -> None:
        ranks, spec, model = inputs.ranks, inputs.optimizer, inputs.model
        if not ranks.distributed:
            raise InputError("engine.name: deepspeed needs torchrun (or choose engine.name=single)")
        if not spec.elementwise:
            raise InputError(
                f"engine.name: deepspeed cannot shard {spec.cls.__name__}: {spec.reason}; choose ddp or another "
                f"optimizer"
            )
        kept = spec.kwargs.get("state_dtype", "fp32")
        for dtype_name in kept.values() if isinstance(kept, dict) else (kept,):
            if dtype_name in precision.BLOCK_FORMATS:
                raise InputError(
                    f"optimizer.state_dtype: {dtype_name} has a scale a block of one parameter, but DeepSpeed's flat "
                    f"partitions hold several: use bf16, or another engine"
                )
        for name, param in named_parameters(model):
            if not param.dim():
                raise InputError(
                    f"parameter {name} has no dimension, which DeepSpeed cannot send: give it the shape (1,)"
                )
        deepspeed = _import(ranks.device)
        dtype = compute_dtype(config.dtype_name(), ranks.device)
        inputs.initialise(model)
        self.ranks = ranks
        self.optimizer = spec.build(model)
        named = named_parameters(model)
        # DeepSpeed makes its masters from the weights that it has rounded to bf16.
        exact = {n: p.detach().to("cpu", copy=True) for n, p in named if p.requires_grad and dtype != torch.float32}
        merged = config.merged(dtype == torch.bfloat16, pin_memory=ranks.device.type == "cuda")
        try:
            with redirect_stdout(io.StringIO()):  # memory statistics and the like, printed whatever the log level
                self._deepspeed, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=merged)
        except (ValueError, AssertionError) as error:
            raise InputError(f"engine.config: DeepSpeed refuses this configuration: {error}") from error
        self.model = self._deepspeed
        self.partitions = Partitions(self.model, self.optimizer, model)
        self.partitions.fill_groups()
        self._restore(exact)
        self._trained = [(n, p) for n, p in named if p.requires_grad]
        self._used: set[str] = set()
        self._unused: set[str] = set()
        self._missed: dict[str, int] = {}
        self._whole: list[tuple[dict[str, Any], list[Tensor]]] = []
        self._hooks: list[Any] = [
            p.register_post_accumulate_grad_hook(lambda _, name=n: self._used.add(name)) for n, p in self._trained
        ]
        self._hooks.append(self.optimizer.register_step_pre_hook(self._before_step))
        self._hooks.append(self.optimizer.register_step_post_hook(self._after_step))

    @torch.no_grad()
    def _restore(self, exact: dict[str, Tensor]) -> None:
        for flat in self.partitions.flats:
            for layout in flat.layouts:
                if layout.name in exact:
                    layout.copy_from_whole(flat.tensor.detach(), exact[layout.name])

    # ---------------------------------------------------------------- gradients

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks; the engine's contract is a sum.
        self._deepspeed.backward(loss * self.ranks.world_size, scale_wrt_gas=False)

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float | None) -> float:
        grads = self.partitions.stage.gradients()
        # fp32 within a tensor, double across tensors and ranks.
        norms = [n.double().to(self.ranks.device) for n in torch._foreach_norm(grads)] if grads else []
        square = torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)
        # The same collective says which parameters had no gradient on any rank: DeepSpeed takes zeros for them.
        used = torch.tensor([name in self._used for name, _ in self._trained], dtype=torch.float64)
        both = torch.cat([square[None].to(self.ranks.device), used.to(self.ranks.device)])
        dist.all_reduce(both)
        norm = math.sqrt(both[0].item())
        self._unused = {name for (name, _), n in zip(self._trained, both[1:].tolist(), strict=True) if not n}
        if max_norm is not None and max_norm < norm < math.inf:
            torch._foreach_mul_(grads, max_norm / norm)
        elif norm * norm > torch.finfo(torch.float32).max:
            norm = math.inf  # DeepSpeed squares in fp32 and would skip the step
        return norm

    def step(self) -> None:
        with self.partitions.in_groups(False):
            self._deepspeed.step()
        if not self._deepspeed.was_step_applied():
            raise RuntimeError("DeepSpeed skipped a step whose gradient is finite")
        for name in self._unused:
            self._missed[name] = self._missed.get(name, 0) + 1

    def zero_grad(self) -> None:
        self.partitions.stage.clear()
        self._used.clear()
        self._unused.clear()

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Step each parameter by itself where some had no gradient, now or before: no decay, no count for these."""
        self._whole = []
        if not (self._unused or self._missed):
            return
        flats = {id(flat.tensor): flat for flat in self.partitions.flats}
        for group in optimizer.param_groups:
            self._whole.append((group, group["params"]))
            group["params"] = [piece for p in group["params"] for piece in self._pieces(flats[id(p)])]

    def _pieces(self, flat: Flat) -> Iterator[Tensor]:
        """The parameters in a flat partition one by one, as views with state of their own."""
        whole = flat.tensor
        for layout in flat.layouts:
            (r,) = layout.ranges
            piece = whole.detach().narrow(0, r.local_start, r.length)
            if layout.name not in self._unused and whole.grad is not None:
                piece.grad = whole.grad.narrow(0, r.local_start, r.length)
            missed = self._missed.get(layout.name, 0)
            self.optimizer.state[piece] = {
                key: value - missed
                if key in _COUNTS
                else value.narrow(0, r.local_start, r.length)
                if isinstance(value, Tensor) and value.shape == whole.shape
                else value
                for key, value in self.optimizer.state[whole].items()
            }
            where = Layout.contiguous(layout.name, layout.shape, r.global_start, r.length)
            self.partitions.tell(piece, (where,))
            yield piece

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for group, whole in self._whole:
            for piece in group["params"]:
                del optimizer.state[piece]
                self.partitions.explicit.pop(piece)
            group["params"] = whole
            for flat in whole:
                for key in _COUNTS & optimizer.state[flat].keys():
                    optimizer.state[flat][key] += 1
        self._whole = []

    # ---------------------------------------------------------------- state

    def init_state(self) -> None:
        states.init_state(self.optimizer)

    def slices(self) -> list[Slice]:
        return self.partitions.slices()

    def step_counts(self) -> dict[str, dict[str, int | float]]:
        scalars = super().step_counts()
        for name, missed in self._missed.items():
            for key in scalars.get(name, {}).keys() & _COUNTS:
                scalars[name][key] -= missed
        return scalars

    def load_step_counts(self, scalars: dict[str, dict[str, int | float]]) -> None:
        # A partition has one count for all its parameters: that of the one with the most steps.
        leading = dict(scalars)
        self._missed = {}
        for flat in self.partitions.flats:
            found = {layout.name: scalars[layout.name] for layout in flat.layouts if layout.name in scalars}
            first = max(found.values(), key=lambda entry: entry.get("step", 0), default={})
            for name, entry in found.items():
                leading[name] = first
                if missed := int(first.get("step", 0) - entry.get("step", 0)):
                    self._missed[name] = missed
        super().load_step_counts(leading)

    def gradient_bytes(self) -> int:
        return self.partitions.stage.gradient_bytes()

    def replicas(self) -> int:
        return 1

    def full_parameters(self) -> Iterator[tuple[str, Tensor | None]]:
        for name, whole in self.partitions.full():
            yield name, whole.cpu() if self.ranks.is_main else None

    def after_load(self) -> None:
        self.partitions.stage.refresh()

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
        raise InputError(
            f"run.device: this run is on {device.type}, but DeepSpeed has chosen {accelerator.device_name()}: set the "
            f"environment variable DS_ACCELERATOR={device.type}"
        )
    if device.type == "cpu":
        # Else the first collective compiles an extension, for a minute, that only inference uses.
        builder = accelerator.create_op_builder("ShareMemCommBuilder")
        if builder is not None:
            deepspeed.ops.__compatible_ops__[builder.NAME] = False
    if not any(isinstance(f, _Intended) for f in logger.filters):
        logger.addFilter(_Intended())
    for call in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f".*{call}` is deprecated", category=FutureWarning)
    return deepspeed


class _Intended(logging.Filter):
    """Drops the warning that the optimizer is not one of DeepSpeed's."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "untested optimizer" not in record.getMessage()
