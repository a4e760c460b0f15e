"""The three transports by themselves: sums, gathers, channels, and who may read or write whose memory."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardopt.engines.zero import PeerError
from shardopt.engines.zero.transports import Communicator, communicator, shared_memory
from tests.distributed.pool import on_ranks

CPU = torch.device("cpu")
TRANSPORTS = ("memory", "sockets", "native")


@contextlib.contextmanager
def only(transport: str) -> Iterator[None]:
    """Make `communicator` choose `transport` on gloo."""
    with contextlib.ExitStack() as patches:
        if transport == "sockets":
            patches.enter_context(mock.patch.object(shared_memory, "_process_vm_readv", return_value=None))
        elif transport == "native":
            patches.enter_context(mock.patch.object(dist, "get_backend_config", return_value="cpu:other"))
            other = dist.new_group

            def new_group(*args, backend, **kwargs):
                return other(*args, backend="gloo", **kwargs)

            patches.enter_context(mock.patch.object(dist, "new_group", new_group))
        yield


def made(transport: str, **kwargs) -> Communicator:
    with only(transport):
        comm = communicator(dist.group.WORLD, CPU, timedelta(seconds=5), **kwargs)
    assert comm.name == transport
    return comm


def bucket(rank: int, world_size: int, seed: int, dtype: torch.dtype = torch.float32, part: int = 40) -> Tensor:
    return torch.randn(world_size * part, generator=torch.Generator().manual_seed(seed * 100 + rank)).to(dtype)


def expected(rank: int, world_size: int, seed: int, dtype: torch.dtype = torch.float32, part: int = 40) -> Tensor:
    parts = [bucket(r, world_size, seed, dtype, part).float().chunk(world_size)[rank] for r in range(world_size)]
    return torch.stack(parts).sum(0)


def _reduce_and_gather(rank, world_size):
    right = {}
    for transport in TRANSPORTS:
        comm = made(transport, in_flight=2)
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.ones(40)
            flat = bucket(rank, world_size, 1, dtype)
            parts = [[p[:17], p[17:]] if comm.takes_messages else [p] for p in flat.chunk(world_size)]
            reduction = comm.reduce_scatter(parts)
            norm = reduction.finish(out, accumulate=True, scale=0.5)
            reduction.release()
            close = torch.allclose(out, 1 + 0.5 * expected(rank, world_size, 1, dtype), rtol=0, atol=1e-6)
            right[transport, dtype] = close and torch.allclose(norm, out.norm())
            gathered = torch.full((world_size * 40,), -1.0, dtype=dtype)
            gathered.chunk(world_size)[rank].fill_(rank)
            comm.all_gather(gathered)()
            right[transport, dtype, "gather"] = gathered.tolist() == [float(i // 40) for i in range(world_size * 40)]
        sent = comm.reduce_bytes, comm.gather_bytes
        right[transport, "bytes"] = sent == ((world_size - 1) * 40 * 6,) * 2
        right[transport, "sum"] = comm.sum(torch.tensor([1.0, rank])).tolist() == [world_size, sum(range(world_size))]
    return right


@pytest.mark.parametrize("world_size", [2, 3])
def test_transports_reduce_and_gather_alike(world_size):
    for right in on_ranks(world_size, _reduce_and_gather):
        assert len(right) == 3 * 6
        assert not [case for case, good in right.items() if not good]


def _two_channels(rank, world_size, transport):
    """Two communicators whose reductions and gathers are launched in the opposite order on the last rank."""
    comms = [made(transport, in_flight=2), made(transport, in_flight=2)]
    order = [1, 0] if rank == world_size - 1 else [0, 1]
    parts = [[[p] for p in bucket(rank, world_size, seed).chunk(world_size)] for seed in (0, 1)]
    flats = [torch.zeros(world_size * 40) for _ in comms]
    for i in (0, 1):
        flats[i].chunk(world_size)[rank].fill_(10 * i + rank)
    reductions: dict[int, object] = {}
    for i in order:
        reductions[i] = comms[i].reduce_scatter(parts[i])
    sums = [torch.empty(40), torch.empty(40)]
    for i in (0, 1):
        reductions[i].finish(sums[i], accumulate=False)
        reductions[i].release()
    waits = {i: comms[i].all_gather(flats[i]) for i in order}
    for i in (0, 1):
        waits[i]()
    return (
        len({comm.channel for comm in comms}),
        [torch.allclose(sums[i], expected(rank, world_size, i), rtol=0, atol=1e-6) for i in (0, 1)],
        [flats[i].tolist() == [10.0 * i + j // 40 for j in range(world_size * 40)] for i in (0, 1)],
    )


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_messages_of_two_communicators_on_one_group_do_not_cross(transport):
    for channels, sums, gathers in on_ranks(2, _two_channels, transport):
        assert channels == 2
        assert sums == [True, True]
        assert gathers == [True, True]


def _channels(rank, world_size):
    """Rank 1 has failed alone to construct something, so that it counts one channel more."""
    if rank == 1:
        from shardopt.engines.zero import transports

        name = dist.group.WORLD.group_name
        transports._next_channel[name] = transports._next_channel.get(name, 0) + 1
    channels = [made("sockets").channel for _ in range(2)]
    pair = dist.new_group([0, 1])
    return channels, communicator(pair, CPU).channel


def test_channels_are_the_same_on_every_rank():
    first, second = on_ranks(2, _channels)
    assert first == second
    assert first[0][0] < first[0][1]
    assert first[1] == 0


def _without_writing(rank, world_size):
    """A seccomp profile that allows process_vm_readv and forbids process_vm_writev."""
    real = ctypes.CDLL

    def refuse(*_):
        ctypes.set_errno(errno.EPERM)
        return -1

    class Libc:
        def __init__(self, *args, **kwargs):
            self.libc = real(*args, **kwargs)
            self.process_vm_writev = refuse

        def __getattr__(self, name):
            return getattr(self.libc, name)

    shared_memory._process_vm_readv.cache_clear()
    with mock.patch.object(ctypes, "CDLL", Libc):
        return _reduce_and_gather(rank, world_size)


def test_reading_memory_is_enough_where_writing_is_forbidden():
    for right in on_ranks(2, _without_writing):
        assert not [case for case, good in right.items() if not good]


def _reading_forbidden(rank, world_size):
    """Rank 1 may not read the others' memory."""

    def refuse(*_):
        ctypes.set_errno(errno.EPERM)
        return -1

    with mock.patch.object(shared_memory, "_process_vm_readv", return_value=refuse) if rank == 1 else mock.MagicMock():
        return communicator(dist.group.WORLD, CPU).name


def test_all_ranks_take_sockets_where_one_may_not_read_memory():
    assert on_ranks(2, _reading_forbidden) == ["sockets", "sockets"]


def _reused_pid(rank, world_size):
    """The PID of rank 1 now is that of a process (this one) whose memory looks like rank 1's at the same addresses."""
    comm = made("memory")
    if rank == 1:
        dist.barrier()
        return None
    mailbox, payload = comm._reductions, torch.full((4,), 7.0)
    table = (ctypes.c_int64 * 1)(payload.data_ptr())
    impostor = (ctypes.c_int64 * 4)(mailbox.peers[1].secret ^ 1, 1, ctypes.addressof(table), 1)
    before = list(impostor)
    mailbox.peers[1].pid, mailbox.peers[1].address = os.getpid(), ctypes.addressof(impostor)
    out, message = torch.zeros(4), ""
    try:
        comm.reduce_scatter([[torch.ones(4)], [torch.ones(4)]]).finish(out, accumulate=False)
    except PeerError as error:
        message = str(error)
    dist.barrier()
    return message, out.tolist(), list(impostor) == before


def test_process_with_reused_pid_is_neither_read_nor_written():
    message, out, untouched = on_ranks(2, _reused_pid)[0]
    assert message == "reading from rank 1 failed: its process has ended, and its PID is another's"
    assert out == [0.0] * 4
    assert untouched
