"""The processes of a run: start, agree, stop."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from shardopt.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the others. A single process (world size 1) may have no process group at all."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    distributed: bool
    owns_group: bool = False  # whether `start` made the process group, so that `stop` ends it

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def start(cls, device: str = "auto", timeout_minutes: float = 10.0) -> Ranks:
        """Join the process group that torchrun describes in the environment, or stand alone without one.

        Args:
            device: "auto" takes CUDA where there is one (NCCL, with gloo beside it for CPU tensors), else "cpu".
            timeout_minutes: how long a collective may wait before it fails.
        """
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            if not torch.cuda.is_available():
                raise InputError("run.device is cuda, but torch sees no GPU: set run.device=cpu")
            if local_rank >= torch.cuda.device_count():
                raise InputError(
                    f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
                    f"lower --nproc_per_node"
                )
            where = torch.device("cuda", local_rank)
            torch.cuda.set_device(where)
        else:
            where = torch.device(device)
        distributed = "RANK" in os.environ
        owns_group = distributed and not dist.is_initialized()
        if owns_group:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo",
                timeout=timedelta(minutes=timeout_minutes),
                device_id=where if where.type == "cuda" else None,
            )
        return cls(rank, world_size, local_rank, where, distributed, owns_group)

    def stop(self) -> None:
        """Leave the process group that `start` made."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()

    def sum(self, values: list[float]) -> list[float]:
        """The sum over ranks of each value, in float64. A collective."""
        if not self.distributed:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank. A collective."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank (pickled between ranks of one job). A collective."""
        if not self.distributed:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """Rank 0's value on every rank (pickled between ranks of one job). A collective."""
        if not self.distributed:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` here; if it raises on any rank, raise on every rank. A collective.

        Without it a rank that fails alone (an unwritable disk, a corpus that is missing on one node) leaves the
        others waiting in their next collective until the timeout.

        Raises:
            InputError: the action raised an InputError on some rank; its message, once.
            RuntimeError: it raised something else on another rank. The failing rank raises its own error.
        """
        error: Exception | None = None
        try:
            result = action()
        except Exception as e:
            error = e
        if not self.distributed:
            if error is not None:
                raise error
            return result
        mine = None if error is None else (isinstance(error, InputError), f"{type(error).__name__}: {error}")
        failures = [(rank, *report) for rank, report in enumerate(self.gather(mine)) if report is not None]
        if error is not None:
            raise error
        if failures:
            rank, is_input, message = failures[0]
            if is_input:
                raise InputError(message.removeprefix("InputError: "))
            raise RuntimeError(f"rank {rank} failed: {message}")
        return result
