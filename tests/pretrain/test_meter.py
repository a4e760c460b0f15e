"""Seconds of a step's parts, utilisation and profiles."""

from __future__ import annotations

import errno
import gzip
import json
import os
import time
from typing import Any

import pytest
import torch

from shardopt.distributed import Ranks
from shardopt.errors import InputError
from shardopt.pretrain.meter import PARTS, Meter, StepClock
from shardopt.pretrain.profile import ProfileConfig
from tests.distributed.pool import on_ranks
from tests.pretrain import tiny


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    return clock


class Event:
    """A CUDA event on a device that is `done` up to some moment."""

    now, done = 0.0, 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def query(self) -> bool:
        return self.at <= Event.done

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.at - self.at)

    def synchronize(self) -> None:
        raise AssertionError("waits for the GPU")


def test_parts_of_a_step_are_what_lies_between_the_marks(now: list[float]) -> None:
    clock = StepClock(torch.device("cpu"))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    clock.watch_update(optimizer)
    optimizer.register_step_pre_hook(lambda *_: now.__setitem__(0, now[0] + 4))
    for part, seconds in (("forward_backward", 1), ("reduce_wait", 2), ("forward_backward", 10), ("gather_wait", 0.5)):
        clock.mark(part)
        now[0] += seconds
    optimizer.step()
    now[0] += 0.25
    clock.mark(None)
    now[0] += 1000  # an evaluation
    clock.mark("forward_backward")
    assert clock.read() == {"forward_backward": 11, "reduce_wait": 2, "update": 4, "gather_wait": 0.75}
    assert clock.read() == dict.fromkeys(PARTS, 0)


def test_parts_of_a_gpus_step_are_read_without_waiting_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = StepClock(torch.device("cuda"))
    for part in ("forward_backward", "reduce_wait", "update", None):
        clock.mark(part)
        Event.now += 2
    Event.done = 4
    assert clock.read() == {"forward_backward": 2, "reduce_wait": 2, "update": 0, "gather_wait": 0}
    Event.done = 6
    assert clock.read() == {"forward_backward": 0, "reduce_wait": 0, "update": 2, "gather_wait": 0}


def test_figures_are_means_over_steps_and_the_largest_of_the_ranks(now: list[float]) -> None:
    class Two(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value, value | {"data_wait": 3.0, "reduce_wait": 0.0}]

    meter = Meter(Two(0, 2, 0, torch.device("cpu"), distributed=False), flops=5e9, peak=1e12)
    for loss, waited in ((4.0, 0.5), (3.0, 1.0)):
        meter.begin()
        meter.clock.mark("reduce_wait")
        now[0] += 2
        meter.clock.mark(None)
        meter.end(loss, 0.1 * loss, 1000, waited)
        now[0] += 50
    figures = meter.read()
    assert figures["loss"] == 3.5
    assert figures["grad_norm"] == pytest.approx(0.3)
    assert figures["tokens_per_second"] == 500
    assert figures["step_time"] == 2
    assert figures["data_wait"] == 1.5
    assert figures["reduce_wait"] == 2
    assert figures["mfu"] == pytest.approx(500 * 5e9 / 2e12)
    assert meter.losses == []
    assert "mfu" not in _read(Meter(tiny.ALONE, 1.0, None), now)


def test_tokens_are_those_of_each_step_and_a_router_loss_is_a_mean_too(now: list[float]) -> None:
    meter = Meter(tiny.ALONE, 1.0, None)
    for tokens, router in ((100, 0.5), (500, 1.0)):
        meter.begin()
        now[0] += 3
        meter.end(2.0, 1.0, tokens, 0.0, router)
    figures = meter.read()
    assert (figures["tokens_per_second"], figures["router_loss"]) == (100, 0.75)
    assert "router_loss" not in _read(meter, now)


def _read(meter: Meter, now: list[float]) -> dict[str, float]:
    meter.begin()
    now[0] += 1
    meter.end(1.0, 1.0, 10, 0.0)
    return meter.read()


@pytest.mark.parametrize("engine", ["{name: fsdp}", "{name: zero, stage: 2}", "{name: ddp}"])
def test_parts_of_a_runs_steps_are_logged_and_every_rank_writes_its_trace(tmp_path, engine):
    tiny.corpus(tmp_path / "text")
    on_ranks(2, tiny.run, tmp_path, engine=engine, train__steps=6, profile__steps="2-3", tracking__log_every=3)
    for row in tiny.metrics(tmp_path, "tiny"):
        assert all(0 < row[part] <= row["step_time"] for part in (*PARTS, "data_wait"))
    for rank in range(2):
        path = tmp_path / "runs" / "tiny" / "profile" / f"rank-0000{rank}.trace.json.gz"
        trace = json.loads(gzip.decompress(path.read_bytes()))
        names = [event.get("name") for event in trace["traceEvents"]]
        assert sorted({name for name in names if str(name).startswith("step ")}) == ["step 2", "step 3"]
        (last,) = (event for event in trace["traceEvents"] if event.get("name") == "step 3")
        products = [event["ts"] for event in trace["traceEvents"] if event.get("name") == "aten::mm"]
        assert products
        assert max(products) < last["ts"] + last["dur"]  # nothing of the steps after it


def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path, capsys, monkeypatch):
    def full(self, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tiny.corpus(tmp_path / "text")
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full)
    result = tiny.run(0, 1, tmp_path, engine="{name: single}", train__steps=3, profile__steps="3-9")
    assert result.status == "finished"
    assert "cannot be written: [Errno 28] No space left on device" in " ".join(capsys.readouterr().out.split())


def test_steps_that_make_no_sense_are_refused():
    assert ProfileConfig(steps="10-12").range == (10, 12)
    assert ProfileConfig(steps=7).range == (7, 7)
    for steps in ("12-10", "0-3", "ten", "3-", "-3", 0, "1-2-3"):
        with pytest.raises((InputError, ValueError), match="must be a step or two, as 10-12"):
            ProfileConfig(steps=steps)
