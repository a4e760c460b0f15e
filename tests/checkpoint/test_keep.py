"""What is not finite is not saved, and what is known to be good is not deleted."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from shardopt import checkpoint
from shardopt.checkpoint import Keep, Saver, folders, saving
from shardopt.checkpoint.finite import not_finite
from shardopt.errors import InputError, NonFiniteError, StorageError
from shardopt.optim import precision, states
from shardopt.slices import Layout, Range, Slice
from tests.checkpoint import made
from tests.distributed.pool import on_ranks


def _held(kind: str, *values: float, dtype: torch.dtype = torch.float32) -> Slice:
    return Slice("w", kind, Layout.whole("w", (len(values),)), (torch.tensor(values).to(dtype),))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_values_that_are_not_finite_are_counted_by_slice(bad: float, dtype: torch.dtype) -> None:
    slices = [_held("weight", 1, bad, 3, bad, dtype=dtype), _held("m1", 1, 2, dtype=dtype)]
    assert not_finite(slices) == ["w/weight (2 values that are not finite)"]
    assert not_finite([_held("m1", math.inf, -math.inf), _held("buffer", -math.inf)]) == [
        "w/m1 (2 values that are not finite)"
    ]


def test_large_values_gaps_and_integers_are_finite() -> None:
    largest = torch.finfo(torch.float32).max
    gap = Layout("w", (2,), (Range(0, 0, 1), Range(1, 2, 1)))
    slices = [
        _held("weight", largest, largest, largest),
        Slice("w", "m1", gap, (torch.tensor([1.0, math.nan, 2.0]),)),
        Slice("w", "m2", Layout("w", (2,), ()), (torch.tensor([math.nan]),)),
        _held("master_low", 1, 2, dtype=torch.int16),
    ]
    assert not_finite(slices) == []
    assert not_finite([]) == []


@pytest.mark.parametrize("fmt", precision.BLOCK_FORMATS)
def test_a_block_with_a_value_that_is_not_finite_is_found(fmt: str) -> None:
    values = torch.ones(3 * precision.BLOCK)
    codes = torch.zeros(values.numel(), dtype=precision.FORMATS[fmt].dtype(torch.float32))
    s = Slice("w", "m2", Layout.whole("w", values.shape), (codes, torch.zeros(3)), fmt)
    states.write_slice(s, values)
    assert not_finite([s]) == []
    values[precision.BLOCK + 5] = math.inf
    states.write_slice(s, values)
    assert not_finite([s]) == ["w/m2 (1 blocks with values that are not finite)"]


def _poisoned_on_one(rank: int, world_size: int, root: Path, asynchronous: bool) -> list[str]:
    saver = Saver(root, 1, ranks=made.ranks_here(rank, world_size), asynchronous=asynchronous)
    tensor = torch.ones(2)
    held = [Slice("w", "m1", Layout.contiguous("w", (4,), 2 * rank, 2), (tensor,))]
    saver.save(1, made.State(held, saver.ranks))
    if rank == 1:
        tensor[1] = math.inf
    with pytest.raises(NonFiniteError) as caught:
        saver.save(2, made.State(held, saver.ranks))
    tensor.fill_(1)
    saver.save(3, made.State(held, saver.ranks))
    saver.close()
    return [str(caught.value)]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_value_that_is_not_finite_on_one_rank_is_refused_by_all(tmp_path: Path, asynchronous: bool) -> None:
    first, second = on_ranks(2, _poisoned_on_one, tmp_path, asynchronous)
    assert first == second
    assert "step-00000002 is not written: w/m1 (1 values that are not finite)" in first[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def _facts(*checkpoints: tuple[int, float | None, float, bool]) -> dict[int, dict[str, Any]]:
    return {s: {"loss": loss, "time": 60 * m, "after_finite_step": f} for s, loss, m, f in checkpoints}


# step, loss, minute, whether a step since the one before was finite
RUN = _facts(
    (10, 3.0, 0, True), (20, 1.0, 10, True), (30, 2.0, 20, True), (40, 1.0, 61, True), (50, None, 70, True),
    (60, 2.5, 125, True),
)  # fmt: skip


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (Keep(1), {50, 60}),  # the one before is the newest that is known to be good
        (Keep(3), {40, 50, 60}),
        (Keep(9), {10, 20, 30, 40, 50, 60}),
        (Keep(1, every=30), {30, 50, 60}),
        (Keep(1, hours=1), {10, 40, 50, 60}),
        (Keep(1, hours=0.25), {10, 30, 40, 50, 60}),
        (Keep(1, best=1), {40, 50, 60}),  # of equals the newer
        (Keep(1, best=2), {20, 40, 50, 60}),
        (Keep(1, best=9), {10, 20, 30, 40, 50, 60}),
        (Keep(2, every=20, hours=2, best=1), {10, 20, 40, 50, 60}),
    ],
    ids=str,
)
def test_keep_rules(keep: Keep, kept: set[int]) -> None:
    assert keep.kept(RUN) == kept


def test_the_last_that_a_finite_step_followed_stays_whatever_comes_after() -> None:
    run = _facts((10, None, 0, True), (20, None, 0, True), (30, None, 0, False), (40, None, 0, False))
    assert Keep(1).kept(run) == {10, 40}
    assert Keep(1).kept({}) == set()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"last": 0}, "checkpoint.keep must be at least 1, got 0"),
        ({"every": 0}, "checkpoint.keep_every must be at least 1 (or null), got 0"),
        ({"hours": 0.0}, "checkpoint.keep_hours must be more than 0 (or null), got 0.0"),
        ({"best": -1}, "checkpoint.keep_best must be at least 0, got -1"),
    ],
)
def test_rules_that_make_no_sense_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        Keep(**arguments)
    assert str(caught.value) == said


@pytest.mark.parametrize("keep", [1.5, "3", None])
def test_keep_is_a_number_or_rules(tmp_path: Path, keep: Any) -> None:
    with pytest.raises(InputError, match=r"keep must be a number of checkpoints or a checkpoint\.Keep, got"):
        Saver(tmp_path, keep, ranks=made.ranks_here(), asynchronous=False)


@pytest.mark.parametrize("step", [-1, 1.0, "1"])
def test_step_is_a_whole_number(tmp_path: Path, step: Any) -> None:
    with pytest.raises(InputError, match="step must be a whole number >= 0, got"):
        Saver(tmp_path, 1, ranks=made.ranks_here(), asynchronous=False).save(step, _state(1))
    assert list(tmp_path.iterdir()) == []


def _state(step: int) -> made.State:
    return made.State([_held("m1", step)], made.ranks_here())


def test_a_run_keeps_its_best_and_its_milestones_over_restarts(tmp_path: Path) -> None:
    losses = {1: 2.0, 2: 1.0, 3: math.nan, 4: 3.0, 5: 4.0, 6: None}
    for steps in ((1, 2, 3), (4, 5, 6)):
        saver = Saver(tmp_path, Keep(1, every=4, best=1), ranks=made.ranks_here(), asynchronous=True)
        for step in steps:
            saver.save(step, _state(step), loss=losses[step], after_finite_step=step != 6)
        saver.close()
    # 4 is a multiple, and the newest that is known to be good: no finite step came after 5.
    assert sorted(folders.step_folders(tmp_path)) == [2, 4, 6]


def test_good_are_those_that_a_finite_step_came_after(tmp_path: Path) -> None:
    saver = Saver(tmp_path, Keep(9), ranks=made.ranks_here(), asynchronous=True)
    assert saver.good() == []
    for step, finite in ((1, True), (2, True), (3, False), (4, False), (5, True), (6, True)):
        saver.save(step, _state(step), after_finite_step=finite)
    saver.wait()
    assert [folder.name[-1] for folder in saver.good(after_finite_step=False)] == ["5", "4", "1"]
    assert [folder.name[-1] for folder in saver.good(after_finite_step=True)] == ["6", "5", "4", "1"]
    saver.close()


@pytest.mark.parametrize("told", ["at once", "by a wait", "by the next save"])
def test_finite_steps_are_counted_from_the_last_save_that_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    real = saving.write_document

    def full(folder: Path, document: dict[str, Any]) -> None:
        if document["checkpoint"]["name"] == "step-00000002":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(folder, document)

    monkeypatch.setattr(saving, "write_document", full)
    saver = Saver(tmp_path, Keep(9), ranks=made.ranks_here(), asynchronous=told != "at once")
    saver.save(1, _state(1), after_finite_step=True)

    def fail() -> None:
        saver.save(2, _state(2), after_finite_step=told != "by the next save")
        if told == "by the next save":
            saver.save(3, _state(3), after_finite_step=True)
        saver.wait()

    with pytest.raises(StorageError, match="No space left on device"):
        fail()
    for step in (3, 4):
        saver.save(step, _state(step), after_finite_step=False)
    saver.close()
    complete = {f.name: checkpoint.read_document(f)["checkpoint"] for f in folders.complete_steps(tmp_path)}
    finite = {name: facts["after_finite_step"] for name, facts in complete.items()}
    assert finite == {"step-00000004": False, "step-00000003": True, "step-00000001": True}
