"""A Llama of 98M parameters trained on all GPUs under FSDP2, by AdamW and by AdEMAMix: a case of gpu_check.py.

The model is that of configs/llama-124m.yaml with a tokenizer of 16,384 pieces; the text is the Python sources of the
standard library and of torch, which are wherever this runs. What it shows is that training works there as a
whole, and what a step costs: so few steps do not say which optimizer is better (docs/benchmarks.md does).
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from scripts.gpu_parts import Row, last_line, shardopt

STEPS = 100
TORCH = Path(torch.__file__).parent
SETTINGS = [
    "configs/llama-124m.yaml",
    "model.vocab_size=16384",
    f"data.sources=[{{source: stdlib}}, {{source: text, label: torch, paths: {TORCH}/**/*.py, weight: 4}}]",
    "data.tokenizer={bpe: 16384}",
    f"train.steps={STEPS}",
    "train.micro_batch=16",
    "train.grad_clip=1.0",
    "schedule.warmup=10",
    "schedule.min_lr_ratio=0.05",
    f"eval.every={STEPS}",
    "eval.batches=4",
    f"checkpoint.every={STEPS}",
]
SHORT = "lr: 1.5e-3, betas: [0.9, 0.99, 0.999], alpha: 2.0, alpha_warmup: total, beta3_warmup: total"
OPTIMIZERS = {
    "AdamW": "{name: adamw, lr: 1.5e-3, betas: [0.9, 0.95], weight_decay: 0.1}",
    "AdEMAMix, bf16 state": f"{{name: ademamix, {SHORT}, weight_decay: 0.1, state_dtype: bf16}}",
}


def train() -> Iterator[Row]:
    """A row of each optimizer: held-out loss, tokens a second, MFU, time of the update, memory."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = shardopt("data", "prepare", *SETTINGS)
        yield "the text", prepared.returncode == 0, last_line(prepared)
        for name, optimizer in OPTIMIZERS.items():
            run = Path(folder, name.replace(", ", "-").replace(" ", "-"))
            began = time.perf_counter()
            changes = [f"run.dir={folder}", f"run.name={run.name}", f"optimizer={optimizer}"]
            done = shardopt("pretrain", "--nproc-per-node", "gpu", *SETTINGS, *changes)
            if done.returncode:
                yield name, False, last_line(done)
                continue
            text, learned = figures([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
            yield name, learned, f"{text}, {time.perf_counter() - began:.0f} s in all"


def figures(rows: list[dict[str, Any]]) -> tuple[str, bool]:
    """Of the rows of metrics.jsonl: the figures in words, and whether held-out loss is under 80 % of the first loss."""
    scores = [row["eval_loss"] for row in rows if "eval_loss" in row]
    steady = [row for row in rows if "step_time" in row][len(rows) // 3 :]

    def median(key: str) -> float:
        return statistics.median(row[key] for row in steady)

    first = next(row["loss"] for row in rows if "loss" in row)
    text = f"held-out loss {scores[-1]:.3f} after {rows[-1]['step']} steps (training: {first:.2f} at first), "
    text += f"{median('tokens_per_second') / 1e3:.0f}k tokens/s, "
    if all("mfu" in row for row in steady):  # the device's peak is known
        text += f"MFU {median('mfu'):.0%}, "
    text += f"{1e3 * median('step_time'):.0f} ms a step, of that the update {1e3 * median('update'):.1f}, "
    text += f"peak {max(row['memory_bytes'] for row in steady) / 2**30:.1f} GiB"
    return text, scores[-1] < 0.8 * first
