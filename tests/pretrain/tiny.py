"""A run small enough for a test: a two-layer Llama on a few kilobytes of made text."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from shardopt.distributed import Ranks
from shardopt.pretrain import data
from shardopt.pretrain.config import Config, _override, parse
from shardopt.pretrain.loop import Result, pretrain
from shardopt.pretrain.meter import PARTS
from shardopt.pretrain.record import read_metrics

MEASURED = {"tokens_per_second", "memory_bytes", "step_time", "data_wait", *PARTS}
"""Figures that are no functions of the config: they have tests of their own."""
ALONE = Ranks(0, 1, 0, torch.device("cpu"), distributed=False)


def corpus(folder: Path, documents: int = 60) -> Path:
    """Text files of words over a small alphabet, enough for some hundred blocks of 32."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(40)]
    for i in range(documents):
        text = " ".join(draw.choices(words, k=draw.randint(60, 120)))
        (folder / f"{i:03d}.txt").write_text(text)
    return folder


def stream(folder: Path, shards: int = 1, files: int = 4) -> str:
    """`data.sources` of a streamed dataset of `files`, made in `folder`."""
    for path in sorted(corpus(folder / "text", documents=60 * files).iterdir()):
        part = folder / f"train-{int(path.stem) % files}.jsonl"
        with part.open("a") as file:
            file.write(json.dumps({"text": path.read_text()}) + "\n")
    shutil.rmtree(folder / "text")
    return f"[{{source: hf, name: {folder}, streaming: true, scan: 40, shards: {shards}}}]"


def tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """The config as plain data; `changes` are dotted keys with __ for the dot, and YAML text or values."""
    config: dict[str, Any] = {
        "run": {"name": "tiny", "dir": str(folder / "runs"), "device": "cpu"},
        "model": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
        },
        "data": {
            "sources": [{"source": "text", "paths": [str(folder / "text")]}],
            "block_size": 32,
            "holdout": 0.1,
            "cache": str(folder / "cache"),
        },
        "optimizer": {"name": "ademamix", "lr": 3e-3, "alpha_warmup": "total", "beta3_warmup": "total"},
        "schedule": {"warmup": 2},
        "engine": {"name": "fsdp"},
        "train": {"steps": 6, "global_batch": 8, "micro_batch": 2},
        "eval": {"every": 100, "batches": 1, "sample_tokens": 0},
        "checkpoint": {"every": 100, "export": False},
        "tracking": {"log_every": 1, "wandb": {"mode": "disabled"}},
    }
    for key, value in changes.items():
        _override(config, f"{key.replace('__', '.')}={value}")
    return config


def config(folder: Path, **changes: Any) -> Config:
    return parse(tree(folder, **changes))


def run(rank: int, world_size: int, folder: Path, plot: bool = False, **changes: Any) -> Result:
    """For `on_ranks`: the run on every rank of a pool, or alone with world_size 1 (`run(0, 1, ...)`).

    Args:
        plot: whether it draws loss.png, which takes as long as twenty of its steps.
    """
    with nullcontext() if plot else mock.patch("shardopt.pretrain.metrics.draw_loss"):
        return pretrain(config(folder, **changes))


def metrics(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of the run's metrics.jsonl."""
    return read_metrics(folder / "runs" / name / "metrics.jsonl")


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@torch.no_grad()
def exported_loss(folder: Path, export: Path, blocks: int = 8, **changes: Any) -> float:
    """Held-out loss of an export as transformers loads it, on the blocks that the run (of `changes`) scores."""
    from transformers import AutoModelForCausalLM

    _, holdout = data.prepare(config(folder, **changes).data, ALONE, 0, 8)
    tokens = holdout.batch(0, min(blocks, holdout.n_blocks))
    logits = AutoModelForCausalLM.from_pretrained(export)(tokens[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
