"""The backend's own reduce-scatter and all-gather: NCCL, and whatever else is not gloo."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from shardopt.engines.zero.transports.base import Communicator, Part, Reduction, sum_parts

# Renamed in torch 2.13.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class NativeCommunicator(Communicator):
    """The backend's collectives; on CUDA they run on the backend's own stream."""

    name = "native"
    takes_messages = False

    def reduce_scatter(self, parts: Sequence[Part]) -> Reduction:
        first = parts[0][0]
        return _NativeReduction(self, first.as_strided((first.numel() * self.size,), (1,)))

    def all_gather(self, flat: Tensor) -> Callable[[], None]:
        own = flat.view(self.size, -1)[self.rank]
        work = _all_gather(flat, own, group=self.group, async_op=True)
        self.gather_bytes += own.nbytes * (self.size - 1)
        return lambda: self.wait(work, "the all-gather")


class _NativeReduction(Reduction):
    def __init__(self, comm: NativeCommunicator, flat: Tensor) -> None:
        self.comm, self.flat = comm, flat
        # A native sum in 16 bits would round at every hop: exchange instead, and add in fp32 here.
        self.exchanged = flat.dtype != torch.promote_types(flat.dtype, torch.float32)
        if self.exchanged:
            self.received = torch.empty_like(flat)
            self.work = dist.all_to_all_single(self.received, flat, group=comm.group, async_op=True)
        else:
            self.received = flat.new_empty(flat.numel() // comm.size)
            self.work = _reduce_scatter(self.received, flat, group=comm.group, async_op=True)
        comm.reduce_bytes += flat.nbytes // comm.size * (comm.size - 1)

    def held_bytes(self) -> int:
        return self.flat.nbytes + self.received.nbytes

    def finish(self, out: Tensor, accumulate: bool, scale: float = 1.0) -> Tensor:
        self.comm.wait(self.work, "the reduce-scatter")
        parts = list(self.received.view(self.comm.size, -1)) if self.exchanged else [self.received]
        sum_parts(parts, out, accumulate, scale)
        return torch.linalg.vector_norm(out)

    def release(self) -> None:
        pass  # the backend keeps what it still reads
