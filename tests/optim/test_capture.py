"""A step of AdEMAMix as the device sees it, on a stand-in for a GPU: its copies and launches, eager and captured."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import shardopt
from shardopt.errors import InputError
from shardopt.optim.kernels import triton as kernel
from tests.fake_cuda import FakeCuda, NotCapturable, Race

if kernel._INTERPRETED:
    pytest.skip("the interpreter's kernel is for the CPU: unset TRITON_INTERPRET", allow_module_level=True)


class Launches:
    """In place of a compiled kernel: takes note of a launch, and reads and writes its tensors on the stream."""

    def __init__(self, name: str, made: list[tuple[str, int]]) -> None:
        self.name, self.made = name, made

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, **_: Any) -> None:
            self.made.append((self.name, grid[0]))
            for tensor in arguments:
                if isinstance(tensor, torch.Tensor):
                    tensor.add_(0)

        return launch


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in, the launches that were made, and what captured graphs keep."""
    made: list[tuple[str, int]] = []
    for name in ("_step_kernel", "_scalars_kernel"):
        monkeypatch.setattr(kernel, name, Launches(name, made))
    monkeypatch.setattr(kernel, "_captured", [])
    with FakeCuda() as device:
        yield SimpleNamespace(device=device, made=made)


def optimizer_of(**options: Any) -> shardopt.AdEMAMix:
    """Over a weight of two programs and one of a part, with gradients, on the stand-in."""
    params = [torch.nn.Parameter(torch.ones(n, device="cuda")) for n in (1500, 7)]
    for param in params:
        param.grad = torch.ones_like(param)
    lr = torch.tensor(1e-3, device="cuda")
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    return shardopt.AdEMAMix(named, **({"lr": lr, "kernel": "triton", "capturable": True} | options))


def step_captured(gpu: Any, optimizer: shardopt.AdEMAMix) -> None:
    gpu.device.capturing = True
    try:
        optimizer.step()
    finally:
        gpu.device.capturing = False


@pytest.mark.parametrize("options", [{}, {"state_dtype": "block8", "weight_ema": 0.9, "alpha_warmup": 3}], ids=str)
def test_a_captured_step_waits_for_nothing_and_keeps_what_it_reads(gpu: Any, options: dict[str, Any]) -> None:
    optimizer = optimizer_of(**options)
    for _ in range(3):
        optimizer.step()
    gpu.made.clear()
    step_captured(gpu, optimizer)
    programs = -(-1500 // kernel._BLOCK) + 1
    # as replays have it: nothing else is launched
    assert gpu.made == [("_scalars_kernel", 1), ("_step_kernel", programs)]
    optimizer.step()  # what the graph reads is left alone
    assert [int(state["step"]) for state in optimizer.state.values()] == [5, 5]
    params = optimizer.param_groups[0]["params"], optimizer.param_groups[0]["lr"], dict(optimizer.state)
    del optimizer
    gc.collect()
    gpu.device.sweep()
    assert params


def test_eager_steps_do_not_wait_for_the_device(gpu: Any) -> None:
    with mock.patch.object(FakeCuda, "host_waits", side_effect=AssertionError("waited")):
        for capturable in (False, True):
            optimizer = optimizer_of(capturable=capturable, lr=1e-3, state_dtype="bf16")
            for _ in range(3):
                optimizer.step()


def test_a_capture_without_a_step_before_is_refused(gpu: Any) -> None:
    optimizer = optimizer_of()
    optimizer.init_state()
    with pytest.raises(InputError, match="needs memory from a step before: take one, then capture"):
        step_captured(gpu, optimizer)
    assert [int(state["step"]) for state in optimizer.state.values()] == [0, 0]
    optimizer.step()
    step_captured(gpu, optimizer)


def test_scalars_of_the_host_are_refused_in_a_capture(gpu: Any) -> None:
    for options, message in (
        ({"capturable": False, "lr": 1e-3}, "needs capturable=True: the step would stand still"),
        ({"lr": torch.tensor(1e-3)}, r"a CUDA graph reads lr on cuda:0: move lr there"),
    ):
        optimizer = optimizer_of(**options)
        optimizer.step()
        with pytest.raises(InputError, match=message):
            step_captured(gpu, optimizer)


def test_a_count_that_the_host_reads_is_found_in_a_capture(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = optimizer_of()
    optimizer.step()
    monkeypatch.setattr(torch, "_foreach_add_", lambda counts, by: [c.add_(by).item() for c in counts])
    with pytest.raises(NotCapturable, match="the host waits for the device"):
        step_captured(gpu, optimizer)


def test_a_graphs_memory_that_nobody_keeps_is_found(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_captured", SimpleNamespace(append=lambda kept: None))
    optimizer = optimizer_of()
    optimizer.step()
    with pytest.raises(Race, match=r"pinned .*, which a graph reads, is gone"):
        step_captured(gpu, optimizer)


def test_pinned_memory_that_is_written_before_its_copy_is_done_is_found(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, kept = kernel._pinned, {}
    monkeypatch.setattr(kernel, "_pinned", lambda words, device: kept.setdefault(words, made(words, device)))
    optimizer = optimizer_of(capturable=False, lr=1e-3)
    optimizer.step()
    with pytest.raises(Race, match=r"pinned .*, read by default stream, is written by host in no order"):
        optimizer.step()
