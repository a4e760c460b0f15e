"""Our own checkpoints as training states, and back through `checkpoint.save`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from shardopt.checkpoint.convert.state import Scratch, TrainingState, Whole
from shardopt.checkpoint.document import DOCUMENT
from shardopt.checkpoint.export import model_files
from shardopt.checkpoint.saving import save
from shardopt.checkpoint.store import exists
from shardopt.checkpoint.stored import Stored, locate, root_of, step_of
from shardopt.engines.state import Saveable
from shardopt.slices import Layout, Slice

NAME = "shardopt"


def holds(path: Path) -> bool:
    return exists(path / DOCUMENT) or root_of(path) is not None


def read(path: Path) -> TrainingState:
    stored = Stored(locate(path))
    tensors = {
        (name, kind): Whole(
            tuple(stored.parameters[name]["shape"]), stored.dtype(name, kind), partial(stored.read, name, kind)
        )
        for name, kind in stored.keys
    }
    groups = [
        {key: tuple(value) if isinstance(value, list) and key != "names" else value for key, value in group.items()}
        for group in stored.document["checkpoint"]["groups"]
    ]
    return TrainingState(
        tensors,
        stored.document["checkpoint"]["step_counts"],
        groups,
        stored.document.get("step", step_of(stored.folder)),
        tuple(model_files(stored.folder)),
        NAME,
    )


def write(path: Path, state: TrainingState, scratch: Scratch) -> None:
    held = [
        Slice(name, kind, Layout.whole(name, whole.shape), (scratch.keep(whole),))
        for (name, kind), whole in state.tensors.items()
    ]
    save(path, _Held(held, state), {"step": state.step, "host": state.source})


class _Held(Saveable):
    """Slices that lie in files, and an optimizer that only says their groups."""

    def __init__(self, held: list[Slice], state: TrainingState) -> None:
        named = [(name, torch.zeros(0)) for name in state.stateful] or [("none", torch.zeros(0))]
        tensors = dict(named)
        groups = [
            {**{k: v for k, v in group.items() if k != "names"}, "params": [(n, tensors[n]) for n in group["names"]]}
            for group in state.full_groups()
        ]
        super().__init__(torch.optim.Optimizer(cast(Any, groups or named), {}))
        self._held, self._counts = held, state.counts

    def slices(self) -> list[Slice]:
        return self._held

    def step_counts(self) -> dict[str, dict[str, int | float]]:
        return self._counts
