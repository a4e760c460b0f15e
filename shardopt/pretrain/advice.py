"""What a run that ends by itself, or is refused, tells the user to do."""

from __future__ import annotations

from pathlib import Path

from shardopt import checkpoint
from shardopt.checkpoint.folders import complete_steps
from shardopt.checkpoint.saver import Saver
from shardopt.checkpoint.store import exists
from shardopt.errors import few
from shardopt.pretrain.config import Config


def after_nonfinite(config: Config, saver: Saver, after_finite_step: bool) -> str:
    """What to change where a run gives up, and which checkpoint to begin with. A collective.

    Args:
        config: of the run.
        saver: of the run, with no save pending.
        after_finite_step: whether a step since the last save was finite.
    """
    clip = "set train.grad_clip" if config.train.grad_clip is None else "train.grad_clip"
    lower = f"Lower optimizer.lr or {clip} under another run.name"
    found = saver.ranks.ask_main(lambda: complete_steps(saver.root))
    good = saver.good(after_finite_step)
    if good:
        words = f"{lower}, with run.from; the last good checkpoint is {good[0]}"
        if good[1:]:
            older = ", ".join(folder.name for folder in good[1:4])
            words += f" (older: {older}; to go on in this run from one of them, rename the newer ones)"
        if found[0] != good[0]:
            words += f"; no finite step came after {_after(good[0], found)}"
        return words
    if found:
        words = f"{lower}; no finite step came after {_after(None, found)}, so that its weights may be ruined"
    else:
        words = f"{lower}, or remove {config.folder} first; the run never reached a checkpoint"
    return words if config.run.source is None else f"{words}; run.from = {config.run.source} is where it began"


def _after(good: Path | None, found: list[Path]) -> str:
    """Names of the checkpoints that are newer than `good`."""
    return few(folder.name for folder in (found if good is None else found[: found.index(good)]))


def instead_of(folder: Path, store: Path) -> str:
    """What to do where the run in `folder`, with its checkpoints in `store`, is not the one that was asked for."""
    if checkpoint.latest(store / "checkpoints") is None:
        return f"Set them back to go on with it, or choose another run.name, or remove {folder}: it has no checkpoint"
    export = store / "export"
    written = "" if exists(export) else f", which shardopt export {store} {export} writes"
    return (
        f"Set them back to go on with it, or choose another run.name, with run.from={store} to go on from its newest "
        f"checkpoint as another run, or model='{{path: {export}}}' for its weights alone{written}"
    )
