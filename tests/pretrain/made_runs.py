"""Run folders as runs leave them, made without a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

CONFIG: dict[str, Any] = {
    "run": {"name": "a", "seed": 0},
    "data": {"sources": [{"source": "text", "paths": ["text"]}]},
    "optimizer": {"name": "ademamix", "lr": 1e-3},
    "train": {"steps": 1000},
}
TOKENS = 100
"""Of a step."""


def row(step: int, shift: float = 0.0, **changes: Any) -> dict[str, Any]:
    loss = 2 + shift + 8 / (1 + step / 50) + 0.1 * math.sin(step)
    return {
        "step": step, "tokens": TOKENS * step, "loss": loss, "bits_per_byte": loss / 2, "lr": 1e-3 * (1 - step / 2000),
        "grad_norm": 1 + math.cos(step) / 9, "tokens_per_second": 4000.0 + step % 7, "step_time": 0.1,
        "memory_bytes": 7e8, "skipped_steps": 0, "m1_norm": 0.5, "update_ratio/layers.0": 0.1,
    } | changes  # fmt: skip


def evaluated(step: int, **changes: Any) -> dict[str, Any]:
    return row(step, eval_loss=3 + 900 / (100 + step), eval_bits_per_byte=1.5, **changes)


def rows(steps: int = 1000, every: int = 2, shift: float = 0.0) -> list[dict[str, Any]]:
    return [
        evaluated(step, loss=row(step, shift)["loss"]) if step % 100 == 0 else row(step, shift)
        for step in range(every, steps + 1, every)
    ]


def event(kind: str, step: int, at: float = 1.8e9, **facts: Any) -> dict[str, Any]:
    return {"time": at + step, "event": kind, "step": step, **facts}


def start(step: int = 0, **about: Any) -> dict[str, Any]:
    known = {
        "parameters": 1_000_000,
        "world_size": 2,
        "engine": "zero",
        "torch": "2.13.0",
        "git_commit": "abcdef0123456",
    }
    held = {
        "columns": ["rank 0", "rank 1", "unsharded"],
        "bytes": {"weights": [4e6, 4e6, 8e6], "total": [4e6, 4e6, 8e6]},
    }
    return event("start", step, about=known | about, memory=held, origin={})


def write(folder: Path, metrics: list[dict[str, Any]], **parts: Any) -> Path:
    """A run folder: `metrics`, and `config` (sections that are other), `events`, `samples`, `data`, `lock`."""
    folder.mkdir(parents=True)
    config = {name: values | parts.get("config", {}).get(name, {}) for name, values in CONFIG.items()}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for name, objects in (
        ("metrics", metrics),
        ("events", parts.get("events", [])),
        ("samples", parts.get("samples", [])),
    ):
        if objects:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in objects), encoding="utf-8")
    if "data" in parts:
        (folder / "data.json").write_text(json.dumps(parts["data"]), encoding="utf-8")
    if "lock" in parts:
        (folder / ".lock").write_text(json.dumps(parts["lock"]))
    return folder
