"""A save or a load at the wrong moment, or with other arguments on each rank, is an error or says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shardopt import AdEMAMix, checkpoint
from shardopt.checkpoint import Saver
from shardopt.engines.state import ModuleState
from shardopt.errors import InputError
from tests.checkpoint import made
from tests.distributed.pool import on_ranks


def _trained() -> ModuleState:
    model = torch.nn.Linear(3, 2)
    return ModuleState(AdEMAMix(model.named_parameters(), lr=1e-3), model)


def test_a_saver_has_defaults_and_is_closed_once_and_for_all(tmp_path: Path) -> None:
    saver, state = Saver(tmp_path), _trained()
    for step in range(1, 6):
        saver.save(step, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{step}" for step in (3, 4, 5)]
    saver.close()
    with pytest.raises(RuntimeError, match=r"the Saver of .* is closed"):
        saver.save(6, state)


@pytest.mark.parametrize("first", ["init", "save", "load"])
def test_state_that_is_made_in_inference_mode_can_be_trained_on(tmp_path: Path, first: str) -> None:
    checkpoint.save(tmp_path / "a", _trained())
    state = _trained()
    with torch.inference_mode():
        if first == "init":
            state.init()
        elif first == "save":
            checkpoint.save(tmp_path / "b", state)
        else:
            checkpoint.load(tmp_path / "a", state)
    held = [value for values in state.optimizer.state.values() for value in values.values()]
    assert not any(value.is_inference() for value in held if isinstance(value, torch.Tensor))
    state.model(torch.ones(1, 3)).sum().backward()
    state.optimizer.step()


def _different(rank: int, world_size: int, root: Path) -> list[str]:
    ranks = made.ranks_here(rank, world_size)
    state = made.State(made.slices(made.rows, rank, world_size), ranks)
    for name in ("same-0", "same-1"):
        checkpoint.save(root / name, state, allow_nonfinite=True)
    saver = Saver(root / "saver", ranks=ranks, allow_nonfinite=True)
    attempts: list[Any] = [
        lambda: checkpoint.save(root / f"new-{rank}", state, allow_nonfinite=True),
        lambda: saver.save(rank, state),
        lambda: checkpoint.load(root / f"same-{rank}", state),
        lambda: checkpoint.save("memory://misuse/a", state, allow_nonfinite=True),
        lambda: checkpoint.load("memory://misuse/a", state),
    ]
    said = []
    for attempt in attempts:
        with pytest.raises(InputError) as caught:
            attempt()
        said.append(str(caught.value))
    saver.close()
    return [*said, *sorted(path.name for path in root.iterdir())]


def test_ranks_that_give_different_folders_say_which(tmp_path: Path) -> None:
    first, second = on_ranks(2, _different, tmp_path)
    assert first == second
    for said, name in zip(first, ("new-{}", "saver/step-0000000{}", "same-{}"), strict=False):
        one, other = (f"{tmp_path / name.format(rank)} on rank {rank}" for rank in (0, 1))
        assert said == f"ranks gave different folders: {one}, {other}"
    for said in first[3:5]:
        assert said == "memory://misuse/a lives in one process, and there are 2 ranks: name a folder or a store"
    assert first[5:] == ["same-0", "same-1", "saver"]
