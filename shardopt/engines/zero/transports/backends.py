"""Transports by the process group: pairwise messages on gloo (or a single process), the backend's own elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from shardopt.engines.zero.transports.base import Communicator, Part, Reduction

_FIRST_TAG = 0x5A0000  # keeps these messages apart from others that a program sends over the same group

# Renamed in torch 2.13.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class SocketsCommunicator(Communicator):
    """Sends and receives over the group's sockets; messages of channel c carry a tag of their own."""

    name = "sockets"
    takes_messages = True

    def send(self, message: Tensor, peer: int) -> Callable[[], None]:
        """Start sending; returns the function that waits until `message` may change."""
        work = dist.isend(message, group=self.group, group_dst=peer, tag=_FIRST_TAG + self.channel)
        return lambda: self.wait(work, f"sending to rank {self.global_rank(peer)}")

    def receive(self, into: Tensor, peer: int) -> Callable[[], None]:
        """Start receiving; returns the function that waits until `into` is there."""
        work = dist.irecv(into, group=self.group, group_src=peer, tag=_FIRST_TAG + self.channel)
        return lambda: self.wait(work, f"receiving from rank {self.global_rank(peer)}")

    def reduce_scatter(self, parts: Sequence[Part]) -> Reduction:
        return _SocketsReduction(self, parts)

    def all_gather(self, flat: Tensor) -> Callable[[], None]:
        parts = flat.view(self.size, -1)
        waits = [self.receive(parts[peer], peer) for peer in self.peers()]
        waits += [self.send(parts[self.rank], peer) for peer in self.peers()]
        self.gather_bytes += parts[self.rank].nbytes * (self.size - 1)
        return lambda: _call_all(waits)


class _SocketsReduction(Reduction):
    def __init__(self, comm: SocketsCommunicator, parts: Sequence[Part]) -> None:
        super().__init__(comm, parts)
        lengths = [message.numel() for message in self.own]
        self.received = [self.own[0].new_empty(sum(lengths) if r != comm.rank else 0) for r in range(comm.size)]
        split = {peer: self.received[peer].split(lengths) for peer in comm.peers()}
        self.receives = [comm.receive(message, peer) for peer, messages in split.items() for message in messages]
        self.sends = [comm.send(message, peer) for peer in comm.peers() for message in parts[peer]]

    def arrive(self) -> None:
        _call_all(self.receives)

    def release(self) -> None:
        _call_all(self.sends)


def _call_all(waits: Sequence[Callable[[], None]]) -> None:
    for wait in waits:
        wait()


class NativeCommunicator(Communicator):
    """The backend's collectives; on CUDA they run on the backend's own stream."""

    name = "native"
    takes_messages = False

    def reduce_scatter(self, parts: Sequence[Part]) -> Reduction:
        return _NativeReduction(self, parts)

    def all_gather(self, flat: Tensor) -> Callable[[], None]:
        own = flat.view(self.size, -1)[self.rank]
        work = _all_gather(flat, own, group=self.group, async_op=True)
        self.gather_bytes += own.nbytes * (self.size - 1)
        return lambda: self.wait(work, "the all-gather")


class _NativeReduction(Reduction):
    def __init__(self, comm: NativeCommunicator, parts: Sequence[Part]) -> None:
        super().__init__(comm, parts)
        part = self.own[0]
        flat = parts[0][0].as_strided((part.numel() * comm.size,), (1,))
        # A native sum in 16 bits would round at every hop: exchange instead, and add in fp32 here.
        exchanged = part.dtype != torch.promote_types(part.dtype, torch.float32)
        received = torch.empty_like(flat if exchanged else part)
        start = dist.all_to_all_single if exchanged else _reduce_scatter
        self.work = start(received, flat, group=comm.group, async_op=True)
        self.received = received.split(part.numel())  # every rank's, or the sum alone

    def arrive(self) -> None:
        self.comm.wait(self.work, "the reduce-scatter")

    def chunks(self) -> Iterator[tuple[list[Tensor], int, int]]:
        yield list(self.received), 0, self.own[0].numel()

    def not_finite(self) -> list[int]:
        return []
