"""Transports by the process group: pairwise messages on gloo (or a single process), the backend's own elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from shardopt.engines.zero.transports.base import Communicator, Part, PeerError, Reduction

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
    """The backend's collectives; on CUDA they run on the backend's own stream.

    There a wait is one of the stream and not of the processor, which a `timeout` of the wait itself would make it: the
    backend's watchdog ends what lasts longer than the group's own. `timeout` bounds the one wait of a step that the
    processor takes part in, for the agreement of all ranks, which nothing that is stuck lets through.
    """

    name = "native"
    takes_messages = False
    depth = 4  # half as large as others': several in flight beside the one that fills

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        timeout: timedelta | None = None,
        channel: int = 0,
        in_stream: bool = False,
    ) -> None:
        super().__init__(group, timeout, channel)
        self.in_stream = in_stream  # whether waiting is for the device's stream alone

    def exchanges(self, dtype: torch.dtype) -> bool:
        # A native sum in 16 bits would round at every hop.
        return dtype != torch.promote_types(dtype, torch.float32)

    def sum(self, values: Tensor) -> Tensor:
        if self.in_stream and self.size > 1:
            work = dist.all_reduce(values, group=self.group, async_op=True)
            deadline = time.monotonic() + self.timeout.total_seconds() if self.timeout is not None else math.inf
            while self.timeout is not None and not work.is_completed():
                if time.monotonic() > deadline:
                    raise PeerError(f"the agreement on gradients failed: timed out after {self.timeout}")
                time.sleep(1e-4)
            self.wait(work, "the agreement on gradients")
            return values
        return super().sum(values)

    def wait(self, work: dist.Work | None, what: str) -> None:
        if not self.in_stream:
            super().wait(work, what)
            return
        try:
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise PeerError(f"{what} failed: {error}") from error

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
        exchanged = comm.exchanges(part.dtype)
        received = torch.empty_like(flat if exchanged else part)
        start = dist.all_to_all_single if exchanged else _reduce_scatter
        self.work = start(received, flat, group=comm.group, async_op=True)
        self.received = received.split(part.numel())  # every rank's, or the sum alone

    def arrive(self) -> None:
        self.comm.wait(self.work, "the reduce-scatter")

    def chunks(self) -> Iterator[tuple[list[Tensor], int, int]]:
        own, received = self.own[0], self.received[0]
        if len(self.received) > 1:  # in one kernel, however many ranks there are
            rows = received.as_strided((self.comm.size, own.numel()), (own.numel(), 1))
            received = rows.sum(0, dtype=torch.promote_types(own.dtype, torch.float32))
        yield [received], 0, own.numel()

    def not_finite(self) -> list[int]:
        return []
