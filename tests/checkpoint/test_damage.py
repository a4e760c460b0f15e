"""Damage is found, told and set aside; a disk in trouble is not taken for damage."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import damage
from shardopt import checkpoint
from shardopt.checkpoint import DamagedError, blocks
from shardopt.checkpoint.verify import find_damage
from shardopt.errors import InputError
from shardopt.slices import Layout, Slice
from tests.checkpoint import made
from tests.distributed.pool import on_ranks

OLD, NEW = damage.OLD, damage.NEW


def _load(folder: Path) -> Any:
    return checkpoint.load(folder, made.State(made.slices(made.whole, filled=False), made.ranks_here()))


def _save_both(rank: int, world_size: int, root: Path) -> None:
    for name in (OLD, NEW):
        made.save(rank, world_size, root / name, made.flat, {"step": int(name[-3:])})


def test_every_planted_damage_is_found_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    on_ranks(2, _save_both, tmp_path)
    assert checkpoint.latest_intact(tmp_path, made.ranks_here()) == tmp_path / NEW
    counts, missed = damage.run(tmp_path, _load, flips=3, types=40)
    assert missed == []
    assert set(counts) == {"flip", "truncation", "growth", "zeros", "moved", "missing", "swap", "types"}
    assert sum(counts.values()) > 110


def test_checkpoint_under_the_name_of_another_step_is_set_aside(tmp_path: Path) -> None:
    _save_both(0, 1, tmp_path)
    (tmp_path / OLD).rename(tmp_path / "step-00000999")
    said: list[str] = []
    assert checkpoint.latest_intact(tmp_path, made.ranks_here(), said.append) == tmp_path / NEW
    assert f"it was saved as {OLD}" in said[0]
    shutil.copytree(tmp_path / NEW, tmp_path / "best")
    assert find_damage(tmp_path / "best", made.ranks_here()) is None


def test_the_planting_script_sees_what_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_ranks(2, _save_both, tmp_path)
    monkeypatch.setattr(blocks, "checksum", lambda _: "0" * blocks.DIGITS)
    _, missed = damage.run(tmp_path, _load, flips=1, types=0)
    assert missed


def test_nothing_intact_is_none_and_all_of_it_is_set_aside(tmp_path: Path) -> None:
    assert checkpoint.latest_intact(tmp_path / "none", made.ranks_here()) is None
    _save_both(0, 1, tmp_path)
    for name in (OLD, NEW):
        (tmp_path / name / "rank-00000.data").unlink()
    (tmp_path / f"{NEW}.damaged").mkdir()  # of a start before this one
    said: list[str] = []
    assert checkpoint.latest_intact(tmp_path, made.ranks_here(), said.append) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"{OLD}.damaged", f"{NEW}.damaged", f"{NEW}.damaged-again"
    ]  # fmt: skip
    assert "rank-00000.data is missing" in said[0]
    assert said[0].endswith(f"It is set aside as {tmp_path / NEW}.damaged-again, and the one before it is used")
    assert said[1].endswith(f"It is set aside as {tmp_path / OLD}.damaged, and it was the last")
    assert len(said) == 2


def _small_blocks(rank: int, world_size: int, root: Path, action: Callable[..., Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", 128)
        return action(rank, world_size, root)


def _through_blocks(rank: int, world_size: int, root: Path) -> int:
    made.save(rank, world_size, root / OLD, made.strided)
    made.load(rank, world_size, root / OLD, made.rows)
    made.load(rank, world_size, root / OLD, made.flat)
    files = checkpoint.read_document(root / OLD)["checkpoint"]["files"]
    return len(files["rank-00000.data"]["xxh3"]) // blocks.DIGITS


def test_vectors_that_lie_in_many_blocks_are_read_by_other_ranks(tmp_path: Path) -> None:
    assert min(on_ranks(2, _small_blocks, tmp_path, _through_blocks)) > 5


def _each_block(rank: int, world_size: int, root: Path) -> list[tuple[str | None, list[str]]]:
    """Flip one bit in each block of rank 0's file in turn: what every rank then says, and the folders left."""
    ranks = made.ranks_here(rank, world_size)
    made.save(rank, world_size, root / OLD, made.flat)
    found = []
    data = root / OLD / "rank-00000.data"
    for block in range(data.stat().st_size // 128):
        for _ in range(2):  # the second time brings it back
            torch.distributed.barrier()
            if rank == 0:
                damage._flip(data.parent, data.name, 128 * block + 70, 3)
            torch.distributed.barrier()
            found.append(checkpoint.find_damage(root / OLD, ranks))
    said: list[str] = []
    if rank == 0:
        damage._flip(data.parent, data.name, data.stat().st_size - 1, 0)
    torch.distributed.barrier()
    assert checkpoint.latest_intact(root, ranks, said.append) is None
    return [*found, said[0]]


def test_the_ranks_share_the_checks_and_all_know_what_one_found(tmp_path: Path) -> None:
    first, second = on_ranks(2, _small_blocks, tmp_path, _each_block)
    assert first == second
    assert first[1:-1:2] == [None] * (len(first) // 2)
    for block, said in enumerate(first[:-1:2]):
        reason = f"damaged: bytes {128 * block} to" if block else "of another save, or damaged: its header"
        assert f"rank-00000.data is {reason}" in said
    assert [p.name for p in tmp_path.iterdir()] == [f"{OLD}.damaged"]
    assert f"set aside as {tmp_path / OLD}.damaged" in first[-1]


def _elsewhere(rank: int, world_size: int, root: Path) -> None:
    """Rank 1 looks at a disk of its own, as where nodes share no file system."""
    made.save(rank, world_size, root / "shared" / OLD, made.flat)
    with pytest.raises(InputError, match=r"run\.dir, of a run\) must be on a file system that all nodes share"):
        checkpoint.latest_intact(root / ("shared" if rank == 0 else "mine"), made.ranks_here(rank, world_size))


def test_a_rank_that_does_not_see_the_files_is_no_damage(tmp_path: Path) -> None:
    on_ranks(2, _small_blocks, tmp_path, _elsewhere)
    assert [p.name for p in (tmp_path / "shared").iterdir()] == [OLD]


@pytest.mark.parametrize("code", ["EIO", "ESTALE", "EAGAIN", "ETIMEDOUT", "EACCES"])
@pytest.mark.parametrize("call", ["open", "preadv", "fstat", "read_bytes", "iterdir"])
def test_a_disk_in_trouble_is_an_error_and_nothing_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, call: str
) -> None:
    _save_both(0, 1, tmp_path)
    trouble = OSError(getattr(errno, code), os.strerror(getattr(errno, code)), "x")

    def fails(*_: Any, **__: Any) -> None:
        raise trouble

    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(*((Path, call) if call in ("read_bytes", "iterdir") else (blocks.os, call)), fails)
        with pytest.raises(InputError, match=r"cannot read .*not taken for damage") as caught:
            checkpoint.latest_intact(tmp_path, made.ranks_here(), said.append)
        assert os.strerror(trouble.errno) in str(caught.value)
        assert not isinstance(caught.value, DamagedError)
        if call != "iterdir":
            with pytest.raises(InputError, match="not taken for damage") as caught:
                _load(tmp_path / NEW)
            assert not isinstance(caught.value, DamagedError)
    assert said == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [OLD, NEW]
    assert checkpoint.latest_intact(tmp_path, made.ranks_here()) == tmp_path / NEW


def test_a_checkpoint_of_another_version_is_refused_and_not_set_aside(tmp_path: Path) -> None:
    _save_both(0, 1, tmp_path)
    (tmp_path / NEW / "checkpoint.json").write_text('{"checkpoint": {"format": 5}}')
    for latest in (checkpoint.latest, lambda root: checkpoint.latest_intact(root, made.ranks_here())):
        with pytest.raises(InputError, match="has checkpoint format 5, this shardopt reads format 6"):
            latest(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [OLD, NEW]


def test_a_load_of_damaged_data_is_an_error_and_the_optimizer_does_not_step(tmp_path: Path) -> None:
    layout = Layout.whole("w", (4096,))
    state = made.State([Slice("w", "weight", layout, (torch.ones(4096),))], made.ranks_here())
    checkpoint.save(tmp_path / OLD, state)
    damage._flip(tmp_path / OLD, "rank-00000.data", 9000, 0)
    with pytest.raises(DamagedError, match=r"rank-00000\.data is damaged: bytes 0 to 16512 do not have their checksum"):
        checkpoint.load(tmp_path / OLD, state)
    with pytest.raises(InputError, match="failed midway"):
        state.optimizer.step()
