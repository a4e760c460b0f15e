"""What a run has recorded in its folder, read without torch: its config, its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from shardopt.errors import InputError, StorageError
from shardopt.rows import newest_rows, read_objects


def recorded_config(folder: Path) -> dict[str, Any] | None:
    """The config that a run has recorded in its folder; None where the folder is no run's.

    Raises:
        InputError: it is damaged, or cannot be read.
    """
    recorded = folder / "config.yaml"
    if not recorded.is_file():
        return None
    try:
        tree = yaml.load(recorded.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as e:
        raise StorageError(f"cannot read {recorded}: {e.strerror or e}") from e
    except (yaml.YAMLError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as e:  # !!int x
        raise InputError(f"{recorded} is damaged: {' '.join(str(e).split())}") from e
    match tree:
        case {"run": {"name": str()}, "train": {"steps": int()}, "data": dict(), "engine": {"name": str()}}:
            return tree
    return None


def last_row(path: Path) -> dict[str, Any] | None:
    """The last whole row of a metrics.jsonl; None where there is none."""
    return next(newest_rows(path), None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order; lines that a crash or a full disk left half-written are skipped.

    A step that stands twice (which this module never writes) keeps its last row.
    """
    rows = {row["step"]: row for row in read_objects(path) if type(row.get("step")) is int}
    return [rows[step] for step in sorted(rows)]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
    """Figures of a whole run, however often it was resumed, from its rows of metrics.

    Returns:
        `step` and `tokens` at its end; `hours` that its steps took, without evaluations and checkpoints;
        `final_eval_loss`, `best_eval_loss` and `best_eval_step`, of those that are finite, if any are.
    """
    if not rows:
        return {}
    steps = [0, *(row["step"] for row in rows)]
    seconds = sum(
        (row.get("step_time") or 0) * (row["step"] - before) for row, before in zip(rows, steps, strict=False)
    )
    figures = {"step": rows[-1]["step"], "tokens": rows[-1].get("tokens", 0), "hours": seconds / 3600}
    held_out = [(row["eval_loss"], row["step"]) for row in rows if row.get("eval_loss") is not None]
    if held_out:
        best, at = min(held_out)
        figures |= {"final_eval_loss": held_out[-1][0], "best_eval_loss": best, "best_eval_step": at}
    return figures
