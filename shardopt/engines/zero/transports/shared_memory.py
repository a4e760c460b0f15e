"""Ranks of one machine read each other's memory instead of sending it through sockets.

A rank writes into its own mailbox where a part lies; the part's owner finds it there, copies it (process_vm_readv,
Linux) while it adds it up, and writes into its own mailbox that it has: one copy into the cache, against three and a
buffer by way of gloo, and no thread beside backward's. Nothing is ever written into another process, and every read
also fetches the secret of the mailbox that it expects there, in the same system call: a process that was given the PID
of a rank that died is not mistaken for it. The kernel lets a process read those of the same user unless Yama
(kernel.yama.ptrace_scope > 0) or a container's seccomp profile forbids it; then the sockets remain.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from shardopt.distributed import all_gather_objects
from shardopt.engines.zero.transports.base import Communicator, Part, PeerError, Reduction

_WORD = 8  # bytes; mailboxes and tables are of 64-bit integers
_PAUSE = 1e-6  # seconds; every pause between two looks into a mailbox is longer by this
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_TwoIovecs = ctypes.c_uint64 * 4  # the kernel's struct iovec: an address and a length in bytes
_mailboxes: list[ctypes.Array[ctypes.c_int64]] = []  # never freed: a peer may still read one after its owner failed


@cache
def _process_vm_readv() -> Callable[..., int] | None:
    """The system call, where this machine has it and it is enough."""
    # Only x86 shows one processor's stores to the others in order without barriers, which Python does not have.
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64" or not _BOOT_ID.exists():
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
    if function is not None:
        one_side = [ctypes.c_void_p, ctypes.c_ulong]
        function.argtypes = [ctypes.c_int, *one_side, *one_side, ctypes.c_ulong]
        function.restype = ctypes.c_ssize_t
    return function


class _Exited(PeerError):
    """A rank's process has ended."""


class _Process:
    """The process of `rank` of the job, known by its PID and by a secret at an address of its memory."""

    def __init__(self, rank: int, pid: int, address: int, secret: int) -> None:
        self.rank, self.pid, self.address, self.secret = rank, pid, address, secret

    def read(self, address: int, into: int, nbytes: int) -> None:
        """Copy `nbytes` from `address` there to `into` here.

        Raises:
            PeerError: the process has ended (_Exited), or may not be read.
        """
        call = _process_vm_readv()
        assert call is not None
        found = ctypes.c_int64()
        done = 0
        while done < nbytes:
            here = _TwoIovecs(ctypes.addressof(found), _WORD, into + done, nbytes - done)
            there = _TwoIovecs(self.address, _WORD, address + done, nbytes - done)
            count = call(self.pid, here, 2, there, 2, 0)
            number = ctypes.get_errno() if count < 0 else errno.EFAULT  # after the secret nothing could be read
            if count > 0 and found.value != self.secret:
                raise _Exited(f"reading from rank {self.rank} failed: its process has ended, and its PID is another's")
            if count <= _WORD:
                kind = _Exited if number == errno.ESRCH else PeerError
                raise kind(f"reading from rank {self.rank} failed: {os.strerror(number)}")
            done += count - _WORD

    def words(self, address: int, count: int) -> list[int]:
        into = (ctypes.c_int64 * count)()
        self.read(address, ctypes.addressof(into), count * _WORD)
        return list(into)


def refusal() -> str | None:
    """Why ranks of this machine cannot read each other's memory, which two processes try; None where they can."""
    if _process_vm_readv() is None:
        return "it needs Linux on x86-64"
    word = ctypes.c_int64(secrets.randbits(63))
    peer = _Process(0, 0, ctypes.addressof(word), word.value)
    until_closed, writer = os.pipe()
    if not (pid := os.fork()):
        os.close(writer)
        os.read(until_closed, 1)
        os._exit(0)
    peer.pid = pid
    if not (reader := os.fork()):  # another child: Yama lets a parent read its own
        code = 1
        try:
            code = int(peer.words(peer.address, 1) != [word.value])
        except PeerError:
            pass
        finally:
            os._exit(code)
    try:
        _, status = os.waitpid(reader, 0)
    finally:
        os.close(writer)
        os.close(until_closed)
        os.waitpid(pid, 0)
    if not status:
        return None
    scope = _YAMA.read_text().strip() if _YAMA.exists() else "0"
    by = f"kernel.yama.ptrace_scope is {scope}" if scope != "0" else "a container's seccomp profile, most likely"
    return f"the kernel forbids process_vm_readv between processes ({by})"


def join(
    group: dist.ProcessGroup, timeout: timedelta | None, channel: int, in_flight: int
) -> SharedMemoryCommunicator | None:
    """A communicator for CPU ranks, if each can read every other one's memory, else None. A collective."""
    comm = SharedMemoryCommunicator(group, timeout, channel, in_flight)
    able = _process_vm_readv() is not None
    mine = (_BOOT_ID.read_text() if able else "", os.getpid(), [(m.address, m.secret) for m in comm.mailboxes])
    everyone = all_gather_objects(mine, group)
    for mailbox, places in zip(comm.mailboxes, zip(*(places for *_, places in everyone), strict=True), strict=True):
        mailbox.peers = [_Process(comm.global_rank(r), everyone[r][1], *place) for r, place in enumerate(places)]
    able = able and all(machine == mine[0] for machine, *_ in everyone)
    try:
        if able:
            for mailbox in comm.mailboxes:
                for process in mailbox.peers:
                    process.words(process.address, 1)
    except PeerError:  # no such process in this container, or not allowed: all ranks agree on that
        able = False
    return comm if all(all_gather_objects(able, group)) else None


class SharedMemoryCommunicator(Communicator):
    """Adds up and copies out of the peers' memory; made by `join`."""

    name = "memory"
    takes_messages = True
    in_background = False

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta | None, channel: int, in_flight: int) -> None:
        super().__init__(group, timeout, channel)
        options = group._get_backend(torch.device("cpu")).options
        self.patience = (timeout or options._timeout).total_seconds()
        self.mailboxes = self._reductions, self._gathers = _Mailbox(self, in_flight), _Mailbox(self, in_flight)

    def reduce_scatter(self, parts: Sequence[Part]) -> Reduction:
        return _SharedMemoryReduction(self, self._reductions, parts)

    def all_gather(self, flat: Tensor) -> Callable[[], None]:
        mailbox, parts = self._gathers, flat.view(self.size, -1)
        number = mailbox.post([parts[self.rank].data_ptr()])
        self.gather_bytes += parts[self.rank].nbytes * (self.size - 1)

        def finish() -> None:
            for peer in self.peers():
                (address,) = mailbox.fetch(peer, number, 0, 1)
                mailbox.peers[peer].read(address, parts[peer].data_ptr(), parts[peer].nbytes)
            mailbox.wait_until_read(number)

        return finish


class _Mailbox:
    """Addresses of what this rank sends, posted for its peers; every rank posts as often, and reads all the others'.

    In words of 64 bits: a secret, then for each of `in_flight` posts three words: its number, counted from 1; where
    its table of addresses lies; and the number again once this rank has read the same post of all its peers.
    """

    def __init__(self, comm: SharedMemoryCommunicator, in_flight: int) -> None:
        self.comm, self.in_flight = comm, in_flight
        self.secret = secrets.randbits(63)
        self.words = (ctypes.c_int64 * (1 + 3 * in_flight))(self.secret)
        _mailboxes.append(self.words)
        self.address = ctypes.addressof(self.words)
        self.peers: list[_Process] = []  # by rank, this one included
        self._number = 0
        self._tables: dict[int, ctypes.Array[ctypes.c_int64]] = {}

    def post(self, addresses: Sequence[int]) -> int:
        """Post a table of addresses; returns the number of the post."""
        self._number += 1
        table = self._tables[self._number] = (ctypes.c_int64 * len(addresses))(*addresses)
        slot = self._slot(self._number)
        self.words[slot + 1] = ctypes.addressof(table)
        self.words[slot] = self._number  # last, since it says that the rest is there
        return self._number

    def fetch(self, peer: int, number: int, first: int, count: int) -> list[int]:
        """Wait for `peer`'s post and return `count` addresses of its table, from the one numbered `first` on."""
        process = self.peers[peer]
        slot = process.address + self._slot(number) * _WORD
        self._wait(lambda: process.words(slot, 1)[0] >= number, f"receiving from rank {process.rank}")
        (table,) = process.words(slot + _WORD, 1)
        return process.words(table + first * _WORD, count)

    def wait_until_read(self, number: int) -> None:
        """Say that this rank has read its peers' posts of that number, and wait until they have read this rank's."""
        mark = self._slot(number) + 2
        self.words[mark] = number

        def has_read(process: _Process) -> bool:
            try:
                return process.words(process.address + mark * _WORD, 1)[0] >= number
            except _Exited:  # perhaps after its last step; it reads nothing any more
                return True

        for peer in self.comm.peers():
            process = self.peers[peer]
            self._wait(partial(has_read, process), f"sending to rank {process.rank}")
        del self._tables[number]

    def _slot(self, number: int) -> int:
        return 1 + 3 * (number % self.in_flight)

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.comm.patience
        looks = 0
        while not ready():
            looks += 1
            if time.monotonic() > deadline:
                raise PeerError(f"{what} failed: timed out after {self.comm.patience:g} s")
            time.sleep(min(looks * _PAUSE, 1e-3))  # short waits end at once, long ones cost no processor time


class _SharedMemoryReduction(Reduction):
    def __init__(self, comm: SharedMemoryCommunicator, mailbox: _Mailbox, parts: Sequence[Part]) -> None:
        super().__init__(comm, parts)
        self.mailbox, self.scratch = mailbox, dict.fromkeys(comm.peers(), self.own[0].new_empty(0))
        self.number = mailbox.post([message.data_ptr() for part in parts for message in part])

    def arrive(self) -> None:
        # All ranks cut a bucket into the same messages.
        first, count, fetch = sum(map(len, self.sent[: self.comm.rank])), len(self.own), self.mailbox.fetch
        self.addresses = {peer: fetch(peer, self.number, first, count) for peer in self.comm.peers()}

    def read(self, peer: int, message: int, first: int, start: int, own: Tensor) -> Tensor:
        if self.scratch[peer].numel() < own.numel():
            self.scratch[peer] = torch.empty_like(own)
        into = self.scratch[peer][: own.numel()]
        address = self.addresses[peer][message] + first * own.itemsize
        self.mailbox.peers[peer].read(address, into.data_ptr(), own.nbytes)
        return into

    def release(self) -> None:
        self.mailbox.wait_until_read(self.number)
