"""How far a run has come, and its way into a checkpoint and back."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from shardopt import checkpoint
from shardopt.checkpoint.blocks import reading
from shardopt.checkpoint.folders import step_folder
from shardopt.checkpoint.store import listing
from shardopt.distributed import Ranks
from shardopt.engines.state import ShardedState
from shardopt.errors import InputError
from shardopt.pretrain import rng
from shardopt.pretrain.data import Batches

FORMAT = "shardopt.pretrain/4"


@dataclass
class Progress:
    """Step counts of a run, saved with every checkpoint."""

    step: int = 0
    """Steps done, skipped ones included; the data and the lr follow it."""
    tokens: int = 0
    """Target tokens of these steps."""
    skipped: int = 0
    """Steps skipped because something was not finite."""
    skipped_in_row: int = 0
    rewinds: int = 0
    """How often the run has gone back to a checkpoint after a loss spike."""
    recent: list[float] = field(default_factory=list)
    """Losses of the last steps, where there is a guard against spikes."""

    def document(self, batches: Batches, config: dict[str, Any], wandb_id: str | None) -> dict[str, Any]:
        """The JSON that a checkpoint keeps beside the tensors. A collective."""
        return {
            "format": FORMAT,
            **asdict(self),
            "data": batches.state_dict(self.step),
            "data_fingerprint": batches.data.fingerprint,
            "tokenizer": batches.data.saved_tokenizer.key,
            "wandb_id": wandb_id,
            "config": config,
        }

    @classmethod
    def of(cls, document: dict[str, Any]) -> Progress:
        """The progress in a checkpoint's document."""
        return cls(**{one.name: document[one.name] for one in fields(cls)})


def read_document(folder: Path) -> dict[str, Any]:
    """The document of a run's checkpoint.

    Raises:
        InputError: it cannot be read, or is no run's.
    """
    document = checkpoint.read_document(folder)
    if document.get("format") != FORMAT:
        raise InputError(f"{folder} is no checkpoint of a pretraining run of this version ({FORMAT})")
    return document


def newest(folder: Path, ranks: Ranks, resume: str, warn: Callable[[str], None]) -> Path | None:
    """The newest intact checkpoint of the run in `folder`; None where it begins at step 0. A collective.

    Raises:
        InputError: there is none, but `resume` is "must" or there are damaged ones; on every rank.
    """
    root = folder / "checkpoints"
    found = checkpoint.latest_intact(root, ranks, warn)
    if found is None and resume == "must":
        raise InputError(f"run.resume: must, but {folder} holds no complete checkpoint")

    def set_aside() -> list[str]:
        with reading(root):
            return sorted(name for name in listing(root) if re.fullmatch(r"step-\d+\.damaged.*", name))

    damaged = ranks.ask_main(set_aside)
    if found is None and damaged:
        raise InputError(
            f"every checkpoint in {root} is damaged ({', '.join(damaged)}): to begin again at step 0, choose another "
            f"run.name, or remove them"
        )
    return found


def resume(folder: Path, state: ShardedState, batches: Batches, seed: int) -> tuple[Progress, dict[str, Any]]:
    """Load a checkpoint into `state`, `batches` and the random generators. A collective.

    Returns:
        How far the run had come, and the checkpoint's document.

    Raises:
        InputError: it is of another program or other data, or does not fit `state`; on every rank.
    """
    ranks = state.ranks
    document = ranks.together(lambda: read_document(folder))
    if document["data_fingerprint"] != batches.data.fingerprint:
        raise InputError(
            f"data: the corpus or its tokenizer has changed since {folder} was written, so the run would not go "
            f"on where it stopped; restore it, or choose another run.name"
        )
    checkpoint.load(folder, state)
    progress = Progress.of(document)
    batches.load_state_dict(document["data"], progress.step)
    restore_generators(folder, ranks, seed, progress.step)
    return progress, document


def restore_generators(folder: Path, ranks: Ranks, seed: int, step: int) -> bool:
    """Set this rank's random generators as they were; false where they are new, for another number of ranks."""
    saved = checkpoint.load_extras(folder, list(rng.capture(ranks.rank)))
    if saved:
        rng.restore(ranks.rank, saved)
    else:  # new streams, of their own for this step
        rng.seed_all(seed, ranks.rank, step)
    return bool(saved)


def saved(root: Path, step: int, ranks: Ranks) -> Path:
    """The checkpoint of `step`, a run's last, under `root`. A collective.

    Raises:
        InputError: it is not on the disk; on every rank.
    """
    found = ranks.ask_main(lambda: checkpoint.latest(root))
    expected = step_folder(root, step)
    if found != expected:
        raise InputError(
            f"the run ended at step {step:,}, but {expected} is not there or not complete: somebody has removed or "
            f"changed it; {f'the newest is {found}' if found else 'there is no other'}"
        )
    return found
