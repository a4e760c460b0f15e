"""docs/recipes/trl.md: SFTTrainer and DPOTrainer on a tiny model and rows made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is in the dev extra")
from shardopt.errors import InputError
from shardopt.integrations.accelerate import sharded_state
from tests.distributed.pool import on_ranks
from tests.recipes.page import names_of

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(20))]
COMMON = {
    "learning_rate": 1e-2,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "save_steps": 3,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, **size))


def rows(kind: str) -> Any:
    from datasets import Dataset

    if kind == "sft":
        return Dataset.from_list([{"text": " ".join(f"w{(i + j) % 20}" for j in range(6))} for i in range(16)])
    pairs = [{"prompt": f"w{i} ", "chosen": f"w{(i + 1) % 20} w{(i + 2) % 20}", "rejected": "w3"} for i in range(16)]
    return Dataset.from_list(pairs)


def _trained(kind: str, names: dict[str, Any], folder: Path, resume: Path | None = None) -> Any:
    from trl import DPOConfig, SFTConfig

    if kind == "sft":
        return names["fine_tune"](model(), SFTConfig(str(folder), **COMMON), rows(kind), tokenizer(), resume)
    args = DPOConfig(str(folder), **COMMON)
    return names["prefer"](model(), model(), args, rows(kind), tokenizer(), resume)


def _train_and_resume(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    from tests.integrations.hosts import new_job

    new_job(alone=True)
    names, told = names_of("trl"), {}
    for kind in ("sft", "dpo"):
        straight = _trained(kind, names, folder / kind)
        resumed = _trained(kind, names, folder / f"{kind}-again", folder / kind / "checkpoint-3")
        optimizers = [sharded_state(t.optimizer).optimizer for t in (straight, resumed)]
        states = [[t for s in o.state.values() for t in s.values() if torch.is_tensor(t)] for o in optimizers]
        weights = [[p.detach() for p in t.model.parameters()] for t in (straight, resumed)]
        told[kind] = {
            "losses": [row["loss"] for row in straight.state.log_history if "loss" in row],
            "alpha": [row["alpha"] for row in straight.state.log_history if "alpha" in row],
            "dtypes": {t.dtype for t in states[0]},
            "equal": all(torch.equal(a, b) for pair in (states, weights) for a, b in zip(*pair, strict=True)),
        }
    from trl import DPOConfig

    args = DPOConfig(str(folder), **COMMON)
    with pytest.raises(InputError) as error:
        names["AdEMAMixDPOTrainer"](model(), args=args, ademamix={"alpa": 8.0}, processing_class=tokenizer())
    return told | {"refusal": str(error.value)}


def test_sft_and_dpo_learn_and_a_resumed_run_is_as_if_never_stopped(tmp_path: Path) -> None:
    (told,) = on_ranks(1, _train_and_resume, tmp_path)
    for kind in ("sft", "dpo"):
        assert len(told[kind]["losses"]) == 6
        assert told[kind]["losses"][-1] < told[kind]["losses"][0]
        assert told[kind]["alpha"][-1] == 8.0  # the warm-up is over with the training
        assert told[kind]["dtypes"] == {torch.bfloat16}
        assert told[kind]["equal"]
    assert "alpa" in told["refusal"]
    assert "alpha" in told["refusal"]
