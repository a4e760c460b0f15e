"""How far a run has come, and its way into a checkpoint and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from shardopt import checkpoint
from shardopt.engines.state import ShardedState
from shardopt.errors import InputError
from shardopt.pretrain import rng
from shardopt.pretrain.data import TrainData

FORMAT = "shardopt.pretrain/2"


@dataclass
class Progress:
    """Step counts of a run, saved with every checkpoint."""

    step: int = 0
    """Steps done, skipped ones included; the data and the lr follow it."""
    skipped: int = 0
    """Steps skipped because something was not finite."""
    skipped_in_row: int = 0
    rewinds: int = 0
    """How often the run has gone back to a checkpoint after a loss spike."""
    batches_left_out: int = 0
    """Batches that it has passed over by that: step s, from 0, takes the batch s + batches_left_out."""
    recent: list[float] = field(default_factory=list)
    """Losses of the last steps, where there is a guard against spikes."""

    def document(self, data: TrainData, config: dict[str, Any], wandb_id: str | None) -> dict[str, Any]:
        """The JSON that a checkpoint keeps beside the tensors."""
        return {
            "format": FORMAT,
            **asdict(self),
            "data": data.state_dict(),
            "data_fingerprint": data.fingerprint,
            "wandb_id": wandb_id,
            "config": config,
        }


def resume(folder: Path, state: ShardedState, data: TrainData, seed: int) -> tuple[Progress, dict[str, Any]]:
    """Load a checkpoint into `state`, `data` and the random generators. A collective.

    Returns:
        How far the run had come, and the checkpoint's document.

    Raises:
        InputError: it is of another program or other data, or does not fit `state`; on every rank.
    """
    ranks = state.ranks
    document = ranks.together(lambda: checkpoint.read_document(folder))
    if document.get("format") != FORMAT:
        raise InputError(f"{folder} is no checkpoint of a pretraining run of this version ({FORMAT})")
    if document["data_fingerprint"] != data.fingerprint:
        raise InputError(
            f"data: the corpus or its tokenizer has changed since {folder} was written, so the run would not go "
            f"on where it stopped; restore it, or choose another run.name"
        )
    checkpoint.load(folder, state)
    data.load_state_dict(document["data"])
    progress = Progress(**{one.name: document[one.name] for one in fields(Progress)})
    saved = checkpoint.load_extras(folder, list(rng.capture(ranks.rank)))
    if saved:
        rng.restore(ranks.rank, saved)
    else:  # another number of ranks: new streams, of their own for this step
        rng.seed_all(seed, ranks.rank, progress.step)
    return progress, document
