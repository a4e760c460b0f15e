"""Layouts and slices: the elements of a parameter that one process holds. Arithmetic only, no ranks.

A share of a parameter is a few contiguous ranges of the flattened (row-major) parameter, nearly always one.
Rounding, checkpoints and memory reports are all written against these two types, so that they are the same
under every engine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_ORDINARY = (Tensor, torch.nn.Parameter)  # most tensors: an import in a function is slow
# Wrappers put these in front of, or inside, a parameter's fully qualified name.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


class PlacementError(ValueError):
    """A DTensor whose local part is not a few contiguous ranges of the flattened parameter."""


class Range(NamedTuple):
    """`length` elements that start at `global_start` of the whole parameter and `local_start` of the local."""

    global_start: int
    local_start: int
    length: int


@dataclass(frozen=True)
class Layout:
    """The elements of one parameter that one process holds.

    Args:
        name: canonical fully qualified name (see `canonical_name`).
        shape: shape of the whole parameter.
        ranges: non-overlapping, in ascending order, none empty; no ranges means that nothing is held.

    Raises:
        ValueError: a range that is empty, overlaps the one before it or leaves the parameter.
    """

    name: str
    shape: tuple[int, ...]
    ranges: tuple[Range, ...]

    def __post_init__(self) -> None:
        global_end = local_end = 0
        for r in self.ranges:
            if r.length <= 0 or r.global_start < global_end or r.local_start < local_end:
                raise ValueError(f"{self.name}: ranges must be non-empty, ascending and disjoint, got {self.ranges}")
            global_end, local_end = r.global_start + r.length, r.local_start + r.length
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
            target.narrow(0, r.local_start, r.length).copy_(flat.narrow(0, r.global_start, r.length))

    def copy_to_whole(self, local: Tensor, whole: Tensor) -> None:
        """Copy the flattened `local`'s elements to their places in the contiguous `whole`, in place."""
        flat, source = whole.view(-1), local.reshape(-1)
        for r in self.ranges:
            flat.narrow(0, r.global_start, r.length).copy_(source.narrow(0, r.local_start, r.length))


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

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def layout_of(param: Tensor, name: str) -> Layout:
    """The layout of an ordinary tensor (the whole), or of a DTensor sharded by rows as FSDP2 does it.

    Rows are cut as torch.chunk cuts them: ceil(rows / N) each, so the last shards may be smaller or empty.
    Replicated mesh dimensions (HSDP) do not matter.

    Raises:
        PlacementError: another placement (other dimensions, partial, strided, two sharded mesh dimensions).
    """
    if type(param) in _ORDINARY:
        return Layout.whole(name, param.shape)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = param.placements if isinstance(param, DTensor) else ()
    sharded = [(dim, p) for dim, p in enumerate(placements) if not isinstance(p, Replicate)]
    if not isinstance(param, DTensor) or not sharded:
        return Layout.whole(name, param.shape)
    mesh_dim, placement = sharded[0]
    # _StridedShard (FSDP2 over tensor parallelism) is not a plain Shard of contiguous rows.
    if len(sharded) > 1 or type(placement) is not Shard or placement.dim != 0:
        raise PlacementError(
            f"{name} has placements {tuple(placements)}: only one sharded mesh dimension, over rows "
            f"(Shard(0)), can be described by contiguous ranges"
        )
    coordinate = param.device_mesh.get_coordinate()
    if coordinate is None:  # this process is not part of the mesh
        return Layout(name, tuple(param.shape), ())
    rows, row_numel = param.shape[0], math.prod(param.shape[1:])
    chunk = -(-rows // param.device_mesh.size(mesh_dim))
    first = min(coordinate[mesh_dim] * chunk, rows)
    last = min(first + chunk, rows)
    return Layout.contiguous(name, param.shape, first * row_numel, (last - first) * row_numel)


def named_parameters(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Canonical names and parameters in registration order; tied weights once, under their first name."""
    return [(canonical_name(name), param) for name, param in module.named_parameters()]


def persistent_buffers(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Canonical names and tensors of the buffers that are part of `module`'s state_dict; a shared one once."""
    kept = module._named_members(
        lambda m: ((name, b) for name, b in m._buffers.items() if name not in m._non_persistent_buffers_set)
    )
    return [(canonical_name(name), buffer) for name, buffer in kept]
