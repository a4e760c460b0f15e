"""Flat per-parameter vectors for torch.distributed.checkpoint: each rank writes and reads its ranges."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from shardopt.slices import Layout, local_tensor


class FlatShard(Tensor):
    """A 1-D tensor of `numel` elements of which only `chunks` exist here; it has no storage of its own.

    torch.distributed.checkpoint asks a sharded tensor for its write items, its chunks and their values through three
    methods, which any Tensor subclass may have.

    Args:
        numel: elements of the whole vector.
        dtype: of the vector on the disk.
        chunks: global offset of each range held here -> its elements, a 1-D tensor on any device.
    """

    chunks: dict[int, Tensor]

    @staticmethod
    def __new__(cls, numel: int, dtype: torch.dtype, chunks: dict[int, Tensor]) -> FlatShard:
        shard = Tensor._make_wrapper_subclass(cls, (numel,), dtype=dtype, device=torch.device("cpu"))
        shard.chunks = chunks
        return shard

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{func} on a FlatShard: it only names what a checkpoint holds")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FlatShard({self.numel()}, {self.dtype}, {[(s, c.numel()) for s, c in self.chunks.items()]})"

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=self.dtype), self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size([start]), torch.Size([values.numel()]))
            for start, values in self.chunks.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.chunks[index.offset[0]]


def chunks_of(layout: Layout, tensor: Tensor) -> dict[int, Tensor]:
    """`tensor`'s elements by their offset in the whole parameter: views of it, or of a copy if it is not contiguous."""
    vector = local_tensor(tensor).detach().reshape(-1)
    return {r.global_start: vector.narrow(0, r.local_start, r.length) for r in layout.ranges}


def coverage_error(numel: int, chunks: Iterable[tuple[int, int]]) -> str | None:
    """The error in (start, length) pairs that should cover 0 .. numel exactly once, or None."""
    end = 0
    for start, length in sorted(chunks):
        if start > end:
            return f"elements {end} to {start} of {numel} are held by no rank"
        if start < end:
            return f"elements {start} to {min(end, start + length)} of {numel} are held in two ranges"
        end = start + length
    if end < numel:
        return f"elements {end} to {numel} of {numel} are held by no rank"
    return f"elements beyond the end ({numel}) are held" if end > numel else None


def few(items: Iterable[str], limit: int = 5) -> str:
    """The first few of `items`, and how many more there are."""
    listed = sorted(items)
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more} more" if more > 0 else "")
