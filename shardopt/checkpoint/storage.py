"""Where torch.distributed.checkpoint puts its tensors: one file of checksummed blocks for each rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from shardopt.checkpoint import blocks
from shardopt.checkpoint.blocks import FileRecord, Wanted


class Place(NamedTuple):
    """Where a chunk of a tensor lies."""

    file: str
    start: int
    """Its first byte in the file."""


class Written(NamedTuple):
    """What one rank has written."""

    file: str
    record: FileRecord
    chunks: list[tuple[str, int, int, int]]
    """Key, first element in the flattened tensor, elements, first byte in the file."""


def data_file(rank: int) -> str:
    return f"rank-{rank:05d}.data"


class Writer(StorageWriter):
    """Writes this rank's file, and calls `publish` on rank 0 once all ranks have written; its errors reach all.

    Args:
        folder: made where it is not there.
        rank: of this process.
        save_id: of this save, in the header of each file.
        publish: gets what each rank wrote, and the metadata that DCP's planner made.
    """

    def __init__(
        self, folder: Path, rank: int, save_id: str, publish: Callable[[list[Written], Metadata], None]
    ) -> None:
        super().__init__()
        self.folder, self.rank, self.save_id, self._publish = folder, rank, save_id, publish

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[Any]:
        written: list[Written] = []
        if plan.items:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = data_file(self.rank)
            tensors: list[Tensor] = [planner.resolve_data(item) for item in plan.items]  # type: ignore[misc]
            record, starts = blocks.write_file(self.folder / name, self.save_id, tensors)
            chunks = []
            for item, tensor, start in zip(plan.items, tensors, starts, strict=True):
                offsets = item.index.offset
                first = offsets[0] if offsets is not None and len(offsets) == 1 else 0
                chunks.append((item.index.fqn, first, tensor.numel(), start))
            written.append(Written(name, record, chunks))
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(written)
        return future

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        self._publish([written for rank in results for written in rank], metadata)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class Reader(StorageReader):
    """Reads ranges of the tensors, from an index that was read and checked before.

    Args:
        folder: the checkpoint.
        save_id: that its files must have.
        records: of its files.
        metadata: of the tensors to read, with a `Place` for each chunk.
    """

    def __init__(self, folder: Path, save_id: str, records: Mapping[str, FileRecord], metadata: Metadata) -> None:
        super().__init__()
        self.folder, self.save_id, self.records, self.metadata = folder, save_id, records, metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        files: dict[str, list[Wanted]] = {}
        for item in plan.items:
            file, start = self.metadata.storage_data[item.storage_index]
            dtype = self.metadata.state_dict_metadata[item.storage_index.fqn].properties.dtype  # type: ignore[union-attr]
            # Only vectors are read in parts.
            first = item.storage_offsets[0] if len(item.storage_offsets) == 1 else 0
            target = planner.resolve_tensor(item).detach()
            files.setdefault(file, []).append(Wanted(start + first * dtype.itemsize, dtype, target))
        for name, wanted in files.items():
            blocks.read_file(self.folder / name, self.save_id, self.records[name], wanted)
        future: torch.futures.Future[None] = torch.futures.Future()
        future.set_result(None)
        return future

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
