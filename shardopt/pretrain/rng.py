"""The random generators of this process (torch's, Python's, numpy's), as tensors that a checkpoint can hold."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardopt.slices import name_key


def seed_all(seed: int, *salt: int) -> None:
    """Seed every generator from the run's seed and `salt` (rank, step), so that ranks differ."""
    mixed = name_key("/".join(map(str, (seed, *salt))))
    torch.manual_seed(mixed >> 1)  # the GPUs' too
    random.seed(mixed)
    np.random.seed(mixed % 2**32)


def capture(rank: int) -> dict[str, Tensor]:
    """The state of each generator under a key that names the rank; Python's and numpy's as JSON text."""
    state = {
        "torch": torch.get_rng_state(),
        "python": _as_bytes(random.getstate()),
        "numpy": _as_bytes(np.random.get_state(legacy=False)),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {f"rng/rank-{rank:05d}/{kind}": value for kind, value in state.items()}


def restore(rank: int, saved: dict[str, Tensor]) -> None:
    """Set the generators to a state that `capture` returned."""
    state = {key.rsplit("/", 1)[1]: value for key, value in saved.items() if f"/rank-{rank:05d}/" in key}
    torch.set_rng_state(state["torch"])
    version, words, pending_gauss = json.loads(bytes(state["python"].tolist()))
    random.setstate((version, tuple(words), pending_gauss))
    np.random.set_state(json.loads(bytes(state["numpy"].tolist())))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _as_bytes(state: Any) -> Tensor:
    text = json.dumps(state, default=np.ndarray.tolist)  # its floats are exact
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
