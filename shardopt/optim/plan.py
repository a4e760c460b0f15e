"""Which segments a step touches: from parameters, gradients and state to the tables that kernels take.

A plan holds for as long as the same tensor objects are parameters and state; it is made lazily, because hosts swap
parameters between construction and the first step. Storage may move under a tensor at any time (`.data`,
offloading), so pointers are read anew at every step. What is done for each parameter at each step is kept to a
handful of attribute reads: the rest is numpy on whole tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter, is_, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardopt.errors import InputError
from shardopt.optim import kernels, precision
from shardopt.optim.kernels import MAXIMIZE, SEGMENT, SKIP, TYPES, YOGI, Entry, Kernel, Table
from shardopt.optim.reference import Scalars, scalars_at
from shardopt.slices import Layout, PlacementError, Range, local_tensor, name_key

COUNTS = ("step", "schedule_step")
_HYPER = ("betas", "alpha", "eps", "weight_decay", "alpha_warmup", "beta3_warmup", "eps_root")
_HYPER_KEYS = (*_HYPER, "second_moment", "maximize", "weight_ema")
_STEP_FIELDS = Scalars._fields[:11]  # the doubles of a row that change from step to step
_NAMES = SEGMENT.names or ()
# Rows as words: the columns before the small ones at the end are of 8 bytes.
_WORD = 8
_DOUBLES = slice(_NAMES.index("lr"), _NAMES.index("lr") + len(_STEP_FIELDS))
assert _NAMES[_DOUBLES] == _STEP_FIELDS
_STORED = ("m1", "m2", "nu", "weight_ema", "m1_scale", "m2_scale", "nu_scale", "weight_ema_scale", "master")
_COLUMN_OF = {key: _NAMES.index(key) for key in _STORED} | {"master_low": _NAMES.index("master")}
_TILE = 1 << 20  # elements that a temporary may have where strided tensors are copied in parts
# Mapped over lists of tensors, these cost half of what a loop that asks each does.
_data_ptr, _is_contiguous = torch.Tensor.data_ptr, torch.Tensor.is_contiguous
_dtype, _layout = attrgetter("dtype"), attrgetter("layout")


def scalars_of(group: Mapping[str, Any], step: int, schedule_step: int) -> Scalars:
    """A parameter group's scalars at a step (from 1). A step on the device (capturable) stands as 0."""
    lr = group["lr"]
    on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
    known = 0.0 if on_device and not step else float(lr)  # reading a device's tensor would break a capture
    found = scalars_at(max(1, step), max(1, schedule_step), lr=known, **{key: group[key] for key in _HYPER_KEYS})
    if not step and group["weight_ema"] is not None:
        found = found._replace(weight_ema_rate=1.0 - group["weight_ema"])  # the kernel knows the first step itself
    return found


def make_entry(param: Tensor, group: int, state: dict[str, Any]) -> Entry:
    tensors = {k: local_tensor(v) for k, v in state.items() if isinstance(v, Tensor) and k not in COUNTS}
    tensors |= {k: v.view(-1) for k, v in tensors.items() if k.endswith("_scale")}  # a row of a DTensor
    return Entry(param, group, state, tensors)


def placed_ranges(layouts: Sequence[Layout]) -> Iterator[tuple[Layout, Range, int]]:
    """Each range with its layout and the number of its first block."""
    block = 0
    for layout in layouts:
        for r in layout.ranges:
            yield layout, r, block
            block += precision.blocks(r.length)


class Plan:
    """
    Args:
        groups: the optimizer's parameter groups.
        params: their parameters, in order, those named twice included.
        names: canonical name of each.
        state: the optimizer's state; parameters without any are not in the plan.
        layouts: what a parameter's local tensor holds, given the parameter and its name.
        kernel: what `kernels.choose` is to be asked for.

    Raises:
        InputError: a layout that does not fit, or none where rounding needs one.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        params: list[Tensor],
        names: Mapping[Tensor, str],
        state: Mapping[Tensor, dict[str, Any]],
        layouts: Callable[[Tensor, str], tuple[Layout, ...]],
        kernel: str,
    ) -> None:
        self.groups = groups
        self.params = params
        self.entries: list[Entry] = []
        self.layouts: list[tuple[Layout, ...]] = []
        self.kernels: list[Kernel] = []
        self.positions: list[int] = []  # of the entries in `params`
        seen: set[Tensor] = set()
        owners = [index for index, group in enumerate(groups) for _ in group["params"]]
        for position, (param, group) in enumerate(zip(params, owners, strict=True)):
            if param in seen or not state.get(param):  # a tied weight that is listed twice makes one step
                continue
            seen.add(param)
            entry = make_entry(param, group, state[param])
            weight = local_tensor(param.detach())
            self.entries.append(entry)
            self.positions.append(position)
            self.layouts.append(_resolve(entry, weight, names[param], layouts))
            self.kernels.append(kernels.choose(kernel, weight))
        planned = set(self.positions)
        self.absent = [i for i, param in enumerate(params) if i not in planned and param not in seen]
        self._states = [entry.state for entry in self.entries]
        self._stepped, place = np.unique([entry.group for entry in self.entries], return_inverse=True)
        self._place = place.astype(np.int64)  # of each entry's group among those that have entries
        self._scheduled = any("schedule_step" in held for held in self._states)
        self._all_states = list(state.values())
        self._lengths = list(map(len, self._all_states))
        keys = {key for entry in self.entries for key in entry.tensors}
        self._columns = []  # for each state key the dicts that have it and the tensors that they should hold
        for key in keys:
            holders = [held for held in self._states if key in held]
            self._columns.append((itemgetter(key), holders, [held[key] for held in holders]))
        self._params = [entry.param for entry in self.entries]
        self._placed = [hasattr(param, "placements") for param in self._params]
        self._any_placed = any(self._placed)
        self._types = [param.dtype for param in self._params]
        self._tables: list[Table] = []
        self._table_kernels: list[Kernel] = []
        self._strided: list[int] | None = None

    def holds(self, params: list[Tensor], state: Mapping[Tensor, Any]) -> bool:
        """Whether the parameters and the tensors of their state are still the very same objects."""
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        now = state.values()
        if len(now) != len(self._all_states) or not all(map(is_, now, self._all_states)):
            return False
        if list(map(len, now)) != self._lengths:
            return False
        for get, holders, tensors in self._columns:
            try:
                if not all(map(is_, map(get, holders), tensors)):
                    return False
            except KeyError:
                return False
        return list(map(_dtype, self._params)) == self._types

    def held(self) -> Iterator[tuple[Entry, Tensor, list[tuple[int, int, int]]]]:
        """Each entry with its local weight and its ranges as (first local element, first block, length)."""
        for entry, layouts in zip(self.entries, self.layouts, strict=True):
            ranges = [(r.local_start, block, r.length) for _, r, block in placed_ranges(layouts)]
            yield entry, local_tensor(entry.param), ranges

    def step(self, gradients: list[Tensor | None]) -> None:
        """One step; `gradients` are those of `params`, None where there is none.

        Raises:
            InputError: a gradient that is sparse or not placed like its parameter. Nothing has moved or counted.
        """
        weights, grads, strided = self._gather([gradients[i] for i in self.positions])
        if strided != self._strided:
            self._strided = strided
            self._make_tables(frozenset(strided))
        for table in self._tables:
            if table.capturable:
                self._describe_schedules(table)  # may refuse an lr: before the step counts
        combos, scalars, steps = self._count(grads)
        if not scalars:
            return
        flags = np.array([MAXIMIZE * s.maximize | YOGI * s.yogi for s in scalars], dtype=np.uint8)
        values = np.array([s[: len(_STEP_FIELDS)] for s in scalars], dtype=np.float64)
        for kernel, table in zip(self._table_kernels, self._tables, strict=True):
            indices = table.cache["indices"]
            whole = len(indices) == len(grads)
            table.weights = weights if whole else [weights[i] for i in indices]
            table.grads = grads if whole else [grads[i] for i in indices]
            table.cache["pointers"].fill()
            _set_scalars(table, combos if whole else combos[indices], values, steps, flags)
            try:
                kernel.run(table)
            finally:
                table.weights, table.grads = [], []  # or the gradients would outlive zero_grad
        for i in strided:
            if (at := combos[i]) >= 0:
                self._step_strided(i, weights[i], grads[i], values[at : at + 1], steps[at : at + 1], flags[at : at + 1])

    # -- each step, for each parameter ----------------------------------------------------------------------------

    def _gather(self, grads: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor | None], list[int]]:
        """Local weights and gradients, and the entries of which one is not laid out in order."""
        weights = self._params
        if self._any_placed:
            weights = list(map(local_tensor, weights))
            grads = [
                self._local_gradient(i, grad) if placed and grad is not None else grad
                for i, (grad, placed) in enumerate(zip(grads, self._placed, strict=True))
            ]
        # Nearly every step needs no closer look, and hundreds of small tensors make looking dear.
        present = [grad for grad in grads if grad is not None]
        if (
            len(present) == len(grads)
            and list(map(_dtype, present)) == self._types
            and {*map(_layout, present)} <= {torch.strided}
            and all(map(_is_contiguous, present))
            and all(map(_is_contiguous, weights))
        ):
            return weights, grads, []
        strided = []
        for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise InputError(
                    f"the gradient of {self.layouts[i][0].name} is sparse: AdEMAMix needs dense ones "
                    f"(nn.Embedding(sparse=False))"
                )
            kind = grad.dtype
            if kind is not self._types[i] and (kind not in TYPES or torch.float64 in (kind, self._types[i])):
                grads[i] = grad.to(self._types[i])
            if not (grad.is_contiguous() and weight.is_contiguous()):
                strided.append(i)
        return weights, grads, strided

    def _local_gradient(self, index: int, grad: Tensor) -> Tensor:
        placements = self._params[index].placements  # type: ignore[attr-defined]
        if getattr(grad, "placements", None) != placements:
            raise InputError(
                f"the gradient of {self.layouts[index][0].name} is placed as {getattr(grad, 'placements', None)}, its "
                f"parameter as {placements}: redistribute it first"
            )
        return local_tensor(grad)

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
                step = int(step.add_(1.0))
                scheduled = step if scheduled is None else int(scheduled.add_(1.0))
            else:
                on_device += [step] if scheduled is None else [step, scheduled]
                step = scheduled = 0
            which.append(places.setdefault((entry.group, step, scheduled), len(places)))
        if on_device:
            torch._foreach_add_(on_device, 1.0)
        scalars = [scalars_of(self.groups[group], step, scheduled) for group, step, scheduled in places]
        return np.array(which, dtype=np.int64), scalars, np.array([step for _, step, _ in places], dtype=np.int64)

    def _count_alike(self, grads: list[Tensor | None]) -> tuple[int, int] | None:
        """Count the step of entries that all have a gradient and the same counts on the host, the usual case.

        None, and nothing counted, where that is not so.
        """
        if type(None) in {*map(type, grads)}:
            return None
        counted = []
        for key in COUNTS if self._scheduled else COUNTS[:1]:
            counts: list[Any] = [state.get(key) for state in self._states]
            if {*map(type, counts)} != {int} or counts.count(counts[0]) < len(counts):
                return None
            counted.append((key, counts[0] + 1))
        for key, count in counted:
            for state in self._states:
                state[key] = count
        return counted[0][1], counted[-1][1]

    # -- tables -------------------------------------------------------------------------------------------------

    def _make_tables(self, strided: frozenset[int]) -> None:
        members: dict[tuple[str, torch.device, bool], list[int]] = {}
        for i, entry in enumerate(self.entries):
            if i not in strided:
                device = self._params[i].device
                captured = bool(self.groups[entry.group]["capturable"]) and device.type != "cpu"
                if captured and self.kernels[i].name == "torch":
                    raise InputError(
                        f"capturable=True on {device} needs the triton kernel, and {self._params[i].dtype} parameters "
                        f"have only the torch one here, which reads the step on the host: set capturable=False"
                    )
                members.setdefault((self.kernels[i].name, device, captured), []).append(i)
        self._tables = [
            self._table(indices, [self.entries[i] for i in indices], [self.layouts[i] for i in indices], captured)
            for (_, _, captured), indices in members.items()
        ]
        self._table_kernels = [self.kernels[indices[0]] for indices in members.values()]

    def _table(
        self, indices: list[int], entries: list[Entry], layouts: list[tuple[Layout, ...]], captured: bool
    ) -> Table:
        segments = [(i, layout, r, block) for i, w in enumerate(layouts) for layout, r, block in placed_ranges(w)]
        owner = np.array([i for i, *_ in segments], dtype=np.int64)
        rows = np.zeros(len(segments), dtype=SEGMENT)
        rows["length"] = [r.length for _, _, r, _ in segments]
        rows["start"] = [r.global_start for _, _, r, _ in segments]
        seeds = [self.groups[entry.group]["seed"] for entry in entries]
        keys = {(i, layout.name): precision.base_key(seeds[i], name_key(layout.name)) for i, layout, *_ in segments}
        rows["key"] = np.array([keys[i, layout.name] for i, layout, *_ in segments], dtype=np.uint64)
        codes = [storage_codes(entry) for entry in entries]
        for name in ("weight_type", "m1_format", "m2_format", "nu_format", "weight_ema_format", "master_kind"):
            rows[name] = [codes[i][name] for i in owner]
        table = Table(
            device=entries[0].param.device,
            entries=entries,
            rows=rows,
            row_entry=owner,
            row_local=np.array([r.local_start for _, _, r, _ in segments], dtype=np.int64),
            row_block=np.array([block for *_, block in segments], dtype=np.int64),
            capturable=captured,
        )
        table.cache["indices"] = indices
        table.cache["pointers"] = _Pointers(table)
        return table

    def _describe_schedules(self, table: Table) -> None:
        """What a captured kernel computes its scalars from (kernels/__init__.py)."""
        groups = [self.groups[entry.group] for entry in table.entries]
        for lr in (group["lr"] for group in groups):
            if isinstance(lr, Tensor) and lr.device == table.device and lr.dtype != torch.float32:
                raise InputError(f"lr: with capturable=True a tensor on the device must be float32, got {lr.dtype}")
        owner = table.row_entry
        for name, values in (
            ("alpha_final", [group["alpha"] for group in groups]),
            ("beta3_final", [group["betas"][2] for group in groups]),
            ("alpha_warmup", [group["alpha_warmup"] or 0 for group in groups]),
            ("beta3_warmup", [group["beta3_warmup"] or 0 for group in groups]),
            ("step_pointer", [entry.state["step"].data_ptr() for entry in table.entries]),
            ("schedule_pointer", [entry.state["schedule_step"].data_ptr() if "schedule_step" in entry.state else 0
                                  for entry in table.entries]),
            ("lr_pointer", [group["lr"].data_ptr() if isinstance(group["lr"], Tensor)
                            and group["lr"].device == table.device else 0 for group in groups]),
        ):  # fmt: skip
            table.rows[name] = np.array(values, dtype=table.rows[name].dtype)[owner]

    def _step_strided(
        self,
        index: int,
        weight: Tensor,
        grad: Tensor | None,
        values: np.ndarray,
        steps: np.ndarray,
        flags: np.ndarray,
    ) -> None:
        """A weight or gradient that is not laid out in order: contiguous copies of some rows at a time."""
        assert grad is not None
        entry, layouts = self.entries[index], self.layouts[index]
        # blocks do not end where rows do, so block formats take the whole at once
        rows = weight.shape[0]
        some = rows if any(key.endswith("_scale") for key in entry.tensors) else max(1, _TILE * rows // weight.numel())
        row_numel = weight.numel() // rows
        for first in range(0, rows, some):
            part = weight[first : first + some]
            copy = part.contiguous()
            start = first * row_numel
            tensors = {
                key: tensor if key.endswith("_scale") else tensor.view(-1).narrow(0, start, copy.numel())
                for key, tensor in entry.tensors.items()
            }
            clipped = tuple(_clipped(layout, start, copy.numel()) for layout in layouts)
            table = self._table([index], [replace(entry, tensors=tensors)], [clipped], captured=False)
            table.weights, table.grads = [copy], [grad[first : first + some].contiguous()]
            table.cache["pointers"].fill()
            _set_scalars(table, np.zeros(1, dtype=np.int64), values, steps, flags)
            self.kernels[index].run(table)
            if values[0][0] != 0.0 and copy.data_ptr() != part.data_ptr():  # with lr = 0 no bit is to move
                part.copy_(copy)


class _Pointers:
    """The pointer columns of a table's rows: which tensor each points into, and how many bytes behind its start."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.stored: list[Tensor] = []  # those of an entry together, as they lie in memory
        number: dict[tuple[int, str], int] = {}
        for index, entry in enumerate(table.entries):
            for key, tensor in entry.tensors.items():
                if key in _COLUMN_OF:
                    number[index, key] = len(self.stored)
                    self.stored.append(tensor)
        sizes = np.array([tensor.element_size() for tensor in self.stored], dtype=np.int64)
        words, count = SEGMENT.itemsize // _WORD, len(table.entries)
        parts = []
        for key, column in _COLUMN_OF.items():
            owner = np.array([number.get((i, key), -1) for i in range(count)], dtype=np.int64)[table.row_entry]
            rows = np.nonzero(owner >= 0)[0]
            first = (table.row_block if key.endswith("_scale") else table.row_local)[rows]
            parts.append((rows * words + column, owner[rows], first * sizes[owner[rows]] if len(rows) else first))
        whole = np.arange(len(table.rows)) * words
        weights, grads = len(self.stored) + table.row_entry, len(self.stored) + count + table.row_entry
        sizes = np.array([entry.param.dtype.itemsize for entry in table.entries], dtype=np.int64)
        parts.append((whole + _NAMES.index("weight"), weights, table.row_local * sizes[table.row_entry]))
        parts.append((whole + _NAMES.index("grad"), grads, np.zeros_like(table.row_local)))  # by `fill`
        self.places, self.owner, offsets = (np.concatenate(column) for column in zip(*parts, strict=True))
        self.offsets = offsets.astype(np.uint64)
        self.types: list[torch.dtype | None] = []

    def fill(self) -> None:
        table = self.table
        types = [None if grad is None else grad.dtype for grad in table.grads]
        if types != self.types:
            self.types, rows = types, table.row_entry
            table.rows["grad_type"] = np.array([0 if t is None else TYPES[t] for t in types], dtype=np.uint8)[rows]
            sizes = np.array([0 if t is None else t.itemsize for t in types], dtype=np.int64)
            self.offsets[-len(rows) :] = sizes[rows] * table.row_local
        addresses = [*map(_data_ptr, self.stored), *map(_data_ptr, table.weights)]
        addresses += [0 if grad is None else grad.data_ptr() for grad in table.grads]
        words = table.rows.view(np.uint64).reshape(-1)
        words[self.places] = np.array(addresses, dtype=np.uint64)[self.owner] + self.offsets


def _set_scalars(table: Table, places: np.ndarray, values: np.ndarray, steps: np.ndarray, flags: np.ndarray) -> None:
    rows, of_row = table.rows, places[table.row_entry]
    rows["flags"] = np.where(of_row < 0, SKIP, flags[of_row])
    rows["step"] = steps[of_row]
    # The doubles of a row lie side by side: one assignment instead of one for each.
    rows.view(np.float64).reshape(-1, SEGMENT.itemsize // _WORD)[:, _DOUBLES] = values[of_row]


def storage_codes(entry: Entry) -> dict[str, int]:
    """The type and format columns of an entry's rows, from the tensors that it has."""
    codes = {"weight_type": TYPES[entry.param.dtype], "master_kind": 0}
    for key in precision.ROUNDED:
        codes[f"{key}_format"] = kernels.NONE
        if key in entry.tensors:
            fmt = precision.format_of(key, entry.tensors[key], f"{key}_scale" in entry.tensors)
            codes[f"{key}_format"] = precision.FORMATS[fmt]
    for kind, key in (("fp32", "master"), ("split", "master_low")):
        if key in entry.tensors:
            codes["master_kind"] = kernels.MASTERS[kind]
    return codes


def _resolve(
    entry: Entry, weight: Tensor, name: str, layouts: Callable[[Tensor, str], tuple[Layout, ...]]
) -> tuple[Layout, ...]:
    try:
        found = layouts(entry.param, name)
    except PlacementError as e:
        codes = storage_codes(entry)
        exact = (kernels.NONE, precision.FORMATS["fp32"])
        rounded = any(codes[f"{key}_format"] not in exact for key in precision.ROUNDED)
        if rounded or (weight.dtype == torch.bfloat16 and not codes["master_kind"]):
            raise InputError(f"stochastic rounding cannot place {name}: {e}; use state_dtype='fp32'") from e
        # nothing is rounded: where the elements belong does not matter
        return (Layout.contiguous(name, (weight.numel(),), 0, weight.numel()),)
    end = max((r.local_start + r.length for layout in found for r in layout.ranges), default=0)
    if end > weight.numel():
        raise InputError(f"the layout of {name} ends at element {end}, the local tensor has {weight.numel()}")
    return found


def _clipped(layout: Layout, start: int, length: int) -> Layout:
    """The part of a layout that lies in the local elements start .. start + length, counted from `start`."""
    ranges = []
    for r in layout.ranges:
        first, last = max(r.local_start, start), min(r.local_start + r.length, start + length)
        if first < last:
            ranges.append(Range(r.global_start + first - r.local_start, first - start, last - first))
    return Layout(layout.name, layout.shape, tuple(ranges))
