"""A checkpoint of any engine loads on any other: moves that cover all; scripts/move_checkpoints.py has every pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts import move_checkpoints as moves
from scripts.move_checkpoints import Place
from shardopt import checkpoint

# Every engine saves and loads, every format moves, to another number of ranks each time.
MOVES = [
    ("fp32", Place("single", 1), Place("deepspeed-3", 2)),
    ("bf16", Place("deepspeed-3", 3), Place("zero-2", 2)),
    ("block16", Place("zero-2", 3), Place("fsdp", 2)),
    ("block8", Place("fsdp", 3), Place("ddp", 2)),
    ("masters", Place("ddp", 3), Place("zero-1", 2)),
    ("split", Place("zero-1", 3), Place("hsdp", 4)),
    ("mixed-blocks", Place("hsdp", 4), Place("zero-replicated", 2)),
    ("bf16-weights", Place("zero-replicated", 4), Place("single", 1)),
    ("mixed", Place("deepspeed-1", 3), Place("deepspeed-2", 2)),
    ("bf16-compute", Place("deepspeed-2", 3), Place("deepspeed-1", 2)),
]


def test_the_moves_cover_every_engine_and_format() -> None:
    formats, sources, targets = ([move[i] for move in MOVES] for i in range(3))
    assert set(formats) == set(moves.FORMATS)
    assert {place.engine for place in sources} == {place.engine for place in targets} == set(moves.ENGINES)
    assert all(source.ranks != target.ranks for source, target in zip(sources, targets, strict=True))


def test_state_moves_between_engines_and_ranks_bit_for_bit_and_training_goes_on(tmp_path: Path) -> None:
    try:
        for fmt, source, target in MOVES:
            expected = moves.control(fmt)
            assert moves.save_all(fmt, [source], tmp_path, expected)[source] < moves.TOLERANCE[fmt], source
            wrong, _ = moves.load_all(fmt, source, [target], tmp_path, expected)[target]
            assert wrong == [], f"{fmt} of {source} on {target}"
    finally:
        for n in (1, 2, 3, 4):
            moves.on_ranks(n, moves.release)


def _planted(case: str, state: Any) -> None:
    """What a load that is not right would leave behind."""
    if case == "element":
        state.slices()[-1].tensors[0].view(-1)[0] += 1
    elif case == "count":
        state.load_step_counts({name: {"step": 4} for name in state.step_counts()})
    elif case == "lr":
        state.optimizer.param_groups[0]["lr"] *= 1.01


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("element", "not as saved: layers.1.bias/nu"),
        ("count", "not as saved: embed.weight"),
        ("lr", "losses differ by"),
    ],
)
def test_a_load_that_is_not_right_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, message: str
) -> None:
    place, fmt, load = Place("single", 1), "fp32", checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda folder, state: (load(folder, state), _planted(case, state)))
    expected = moves.control(fmt)
    try:
        moves.save(0, 1, fmt, [place], tmp_path)
        outcome = moves.load(0, 1, fmt, [place], moves.folder_of(tmp_path, fmt, place))
    finally:
        moves.release(0, 1)
    wrong, _ = moves.judge(fmt, [reply[0] for reply in [outcome]], expected[moves.BEFORE :], moves.numels_of(fmt))
    assert wrong[0].startswith(message)
