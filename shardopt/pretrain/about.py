"""What a run is: the facts beside its config that tell two runs apart."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from shardopt import __version__
from shardopt.engines.base import Engine
from shardopt.pretrain.data_facts import in_short
from shardopt.pretrain.report import count

if TYPE_CHECKING:
    from shardopt.pretrain.loop import Run


def about(engine: Engine, parameters: int, fingerprint: str) -> dict[str, Any]:
    """Facts about a run, by name: as W&B's config and TensorBoard's text show them.

    Args:
        engine: built.
        parameters: of the model, tied ones once.
        fingerprint: of the data.
    """
    ranks = engine.ranks
    return {
        "parameters": parameters,
        "world_size": ranks.world_size,
        "engine": engine.name,
        "kernel": getattr(engine.optimizer, "kernel", "torch"),
        "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ranks.device.type,
        "data_fingerprint": fingerprint,
        "shardopt": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "git_commit": git_commit(Path.cwd()),
    }


def console_facts(run: Run) -> dict[str, object]:
    """What the console says of a run at its start; see `Report.start`."""
    config, engine, ranks = run.config, run.engine, run.ranks
    ema = engine.optimizer.param_groups[0].get("weight_ema")
    return {
        "model": f"{count(run.parameters)} parameters",
        "engine": f"{engine.name}, {ranks.world_size} rank{'s' * (ranks.world_size != 1)} on {ranks.device.type}",
        "optimizer": f"{config.optimizer.name}, {getattr(engine.optimizer, 'kernel', 'torch')} kernel",
        **in_short(run.data_report),
        "weight EMA": f"decay {ema}; held-out loss, export and sample are of it" if ema is not None else None,
        "run folder": config.folder,
        "checkpoints": root if (root := config.store) != config.folder else None,
        **run.origin,
    }


def git_commit(folder: Path) -> str | None:
    """The commit of the repository around `folder`, with "+" where files differ from it; None where there is none."""
    said = [_git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")]
    return None if said[0] is None else said[0] + ("+" if said[1] else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        ran = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a file system that takes too long to look through
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None
