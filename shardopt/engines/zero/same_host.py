"""Ranks of one host read each other's memory, instead of sending it through sockets.

A rank writes on a mailbox of its own where a part lies; the part's owner looks there, copies it (process_vm_readv,
Linux) while it adds it up, and writes on the same mailbox that it has: one copy into the cache, against three and a
buffer by way of gloo, and no thread beside backward's. The kernel allows a process to reach into those of the same user
unless Yama (kernel.yama.ptrace_scope > 0) or a container's seccomp profile forbids it; then the sockets remain.
"""

from __future__ import annotations

import ctypes
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from shardopt.engines.zero.collectives import (
    Collectives,
    Exchange,
    Part,
    PeerError,
    Reduction,
    stretches,
)

_WORD = 8  # bytes; mailboxes and tables are of 64-bit integers
_PAUSE = 1e-6  # seconds; so much longer after each look at a mailbox
_mailboxes: list[ctypes.Array[ctypes.c_int64]] = []  # never freed: a peer may still look at one after its owner failed


class _Piece(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@cache
def _system_call(name: str) -> Callable[..., int] | None:
    """process_vm_readv or process_vm_writev, where this machine has them and they are enough."""
    # Only x86 shows one processor's stores to the others in order without barriers, which Python does not have.
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is not None:
        pieces = ctypes.POINTER(_Piece)
        function.argtypes = [ctypes.c_int, pieces, ctypes.c_ulong, pieces, ctypes.c_ulong, ctypes.c_ulong]
        function.restype = ctypes.c_ssize_t
    return function


def _copy(call: str, process: int, there: int, here: int, nbytes: int) -> None:
    """Copy bytes from or to another process' memory. Raises OSError where the kernel will not."""
    function = _system_call(call)
    assert function is not None
    done = 0
    while done < nbytes:
        ours, theirs = _Piece(here + done, nbytes - done), _Piece(there + done, nbytes - done)
        count = function(process, ours, 1, theirs, 1, 0)
        if count <= 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        done += count


def _integers(process: int, address: int, count: int) -> list[int]:
    into = (ctypes.c_int64 * count)()
    _copy("process_vm_readv", process, address, ctypes.addressof(into), count * _WORD)
    return list(into)


def join(group: dist.ProcessGroup, timeout: timedelta | None, outstanding: int) -> SameHost | None:
    """A communicator for the CPU ranks of `group` if each can read every other one's memory, else None. A collective.

    Args:
        timeout: of a wait; None takes the process group's own.
        outstanding: reductions, and gathers, that are on their way at a time at most.
    """
    comm = SameHost(group, timeout, outstanding)
    boot = Path("/proc/sys/kernel/random/boot_id")
    able = _system_call("process_vm_readv") is not None and boot.exists()
    probe = (ctypes.c_int64 * 1)(secrets.randbits(62))
    mine = (boot.read_text() if able else "", os.getpid(), ctypes.addressof(probe), probe[0], comm.addresses())
    theirs = [mine] * comm.size
    dist.all_gather_object(theirs, mine, group=group)
    able = able and all(host == mine[0] for host, *_ in theirs)
    if able:
        try:
            able = all(_integers(process, address, 1) == [value] for _, process, address, value, _ in theirs)
        except OSError:  # no such process in this container, or not allowed: all ranks are told
            able = False
    comm.meet([process for _, process, *_ in theirs], [addresses for *_, addresses in theirs])
    agreed = torch.tensor([int(able)])
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group=group)  # also keeps the probe until all have looked
    return comm if agreed.item() else None


class SameHost(Collectives):
    """As Pairwise, for ranks that can read each other's memory; made by `join`."""

    name = "memory"
    takes_messages = True
    in_background = False

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta | None, outstanding: int) -> None:
        super().__init__(group, timeout)
        self.processes: list[int] = []
        self._reductions, self._gathers = _Mailbox(self, outstanding), _Mailbox(self, outstanding)
        options = group._get_backend(torch.device("cpu")).options
        self.patience = (timeout or options._timeout).total_seconds()

    def addresses(self) -> list[int]:
        return [mailbox.address for mailbox in (self._reductions, self._gathers)]

    def meet(self, processes: list[int], addresses: list[list[int]]) -> None:
        """Learn every rank's process, and where its mailboxes are."""
        self.processes = processes
        self._reductions.theirs, self._gathers.theirs = map(list, zip(*addresses, strict=True))

    def read(self, peer: int, address: int, into: Tensor) -> None:
        """Fill the contiguous `into` from `peer`'s memory."""
        try:
            _copy("process_vm_readv", self.processes[peer], address, into.data_ptr(), into.nbytes)
        except OSError as error:
            raise self.lost(peer, error) from error

    def lost(self, peer: int, error: OSError) -> PeerError:
        return PeerError(f"reading from rank {self.global_rank(peer)} failed: {error.strerror}")

    def reduce_scatter(self, parts: Sequence[Part]) -> Reduction:
        return _Reading(self, self._reductions, parts)

    def all_gather(self, flat: Tensor) -> Callable[[], None]:
        mailbox, parts = self._gathers, flat.view(self.size, -1)
        number = mailbox.announce([[parts[self.rank].data_ptr()]] * self.size)
        self.gather_bytes += parts[self.rank].nbytes * (self.size - 1)

        def finish() -> None:
            for peer in self.peers():
                (address,) = mailbox.look(peer, number, 1)
                self.read(peer, address, parts[peer])
            mailbox.answer(number)

        return finish


class _Mailbox:
    """What this rank tells the others, in words of 64 bits; every rank makes the same announcements in one order.

    First `outstanding` pairs: the number of an announcement, from 1, and where its table lies (for each rank where
    in the table its addresses begin, then the addresses). Then, for each rank and written by it, the number up to
    which it has read this rank's announcements: written here, it is still there when that rank has gone home.
    """

    def __init__(self, comm: SameHost, outstanding: int) -> None:
        self.comm, self.outstanding = comm, outstanding
        self.words = (ctypes.c_int64 * (2 * outstanding + comm.size))()
        _mailboxes.append(self.words)
        self.address = ctypes.addressof(self.words)
        self.theirs: list[int] = []  # the address of every rank's
        self._number = 0
        self._tables: dict[int, ctypes.Array[ctypes.c_int64]] = {}

    def announce(self, addresses: Sequence[Sequence[int]]) -> int:
        """Tell rank r addresses[r]; returns the announcement's number."""
        begins: list[int] = []
        flat: list[int] = []
        for told in addresses:
            begins.append(len(addresses) + len(flat))
            flat += told
        self._number += 1
        table = self._tables[self._number] = (ctypes.c_int64 * (len(begins) + len(flat)))(*begins, *flat)
        slot = self._slot(self._number)
        self.words[slot + 1] = ctypes.addressof(table)
        self.words[slot] = self._number  # last, since it says that the rest is there
        return self._number

    def look(self, peer: int, number: int, count: int) -> list[int]:
        """Wait for `peer`'s announcement and return the `count` addresses that are for this rank."""
        slot = self.theirs[peer] + self._slot(number) * _WORD
        self._await(peer, lambda: self._integers(peer, slot, 1)[0] >= number, "receiving from")
        (table,) = self._integers(peer, slot + _WORD, 1)
        (begin,) = self._integers(peer, table + self.comm.rank * _WORD, 1)
        return self._integers(peer, table + begin * _WORD, count)

    def answer(self, number: int) -> None:
        """Say that this rank has read everybody's announcement, and wait until everybody has read this rank's."""
        comm, done = self.comm, 2 * self.outstanding
        mine = (ctypes.c_int64 * 1)(number)
        for peer in comm.peers():
            there = self.theirs[peer] + (done + comm.rank) * _WORD
            try:
                _copy("process_vm_writev", comm.processes[peer], there, ctypes.addressof(mine), _WORD)
            except OSError as error:
                raise comm.lost(peer, error) from error
        for peer in comm.peers():

            def answered(peer: int = peer) -> bool:
                if self.words[done + peer] >= number:
                    return True
                try:
                    self._integers(peer, self.theirs[peer], 1)  # is it alive?
                except PeerError:
                    if self.words[done + peer] < number:  # it may have answered and gone meanwhile
                        raise
                return False

            self._await(peer, answered, "sending to")
        del self._tables[number]

    def _slot(self, number: int) -> int:
        return 2 * (number % self.outstanding)

    def _await(self, peer: int, ready: Callable[[], bool], doing: str) -> None:
        deadline = time.monotonic() + self.comm.patience
        looks = 0
        while not ready():
            looks += 1
            if time.monotonic() > deadline:
                name = self.comm.global_rank(peer)
                raise PeerError(f"{doing} rank {name} failed: timed out after {self.comm.patience:g} s")
            time.sleep(min(looks * _PAUSE, 1e-3))  # short waits are met at once, long ones cost no processor time

    def _integers(self, peer: int, address: int, count: int) -> list[int]:
        try:
            return _integers(self.comm.processes[peer], address, count)
        except OSError as error:
            raise self.comm.lost(peer, error) from error


class _Reading(Exchange):
    comm: SameHost

    def __init__(self, comm: SameHost, mailbox: _Mailbox, parts: Sequence[Part]) -> None:
        super().__init__(comm)
        self.mailbox, self.mine = mailbox, parts[comm.rank]
        self.sent = parts  # they must live until the others have read them
        self.number = mailbox.announce([[message.data_ptr() for message in part] for part in parts])
        comm.reduce_bytes += sum(message.nbytes for peer in comm.peers() for message in parts[peer])

    def held_bytes(self) -> int:
        return sum(message.nbytes for part in self.sent for message in part)

    def release(self) -> None:
        self.mailbox.answer(self.number)

    def parts(self) -> Iterator[tuple[list[Tensor], int, int]]:
        comm = self.comm
        addresses = {peer: self.mailbox.look(peer, self.number, len(self.mine)) for peer in comm.peers()}
        scratch = {peer: self.mine[0].new_empty(0) for peer in addresses}
        for number, first, start, end in stretches(self.mine, comm.size):
            own = self.mine[number][first : first + end - start]
            parts = [own] * comm.size
            for peer, at in addresses.items():
                if scratch[peer].numel() < own.numel():
                    scratch[peer] = torch.empty_like(own)
                parts[peer] = scratch[peer][: own.numel()]
                comm.read(peer, at[number] + first * own.itemsize, parts[peer])
            yield parts, start, end
