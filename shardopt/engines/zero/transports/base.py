"""The interface of a transport: reduce-scatter a bucket onto the ranks that own its parts, all-gather the parts.

gloo gets pairwise exchanges (backends.py): every rank sends each other rank that rank's part and adds what it receives,
in rank order and in fp32 whatever is on the wire. That is several times faster than gloo's reduce-scatter, sends
gradients from where autograd left them, and makes the sum independent of how buckets are cut. Ranks of one machine need
not even send (shared_memory.py). NCCL and other backends use their own collectives.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# Messages for one rank, in order: together they are that rank's part of a bucket.
Part = Sequence[Tensor]
_IN_CACHE = 1 << 17  # elements that are added up at a time, of all ranks together; half a MiB in fp32


class PeerError(RuntimeError):
    """Another rank did not take part in a collective: it died, raised, or went another way through the code."""


class Reduction(abc.ABC):
    """A reduce-scatter in flight: what every rank has sent for this rank's part is added up here.

    `sent` must live until `release`.
    """

    received: Sequence[Tensor] = ()  # by rank, where parts are received

    def __init__(self, comm: Communicator, parts: Sequence[Part]) -> None:
        self.comm, self.sent, self.own = comm, parts, parts[comm.rank]
        comm.reduce_bytes += sum(message.nbytes for peer in comm.peers() for message in parts[peer])

    @abc.abstractmethod
    def arrive(self) -> None:
        """Wait until every rank's part may be read. Raises PeerError if a rank did not send it in time."""

    def release(self) -> None:  # noqa: B027  a backend keeps what it still reads
        """After `finish` and `not_finite`: wait until the tensors that were sent may change.

        Raises:
            PeerError: a rank did not receive its part in time.
        """

    def read(self, peer: int, message: int, first: int, start: int, own: Tensor) -> Tensor:
        """What `peer` sent for the elements of `own`, which begin at `first` in the message, at `start` in the part.

        Good until the next one of that peer is read.
        """
        return self.received[peer][start : start + own.numel()]

    def chunks(self) -> Iterator[tuple[list[Tensor], int, int]]:
        """Every rank's values, in rank order, of pieces of the part that fit the cache: (values, start, end)."""
        at = 0
        for number, message in enumerate(self.own):
            size = max(1, _IN_CACHE // self.comm.size if message.device.type == "cpu" else message.numel())
            for first in range(0, message.numel(), size):
                own = message[first : first + size]
                values = [own] * self.comm.size
                for peer in self.comm.peers():
                    values[peer] = self.read(peer, number, first, at + first, own)
                yield values, at + first, at + first + own.numel()
            at += message.numel()

    def held_bytes(self) -> int:
        """Bytes that this reduction keeps alive: what is being sent, and where it is received."""
        return sum(tensor.nbytes for tensors in (*self.sent, self.received) for tensor in tensors)

    def finish(self, out: Tensor, accumulate: bool, scale: float = 1.0) -> Tensor:
        """Wait, and write `scale` times the sum over ranks of this rank's part to `out` (or add it).

        Args:
            out: 1-D, fp32 or wider, as long as the part.
            accumulate: add to `out` instead of overwriting it.
            scale: what the sum is multiplied by.

        Returns:
            The L2 norm of what `out` then holds, a tensor without dimensions.

        Raises:
            PeerError: a rank did not send its part in time.
        """
        self.arrive()
        norms = []
        for values, start, end in self.chunks():
            _sum_parts(values, out[start:end], accumulate, scale)
            norms.append(torch.linalg.vector_norm(out[start:end]))
        return torch.linalg.vector_norm(torch.stack(norms))

    def not_finite(self) -> list[int]:
        """After `finish`: the global ranks that sent a NaN or an infinity; empty where they cannot be told apart."""
        bad: set[int] = set()
        for values, *_ in self.chunks():
            bad |= {rank for rank, part in enumerate(values) if not part.isfinite().all()}
        return sorted(map(self.comm.global_rank, bad))


def _sum_parts(parts: Sequence[Tensor], out: Tensor, accumulate: bool, scale: float) -> None:
    """out (+)= scale (parts[0] + parts[1] + ...), added in that order in out's dtype; the parts stay as they are."""
    # The sum of the parts comes first, so that it does not depend on what was there.
    total = torch.empty_like(out) if accumulate else out
    if len(parts) > 1 and parts[0].dtype == parts[1].dtype == out.dtype:
        torch.add(parts[0], parts[1], out=total)
        rest = parts[2:]
    else:
        total.copy_(parts[0])
        rest = parts[1:]
    for part in rest:
        total.add_(part)
    if accumulate:
        out.add_(total, alpha=scale)
    elif scale != 1.0:
        out.mul_(scale)


class Communicator(abc.ABC):
    """A process group as ZeRO uses it; `transports.communicator` makes the right kind.

    Communicators on one group keep their messages apart by `channel`, so that the reductions of two optimizers may be
    in flight at once, launched in another order on each rank. All calls on one communicator must come in the same
    order on every rank.

    Args:
        group: None for a single process.
        timeout: of every wait; None is the process group's own.
        channel: a number that no other communicator on this group has, the same on all of its ranks.

    Attributes:
        name: what ZeroOptimizer.transport shows.
        takes_messages: whether a part may be several messages; if not, the parts are consecutive in one flat bucket.
        in_background: whether data moves while nobody waits, so that waiting late pays.
        depth: buckets that may be filling or in flight at a time.
        rank, size: this rank's place in the group, and the group's size.
        reduce_bytes, gather_bytes: what this rank has sent, by reduce-scatters and by all-gathers.
    """

    name: str
    takes_messages: bool
    in_background = True
    depth = 2

    def __init__(self, group: dist.ProcessGroup | None, timeout: timedelta | None = None, channel: int = 0) -> None:
        self.group, self.timeout, self.channel = group, timeout, channel
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        self.reduce_bytes = self.gather_bytes = 0

    @abc.abstractmethod
    def reduce_scatter(self, parts: Sequence[Part]) -> Reduction:
        """Start sending parts[r] to rank r for every r; the tensors must not change before `Reduction.release`."""

    @abc.abstractmethod
    def all_gather(self, flat: Tensor) -> Callable[[], None]:
        """Start filling `flat` in place, rank r's equal part from rank r; returns the function that waits for it."""

    def exchanges(self, dtype: torch.dtype) -> bool:
        """Whether a reduce-scatter of `dtype` receives every rank's part, to add them up here."""
        return True

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce a few values in place: their sum over ranks, the same bits on every rank."""
        self.start_sum(values, "the agreement on gradients")()
        return values

    def start_sum(self, values: Tensor, what: str) -> Callable[[], None]:
        """Start `sum`; returns the function that waits for it."""
        if self.size == 1:
            return lambda: None
        work = dist.all_reduce(values, group=self.group, async_op=True)
        return lambda: self.wait(work, what)

    def wait(self, work: dist.Work | None, what: str) -> None:
        """Wait for `work`. Raises PeerError, which says `what` was being waited for, if it fails."""
        try:
            if work is not None:
                work.wait(self.timeout or timedelta(0))  # zero: the process group's own
        except RuntimeError as error:
            raise PeerError(f"{what} failed: {error}") from error

    def global_rank(self, rank: int) -> int:
        """The rank in the whole job of this group's `rank`."""
        return dist.get_global_rank(self.group, rank) if self.group is not None else rank

    def peers(self) -> list[int]:
        """The other ranks, beginning with the next one, so that not all ranks turn to the same one first."""
        return [(self.rank + i) % self.size for i in range(1, self.size)]
