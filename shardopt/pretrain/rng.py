"""The random generators of this process (torch's, Python's, numpy's), as tensors that a checkpoint can hold."""

from __future__ import annotations

import random

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
    """The state of each generator under a key that names the rank."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    assert version == 3
    assert name == "MT19937"
    state = {
        "torch": torch.get_rng_state(),
        # A pending gauss(), of which there need not be one.
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*keys, position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {f"rng/rank-{rank:05d}/{kind}": value for kind, value in state.items()}


def restore(rank: int, saved: dict[str, Tensor]) -> None:
    """Set the generators to a state that `capture` returned."""
    state = {key.rsplit("/", 1)[1]: value for key, value in saved.items() if f"/rank-{rank:05d}/" in key}
    torch.set_rng_state(state["torch"])
    has_gauss, gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss if has_gauss else None))
    *keys, position, pending = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, pending, state["numpy_gauss"].item()))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
