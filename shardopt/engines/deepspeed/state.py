"""Sharded state of DeepSpeed's ZeRO: fp32 masters and optimizer state in flat partitions of several parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from shardopt.distributed import Ranks
from shardopt.engines.deepspeed.layouts import Flat, stage_of
from shardopt.engines.held_gradients import UnusedGradients
from shardopt.engines.state import ShardedState
from shardopt.optim import states
from shardopt.slices import Layout, Slice, named_parameters

# What the state counts, of all our optimizers and torch's.
COUNTS = {"step", "schedule_step"}


class DeepspeedState(ShardedState):
    """The flat partitions of one DeepSpeed optimizer, as slices of parameters.

    To be made after deepspeed.initialize (or Accelerator.prepare) and before the first step: it tells an optimizer
    that takes layouts what its partitions hold, so that its random bits are those of any other engine.

    Args:
        host: the DeepSpeed engine, its ZeRO optimizer, or accelerate's wrapper of either.
        optimizer: the client optimizer inside it.
        model: the module that was given to DeepSpeed, for its parameters' names.
        ranks: the processes; None takes those of the default process group.
        trained_only: leave frozen weights and buffers out of the slices.

    Raises:
        InputError: it is not a ZeRO optimizer whose partitions are understood.
    """

    def __init__(
        self,
        host: Any,
        optimizer: Optimizer,
        model: nn.Module,
        ranks: Ranks | None = None,
        *,
        trained_only: bool = False,
    ) -> None:
        super().__init__(optimizer, ranks, model, trained_only)
        self.named = named_parameters(model)
        self.stage = stage_of(host, {param: name for name, param in self.named})
        self.flats = self.stage.flats()
        self._waiting = UnusedGradients.of(optimizer, self.stage.gradients)
        # A partition has one count for all its parameters, that of the one with the most steps.
        self.missed = Counter[str]()
        """Steps that a parameter has made fewer than its partition, for want of a gradient."""
        self.used: set[str] = set()
        """Parameters that have had a gradient here since gradients were dropped, where an engine notes them."""
        self.unused: set[str] = set()
        """Parameters that had none on any rank, where an engine notes them."""
        for flat in self.flats:
            self.tell(flat.tensor, flat.layouts)

    def tell(self, tensor: Tensor, layouts: tuple[Layout, ...] | None) -> None:
        """Let an optimizer that takes layouts know what `tensor` holds."""
        if hasattr(self.optimizer, "set_layout"):
            self.optimizer.set_layout(tensor, layouts)

    @contextmanager
    def in_groups(self, present: bool = True) -> Iterator[None]:
        """The partitions in the client's parameter groups, or not: stage 3 wants to put each there for its own step."""
        kept = [group["params"] for group in self.optimizer.param_groups]
        if present or self.stage.empties_groups:
            self.fill_groups(present)
        try:
            yield
        finally:
            for group, params in zip(self.optimizer.param_groups, kept, strict=True):
                group["params"] = params

    def fill_groups(self, present: bool = True) -> None:
        """Put the partitions into the client's parameter groups, or take them out."""
        for i, group in enumerate(self.optimizer.param_groups):
            group["params"] = [flat.tensor for flat in self.flats if flat.group == i and present]

    def pieces(self, flat: Flat) -> list[tuple[str, Tensor, Layout]]:
        """The parameters in a flat partition one by one: name, a view of the elements, and their layout."""
        return [(s.name, s.tensors[0], s.layout) for s in states.weight_slices({flat.tensor: flat.layouts})]

    def layouts(self) -> dict[Tensor, tuple[Layout, ...]]:
        return {flat.tensor: flat.layouts for flat in self.flats}

    def weight_slices(self) -> list[Slice]:
        # The fp32 masters held here, and the frozen parameters in the dtype that they have.
        slices = states.weight_slices(self.layouts())
        for name, param in self.named if not self.trained_only else ():
            if not param.requires_grad:
                layout, tensor = self.stage.frozen(name, param)
                slices.append(Slice(name, "weight", layout, (tensor,)))
        return slices

    def init(self) -> None:
        with self.in_groups():
            super().init()

    def statistics(self) -> dict[str, float]:
        with self.in_groups():
            return super().statistics()

    def step_counts(self) -> dict[str, dict[str, int | float]]:
        counts = super().step_counts()
        for name, missed in self.missed.items():
            for key in counts.get(name, {}).keys() & COUNTS:
                counts[name][key] -= missed
        return counts

    def load_step_counts(self, counts: Mapping[str, Mapping[str, int | float]]) -> None:
        leading = dict(counts)
        self.missed.clear()
        for flat in self.flats:
            found = {layout.name: counts[layout.name] for layout in flat.layouts if layout.name in counts}
            first = max(found.values(), key=lambda entry: entry.get("step", 0), default={})
            for name, entry in found.items():
                leading[name] = first
                if missed := int(first.get("step", 0) - entry.get("step", 0)):
                    self.missed[name] = missed
        super().load_step_counts(leading)

    def clip_grad_norm(self, max_norm: float | None) -> float:
        norm = self._clip({1.0: self.stage.gradients()}, max_norm)
        if (max_norm is None or norm <= max_norm) and norm * norm > torch.finfo(torch.float32).max:
            return float("inf")  # DeepSpeed squares in fp32 and would skip the step
        return norm

    def holds_gradients(self) -> bool:
        # The last backward was no step's last, or was and no step has followed.
        return not self.stage.zero.is_gradient_accumulation_boundary() or self._waiting.are_there()

    def drop_gradients(self) -> None:
        self.stage.clear()
        self.stage.zero.set_gradient_accumulation_boundary(True)
        self.used.clear()
        self.unused.clear()

    def gradient_bytes(self) -> int:
        return self.stage.gradient_bytes()

    @property
    def replicas(self) -> int:
        return 1

    def full_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        held: dict[str, list[Slice]] = {}
        for s in self.weight_slices():
            held.setdefault(s.name, []).append(s)
        for name, param in self.named:
            mine = held.get(name, [])
            if any(s.layout.is_whole for s in mine) and not param.requires_grad:
                yield name, self.on_main(mine[0].tensors[0])
                continue
            shape = tuple(getattr(param, "ds_shape", param.shape))
            # Integers: adding zero to the bits keeps -0.0 and NaN what they are.
            dtype = torch.float32 if param.requires_grad else param.dtype
            whole = torch.zeros(shape, dtype=dtype, device=self.ranks.device)
            for s in mine:
                s.layout.copy_to_whole(s.tensors[0].to(whole.device), whole)
            dist.all_reduce(whole.view(torch.int32) if dtype == torch.float32 else whole)
            yield name, self.on_main(whole)

    def refresh(self) -> None:
        self.stage.refresh()
