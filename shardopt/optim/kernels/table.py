"""The table that a kernel takes: one row (schema.SEGMENT) for each range of each parameter.

A table is kept from step to step for as long as the layout of the rows is the same. Before each step `point` fills in
the addresses, every one of which the plan has checked, and `set_scalars` the scalars.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shardopt.errors import InputError
from shardopt.optim import precision, schema
from shardopt.optim.kernels.facts import check_reach
from shardopt.optim.precision import Format, blocks
from shardopt.optim.schema import Scalars
from shardopt.slices import Layout, name_key

if TYPE_CHECKING:
    from shardopt.optim.kernels import Kernel

_NAMES = schema.SEGMENT.names or ()
# Rows as words: the columns before the small ones at the end are of 8 bytes.
_WORD = 8
_WORDS = schema.SEGMENT.itemsize // _WORD
_DOUBLES = slice(_NAMES.index("lr"), _NAMES.index("lr") + len(schema.DOUBLES))
assert _NAMES[_DOUBLES] == schema.DOUBLES
_COLUMN_OF = {key: _NAMES.index(key) for key in (*schema.ROUNDED, *schema.SCALES)}
_COLUMN_OF |= dict.fromkeys(schema.MASTER_KINDS, _NAMES.index("master"))
_BITS = tuple(schema.FLAG_BITS.values())


class Tile(NamedTuple):
    """Elements of one parameter that lie together in the local tensor, from the start of a block on.

    Args:
        start: index of the first in the whole parameter.
        local: in the local tensor.
        block: number of its block among those that are here.
        numel: number of elements.
        row, stride: as those of a slices.Range.
        column: place of the first in its row.
    """

    start: int
    local: int
    block: int
    numel: int
    row: int = 0
    stride: int = 0
    column: int = 0

    def tiles(self, size: int) -> Iterator[Tile]:
        """These elements in parts of at most `size`, a multiple of precision.BLOCK."""
        start, local, block, length, row, stride, column = self
        for done in range(0, length, size):
            rows, at = divmod(column + done, row) if row else (0, done)
            first = start - column + rows * stride + at
            numel = min(size, length - done)
            yield Tile(first, local + done, block + done // precision.BLOCK, numel, row, stride, at if row else 0)

    def indices(self, device: torch.device) -> Tensor:
        """Of each element in the whole parameter, int64."""
        number = torch.arange(self.column, self.column + self.numel, device=device)
        if not self.row:
            return number + self.start
        return self.start - self.column + number // self.row * self.stride + number % self.row


@dataclass(slots=True)
class Entry:
    """One parameter and its local state tensors, by state key ("m1", "m1_scale", "master", ...).

    Args:
        name: the parameter's, for messages.
        group: number of its group.
        formats: how the tensors that are rounded are stored.
        layouts: what the local tensor holds.
    """

    name: str
    param: Tensor
    group: int
    state: dict[str, Any]
    tensors: dict[str, Tensor]
    formats: dict[str, Format]
    layouts: tuple[Layout, ...]
    kernel: Kernel

    def ranges(self) -> Iterator[tuple[str, Tile]]:
        """Each range, with the name of the parameter that it is of."""
        block = 0
        for layout in self.layouts:
            for r in layout.ranges:
                yield layout.name, Tile(r.global_start, r.local_start, block, r.length, r.row, r.stride)
                block += blocks(r.length)

    def tiles(self, size: int) -> Iterator[Tile]:
        """The ranges in parts of at most `size` elements, a multiple of precision.BLOCK."""
        return (tile for _, whole in self.ranges() for tile in whole.tiles(size))

    def stored(self, key: str, where: Tile) -> tuple[Tensor, Tensor | None]:
        """Codes and scales (views, flat) of these elements."""
        scales = self.tensors.get(f"{key}_scale")
        codes = self.tensors[key].view(-1).narrow(0, where.local, where.numel)
        return codes, None if scales is None else scales.narrow(0, where.block, blocks(where.numel))

    def decoded(self, key: str, where: Tile) -> Tensor:
        """The values of these elements, flat, in fp32 (or fp64)."""
        return self.formats[key].decode(*self.stored(key, where))


def pointed(entry: Entry) -> list[tuple[str, Tensor]]:
    """State keys and tensors of the addresses that the entry's rows hold, in the order of their numbers."""
    return [(key, tensor) for key, tensor in entry.tensors.items() if key in _COLUMN_OF]


def collapsed(tensor: Tensor) -> list[tuple[int, int]]:
    """Size and stride of each dimension, those that can be gone through as one together."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if dims and dims[-1][1] == size * stride:
            dims[-1] = dims[-1][0] * size, stride
        elif size != 1:
            dims.append((size, stride))
    return dims or [(1, 1)]


def clipped(layout: Layout, start: int, length: int) -> Layout:
    """The part of a layout that lies in the local elements start .. start + length, counted from `start`."""
    ranges = []
    for r in layout.ranges:
        first, last = max(r.local_start, start), min(r.local_start + r.length, start + length)
        if first < last:
            ranges.append(r.part(first - r.local_start, last - first)._replace(local_start=first - start))
    return Layout(layout.name, layout.shape, tuple(ranges))


class Table:
    """
    Args:
        indices: of the entries in the plan.
        entries: parameters of one device and kernel.
        groups: the optimizer's parameter groups.
        capturable: the kernel computes the scalars on the device, from the counts and schedules there.
        strided: its one weight or gradient is not contiguous: checked as others, and stepped in contiguous copies.
        shaped: numbers of its entries whose weights or gradients are not contiguous, for a kernel that takes strides.
    """

    def __init__(
        self,
        indices: list[int],
        entries: list[Entry],
        groups: Sequence[Mapping[str, Any]],
        capturable: bool,
        strided: bool = False,
        shaped: Sequence[int] = (),
    ) -> None:
        ranges = [(i, name, tile) for i, entry in enumerate(entries) for name, tile in entry.ranges()]
        self.device = entries[0].param.device
        self.indices, self.entries, self.capturable, self.strided = indices, entries, capturable, strided
        self.kernel = entries[0].kernel
        self._shaped = list(shaped)
        self._shapes: dict[tuple[int, str], np.ndarray] = {}  # what the rows point to
        self._shapes_of: list[tuple[Any, ...] | None] = []  # what these were written for
        self.columns = np.arange(0)  # of the plan's facts that are about these entries
        self.learning_rates: list[float | Tensor] = []  # of a capturable table's entries
        self.captured = False  # whether a CUDA graph holds a step of this table
        self.rows = rows = np.zeros(len(ranges), dtype=schema.SEGMENT)
        # Views are made once: of a record numpy takes microseconds to make one.
        self._words = rows.view(np.int64).reshape(-1)
        self.doubles = rows.view(np.float64).reshape(-1, _WORDS)[:, _DOUBLES]  # they lie side by side
        self._steps = rows["step"]
        self._placed: np.ndarray | None = None  # what the rows' flags were last set for, and each row's place then
        self._flagged: list[tuple[Any, ...]] = []
        self._of_row = np.arange(0)
        self.row_entry = owner = np.array([i for i, _, _ in ranges], dtype=np.int64)
        columns = np.array([tile[:-1] for _, _, tile in ranges], dtype=np.int64).reshape(-1, 6).T
        rows["start"], self.row_local, self.row_block, rows["length"], rows["row"], rows["stride"] = columns
        rows["local"] = self.row_local
        # where shapes are, addresses are of the tensors' first elements
        self._from_start = np.where(np.isin(owner, list(shaped)), 0, self.row_local)
        self.weights: list[Tensor] = []
        self.grads: list[Tensor | None] = []
        self.cache: dict[str, Any] = {}
        seeds = [groups[entry.group]["seed"] for entry in entries]
        keys = {(i, name): precision.base_key(seeds[i], name_key(name)) for i, name, _ in ranges}
        rows["key"] = np.array([keys[i, name] for i, name, _ in ranges], dtype=np.uint64)
        rows["weight_type"] = np.array([schema.TYPES[entry.param.dtype] for entry in entries])[owner]
        for key in schema.ROUNDED:
            codes = [entry.formats[key].code if key in entry.formats else schema.NONE for entry in entries]
            rows[f"{key}_format"] = np.array(codes)[owner]
        for key, kind in schema.MASTER_KINDS.items():
            rows["master_kind"][np.array([key in entry.tensors for entry in entries])[owner]] = kind
        self._place_pointers()

    def _place_pointers(self) -> None:
        """List the words of the rows that are addresses: the number of their tensor, and the bytes behind its start.

        Tensors are numbered as `point` has their addresses: those of `pointed`, then weights, then gradients.
        """
        count = len(self.entries)
        numbers = {key: [-1] * count for key in _COLUMN_OF}
        sizes: list[int] = []  # of an element
        for index, entry in enumerate(self.entries):
            for key, tensor in pointed(entry):
                numbers[key][index] = len(sizes)
                sizes.append(tensor.element_size())
        parts = []
        weights, grads = len(sizes) + self.row_entry, len(sizes) + count + self.row_entry
        for key, column in _COLUMN_OF.items():
            owner = np.array(numbers[key], dtype=np.int64)[self.row_entry]
            rows = np.nonzero(owner >= 0)[0]
            first = (self.row_block if key in schema.SCALES else self.row_local)[rows]
            parts.append((rows * _WORDS + column, owner[rows], first * np.array(sizes, dtype=np.int64)[owner[rows]]))
        whole = np.arange(len(self.rows)) * _WORDS
        size = np.array([entry.param.dtype.itemsize for entry in self.entries], dtype=np.int64)
        parts.append((whole + _NAMES.index("weight"), weights, self._from_start * size[self.row_entry]))
        parts.append((whole + _NAMES.index("grad"), grads, np.zeros_like(self.row_local)))  # by `point`
        self._places, self._owner, self._offsets = (np.concatenate(column) for column in zip(*parts, strict=True))
        self._types: list[torch.dtype | None] = []

    def point(
        self,
        addresses: np.ndarray,
        weights: list[Tensor],
        grads: list[Tensor | None],
        types: list[torch.dtype | None],
    ) -> None:
        """Let the rows point into state and these local weights and gradients, all of which have been checked.

        Args:
            addresses: of the state tensors (`pointed`) of each entry, then of the weights, then of the gradients.
            types: dtype of each gradient.
        """
        self.weights, self.grads = weights, grads
        if types is not self._types and types != self._types:
            self._types, owner = types, self.row_entry
            codes = [schema.NONE if t is None else schema.TYPES[t] for t in types]
            self.rows["grad_type"] = np.array(codes, dtype=np.uint8)[owner]
            sizes = np.array([0 if t is None else t.itemsize for t in types], dtype=np.int64)
            self._offsets[len(self._offsets) - len(owner) :] = sizes[owner] * self._from_start
        self._words[self._places] = addresses[self._owner] + self._offsets
        now = [
            None if t is None else (t.shape, t.stride(), t.storage_offset(), t.untyped_storage().nbytes())
            for i in self._shaped
            for t in (weights[i], grads[i])
        ]
        if now != self._shapes_of:
            for i in self._shaped:
                self._place_shapes(i)
            self._shapes_of = now

    def _place_shapes(self, index: int) -> None:
        """Let an entry's rows point to the shapes of its weight and gradient.

        Raises:
            InputError: a tensor that reaches beyond its storage.
        """
        pair = {"weight_shape": self.weights[index], "grad_shape": self.grads[index]}
        for key, tensor in pair.items():
            if tensor is None:
                continue
            check_reach(
                tensor, f"the {'weight' if key == 'weight_shape' else 'gradient of'} {self.entries[index].name}"
            )
            dims = collapsed(tensor)
            numbers = self._shapes[index, key] = np.array([len(dims), *chain.from_iterable(dims)], dtype=np.int64)
            self.rows[key][self.row_entry == index] = numbers.ctypes.data

    def set_scalars(self, places: np.ndarray, scalars: Sequence[Scalars], steps: np.ndarray) -> None:
        """Give each row its scalars and step.

        Args:
            places: of each entry in `scalars` and `steps`; -1 for an entry that is to be left alone.
        """
        flags = [s[len(schema.DOUBLES) :] for s in scalars]
        if places is not self._placed or flags != self._flagged:  # seldom: most steps are as the one before
            self._placed, self._flagged, of_row = places, flags, places[self.row_entry]
            codes = [sum(bit for bit, on in zip(_BITS, values, strict=True) if on) for values in flags]
            self.rows["flags"] = np.where(of_row < 0, schema.SKIP, np.array(codes, dtype=np.uint8)[of_row])
            self._of_row = of_row
        values = np.array([s[: len(schema.DOUBLES)] for s in scalars])
        alike = len(scalars) == 1  # what numpy spreads over the rows in a fraction of the time
        self._steps[:] = steps if alike else steps[self._of_row]
        self.doubles[:] = values if alike else values[self._of_row]

    def describe_schedules(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Fill in what a captured kernel computes its scalars from (kernels/__init__.py).

        Raises:
            InputError: a learning rate or count that the kernel cannot read.
        """
        own = [groups[entry.group] for entry in self.entries]
        states = [entry.state for entry in self.entries]
        self.learning_rates = [group["lr"] for group in own]
        lrs = [group["lr"] if isinstance(group["lr"], Tensor) else None for group in own]
        for entry, state, lr in zip(self.entries, states, lrs, strict=True):
            if lr is not None and lr.device != self.device and lr.device.type != "cpu":
                raise InputError(
                    f"lr is on {lr.device}, {entry.name} on {self.device}: with capturable=True move lr there"
                )
            if lr is not None and lr.device == self.device and lr.dtype != torch.float32:
                raise InputError(f"lr: with capturable=True a tensor on the device must be float32, got {lr.dtype}")
            for key in ("step", "schedule_step"):
                count = state.get(key, state["step"])
                if not isinstance(count, Tensor) or (count.dtype, count.device) != (torch.int64, self.device):
                    raise InputError(
                        f"with capturable=True state {key!r} of {entry.name} must be an int64 tensor on {self.device}: "
                        f"set capturable before the first step, or load the state again"
                    )
        for name, values in (
            ("alpha_final", [group["alpha"] for group in own]),
            ("beta3_final", [group["betas"][2] for group in own]),
            ("alpha_warmup", [group["alpha_warmup"] or 0 for group in own]),
            ("beta3_warmup", [group["beta3_warmup"] or 0 for group in own]),
            *((f"group_{key}", [group[key] for group in own]) for key in ("eps", "eps_root", "weight_decay")),
            ("step_pointer", [state["step"].data_ptr() for state in states]),
            ("schedule_pointer", [s["schedule_step"].data_ptr() if "schedule_step" in s else 0 for s in states]),
            ("lr_pointer", [0 if lr is None or lr.device != self.device else lr.data_ptr() for lr in lrs]),
        ):
            self.rows[name] = np.array(values, dtype=self.rows[name].dtype)[self.row_entry]
