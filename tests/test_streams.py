"""What runs on streams, on a stand-in for a GPU that keeps their order: nothing is read before it is there."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardopt import ZeroOptimizer
from shardopt.checkpoint.staging import Staging
from shardopt.distributed import Ranks
from shardopt.engines.compile import compile_forward
from shardopt.engines.zero import optimizer as zero
from shardopt.engines.zero.transports import backends
from shardopt.errors import InputError
from shardopt.pretrain.data.prefetch import Batches
from tests.fake_cuda import CUDA, FakeCuda, NotCapturable, Race, Stream, Work, collective


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with FakeCuda() as device:
        yield device


# -- the stand-in itself ------------------------------------------------------------------------------------------


def test_tensors_say_where_they_are_and_compute_there(gpu: FakeCuda) -> None:
    x = torch.ones(3, device="cuda")
    assert x.is_cuda
    assert (x + 1).device == CUDA
    assert not x.cpu().is_cuda
    assert (x + 1).tolist() == [2.0, 2.0, 2.0]
    assert torch.ones(2).pin_memory().is_pinned()


def test_a_read_that_nothing_puts_after_the_write_is_a_race(gpu: FakeCuda) -> None:
    x, side = torch.ones(3, device="cuda"), Stream()
    with gpu.stream(side), pytest.raises(Race, match=r"written by default stream, is read by stream 2 in no order"):
        x.sum()
    side.wait_stream(gpu.current)
    with gpu.stream(side):
        y = x * 2
        done = side.record_event()
    gpu.current.wait_event(done)
    assert y.sum().item() == 6


def test_memory_that_another_stream_reads_is_not_given_back(gpu: FakeCuda) -> None:
    side = Stream()
    for keeps in (True, False):
        x = torch.ones(3, device="cuda")
        side.wait_stream(gpu.current)
        with gpu.stream(side):
            y = x + 1
        if keeps:
            x.record_stream(side)
        del x
        if keeps:
            gpu.sweep()
        else:
            with pytest.raises(Race, match="is freed to default stream while stream 2 may still use it"):
                gpu.sweep()
        assert y.is_cuda


def test_what_a_graph_may_not_hold_is_refused_while_it_is_captured(gpu: FakeCuda) -> None:
    x = torch.ones(3, device="cuda")
    gpu.capturing = True
    y = x * 2
    for act in (y.sum().item, y.cpu, y.tolist, torch.cuda.synchronize, lambda: float(y[0]), torch.ones(2).pin_memory):
        with pytest.raises(NotCapturable):
            act()
    with pytest.raises(NotCapturable):
        y.copy_(torch.ones(3))


# -- batches and checkpoints ----------------------------------------------------------------------------------------


def read_ahead() -> None:
    data: Any = SimpleNamespace(
        batch=lambda step, *_: torch.full((2, 5), step, dtype=torch.int64),
        state_dict=lambda step: {},
        stages=SimpleNamespace(at=lambda step: SimpleNamespace(global_batch=2)),
    )
    batches = Batches(data, Ranks(0, 1, 0, CUDA, distributed=False), ahead=0)
    for step in range(3):
        tokens = batches.batch(step)
        assert tokens.is_cuda
        seen = tokens.float().mean()
        del tokens
    assert seen.item() == 2


def test_a_batch_is_read_after_its_copy_and_kept_until_it_is_read(gpu: FakeCuda) -> None:
    read_ahead()


def test_a_batch_whose_copy_is_not_waited_for_is_a_race(gpu: FakeCuda) -> None:
    with mock.patch.object(Stream, "wait_event"), pytest.raises(Race, match="written by stream 2"):
        read_ahead()


def test_a_batch_that_is_freed_to_the_copying_stream_is_a_race(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCuda, "record", lambda *_: None)  # a mock would keep the batch
    with pytest.raises(Race, match="is freed to stream 2 while default stream may still use it"):
        read_ahead()


def staged(gpu: FakeCuda) -> None:
    staging, source = Staging(), torch.ones(8, device="cuda")
    for _ in range(2):
        source.add_(1)
        buffer = staging.copy([source, source * 2])
        assert buffer.is_pinned()
        gpu.host_reads(buffer)
        source.zero_()


def test_a_saves_copy_is_written_after_it_has_arrived(gpu: FakeCuda) -> None:
    staged(gpu)


def test_a_saves_copy_that_is_not_waited_for_is_a_race(gpu: FakeCuda) -> None:
    with (
        mock.patch.object(torch.cuda, "synchronize"),
        pytest.raises(Race, match=r"pinned .* written by default stream, is read by host"),
    ):
        staged(gpu)


# -- ZeRO over NCCL ---------------------------------------------------------------------------------------------------


def reduce_scatter(gpu: FakeCuda, out: torch.Tensor, flat: torch.Tensor, **_: Any) -> Any:
    return collective(gpu, lambda: out.copy_(flat.view(-1)[: out.numel()]), out, flat)


def all_gather(gpu: FakeCuda, flat: torch.Tensor, own: torch.Tensor, **_: Any) -> Any:
    return collective(gpu, lambda: flat.view(-1)[: own.numel()].copy_(own), flat, own)


def all_reduce(gpu: FakeCuda, values: torch.Tensor, *_: Any, async_op: bool = False, **__: Any) -> Any:
    work = collective(gpu, lambda: values.mul_(1), values)
    if not async_op:
        work.wait()
    return work


@pytest.fixture
def nccl(gpu: FakeCuda) -> Iterator[FakeCuda]:
    """A group of one rank, whose collectives run on a stream of their own."""
    with torch._C.DisableTorchFunction():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def native(group: Any, device: Any, timeout: Any = None, **_: Any) -> Any:
        return backends.NativeCommunicator(group if group is not None else dist.group.WORLD, timeout, in_stream=True)

    try:
        with (
            mock.patch.object(zero, "communicator", native),
            mock.patch.object(backends, "_reduce_scatter", lambda *a, **k: reduce_scatter(gpu, *a, **k)),
            mock.patch.object(backends, "_all_gather", lambda *a, **k: all_gather(gpu, *a, **k)),
            mock.patch.object(dist, "all_to_all_single", lambda *a, **k: reduce_scatter(gpu, *a, **k)),
            mock.patch.object(dist, "all_reduce", lambda *a, **k: all_reduce(gpu, *a, **k)),
        ):
            yield gpu
    finally:
        dist.destroy_process_group()


def zero_steps(dtype: torch.dtype = torch.float32, **options: Any) -> list[torch.Tensor]:
    """Weights after three steps of two micro-batches, of ZeRO on the stand-in; one bucket per layer, one in pieces."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1)).to(dtype).cuda()
    optimizer = ZeroOptimizer(model, torch.optim.SGD, bucket_mb=0.002, lr=0.1, **options)
    x = torch.linspace(-1, 1, 32, device="cuda", dtype=dtype).view(4, 8)
    for _ in range(3):
        for last in (False, True):
            with optimizer.accumulate(last):
                (model(x).square().mean() / 2).backward()
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()
    optimizer.wait()
    weights = [p.detach().cpu() for p in model.parameters()]
    optimizer.close()
    return weights


def plain_steps() -> list[torch.Tensor]:
    """The same by torch alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.linspace(-1, 1, 32).view(4, 8)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


VARIANTS: list[dict[str, Any]] = [
    {"stage": 1},
    {"stage": 2},
    {"stage": 2, "reduce_dtype": "bf16"},
    {"stage": 2, "dtype": torch.bfloat16},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_zeros_collectives_and_its_kernels_are_in_order(nccl: FakeCuda, options: dict[str, Any]) -> None:
    waits = FakeCuda.host_waits
    with mock.patch.object(FakeCuda, "host_waits", autospec=True, side_effect=waits) as waited:
        weights = zero_steps(**options)
    assert waited.call_count == 3 + 2 * len(weights)  # once a step, and for each weight on its way there and back
    if options in VARIANTS[:2]:
        torch.testing.assert_close(weights, plain_steps())
    assert all(w.isfinite().all() for w in weights)
    assert nccl.clocks["nccl"]["nccl"] > 20  # there was something to order


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("what", ["the reduce-scatter", "the all-gather"])
def test_a_collective_of_zeros_that_is_not_waited_for_is_a_race(
    nccl: FakeCuda, options: dict[str, Any], what: str
) -> None:
    wait = backends.NativeCommunicator.wait

    def left_out(self: Any, work: Any, now: str) -> None:
        if now != what:
            wait(self, work, now)

    with mock.patch.object(backends.NativeCommunicator, "wait", left_out), pytest.raises(Race, match="nccl"):
        zero_steps(**options)


def test_zeros_agreement_waits_for_its_sum_in_the_stream(nccl: FakeCuda) -> None:
    comm = backends.NativeCommunicator(dist.group.WORLD, in_stream=True)
    comm.size = 2
    values = torch.ones(3, device="cuda")
    assert comm.sum(values).tolist() == [1, 1, 1]
    with mock.patch.object(Work, "wait"), pytest.raises(Race, match="written by nccl"):
        comm.sum(values).tolist()


def test_compiling_on_a_gpu_asks_for_triton(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2).cuda()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"train\.compile: torch\.compile needs the package triton: install it"):
        compile_forward("model", model, [], None)


def test_the_checks_for_a_gpu_run_on_the_stand_in(nccl: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """scripts/gpu_check.py has minutes on a machine that is lent: what it calls exists, and what it compares agrees."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    zero_checks, parts = importlib.import_module("gpu_zero"), importlib.import_module("gpu_parts")
    monkeypatch.setitem(zero_checks.OPTIONS, "kernel", "torch")  # Triton's needs a driver
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    rows = [zero_checks._hooks("zero"), parts.staged()]
    assert [row for row in rows if not row[1]] == []
