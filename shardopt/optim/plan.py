"""The plan of a step: from parameters, gradients and state to the tables that kernels take.

A plan holds for as long as the same tensor objects are parameters and state; it is made lazily, because hosts swap
parameters between construction and the first step. Storage may move under a tensor at any time (`.data`,
offloading), so pointers are read anew at every step, and what they point at is checked: state when the plan is made
and whenever it moves, weights and gradients at every step. What is done for each parameter at each step is kept to a
handful of attribute reads: the rest is numpy on whole tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import attrgetter, is_, itemgetter
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from shardopt.errors import InputError
from shardopt.optim.kernels import Entry, Table
from shardopt.optim.precision import follow_weight
from shardopt.optim.reference import scalars_of
from shardopt.optim.schema import COUNTS, TYPES, Scalars
from shardopt.slices import Layout, Range, local_tensor

_TILE = 1 << 20  # elements that a temporary may have where strided tensors are copied in parts
_ORDINARY = {Tensor, torch.nn.Parameter, NoneType}
# Mapped over lists of tensors, these cost half of what a loop that asks each does.
_numel, _is_contiguous = torch.Tensor.numel, torch.Tensor.is_contiguous
_dtype, _layout = attrgetter("dtype"), attrgetter("layout")


def is_captured(group: Mapping[str, Any], device: torch.device) -> bool:
    """True where steps of the group's parameters are counted, and their scalars computed, on the device."""
    return bool(group["capturable"]) and device.type != "cpu"


class Plan:
    """
    Args:
        groups: the optimizer's parameter groups.
        params: their parameters, in order, those named twice included.
        state: the optimizer's state; parameters without any are not in the plan.
        entry_of: a parameter with its state, given its group.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        params: list[Tensor],
        state: Mapping[Tensor, dict[str, Any]],
        entry_of: Callable[[dict[str, Any], Tensor], Entry],
    ) -> None:
        self.groups = groups
        self.params = params
        self.entries: list[Entry] = []
        self.positions: list[int] = []  # of the entries in `params`
        seen: set[Tensor] = set()
        owners = [group for group in groups for _ in group["params"]]
        for position, (param, group) in enumerate(zip(params, owners, strict=True)):
            if param in seen or not state.get(param):  # a tied weight that is listed twice makes one step
                continue
            seen.add(param)
            self.entries.append(entry_of(group, param))
            self.positions.append(position)
        weights = [local_tensor(entry.param.detach()) for entry in self.entries]
        self.absent = [i for i, param in enumerate(params) if param not in seen]
        self._states = [entry.state for entry in self.entries]
        self._stepped, place = np.unique([entry.group for entry in self.entries], return_inverse=True)
        self._place = place.astype(np.int64)  # of each entry's group among those that have entries
        self._scheduled = any("schedule_step" in held for held in self._states)
        self._all_states = list(state.values())
        self._lengths = list(map(len, self._states))
        keys = {key for entry in self.entries for key in entry.tensors}
        self._columns = []  # for each state key the dicts that have it and the tensors that they should hold
        for key in keys:
            holders = [held for held in self._states if key in held]
            self._columns.append((itemgetter(key), holders, [held[key] for held in holders]))
        self._params = [entry.param for entry in self.entries]
        self._mastered = [i for i, entry in enumerate(self.entries) if "master" in entry.tensors]
        self._left: dict[int, tuple[int, ...]] = {}  # those weights as our own step has left them
        self._any_placed = any(hasattr(param, "placements") for param in self._params)
        self._types, self._numels = (list(map(of, weights)) for of in (_dtype, _numel))
        self._tables: list[Table] = []
        self._made_for: tuple[list[int], list[int]] | None = None  # strided entries and the groups' seeds

    @property
    def captured(self) -> bool:
        """True once a CUDA graph holds a step of this plan."""
        return any(table.captured for table in self._tables)

    def holds(self, params: list[Tensor], state: Mapping[Tensor, Any]) -> bool:
        """True while the parameters and the tensors of their state are the very same objects."""
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        now = state.values()
        if len(now) != len(self._all_states) or not all(map(is_, now, self._all_states)):
            return False
        if list(map(len, self._states)) != self._lengths:
            return False
        for get, holders, tensors in self._columns:
            try:
                if not all(map(is_, map(get, holders), tensors)):
                    return False
            except KeyError:
                return False
        return list(map(_dtype, self._params)) == self._types

    def step(self, gradients: list[Tensor | None]) -> None:
        """One step; `gradients` are those of `params`, None where there is none.

        Raises:
            InputError: a weight or gradient that does not fit what the plan was made for. Nothing has moved or
                counted.
            RuntimeError: a sparse gradient (as torch's own optimizers have it).
        """
        weights, grads, types, strided = self._gather(
            gradients if len(gradients) == len(self.positions) else [gradients[i] for i in self.positions]
        )
        made_for = strided, [group["seed"] for group in self.groups]
        if made_for != self._made_for:
            self._make_tables(set(strided))
            self._made_for = made_for
        try:
            for table in self._tables:
                own = (weights, grads, types)
                if len(table.indices) < len(grads):
                    own = tuple([values[i] for i in table.indices] for values in own)  # type: ignore[assignment]
                table.point(*own)
                if table.capturable:
                    table.describe_schedules(self.groups)
                table.kernel.check(table)
            self._run(weights, grads)  # nothing is refused from here on
        finally:
            for table in self._tables:
                table.weights, table.grads = [], []  # or the gradients would outlive zero_grad

    def _run(self, weights: list[Tensor], grads: list[Tensor | None]) -> None:
        """Count the step and let the kernels take it."""
        places, scalars, steps = self._count(grads)
        if not scalars:
            return
        mastered = [i for i in self._mastered if grads[i] is not None]
        for i in mastered:
            if self._left.get(i) != self._version(i, weights[i]):
                follow_weight(self.entries[i].tensors["master"], weights[i])
        for table in self._tables:
            own = places if len(table.indices) == len(grads) else places[table.indices]
            if table.strided:
                self._step_strided(table, scalars[own[0]], steps[own])
            else:
                table.set_scalars(own, scalars, steps)
                table.kernel.run(table)
        whole = not (places < 0).any()
        increment_version(self._params if whole else [p for p, at in zip(self._params, places, strict=True) if at >= 0])
        self._left.update((i, self._version(i, weights[i])) for i in mastered)

    def _version(self, index: int, weight: Tensor) -> tuple[int, ...]:
        """Other numbers wherever somebody has written to the weight, unless through its `.data`."""
        return weight.data_ptr(), weight._version, self._params[index]._version

    # -- each step, for each parameter ----------------------------------------------------------------------------

    def _gather(
        self, grads: list[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None], list[torch.dtype | None], list[int]]:
        """Local weights and gradients, the gradients' types, and the entries of which one is not laid out in order."""
        weights = self._params
        if self._any_placed:
            weights = list(map(local_tensor, weights))
        kinds = {*map(type, grads)}
        if not kinds <= _ORDINARY:
            grads = [self._local_gradient(i, grad) for i, grad in enumerate(grads)]
        # Nearly every step needs no closer look, and hundreds of small tensors make looking dear.
        all_grads: list[Any] = grads
        if (
            NoneType not in kinds
            and list(map(_dtype, all_grads)) == self._types
            and {*map(_layout, all_grads)} <= {torch.strided}
            and list(map(_numel, all_grads)) == self._numels == list(map(_numel, weights))
            and all(map(_is_contiguous, all_grads))
            and all(map(_is_contiguous, weights))
        ):
            return weights, grads, self._types, []
        grads, strided = list(grads), []
        for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
            if grad is not None:
                grads[i] = grad = self._fitting_gradient(i, weight, grad)
                if not (grad.is_contiguous() and weight.is_contiguous()):
                    strided.append(i)
        return weights, grads, [None if grad is None else grad.dtype for grad in grads], strided

    def _fitting_gradient(self, index: int, weight: Tensor, grad: Tensor) -> Tensor:
        """`grad` in a dtype that the kernels take, where it and the weight are what the plan was made for."""
        name, dtype = self.entries[index].name, self._types[index]
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"AdEMAMix does not support sparse gradients: the gradient of {name} is sparse (an embedding gives "
                f"dense ones with sparse=False)"
            )
        for what, tensor in (("the weight", weight), ("the gradient of", grad)):
            if tensor.numel() != self._numels[index]:
                raise InputError(
                    f"{what} {name} has {tensor.numel()} elements, the optimizer's state {self._numels[index]}: a "
                    f"parameter whose shape changes needs a new optimizer"
                )
        if not (grad.is_floating_point() or dtype.is_complex):
            raise InputError(f"the gradient of {name} is {grad.dtype}: it must be a floating-point tensor")
        kind = grad.dtype
        if kind is not dtype and (kind not in TYPES or torch.float64 in (kind, dtype)):
            return grad.to(dtype)
        return grad

    def _local_gradient(self, index: int, grad: Tensor | None) -> Tensor | None:
        """The part of a gradient that belongs to the local weight; a collective on its way is waited for."""
        if grad is None:
            return None
        placements = getattr(self._params[index], "placements", None)
        if getattr(grad, "placements", None) != placements:
            raise InputError(
                f"the gradient of {self.entries[index].name} is placed as {getattr(grad, 'placements', None)}, its "
                f"parameter as {placements}: redistribute it first"
            )
        local = local_tensor(grad)
        return local.wait() if hasattr(local, "wait") else local  # an AsyncCollectiveTensor

    def _count(self, grads: list[Tensor | None]) -> tuple[np.ndarray, list[Scalars], np.ndarray]:
        """Count the step; each entry's place in the list of scalars (-1: no gradient), the list, its steps.

        There is one place for each group and step count: nearly always as many as there are groups.
        """
        alike = self._count_alike(grads)
        if alike is not None:
            found = [scalars_of(self.groups[group], *alike) for group in self._stepped]
            return self._place, found, np.full(len(found), alike[0], dtype=np.int64)
        on_device: list[Tensor] = []
        places: dict[tuple[int, int, int], int] = {}
        which = []
        for entry, grad in zip(self.entries, grads, strict=True):
            if grad is None:
                which.append(-1)
                continue
            state = entry.state
            step = state["step"]
            scheduled = state.get("schedule_step")
            if isinstance(step, int):
                state["step"] = step = step + 1
                if scheduled is None:
                    scheduled = step
                else:
                    state["schedule_step"] = scheduled = scheduled + 1
            elif step.device.type == "cpu":
                step = int(step.add_(1))
                scheduled = step if scheduled is None else int(scheduled.add_(1))
            else:
                on_device += [step] if scheduled is None else [step, scheduled]
                step = scheduled = 0
            which.append(places.setdefault((entry.group, step, scheduled), len(places)))
        if on_device:
            torch._foreach_add_(on_device, 1)
        scalars = [scalars_of(self.groups[group], step, scheduled) for group, step, scheduled in places]
        return np.array(which, dtype=np.int64), scalars, np.array([step for _, step, _ in places], dtype=np.int64)

    def _count_alike(self, grads: list[Tensor | None]) -> tuple[int, int] | None:
        """Count the step of entries that all have a gradient and the same counts on the host, the usual case.

        None, and nothing counted, where that is not so.
        """
        if NoneType in {*map(type, grads)}:
            return None
        counted = []
        for key in COUNTS if self._scheduled else COUNTS[:1]:
            try:
                counts: list[Any] = list(map(itemgetter(key), self._states))
            except KeyError:  # some were there before a switch from AdamW, some were not
                return None
            if {*map(type, counts)} != {int} or counts.count(counts[0]) < len(counts):
                return None
            counted.append((key, counts[0] + 1))
        for key, count in counted:
            for state in self._states:
                state[key] = count
        return counted[0][1], counted[-1][1]

    # -- tables -------------------------------------------------------------------------------------------------

    def _make_tables(self, strided: set[int]) -> None:
        members: dict[tuple[str, torch.device, bool, int | None], list[int]] = {}
        for i, entry in enumerate(self.entries):
            device = self._params[i].device
            captured = is_captured(self.groups[entry.group], device)
            if captured and entry.kernel.name == "torch":
                raise InputError(
                    f"capturable=True on {device} needs the triton kernel, and {self._params[i].dtype} parameters "
                    f"have only the torch one here, which reads the step on the host: set capturable=False"
                )
            if captured and i in strided:
                raise InputError(
                    f"the weight or gradient of {entry.name} is not contiguous: capturable=True needs them to be, call "
                    f".contiguous() on them, or set capturable=False"
                )
            members.setdefault((entry.kernel.name, device, captured, i if i in strided else None), []).append(i)
        self._tables = [
            Table(indices, [self.entries[i] for i in indices], self.groups, captured, alone is not None)
            for (_, _, captured, alone), indices in members.items()
        ]

    # -- weights or gradients that are not laid out in order --------------------------------------------------------

    def _step_strided(self, table: Table, scalars: Scalars, step: np.ndarray) -> None:
        """Step with contiguous copies of some rows at a time."""
        (entry,), (weight,), (grad,) = table.entries, table.weights, table.grads
        assert grad is not None
        # blocks do not end where rows do, so block formats take the whole at once
        rows = weight.shape[0]
        in_blocks = any(fmt.in_blocks for fmt in entry.formats.values())
        some = rows if in_blocks else max(1, _TILE * rows // weight.numel())
        row_numel = weight.numel() // rows
        for first in range(0, rows, some):
            part = weight[first : first + some]
            copy = part.contiguous()
            start = first * row_numel
            tensors = {
                key: tensor if key.endswith("_scale") else tensor.view(-1).narrow(0, start, copy.numel())
                for key, tensor in entry.tensors.items()
            }
            clipped = tuple(_clipped(layout, start, copy.numel()) for layout in entry.layouts)
            part_table = Table([0], [replace(entry, tensors=tensors, layouts=clipped)], self.groups, capturable=False)
            part_table.point([copy], [grad[first : first + some].contiguous()], [grad.dtype])
            part_table.set_scalars(np.zeros(1, dtype=np.int64), [scalars], step)
            entry.kernel.run(part_table)
            if scalars.lr != 0.0 and copy.data_ptr() != part.data_ptr():  # with lr = 0 no bit is to move
                part.copy_(copy)


# -- layouts -----------------------------------------------------------------------------------------------------


def _clipped(layout: Layout, start: int, length: int) -> Layout:
    """The part of a layout that lies in the local elements start .. start + length, counted from `start`."""
    ranges = []
    for r in layout.ranges:
        first, last = max(r.local_start, start), min(r.local_start + r.length, start + length)
        if first < last:
            ranges.append(Range(r.global_start + first - r.local_start, first - start, last - first))
    return Layout(layout.name, layout.shape, tuple(ranges))
