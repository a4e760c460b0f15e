"""The one communicator of a process group: reduce a bucket onto its owners, hand the owners' parts round again.

gloo gets pairwise exchanges: every rank sends each other rank that rank's part and adds what it receives, in
rank order and in fp32 whatever is on the wire. That is several times faster than gloo's reduce-scatter, lets
gradients be sent from where autograd left them, and makes the sum independent of how buckets are cut. Ranks of one
host need not even send (same_host.py). NCCL and other backends get their native collectives.
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
# Renamed in torch 2.13.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_TAG = 0x5A  # keeps these messages apart from others that a program sends over the same group
_IN_CACHE = 1 << 17  # elements that are added up at a time, of all ranks together; half a MiB in fp32


class PeerError(RuntimeError):
    """Another rank did not take part in a collective: it died, raised, or went another way through the code."""


class Reduction(abc.ABC):
    """A bucket on its way to its owners."""

    @abc.abstractmethod
    def finish(self, out: Tensor, accumulate: bool, scale: float = 1.0) -> Tensor:
        """Wait, and write `scale` times the sum over ranks of this rank's part to `out` (or add it).

        `out` is 1-D, fp32 or wider. Returns the L2 norm of what it then holds.

        Raises:
            PeerError: a rank did not send its part in time.
        """

    @abc.abstractmethod
    def release(self) -> None:
        """After `finish` and `not_finite`: wait until what was sent may change.

        Raises:
            PeerError: a rank did not take its part in time.
        """

    @abc.abstractmethod
    def held_bytes(self) -> int:
        """Bytes that this reduction keeps alive: what is being sent, and where it is received."""

    def not_finite(self) -> list[int]:
        """After `finish`: the ranks that sent something not finite; none where they cannot be told apart."""
        return []


class Collectives(abc.ABC):
    """What ZeRO needs of one process group.

    Args:
        group: None for one process alone.
        timeout: of a wait; None takes the process group's own.

    `reduce_bytes` and `gather_bytes` count what this rank has sent.
    """

    # What ZeroOptimizer.transport shows.
    name: str
    # Whether a part may be handed over as several messages, or must be one stretch of a flat bucket.
    takes_messages: bool
    # Whether anything moves while nobody waits, so that it pays to wait late.
    in_background = True

    def __init__(self, group: dist.ProcessGroup | None, timeout: timedelta | None) -> None:
        self.group, self.timeout = group, timeout
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        self.reduce_bytes = self.gather_bytes = 0

    @abc.abstractmethod
    def reduce_scatter(self, parts: Sequence[Part]) -> Reduction:
        """Start sending part r to rank r for every r; the tensors must not change until it is finished."""

    @abc.abstractmethod
    def all_gather(self, flat: Tensor) -> Callable[[], None]:
        """Start filling `flat` in place from its owners' parts; returns what waits for it."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks of a few values, in place; the same bits on every rank."""
        if self.size > 1:
            wait(
                dist.all_reduce(values, group=self.group, async_op=True),
                self.timeout,
                "the agreement on gradients",
            )
        return values

    def global_rank(self, rank: int) -> int:
        """What the whole job calls `rank` of this group."""
        return dist.get_global_rank(self.group, rank) if self.group is not None else rank

    def peers(self) -> list[int]:
        """The other ranks, nearest first, so that no rank is everybody's first choice."""
        return [(self.rank + i) % self.size for i in range(1, self.size)]


def wait(work: dist.Work | None, timeout: timedelta | None, what: str) -> None:
    """Wait for `work`; its failure becomes a PeerError that says what was being waited for."""
    if work is None:
        return
    try:
        if timeout is None:
            work.wait()
        else:
            work.wait(timeout)
    except RuntimeError as error:
        raise PeerError(f"{what} failed: {error}") from error


def sum_parts(parts: Sequence[Tensor], out: Tensor, accumulate: bool, scale: float) -> None:
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


def stretches(messages: Part, world_size: int) -> Iterator[tuple[int, int, int, int]]:
    """Number of the message, where in it a stretch starts, and where in the part it starts and ends.

    What is done to one stretch after another finds it in the cache.
    """
    at = 0
    for number, message in enumerate(messages):
        size = max(1, _IN_CACHE // world_size if message.device.type == "cpu" else message.numel())
        for first in range(0, message.numel(), size):
            yield number, first, at + first, at + min(first + size, message.numel())
        at += message.numel()


class Exchange(Reduction):
    """A reduction that has every rank's part at hand, and adds them up here."""

    def __init__(self, comm: Collectives) -> None:
        self.comm = comm

    @abc.abstractmethod
    def parts(self) -> Iterator[tuple[list[Tensor], int, int]]:
        """Every rank's part and where it lies, a stretch at a time; good until the next one is asked for."""

    def finish(self, out: Tensor, accumulate: bool, scale: float = 1.0) -> Tensor:
        norms = []
        for parts, start, end in self.parts():
            sum_parts(parts, out[start:end], accumulate, scale)
            norms.append(torch.linalg.vector_norm(out[start:end]))
        return torch.linalg.vector_norm(torch.stack(norms))

    def not_finite(self) -> list[int]:
        bad: set[int] = set()
        for parts, *_ in self.parts():
            bad |= {rank for rank, part in enumerate(parts) if not part.isfinite().all()}
        return sorted(map(self.comm.global_rank, bad))


class _PairwiseExchange(Exchange):
    def __init__(self, comm: Pairwise, parts: Sequence[Part]) -> None:
        super().__init__(comm)
        mine = parts[comm.rank]
        self.sent, self.mine = parts, mine
        total = sum(m.numel() for m in mine)
        peers = comm.peers()
        self.received = {peer: mine[0].new_empty(total) for peer in peers}
        self.receives: dict[int, list[dist.Work | None]] = {}
        self.sends: list[tuple[int, dist.Work | None]] = []
        for peer in peers:
            lengths = [m.numel() for m in mine]
            self.receives[peer] = [
                dist.irecv(chunk, group=comm.group, group_src=peer, tag=_TAG)
                for chunk in self.received[peer].split(lengths)
            ]
        for peer in peers:
            for message in parts[peer]:
                self.sends.append((peer, dist.isend(message, group_dst=peer, group=comm.group, tag=_TAG)))
                comm.reduce_bytes += message.nbytes

    def held_bytes(self) -> int:
        return sum(m.nbytes for part in self.sent for m in part) + sum(r.nbytes for r in self.received.values())

    def finish(self, out: Tensor, accumulate: bool, scale: float = 1.0) -> Tensor:
        for peer, works in self.receives.items():
            for work in works:
                wait(work, self.comm.timeout, f"receiving from rank {self.comm.global_rank(peer)}")
        return super().finish(out, accumulate, scale)

    def parts(self) -> Iterator[tuple[list[Tensor], int, int]]:
        rank, size = self.comm.rank, self.comm.size
        for number, first, start, end in stretches(self.mine, size):
            own = self.mine[number][first : first + end - start]
            yield [own if r == rank else self.received[r][start:end] for r in range(size)], start, end

    def release(self) -> None:
        for peer, work in self.sends:
            wait(work, self.comm.timeout, f"sending to rank {self.comm.global_rank(peer)}")


class Pairwise(Collectives):
    """Every rank exchanges with every other one. Also one process alone."""

    name = "sockets"
    takes_messages = True

    def reduce_scatter(self, parts: Sequence[Part]) -> Reduction:
        return _PairwiseExchange(self, parts)

    def all_gather(self, flat: Tensor) -> Callable[[], None]:
        parts = flat.view(self.size, -1)
        works = []
        for peer in self.peers():
            works.append(
                (
                    f"receiving from rank {self.global_rank(peer)}",
                    dist.irecv(parts[peer], group=self.group, group_src=peer, tag=_TAG),
                )
            )
        for peer in self.peers():
            work = dist.isend(parts[self.rank], group_dst=peer, group=self.group, tag=_TAG)
            works.append((f"sending to rank {self.global_rank(peer)}", work))
            self.gather_bytes += parts[self.rank].nbytes

        def finish() -> None:
            for what, work in works:
                wait(work, self.timeout, what)

        return finish


class _NativeReduction(Reduction):
    def __init__(self, comm: Native, flat: Tensor, accumulate_dtype: torch.dtype) -> None:
        self.comm, self.flat = comm, flat
        # A native sum in 16 bits would round at every hop: exchange instead, and add in fp32 here.
        self.exchanged = flat.dtype != accumulate_dtype
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
        wait(self.work, self.comm.timeout, "the reduce-scatter")
        parts = list(self.received.view(self.comm.size, -1)) if self.exchanged else [self.received]
        sum_parts(parts, out, accumulate, scale)
        return torch.linalg.vector_norm(out)

    def release(self) -> None:
        pass  # the backend keeps what it still reads


class Native(Collectives):
    """The backend's own reduce-scatter and all-gather; both run on the backend's own stream on CUDA."""

    name = "native"
    takes_messages = False

    def reduce_scatter(self, parts: Sequence[Part]) -> Reduction:
        first = parts[0][0]
        flat = first.as_strided((first.numel() * self.size,), (1,))
        return _NativeReduction(self, flat, torch.promote_types(flat.dtype, torch.float32))

    def all_gather(self, flat: Tensor) -> Callable[[], None]:
        part = flat.numel() // self.size
        own = flat[self.rank * part : (self.rank + 1) * part]
        work = _all_gather(flat, own, group=self.group, async_op=True)
        self.gather_bytes += own.nbytes * (self.size - 1)
        return lambda: wait(work, self.timeout, "the all-gather")


def collectives(group: dist.ProcessGroup | None, device: torch.device, timeout: timedelta | None) -> Collectives:
    """The communicator for tensors on `device`; `group` None is one process alone."""
    if group is None or dist.get_world_size(group) == 1:
        return Pairwise(group, timeout)
    # "cpu:gloo,cuda:nccl"
    named = dict(pair.split(":") for pair in str(dist.get_backend_config(group)).split(","))
    return Pairwise(group, timeout) if named.get(device.type) == "gloo" else Native(group, timeout)
