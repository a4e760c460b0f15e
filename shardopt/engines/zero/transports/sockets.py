"""Pairwise exchanges by gloo's point-to-point messages: every rank with every other one. Also a single process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch.distributed as dist
from torch import Tensor

from shardopt.engines.zero.transports.base import Communicator, ExchangedReduction, Part, Reduction, chunks, wait

_FIRST_TAG = 0x5A0000  # keeps these messages apart from others that a program sends over the same group


class SocketsCommunicator(Communicator):
    """Sends and receives over the group's sockets; messages of channel c carry a tag of their own."""

    name = "sockets"
    takes_messages = True

    def send(self, message: Tensor, peer: int) -> dist.Work | None:
        return dist.isend(message, group=self.group, group_dst=peer, tag=_FIRST_TAG + self.channel)

    def receive(self, into: Tensor, peer: int) -> dist.Work | None:
        return dist.irecv(into, group=self.group, group_src=peer, tag=_FIRST_TAG + self.channel)

    def wait_received(self, work: dist.Work | None, peer: int) -> None:
        wait(work, self.timeout, f"receiving from rank {self.global_rank(peer)}")

    def wait_sent(self, work: dist.Work | None, peer: int) -> None:
        wait(work, self.timeout, f"sending to rank {self.global_rank(peer)}")

    def reduce_scatter(self, parts: Sequence[Part]) -> Reduction:
        return _SocketsReduction(self, parts)

    def all_gather(self, flat: Tensor) -> Callable[[], None]:
        parts = flat.view(self.size, -1)
        own = parts[self.rank]
        receives = [(self.receive(parts[peer], peer), peer) for peer in self.peers()]
        sends = [(self.send(own, peer), peer) for peer in self.peers()]
        self.gather_bytes += own.nbytes * (self.size - 1)

        def finish() -> None:
            for work, peer in receives:
                self.wait_received(work, peer)
            for work, peer in sends:
                self.wait_sent(work, peer)

        return finish


class _SocketsReduction(ExchangedReduction):
    comm: SocketsCommunicator

    def __init__(self, comm: SocketsCommunicator, parts: Sequence[Part]) -> None:
        super().__init__(comm)
        self.sent, self.own = parts, parts[comm.rank]
        lengths = [message.numel() for message in self.own]
        self.received = {peer: self.own[0].new_empty(sum(lengths)) for peer in comm.peers()}
        self.receives = [
            (comm.receive(chunk, peer), peer)
            for peer, received in self.received.items()
            for chunk in received.split(lengths)
        ]
        self.sends = [(comm.send(message, peer), peer) for peer in comm.peers() for message in parts[peer]]
        comm.reduce_bytes += sum(message.nbytes for peer in comm.peers() for message in parts[peer])

    def held_bytes(self) -> int:
        return sum(m.nbytes for part in self.sent for m in part) + sum(r.nbytes for r in self.received.values())

    def finish(self, out: Tensor, accumulate: bool, scale: float = 1.0) -> Tensor:
        for work, peer in self.receives:
            self.comm.wait_received(work, peer)
        return super().finish(out, accumulate, scale)

    def received_parts(self) -> Iterator[tuple[list[Tensor], int, int]]:
        rank, size = self.comm.rank, self.comm.size
        for number, first, start, end in chunks(self.own, size):
            own = self.own[number][first : first + end - start]
            yield [own if r == rank else self.received[r][start:end] for r in range(size)], start, end

    def release(self) -> None:
        for work, peer in self.sends:
            self.comm.wait_sent(work, peer)
