"""A Trainer's checkpoint-N folders through kills, damage, rotation and uploads."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("transformers", reason="the extra shardopt[transformers]")
from transformers import Trainer, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from shardopt.checkpoint import blocks, folders
from tests.distributed.pool import RankError, on_ranks
from tests.integrations.training import difference, refused, train

SAVES = {"save_strategy": "steps", "save_steps": 3}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A training on 2 ranks that was never stopped, with checkpoint-3 and checkpoint-6."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, on_ranks(2, train, folder, **SAVES)


# Where a rank is killed: the function, the rank, and how much of the call is done by then.
KILLS: dict[str, tuple[Any, str, int, str]] = {
    "with half of the model written": (Trainer, "_save", 0, "after"),
    "with its slices half written": (blocks, "write_file", 1, "after"),
    "with the slices not named": (folders, "publish", 0, "before"),
    "with the other rank in its generator states": (Trainer, "_save_rng_state", 1, "before"),
    "with half of Trainer's state written": (TrainerState, "save_to_json", 0, "half"),
    "while the older checkpoint is deleted": (shutil, "rmtree", 0, "half"),
}


def killed(rank: int, world_size: int, folder: Path, at: str) -> None:
    """Train with save_total_limit=1 until a rank is killed in the second save."""
    owner, name, victim, moment = KILLS[at]
    original: Callable[..., Any] = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        second = any((folder / f"checkpoint-{step}" / "trainer_state.json").exists() for step in (3, 6))
        if not second or rank != victim:
            return original(*args, **kwargs)
        if moment == "half" and name == "rmtree":
            if not any(Path(args[0]).rglob("model.safetensors")):
                return original(*args, **kwargs)  # something else
            next(Path(args[0]).rglob("model.safetensors")).unlink()
        elif moment == "half":
            Path(args[1]).write_text("{")
        elif moment == "after":
            original(*args, **kwargs)
        return os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(owner, name, dying):
        train(rank, world_size, folder, save_total_limit=1, **SAVES)


@pytest.mark.parametrize("at", KILLS)
def test_a_kill_in_a_save_leaves_a_whole_checkpoint_that_resume_finds(at: str, straight: Any, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="the process died"):
        on_ranks(2, killed, tmp_path, at, fresh=True)
    last = get_last_checkpoint(str(tmp_path))
    assert last is not None
    step = 6 if at == "while the older checkpoint is deleted" else 3
    assert last == str(tmp_path / f"checkpoint-{step}")
    assert json.loads((Path(last) / "trainer_state.json").read_text())["global_step"] == step
    resumed = on_ranks(2, train, tmp_path, resume=last, save_total_limit=1, **SAVES)
    for before, after in zip(straight[1], resumed, strict=True):
        assert difference(before["weights"], after["weights"]) == 0.0
        assert before["sums"] == after["sums"]
        assert before["logs"][-1] == after["logs"][-1]
    if step == 3:  # else there was nothing left to save
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6"]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "slices missing": (lambda new, old: shutil.rmtree(new / "shardopt"), "has no shardopt folder"),
    "a byte of the slices": (lambda new, old: flip(new / "shardopt" / "rank-00001.data"), "rank-00001.data is damaged"),
    "a byte of the weights": (lambda new, old: flip(new / "model.safetensors"), "model.safetensors is damaged"),
    "no schedule": (lambda new, old: (new / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "slices of another step": (
        lambda new, old: shutil.copytree(old / "shardopt", new / "shardopt", dirs_exist_ok=True),
        "checkpoint.json is damaged, or was edited",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_trainer_and_passed_over_by_ours(damage: str, straight: Any, tmp_path: Path) -> None:
    plant, message = DAMAGE[damage]
    run = tmp_path / "run"
    shutil.copytree(straight[0], run)
    plant(run / "checkpoint-6", run / "checkpoint-3")
    for told in on_ranks(2, refused, run, resume=True):
        assert message in told
        assert f"Resume from {run / 'checkpoint-3'}, which is whole" in told
    for told in on_ranks(2, refused, run, resume=str(run / "checkpoint-6"), trainer="AdEMAMixTrainer"):
        assert message in told
    resumed = on_ranks(2, train, run, resume=True, trainer="AdEMAMixTrainer", **SAVES)
    assert difference(straight[1][0]["weights"], resumed[0]["weights"]) == 0.0
    assert straight[1][1]["sums"] == resumed[1]["sums"]
    again = on_ranks(2, train, run, resume=True, max_steps=7)  # checkpoint-6 was written anew
    assert again[0]["step"] == 7


def pushed(rank: int, world_size: int, folder: Path) -> list[tuple[str, bool]]:
    """The folders that are uploaded, and whether each is whole by then."""
    seen: list[tuple[str, bool]] = []

    def push(self: Trainer, checkpoint_folder: str) -> None:
        seen.append((checkpoint_folder, (Path(checkpoint_folder) / "trainer_state.json").exists()))

    with mock.patch.object(Trainer, "_push_from_checkpoint", push), mock.patch.object(Trainer, "init_hf_repo"):
        train(rank, world_size, folder, push_to_hub=True, **SAVES)
    return seen


def test_the_hub_gets_the_folder_under_its_final_name(tmp_path: Path) -> None:
    for seen in on_ranks(2, pushed, tmp_path):
        assert seen == [(str(tmp_path / f"checkpoint-{step}"), True) for step in (3, 6)]


def test_a_checkpoint_caught_between_two_renames_comes_back(straight: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight[0] / "checkpoint-3", run / "_previous" / "checkpoint-3")
    (run / "_saving" / "checkpoint-3").mkdir(parents=True)
    on_ranks(2, train, run, save_strategy="steps", save_steps=6)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-3", "checkpoint-6"]
