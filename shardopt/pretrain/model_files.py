"""The files that transformers loads a run's model from: config, tokenizer, weights."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from shardopt import checkpoint
from shardopt.checkpoint.folders import made_here, publish
from shardopt.checkpoint.store import is_local
from shardopt.engines.state import ShardedState
from shardopt.pretrain.model import ModelConfig


@dataclass(frozen=True)
class ModelFiles:
    """What stands beside the weights.

    Args:
        section: the `model` section.
        config: the model's own.
        tokenizer: whose ids it is trained on.
    """

    section: ModelConfig
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase

    def write(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the model's config, for weights of `dtype`, and the tokenizer."""
        self.config.dtype = dtype
        self.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.section.path is not None and self.section.trust_remote_code:
            for code in Path(self.section.path).glob("*.py"):  # which the config names
                shutil.copy(code, folder)

    def put(self, folder: Path) -> None:
        """As `write`, to a folder that may lie in a store."""
        with made_here(folder) as here:
            self.write(here)
            if not is_local(folder):
                publish(here, folder, lambda _: True)

    def export(self, folder: Path, state: ShardedState, dtype: torch.dtype) -> None:
        """Write the weights of `state` too, rounded to `dtype`; buffers keep theirs. A collective.

        Raises:
            InputError: it cannot be written, on every rank.
        """
        buffers = {s.name for s in state.buffer_slices()}
        whole = state.full_parameters()
        parameters = ((n, p if p is None or n in buffers else p.to(dtype)) for n, p in whole)
        complete = partial(self.write, dtype=dtype)
        checkpoint.export_safetensors(folder, parameters, state.ranks, complete=complete)
