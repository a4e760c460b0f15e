"""Layouts and slices: the elements of a parameter that one process holds. Arithmetic only, no ranks.

A share of a parameter is a few ranges of the flattened (row-major) parameter, nearly always one: contiguous, or, of a
part of the columns, rows that are a stride apart. Rounding, checkpoints and memory reports are all written against
these two types, so that they are the same under every engine and placement.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shardopt.errors import InputError

_ORDINARY = (Tensor, torch.nn.Parameter)  # most tensors: an import in a function is slow
_CAST_WHEN_GATHERED = "WeightWithDynamicFloat8CastTensor"
# Wrappers put these in front of, or inside, a parameter's fully qualified name.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


class PlacementError(InputError):
    """A DTensor whose placements do not say which elements of the parameter its local part holds."""


class Range(NamedTuple):
    """Elements that lie together in the local tensor; in the whole parameter too, or in rows that are apart there.

    Args:
        global_start: place of the first in the whole parameter.
        local_start: in the local tensor.
        length: number of elements, whole rows of them.
        row: elements of a row, where there are several; 0 where all lie together.
        stride: elements of the whole parameter from the start of a row to that of the next.
    """

    global_start: int
    local_start: int
    length: int
    row: int = 0
    stride: int = 0

    @property
    def global_end(self) -> int:
        """Behind the last element, in the whole parameter."""
        if not self.row:
            return self.global_start + self.length
        return self.global_start + (self.length // self.row - 1) * self.stride + self.row

    def part(self, begin: int, length: int) -> Range:
        """`length` elements from number `begin` on: of one row, or whole rows.

        Raises:
            ValueError: a part of one row and of the next.
        """
        if not self.row:
            return Range(self.global_start + begin, self.local_start + begin, length)
        row, column = divmod(begin, self.row)
        rows = (0, 0) if column + length <= self.row else (self.row, self.stride)
        if rows[0] and (column or length % self.row):
            raise ValueError(f"elements {begin} to {begin + length} of {self} are no whole rows")
        return Range(self.global_start + row * self.stride + column, self.local_start + begin, length, *rows)

    def rows(self) -> Iterator[Range]:
        """The same elements in contiguous ranges."""
        size = self.row or self.length
        return (self.part(begin, size) for begin in range(0, self.length, size))

    def of_local(self, flat: Tensor) -> Tensor:
        """These elements of a flattened local tensor, as a view: flat, or [rows, row]."""
        local = flat.narrow(0, self.local_start, self.length)
        return local.view(-1, self.row) if self.row else local

    def of_whole(self, flat: Tensor) -> Tensor:
        """These elements of the flattened whole parameter, as a view in the shape of `of_local`'s."""
        if not self.row:
            return flat.narrow(0, self.global_start, self.length)
        reach = flat.narrow(0, self.global_start, self.global_end - self.global_start)
        return reach.as_strided((self.length // self.row, self.row), (self.stride, 1))


@dataclass(frozen=True)
class Layout:
    """The elements of one parameter that one process holds.

    Args:
        name: canonical fully qualified name (see `canonical_name`).
        shape: shape of the whole parameter.
        ranges: in ascending order, none empty, each behind the last element of the one before; no ranges means that
            nothing is held.

    Raises:
        ValueError: a range that is empty, overlaps the one before it or leaves the parameter, or is not of whole rows.
    """

    name: str
    shape: tuple[int, ...]
    ranges: tuple[Range, ...]

    def __post_init__(self) -> None:
        global_end = local_end = 0
        for r in self.ranges:
            if r.length <= 0 or r.global_start < global_end or r.local_start < local_end:
                raise ValueError(f"{self.name}: ranges must be non-empty, ascending and disjoint, got {self.ranges}")
            if r.row and (r.row < 0 or r.length % r.row or r.stride <= r.row):
                raise ValueError(f"{self.name}: {r} must have whole rows, with a gap between one and the next")
            global_end, local_end = r.global_end, r.local_start + r.length
        if global_end > self.numel:
            raise ValueError(f"{self.name}: range ends at {global_end}, the parameter has {self.numel} elements")

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def local_numel(self) -> int:
        """Elements held here."""
        return sum(r.length for r in self.ranges)

    @property
    def is_whole(self) -> bool:
        return self.local_numel == self.numel

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> Layout:
        return cls.contiguous(name, shape, 0, math.prod(shape))

    @classmethod
    def contiguous(cls, name: str, shape: Sequence[int], start: int, length: int) -> Layout:
        """The elements start .. start + length, which are also the whole of the local tensor."""
        return cls(name, tuple(shape), (Range(start, 0, length),) if length else ())

    def copy_from_whole(self, local: Tensor, whole: Tensor) -> None:
        """Copy this layout's elements of `whole` (shape `self.shape`) into the flattened `local`, in place."""
        flat, target = whole.reshape(-1), local.view(-1)
        for r in self.ranges:
            r.of_local(target).copy_(r.of_whole(flat))

    def copy_to_whole(self, local: Tensor, whole: Tensor) -> None:
        """Copy the flattened `local`'s elements to their places in the contiguous `whole`, in place."""
        flat, source = whole.view(-1), local.reshape(-1)
        for r in self.ranges:
            r.of_whole(flat).copy_(r.of_local(source))


@dataclass(frozen=True)
class Slice:
    """The elements that `layout` names, of one tensor that belongs to a parameter.

    Args:
        name: the parameter's canonical name.
        kind: "weight", "buffer", or the optimizer's state key: "m1", "m2", "nu", ...
        layout: which elements.
        tensors: the storage. `(values,)` holds one value per element, flattened as the layout says (its own
            shape may be the local tensor's); a block format is `(codes, scales)`, which only the same layout
            can restore exactly.
        format: name of the block format ("block16"); None where the tensor's elements are the values themselves.
    """

    name: str
    kind: str
    layout: Layout
    tensors: tuple[Tensor, ...]
    format: str | None = None

    def __post_init__(self) -> None:
        if (len(self.tensors) > 1) != (self.format is not None):
            raise ValueError(f"{self.name}/{self.kind}: codes with scales have a format, plain values have none")

    @property
    def nbytes(self) -> int:
        """Bytes that the storage takes on this process."""
        return sum(t.numel() * t.element_size() for t in self.tensors)


def canonical_name(name: str) -> str:
    """`name` without the prefixes that DDP, torch.compile, FSDP and checkpoint wrappers put into it."""
    for prefix in _WRAPPER_PREFIXES:
        while name.startswith(prefix):
            name = name[len(prefix) :]
        name = name.replace("." + prefix, ".")
    return name


def name_key(name: str) -> int:
    """A stable unsigned 64-bit hash of a canonical name; the same on every machine and Python version."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of `tensor` that this process holds: a DTensor's local tensor, an ordinary tensor itself."""
    if type(tensor) in _ORDINARY:
        return tensor
    from torch.distributed.tensor import DTensor

    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    # torchao's weight that FSDP2 gathers as float8: around the high-precision one, which is what is trained
    return local._tensor.detach() if type(local).__name__ == _CAST_WHEN_GATHERED else local  # type: ignore[attr-defined]


def local_values(param: Tensor) -> Tensor:
    """`local_tensor` of a parameter, apart from its autograd graph where that takes a tensor of its own."""
    return param if type(param) in _ORDINARY else local_tensor(param.detach())


def is_packed(tensor: Tensor) -> bool:
    """True for a tensor whose elements are made of other tensors, such as a quantized weight's codes and scales."""
    return type(tensor) not in _ORDINARY and is_traceable_wrapper_subclass(tensor)


def layout_of(param: Tensor, name: str, coordinate: Sequence[int] | None = None) -> Layout:
    """The layout of an ordinary tensor (the whole), or of a DTensor (of FSDP2, tensor parallelism, or both).

    Args:
        coordinate: in the DTensor's mesh; this process's own where it is not given.

    Raises:
        PlacementError: a partial sum, or a local tensor of another size than its placements say.
    """
    if type(param) in _ORDINARY:
        return Layout.whole(name, param.shape)
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(param, DTensor):
        return Layout.whole(name, param.shape)
    placements: tuple[Any, ...] = param.placements
    mesh = param.device_mesh
    if any(isinstance(p, Partial) for p in placements):
        raise PlacementError(f"{name} has placements {placements}: a partial sum must be redistributed first")
    at = mesh.get_coordinate() if coordinate is None else coordinate
    if at is None:  # this process is not part of the mesh
        return Layout(name, tuple(param.shape), ())
    cuts = tuple(
        (p.dim, mesh.size(i), at[i], getattr(p, "split_factor", 1)) for i, p in enumerate(placements) if is_shard(p)
    )
    layout = Layout(name, tuple(param.shape), _cut(tuple(param.shape), cuts))
    if coordinate is None and layout.local_numel != (held := local_tensor(param.detach()).numel()):
        raise PlacementError(
            f"{name} of shape {tuple(param.shape)} has placements {placements} and holds {held} elements here, where "
            f"these say {layout.local_numel}: cut dimensions that the mesh divides evenly"
        )
    return layout


def is_shard(placement: Any) -> bool:
    """True for the placement of a DTensor that is cut over its mesh dimension."""
    return hasattr(placement, "dim")  # torch's Shard and _StridedShard, neither of which is a kind of the other


def shards_of(param: Tensor) -> int:
    """Into how many shards `param` is cut; 1 for an ordinary tensor."""
    placements = getattr(param, "placements", ())
    return math.prod(param.device_mesh.size(i) for i, p in enumerate(placements) if is_shard(p))  # type: ignore[attr-defined]


@lru_cache(maxsize=4096)  # parameters of one shape and placement are asked about one after the other
def _cut(shape: tuple[int, ...], cuts: tuple[tuple[int, int, int, int], ...]) -> tuple[Range, ...]:
    """The ranges of a tensor that is left of `shape` by some cuts, one after the other.

    Args:
        cuts: dimension, number of parts, number of the part that is left, and into how many pieces the dimension is cut
            before, of each of which the part is a part (torch's _StridedShard).
    """
    ranges, span = [Range(0, 0, 1)], 1  # of the dimensions seen so far, from the last on, and their elements
    for dim in reversed(range(len(shape))):
        indices = np.arange(shape[dim])
        for _, parts, part, pieces in (c for c in cuts if c[0] == dim):
            cut = [_chunk(indices, pieces, piece) for piece in range(pieces)]
            indices = np.concatenate([_chunk(piece, parts, part) for piece in cut])
        ends = np.flatnonzero(np.diff(indices, append=-1) != 1) + 1  # of what lies together
        starts = np.append(0, ends)[: len(ends)]
        found: list[Range] = []
        for first, count in zip(indices[starts].tolist(), (ends - starts).tolist(), strict=True):
            found += _repeat(ranges, first * span, count, span)
        ranges, span = found, span * shape[dim]
    local, placed = 0, []
    for r in ranges:
        placed.append(r._replace(local_start=local))
        local += r.length
    return tuple(placed)


def _chunk(indices: np.ndarray[Any, Any], parts: int, number: int) -> np.ndarray[Any, Any]:
    """As torch.chunk cuts: ceil(n / parts) each, so that the last ones may be smaller or empty."""
    size = -(-len(indices) // parts)
    return indices[number * size : (number + 1) * size]


def _repeat(ranges: list[Range], start: int, count: int, span: int) -> list[Range]:
    """`count` times the elements of `ranges`, each `span` behind the one before, the first at `start`."""
    if len(ranges) == 1:
        (r,) = ranges
        if r.length == span:
            return [Range(start, 0, count * span)]
        if count == 1:
            return [r._replace(global_start=start + r.global_start)]
        if not r.row or r.length // r.row * r.stride == span:  # the rows go on at the same stride
            return [Range(start + r.global_start, 0, count * r.length, r.row or r.length, r.stride or span)]
    return [r._replace(global_start=start + i * span + r.global_start) for i in range(count) for r in ranges]


def named_parameters(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Canonical names and parameters in registration order; tied weights once, under their first name."""
    return [(canonical_name(name), param) for name, param in module.named_parameters()]


def persistent_buffers(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Canonical names and tensors of the buffers that are part of `module`'s state_dict; a shared one once."""
    kept = module._named_members(
        lambda m: ((name, b) for name, b in m._buffers.items() if name not in m._non_persistent_buffers_set)
    )
    return [(canonical_name(name), buffer) for name, buffer in kept]
