"""The plan of a step: from parameters, gradients and state to the tables that kernels take.

A plan holds for as long as the same tensor objects are parameters and state; it is made lazily, because hosts swap
parameters between construction and the first step. Storage may move under a tensor at any time (`.data`,
offloading), so addresses are read anew at every step, together with what they rest on (facts.py). Tensors are looked
at one by one where those facts are not what they were; what else is done for each parameter at each step is kept to a
handful of attribute reads, the rest is numpy on whole tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import itemgetter
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from shardopt.errors import InputError
from shardopt.optim.kernels import Entry, Table
from shardopt.optim.kernels.facts import Facts, Held, Members, check_storage, has_room
from shardopt.optim.kernels.table import clipped, pointed
from shardopt.optim.precision import follow_weight
from shardopt.optim.reference import scalars_of
from shardopt.optim.schema import COUNTS, TYPES, Scalars
from shardopt.slices import local_tensor, local_values

_TILE = 1 << 20  # elements that a temporary may have where strided tensors are copied in parts
_ORDINARY = {Tensor, torch.nn.Parameter, NoneType}


def is_captured(group: Mapping[str, Any], device: torch.device) -> bool:
    """True where steps of the group's parameters are counted, and their scalars computed, on the device."""
    return bool(group["capturable"]) and device.type != "cpu"


class Plan:
    """
    Args:
        groups: the optimizer's parameter groups.
        state: the optimizer's state; parameters without any are not in the plan.
        entry_of: a parameter with its state, given its group.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        entry_of: Callable[[dict[str, Any], Tensor], Entry],
    ) -> None:
        self.groups = groups
        self.params = params = [param for group in groups for param in group["params"]]
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
        weights = [local_values(entry.param) for entry in self.entries]
        self.absent = [i for i, param in enumerate(params) if param not in seen]
        self._states = [entry.state for entry in self.entries]
        self._stepped, place = np.unique([entry.group for entry in self.entries], return_inverse=True)
        self._place = place.astype(np.int64)  # of each entry's group among those that have entries
        self._scheduled = any("schedule_step" in held for held in self._states)
        self._members = Members([group["params"] for group in groups])
        self._state, self._held = state, Held([state, *self._states], COUNTS)
        self._counts: tuple[int, int] | None = None  # of all entries, where `_held` says that they are those
        self._params = [entry.param for entry in self.entries]
        self._mastered = [i for i, entry in enumerate(self.entries) if "master" in entry.tensors]
        self._left: dict[int, tuple[int, ...]] = {}  # those weights as our own step has left them
        self._any_placed = any(hasattr(param, "placements") for param in self._params)
        self._kinds = [(weight.dtype, weight.device) for weight in weights]
        self._numels = [weight.numel() for weight in weights]
        labels = [(key, i, tensor) for i, entry in enumerate(self.entries) for key, tensor in pointed(entry)]
        self._labels = [(key, i) for key, i, _ in labels]  # of each column of the facts
        self._labels += [(key, i) for key in ("weight", "grad") for i in range(len(weights))]
        self._facts = Facts([tensor for _, _, tensor in labels], self._params)
        self._types: list[torch.dtype | None] = [None] * len(weights)  # of the gradients
        self._all_have_gradients = False
        self._strided: set[int] = set()  # entries whose weight or gradient is not laid out in order
        self._tables: list[Table] = []
        self._made_for: tuple[set[int], list[int]] | None = None  # strided entries and the groups' seeds
        self.by_address = False  # whether the kernels of all tables need no tensors

    @property
    def captured(self) -> bool:
        """True once a CUDA graph holds a step of this plan."""
        return any(table.captured for table in self._tables)

    def holds(self, state: Mapping[Tensor, Any]) -> bool:
        """True while the parameters and the tensors of their state are the very same objects."""
        members = [group["params"] for group in self.groups]
        return state is self._state and self._held.unchanged() and self._members.unchanged(members)

    def step(self, gradients: list[Tensor | None]) -> bool:
        """One step; `gradients` are those of `params`, None where there is none.

        Returns:
            False where a weight or state tensor has become one of another kind: a new plan has to check the state.
            Nothing has moved or counted.

        Raises:
            InputError: a weight or gradient that does not fit what the plan was made for. Nothing has moved or
                counted.
            RuntimeError: a sparse gradient (as torch's own optimizers have it).
        """
        weights = list(map(local_tensor, self._params)) if self._any_placed else self._params
        grads = gradients if len(gradients) == len(self.positions) else [gradients[i] for i in self.positions]
        if not {*map(type, grads)} <= _ORDINARY:
            grads = [self._local_gradient(i, grad) for i, grad in enumerate(grads)]
        facts = self._facts.read(weights, grads)
        if self._facts.changed:
            found = self._checked(weights, grads, facts[1:])
            if found is None:
                return False
            grads, facts = found, self._facts.read(weights, found)
            self._facts.known[1:] = facts[1:]
        made_for = self._strided, [group["seed"] for group in self.groups]
        if made_for != self._made_for:
            self._make_tables()
            self._made_for = made_for
        self._take(facts[0], weights, grads)
        return True

    def repeat(self) -> bool:
        """One step where no tensor is of another kind than at the last one, which the kernels take by addresses alone.

        Returns:
            False where that is not so, and `step` is to have a look. Nothing has moved or counted.
        """
        if not self.by_address or any(self.params[i].grad is not None for i in self.absent):
            return False
        if self._made_for != (self._strided, [group["seed"] for group in self.groups]):
            return False
        facts = self._facts.read_own()
        if facts is None or self._facts.changed:
            return False
        if self._facts.moved:
            self._take(facts[0], self._params, [None] * len(self._params))
        else:  # the tables point there
            self._run(self._params)
        return True

    def _take(self, addresses_of_all: np.ndarray, weights: list[Tensor], grads: list[Tensor | None]) -> None:
        """The step itself, of tensors that have been checked."""
        try:
            for table in self._tables:
                addresses, own = addresses_of_all, (weights, grads, self._types)
                if len(table.indices) < len(grads):
                    addresses = addresses[table.columns]
                    own = tuple([values[i] for i in table.indices] for values in own)  # type: ignore[assignment]
                table.point(addresses, *own)
                if table.capturable:
                    table.describe_schedules(self.groups)
                table.kernel.check(table)
            self._facts.known[0] = addresses_of_all
            self._run(weights)  # nothing is refused from here on
        finally:
            for table in self._tables:
                table.weights, table.grads = [], []  # or the gradients would outlive zero_grad

    def _run(self, weights: list[Tensor]) -> None:
        """Count the step and let the kernels take it."""
        places, scalars, steps = self._count()
        if not scalars:
            return
        whole = places is self._place or not (places < 0).any()
        mastered = [i for i in self._mastered if self._types[i] is not None]
        for i in mastered:
            if self._left.get(i) != self._version(i, weights[i]):
                follow_weight(self.entries[i].tensors["master"], weights[i])
        for table in self._tables:
            own = places if len(table.indices) == len(weights) else places[table.indices]
            if table.strided:
                self._step_strided(table, scalars[own[0]], steps[own])
            else:
                table.set_scalars(own, scalars, steps)
                table.kernel.run(table)
        increment_version(self._params if whole else [p for p, at in zip(self._params, places, strict=True) if at >= 0])
        self._left.update((i, self._version(i, weights[i])) for i in mastered)

    def _version(self, index: int, weight: Tensor) -> tuple[int, ...]:
        """Other numbers wherever somebody has written to the weight, unless through its `.data`."""
        return weight.data_ptr(), weight._version, self._params[index]._version

    # -- each step, for each parameter ----------------------------------------------------------------------------

    def _checked(
        self, weights: list[Tensor], grads: list[Tensor | None], facts: np.ndarray
    ) -> list[Tensor | None] | None:
        """The gradients in dtypes that the kernels take, after a look at every tensor that is not as it was.

        None where the plan no longer fits (see `step`).
        """
        for entry, (dtype, device) in zip(self.entries, self._kinds, strict=True):
            if entry.kernel.name == "torch" and is_captured(self.groups[entry.group], device):
                raise InputError(
                    f"capturable=True on {device} needs the triton kernel, and {dtype} parameters have only the torch "
                    f"one here, which reads the step on the host: set capturable=False"
                )
        grads, types, strided = list(grads), list(self._types), set(self._strided)
        known = self._facts.known[1:]
        changed = (facts != known).any(0)
        state = slice(0, len(changed) - 2 * len(weights))  # which is as its entry says when it is first seen
        changed[state] &= (known[1, state] != 0) | ~has_room(facts[1, state])
        for column in np.flatnonzero(changed).tolist():
            key, i = self._labels[column]
            entry, weight, (dtype, device) = self.entries[i], weights[i], self._kinds[i]
            if key == "grad":
                grad = grads[i]
                types[i] = None
                if grad is not None:
                    grads[i] = grad = self._fitting_gradient(i, grad)
                    types[i] = grad.dtype
                    check_storage(grad, device, f"the gradient of {entry.name}")
            elif key == "weight":
                self._check_numel(i, weight, "the weight")
                if weight.dtype != dtype or weight.device != device:
                    return None
                check_storage(weight, device, f"the weight {entry.name}")
            elif known[1, column]:
                return None
            else:
                check_storage(entry.tensors[key], device, f"state {key!r} of {entry.name}")
            grad = grads[i]
            if grad is None or (grad.is_contiguous() and weight.is_contiguous()):
                strided.discard(i)
            else:
                strided.add(i)
        self._types, self._strided, self._all_have_gradients = types, strided, None not in types
        return grads

    def _check_numel(self, index: int, tensor: Tensor, what: str) -> None:
        if tensor.numel() != self._numels[index]:
            raise InputError(
                f"{what} {self.entries[index].name} has {tensor.numel()} elements, the optimizer's state "
                f"{self._numels[index]}: a parameter whose shape changes needs a new optimizer"
            )

    def _fitting_gradient(self, index: int, grad: Tensor) -> Tensor:
        """`grad` in a dtype that the kernels take, where it is what the plan was made for."""
        name, (dtype, _) = self.entries[index].name, self._kinds[index]
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"AdEMAMix does not support sparse gradients: the gradient of {name} is sparse (an embedding gives "
                f"dense ones with sparse=False)"
            )
        self._check_numel(index, grad, "the gradient of")
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
                f"parameter as {placements}: redistribute it first (param.grad = "
                f"param.grad.redistribute(placements=param.placements))"
            )
        local = local_tensor(grad)
        return local.wait() if hasattr(local, "wait") else local  # an AsyncCollectiveTensor

    def _count(self) -> tuple[np.ndarray, list[Scalars], np.ndarray]:
        """Count the step; each entry's place in the list of scalars (-1: no gradient), the list, its steps.

        There is one place for each group and step count: nearly always as many as there are groups.
        """
        alike = self._count_alike() if self._all_have_gradients else None
        if alike is not None:
            found = [scalars_of(self.groups[group], *alike) for group in self._stepped]
            return self._place, found, np.full(len(found), alike[0])
        on_device: list[Tensor] = []
        places: dict[tuple[int, int, int], int] = {}
        which = []
        for entry, kind in zip(self.entries, self._types, strict=True):
            if kind is None:  # no gradient
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

    def _count_alike(self) -> tuple[int, int] | None:
        """Count the step of all entries where they have the same counts, on the host: the usual case.

        None, and nothing counted, where that is not so.
        """
        counts = self._counts if self._held.counted else self._counts_alike()
        if counts is None:
            return None
        self._counts = counts[0] + 1, counts[1] + 1
        for key, count in zip(COUNTS, self._counts, strict=True):
            if key == COUNTS[0] or self._scheduled:
                self._held.count(key, count)
        return self._counts

    def _counts_alike(self) -> tuple[int, int] | None:
        counted = []
        for key in COUNTS if self._scheduled else COUNTS[:1]:
            try:
                counts: list[Any] = list(map(itemgetter(key), self._states))
            except KeyError:  # some were there before a switch from AdamW, some were not
                return None
            if {*map(type, counts)} != {int} or counts.count(counts[0]) < len(counts):
                return None
            counted.append(counts[0])
        return counted[0], counted[-1]

    # -- tables -------------------------------------------------------------------------------------------------

    def _make_tables(self) -> None:
        members: dict[tuple[str, torch.device, bool, int | None], list[int]] = {}
        for i, entry in enumerate(self.entries):
            device = self._params[i].device
            captured = is_captured(self.groups[entry.group], device)
            if captured and i in self._strided:
                raise InputError(
                    f"the weight or gradient of {entry.name} is not contiguous: capturable=True needs them to be, call "
                    f".contiguous() on them, or set capturable=False"
                )
            alone = i if i in self._strided and not entry.kernel.takes_strides else None
            members.setdefault((entry.kernel.name, device, captured, alone), []).append(i)
        self._tables = [
            Table(
                indices,
                [self.entries[i] for i in indices],
                self.groups,
                captured,
                strided=alone is not None,
                shaped=[n for n, i in enumerate(indices) if i in self._strided and alone is None],
            )
            for (_, _, captured, alone), indices in members.items()
        ]
        self.by_address = (
            not self._any_placed and not self._strided and all(t.kernel.takes_addresses for t in self._tables)
        )
        owners = np.array([i for _, i in self._labels])
        for table in self._tables:
            table.columns = np.flatnonzero(np.isin(owners, table.indices))

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
            layouts = tuple(clipped(layout, start, copy.numel()) for layout in entry.layouts)
            part_table = Table([0], [replace(entry, tensors=tensors, layouts=layouts)], self.groups, capturable=False)
            part_grad = grad[first : first + some].contiguous()
            kept = [*(tensor for _, tensor in pointed(part_table.entries[0])), copy, part_grad]
            part_table.point(np.array([t.data_ptr() for t in kept]), [copy], [part_grad], [grad.dtype])
            part_table.set_scalars(np.zeros(1, dtype=np.int64), [scalars], step)
            entry.kernel.run(part_table)
            if scalars.lr != 0.0 and copy.data_ptr() != part.data_ptr():  # with lr = 0 no bit is to move
                part.copy_(copy)
