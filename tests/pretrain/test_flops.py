"""Operations of a token by arithmetic, against those that torch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shardopt.pretrain.flops import attention_flops, flops_per_token, multiplied_weights, peak_of
from shardopt.pretrain.model import ModelConfig, initialise, meta_model, transformers_config

LENGTH, SEQUENCES, VOCABULARY = 128, 2, 300
COMMON = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0}
LLAMA = {"intermediate_size": 160, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen3": {"head_dim": 48, **LLAMA},
    "gpt2": {},  # tied, Conv1D
    "gemma2": {"head_dim": 32, "sliding_window": LENGTH, **LLAMA},
    "phi": LLAMA,
    "apertus": LLAMA,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, **LLAMA},
    "deepseek_v3": {
        "intermediate_size": 160, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 24,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 24, "v_head_dim": 40, "num_key_value_heads": 4,
    },
}  # fmt: skip


def made(family: str) -> Any:
    shape = {"model_type": family, **COMMON, **FAMILIES[family]}
    config = transformers_config(ModelConfig(**shape), VOCABULARY, 0, LENGTH)
    return meta_model(config, attention="eager")  # torch counts the whole of its products


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_those_that_torch_counts(family: str) -> None:
    model = made(family)
    model.config._experts_implementation = "eager"
    weights, attention = multiplied_weights(model), attention_flops(model.config, LENGTH)
    assert flops_per_token(model, LENGTH) == 6 * weights + attention
    initialise(model, torch.device("cpu"), 0)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(VOCABULARY, (SEQUENCES, LENGTH)), use_cache=False).logits.sum().backward()
    # Not causal: twice ours. Rotary tables are the rest.
    assert counter.get_total_flops() == pytest.approx(SEQUENCES * LENGTH * (6 * weights + 2 * attention), rel=0.005)


def test_a_window_counts_the_pairs_within_it() -> None:
    config = transformers_config(
        ModelConfig(model_type="mistral", sliding_window=32, **COMMON, **LLAMA), VOCABULARY, 0, LENGTH
    )
    pairs = sum(min(i, 32) for i in range(1, LENGTH + 1))
    per_pair = 3 * 2 * 2 * COMMON["hidden_size"] * COMMON["num_hidden_layers"]
    assert attention_flops(config, LENGTH) == pytest.approx(per_pair * pairs / LENGTH, rel=0.02)
    config.sliding_window = None
    assert attention_flops(config, LENGTH) == pytest.approx(per_pair * LENGTH / 2)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("AMD Instinct MI300X", 1307.4),
        ("AMD Instinct MI250X", 191.5),  # one of the two dies: a device of its own for torch
        ("NVIDIA RTX A1000", None),
        ("Tesla T4", None),
    ],
)
def test_peak_of_a_device_by_its_name(name: str, tera: float | None) -> None:
    peak = peak_of(name)
    assert peak is None if tera is None else peak == tera * 1e12
