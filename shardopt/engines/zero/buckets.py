"""Flat buckets cut into equal parts: the place of every element and the rank that owns it. Arithmetic only.

A bucket holds whole parameters of one dtype and is padded so that it divides by the world size; rank r owns part
r of every bucket. Parameters are laid out in reverse registration order, about the order in which backward
finishes them, so that buckets fill and are sent one after the other while backward runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from shardopt.slices import Layout

# A parameter starts on a cache line, as it would in a tensor of its own: matrix kernels choose by alignment.
_PARAMETER_ALIGNMENT = 64  # bytes
_PART_ALIGNMENT = 16  # bytes
# Below this a message costs more than copying several small parameters into one.
_MESSAGE_BYTES = 64 * 1024


def bucket_bytes(bucket_mb: float | None, depth: int, world_size: int, narrowing: float) -> float:
    """Bytes of gradients of a bucket, of which `depth` together are two of `bucket_mb`.

    Args:
        bucket_mb: MiB; None is 25, and more where a rank's part on the wire would have less than 64 KiB.
        depth: buckets that may be filling or in flight.
        world_size: parts that a bucket is cut into.
        narrowing: bytes of an element on the wire for each of a gradient's; 0.5 for fp32 sent in bf16.
    """
    size = (25 if bucket_mb is None else bucket_mb) * 2**20 * 2 / depth
    return max(size, world_size * _MESSAGE_BYTES / narrowing) if bucket_mb is None else size


def budget(buckets: Sequence[Bucket], depth: int, takes_messages: bool, piece_bytes: float) -> float:
    """Bytes of gradients that may wait, be packed and be in flight, besides one that is sent in pieces.

    Args:
        depth, takes_messages: of the communicator.
        piece_bytes: of a bucket, where it does not hold one larger parameter.
    """
    largest = max(bucket.nbytes for bucket in buckets)
    return depth * (largest if takes_messages else min(largest, piece_bytes))


@dataclass(frozen=True)
class Member:
    """A whole parameter in a bucket; `index` counts in registration order, `offset` in elements."""

    index: int
    name: str
    shape: tuple[int, ...]
    numel: int
    offset: int


@dataclass(frozen=True)
class Message:
    """A run of elements of the bucket that travels as one."""

    start: int
    length: int
    pieces: list[tuple[Member, int, int, int]]  # elements [first, last) of a parameter, that lie from `at` in this


@dataclass(frozen=True)
class Bucket:
    """Whole parameters of one dtype, in `numel` elements that `world_size` divides."""

    index: int
    dtype: torch.dtype
    members: tuple[Member, ...]
    numel: int
    world_size: int

    @cached_property
    def messages(self) -> list[list[Message]]:
        """What each rank's part is sent in."""
        return [list(self._cut(rank)) for rank in range(self.world_size)]

    def whole(self) -> Message:
        """All of the bucket."""
        return Message(0, self.numel, [(m, 0, m.numel, m.offset) for m in self.members])

    @property
    def part(self) -> int:
        """Elements that each rank owns, padding included."""
        return self.numel // self.world_size

    @property
    def wide(self) -> torch.dtype:
        """What gradients are summed in, and masters kept: fp32 or wider."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def owned(self, member: Member, rank: int) -> tuple[Layout, int]:
        """The layout of the part of `member` that `rank` owns, and its start in the rank's part (elements)."""
        start = max(member.offset, rank * self.part)
        end = min(member.offset + member.numel, (rank + 1) * self.part)
        length = max(0, end - start)
        first = start - member.offset if length else 0
        return Layout.contiguous(member.name, member.shape, first, length), start - rank * self.part if length else 0

    def _cut(self, rank: int) -> Iterator[Message]:
        begin, end = rank * self.part, (rank + 1) * self.part
        floor = _MESSAGE_BYTES // self.dtype.itemsize
        at = begin  # all before it is in a message
        pieces = []  # from there on
        for member in self.members:
            start, stop = max(member.offset, begin), min(member.offset + member.numel, end)
            if stop <= start:
                continue
            first, last = start - member.offset, stop - member.offset
            if stop - start < floor:
                pieces.append((member, first, last, start - at))
                continue
            if start > at:
                yield Message(at, start - at, pieces)
            yield Message(start, stop - start, [(member, first, last, 0)])  # its gradient can be sent as it is
            at, pieces = stop, []
        if at < end:
            yield Message(at, end - at, pieces)

    def __str__(self) -> str:
        first, last = self.members[0].name, self.members[-1].name
        return f"bucket {self.index} ({first}{f' … {last}' if last != first else ''})"


def lay_out(
    parameters: Iterable[tuple[str, tuple[int, ...], torch.dtype]], world_size: int, bucket_bytes: float
) -> tuple[Bucket, ...]:
    """Buckets for parameters given in registration order, in the order in which they are sent.

    Args:
        parameters: canonical name, shape and dtype of each.
        world_size: parts that a bucket is cut into.
        bucket_bytes: a bucket is closed before it would grow over this; a larger parameter has one to itself.

    Raises:
        ValueError: a world size or bucket size that is not positive.
    """
    if world_size < 1 or bucket_bytes <= 0:
        raise ValueError(f"world_size and bucket_bytes must be positive, got {world_size} and {bucket_bytes}")
    open_: dict[torch.dtype, list[Member]] = {}
    closed: list[tuple[torch.dtype, list[Member]]] = []
    for index, (name, shape, dtype) in reversed(list(enumerate(parameters))):
        members = open_.setdefault(dtype, [])
        numel = torch.Size(shape).numel()
        offset = 0
        if members:
            align = _PARAMETER_ALIGNMENT // dtype.itemsize
            offset = -(-(members[-1].offset + members[-1].numel) // align) * align
            if (offset + numel) * dtype.itemsize > bucket_bytes:
                closed.append((dtype, members))
                members = open_[dtype] = []
                offset = 0
        members.append(Member(index, name, tuple(shape), numel, offset))
    closed += open_.items()
    # A bucket is full once its last member has a gradient, which is the earliest registered one.
    closed.sort(key=lambda entry: -entry[1][-1].index)
    buckets = []
    for number, (dtype, members) in enumerate(closed):
        quantum = world_size * _PART_ALIGNMENT // dtype.itemsize
        end = members[-1].offset + members[-1].numel
        buckets.append(Bucket(number, dtype, tuple(members), max(1, -(-end // quantum)) * quantum, world_size))
    return tuple(buckets)


def fingerprint(buckets: Iterable[Bucket]) -> str:
    """A hash of names, shapes, dtypes and places."""
    text = repr([(b.dtype, b.numel, b.world_size, b.members) for b in buckets])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
