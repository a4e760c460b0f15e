"""Floating-point operations of a model, and those that a device can do: for the share of its peak that is used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from shardopt.pretrain.model import routed_experts


class Gpu(NamedTuple):
    """A device's dense bf16 operations (TFLOPS, the maker's data sheet), and the GiB of memory that torch finds."""

    peak: float
    memory: float


# By the words of a device's name. More words go before fewer. An MI250X is two devices: the figures are of one.
GPUS = {
    "H100 PCIe": Gpu(756.0, 79.1), "H100 NVL": Gpu(835.0, 93.1), "H200 NVL": Gpu(835.0, 139.8),
    "H100": Gpu(989.4, 79.1), "H200": Gpu(989.4, 139.8), "GH200": Gpu(989.4, 94.5), "B200": Gpu(2250.0, 178.3),
    "A100": Gpu(312.0, 79.1), "L40S": Gpu(362.0, 44.4), "MI250X": Gpu(191.5, 64.0), "MI300X": Gpu(1307.4, 191.7),
    "MI325X": Gpu(1307.4, 255.7),
}  # fmt: skip
_ATTENDING = {"full_attention", "sliding_attention"}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations a second of `device`; None where they are not known."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """Dense bf16 operations a second of the device called `name`, as "NVIDIA H100 80GB HBM3"."""
    for words, gpu in GPUS.items():
        if all(re.search(rf"\b{word}\b", name) for word in words.split()):
            return gpu.peak * 1e12
    return None


def flops_per_token(model: PreTrainedModel, block_size: int) -> float:
    """Operations for a token of a block, forward and backward; none for what is computed again.

    Six for each weight that the token is multiplied by, and causal attention: a token attends to half of the block on
    average (Chowdhery et al., arXiv 2204.02311, appendix B, which counts all of the block).
    """
    return 6 * multiplied_weights(model) + attention_flops(model.config, block_size)


def multiplied_weights(model: PreTrainedModel) -> float:
    """How many weights a token is multiplied by: those of all matrices but embeddings; of routed experts its own."""
    config, head = model.config, model.get_output_embeddings()
    experts = routed_experts(config)
    chosen = next((k for key in ("num_experts_per_tok", "moe_k", "moe_topk") if (k := getattr(config, key, None))), 1)
    count = 0.0
    for name, param in _matrices(model):
        routed = experts and "experts" in name.split(".")
        count += param.numel() * (chosen / experts if routed else 1)
    tied = head is not None and any(head.weight is m.weight for m in model.modules() if isinstance(m, nn.Embedding))
    return count + (head.weight.numel() if tied else 0)


def _matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    embedded = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, param in model.named_parameters():
        if param.ndim >= 2 and param not in embedded:
            yield name, param


def attention_flops(config: PretrainedConfig, block_size: int) -> float:
    """Operations for a token of both products of causal attention, forward and backward, over all layers."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return 0.0
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    value = getattr(config, "v_head_dim", None) or width
    if nope := getattr(config, "qk_nope_head_dim", None):  # DeepSeek's
        width = nope + config.qk_rope_head_dim
    layers = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or block_size
    if layers is None:
        layers = ["sliding_attention"] * config.num_hidden_layers
    window = min(window, block_size)
    # What a token attends to on average.
    context = {"full_attention": block_size / 2, "sliding_attention": window - window**2 / (2 * block_size)}
    return 3 * 2 * heads * (width + value) * sum(context[layer] for layer in layers if layer in _ATTENDING)
