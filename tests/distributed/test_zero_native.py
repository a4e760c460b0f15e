"""ZeRO by a backend's own collectives: NCCL's path, forced on gloo and on torch's fake group."""

from __future__ import annotations

import contextlib
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardopt import AdEMAMix, ZeroOptimizer
from shardopt.engines import gradient_hooks
from shardopt.engines.zero import PeerError, transports
from shardopt.engines.zero.buckets import bucket_bytes
from shardopt.engines.zero.transports.backends import NativeCommunicator
from tests.allocations import peak_of_cpu_memory
from tests.distributed.pool import on_ranks
from tests.distributed.test_transports import only
from tests.distributed.test_zero import ADEMAMIX, SMALL_BUCKETS, compare, train_ddp, train_zero, weights

TINY_PIECES = 0.003  # MiB: matrices of the model are larger, and end in the middle of a part


def _runs(rank, world_size):
    """Differences from DDP by stage, micro-batches and bucket size, and from our exchange with bf16 on the wire."""
    differences = {}
    for stage, micros, size in ((1, 1, SMALL_BUCKETS), (2, 1, TINY_PIECES), (1, 2, TINY_PIECES), (2, 2, SMALL_BUCKETS)):
        with only("native"):
            ours = train_zero(rank, AdEMAMix, ADEMAMIX, 4, micros, 0.5, stage=stage, bucket_mb=size)
        theirs = train_ddp(rank, AdEMAMix, ADEMAMIX, 4, micros, 0.5)
        differences[stage, micros, size] = compare(ours, theirs)[0]
    for size in (SMALL_BUCKETS, TINY_PIECES):
        narrow = {"bucket_mb": size, "reduce_dtype": "bf16"}
        with only("native"):
            ours = train_zero(rank, AdEMAMix, ADEMAMIX, 4, 1, **narrow)
        theirs = train_zero(rank, AdEMAMix, ADEMAMIX, 4, 1, **narrow)
        differences["bf16", size] = compare(ours, theirs)[0]
    return differences


@pytest.mark.parametrize("world_size", [2, 3])
def test_numbers_are_those_of_ddp_and_of_our_exchange(world_size):
    for differences in on_ranks(world_size, _runs):
        assert len(differences) == 6
        assert max(differences.values()) < 2e-6, differences


def _uneven(rank, world_size):
    """Errors of gradients: many buckets of two parameters, one of which rank 1 does not use, and a large one."""
    shapes = [(16, 16)] * 24 + [(1001, 3)]
    model = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)
    expected = [torch.arange(p.numel()).view(p.shape) * 1e-3 + i for i, p in enumerate(model)]
    with only("native"):
        optimizer = ZeroOptimizer(model, torch.optim.SGD, lr=1.0, bucket_mb=2 * 2 * 1024 / 2**20)
    with optimizer.accumulate():
        used = list(zip(model, expected, strict=True))[1 if rank == 1 else 0 :]
        torch.stack([(p * e).sum() for p, e in used]).sum().backward()
    optimizer.step()
    expected[0] = expected[0] * (world_size - 1) / world_size
    return [(p + e).abs().max().item() for p, e in zip(model, expected, strict=True)], len(optimizer.buckets)


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_lie_where_they_belong_and_missing_ones_are_zero(world_size):
    for errors, buckets in on_ranks(world_size, _uneven):
        assert buckets == 13
        assert max(errors) < 1e-5


class Noting(gradient_hooks.GradientHook):
    def __init__(self):
        self.seen = []

    def before_reduce(self, bucket, flat):
        self.seen.append((bucket, flat.dtype))


def _hooked(rank, world_size):
    hook, layers = Noting(), [nn.Linear(40, 40, bias=False) for _ in range(4)]
    model, plain = nn.Sequential(*layers), nn.Sequential(*[nn.Linear(40, 40, bias=False) for _ in range(4)])
    plain.load_state_dict(model.state_dict())
    with only("native"):
        optimizers = [
            ZeroOptimizer(m, torch.optim.SGD, lr=0.1, bucket_mb=TINY_PIECES, reduce_dtype="bf16")
            for m in (model, plain)
        ]
    gradient_hooks.attach(hook, optimizers[0])
    for m, optimizer in zip((model, plain), optimizers, strict=True):
        for _ in range(2):
            m(torch.ones(2, 40) * (rank + 1)).square().sum().backward()
            optimizer.step()
        optimizer.close()
    return hook.seen, all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_hook_sees_large_parameters_whole_and_in_fp32():
    for seen, equal in on_ranks(2, _hooked):
        assert seen == [(i, torch.float32) for i in range(4)] * 2
        assert equal


def _two_backwards(rank, world_size):
    """The gradient of a bucket of two layers, one of which gets its own in two backwards of one micro-batch."""
    first, second = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    with only("native"):
        optimizer = ZeroOptimizer(nn.ModuleList([first, second]), torch.optim.SGD, lr=1.0)
    x = torch.arange(4.0) + rank
    with optimizer.accumulate():
        second(x).sum().backward()
        (first(x).sum() + 3 * second(x).sum()).backward()  # the last one comes first
    before = weights(nn.ModuleList([first, second]))
    optimizer.step()
    after = weights(nn.ModuleList([first, second]))
    return [(before[name] - after[name])[0].tolist() for name in before]


def test_two_backwards_of_a_micro_batch_are_added_in_the_buckets_tensor():
    mean = torch.arange(4.0) + 0.5
    for first, second in on_ranks(2, _two_backwards):
        assert torch.allclose(torch.tensor(first), mean, atol=1e-5)
        assert torch.allclose(torch.tensor(second), 4 * mean, atol=1e-5)


@pytest.fixture
def fake_group():
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("reduce_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("size", "layers", "extra"), [(256, 32, 0), (1024, 6, 4)])
def test_two_buckets_are_held_and_several_reductions_in_flight(fake_group, size, layers, extra, reduce_dtype):
    """By the profiler's account, in units of `bucket_mb`; layers of 4 MiB are larger than a bucket, and held whole."""
    model = nn.Sequential(*[nn.Linear(size, size, bias=False) for _ in range(layers)])
    with mock.patch.multiple(transports, all_gather_objects=lambda value, *_: [value], _next_channel={}):
        optimizer = ZeroOptimizer(model, AdEMAMix, bucket_mb=1, reduce_dtype=reduce_dtype)
    assert optimizer.transport == "native"
    flying, reducer = [], optimizer.reducer
    send = reducer._send

    def counted(*args):
        send(*args)
        flying.append(len(reducer._flying))

    loss = model(torch.ones(1, size)).sum()
    with (
        mock.patch.object(reducer, "_send", counted),
        peak_of_cpu_memory() as peak,
        optimizer.accumulate(),
    ):
        loss.backward()
    assert max(flying) >= 2
    optimizer.close()
    # As torch's sum does on the CPU.
    widened = 0 if reduce_dtype == "fp32" else reducer.piece_bytes * (2 if extra else 1)
    assert 2**20 < peak.nbytes <= (2 + extra) * 2**20 + widened + 2**18  # activations
    assert reducer.peak_bytes <= 2 * 2**20


def test_parts_on_the_wire_do_not_become_short_with_the_number_of_ranks():
    assert bucket_bytes(None, 2, 8, 0.5) == bucket_bytes(None, 2, 64, 1.0) == 25 * 2**20
    assert bucket_bytes(None, 4, 8, 0.5) == 12.5 * 2**20
    for depth in (2, 4):
        assert bucket_bytes(None, depth, 1024, 1.0) / 1024 == 64 * 1024
        assert bucket_bytes(None, depth, 1024, 0.5) / 1024 * 0.5 == 64 * 1024
    assert bucket_bytes(3, 4, 1024, 0.5) == 1.5 * 2**20


def _replicas(rank, world_size, native):
    """All-reduces over replicas by where they started, and whether weights are those of one process."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    alone = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    alone.load_state_dict(model.state_dict())
    with only("native") if native else contextlib.nullcontext():
        optimizer = ZeroOptimizer(model, torch.optim.SGD, lr=0.1, bucket_mb=0.02, process_group=mesh)
    reference = torch.optim.SGD(alone.parameters(), lr=0.1)
    started, real, where = [], dist.all_reduce, ["outside"]

    def all_reduce(values, *args, **kwargs):
        started.append((where[0], values.dtype))
        return real(values, *args, **kwargs)

    for lasts in ((False, True), (True,), (True, True), (True, False)):
        started.clear()
        with mock.patch.object(dist, "all_reduce", all_reduce):
            for micro, last in enumerate(lasts):
                with optimizer.accumulate(last):
                    x = torch.ones(2, 64) * (1 + rank + micro)
                    where[0] = "backward"
                    model(x).square().mean().backward()
                    where[0] = "outside"
            in_backward = sum(where == "backward" for where, dtype in started if dtype == torch.float32)
            optimizer.step()
        counts = in_backward, sum(dtype == torch.float32 for _, dtype in started)
        for r in range(world_size):
            for micro in range(len(lasts)):
                (alone(torch.ones(2, 64) * (1 + r + micro)).square().mean() / world_size).backward()
        reference.step()
        reference.zero_grad()
        if lasts == (False, True):
            first = counts
    close = [torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), alone.parameters(), strict=True)]
    return first, len(optimizer.buckets), all(close)


@pytest.mark.parametrize("native", [False, True])
def test_sums_over_replicas_start_in_the_last_backward_and_whatever_follows_is_right(native):
    for (in_backward, all_reduces), buckets, close in on_ranks(4, _replicas, native):
        assert buckets >= 6
        assert all_reduces == buckets  # and not one for each micro-batch
        assert in_backward >= buckets - 4
        assert close


def _late_peer(rank, world_size):
    comm = NativeCommunicator(dist.group.WORLD, timedelta(seconds=0.5), in_stream=True)
    if rank == 1:
        time.sleep(1.5)
    begun = time.monotonic()
    message = ""
    try:
        comm.sum(torch.ones(2))
    except PeerError as error:
        message = str(error)
    dist.barrier()
    return message, time.monotonic() - begun


def test_agreement_on_a_device_times_out_by_itself():
    (message, seconds), (other, _) = on_ranks(2, _late_peer, fresh=True)
    assert message == "the agreement on gradients failed: timed out after 0:00:00.500000"
    assert seconds >= 0.5
    assert other == ""


def test_wait_on_a_device_gives_no_timeout_that_would_block_the_processor():
    work = mock.Mock()
    NativeCommunicator(None, timedelta(seconds=5), in_stream=True).wait(work, "the reduce-scatter")
    work.wait.assert_called_once_with()
    NativeCommunicator(None, timedelta(seconds=5)).wait(work, "the reduce-scatter")
    work.wait.assert_called_with(timedelta(seconds=5))
