"""Pairwise exchanges by gloo's point-to-point messages: every rank with every other one. Also a single process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor

from shardopt.engines.zero.transports.base import Communicator, ExchangedReduction, Part, Reduction

_FIRST_TAG = 0x5A0000  # keeps these messages apart from others that a program sends over the same group


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


class _SocketsReduction(ExchangedReduction):
    def __init__(self, comm: SocketsCommunicator, parts: Sequence[Part]) -> None:
        super().__init__(comm, parts)
        lengths = [message.numel() for message in self.own]
        self.received = {peer: self.own[0].new_empty(sum(lengths)) for peer in comm.peers()}
        self.receives = [comm.receive(c, peer) for peer, whole in self.received.items() for c in whole.split(lengths)]
        self.sends = [comm.send(message, peer) for peer in comm.peers() for message in parts[peer]]

    def held_bytes(self) -> int:
        return super().held_bytes() + sum(whole.nbytes for whole in self.received.values())

    def arrive(self) -> None:
        _call_all(self.receives)

    def read(self, peer: int, message: int, first: int, start: int, own: Tensor) -> Tensor:
        return self.received[peer][start : start + own.numel()]

    def release(self) -> None:
        _call_all(self.sends)


def _call_all(waits: Sequence[Callable[[], None]]) -> None:
    for wait in waits:
        wait()
