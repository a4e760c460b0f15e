"""Memory of forward and backward on fake tensors, against what torch allocates on the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from shardopt.errors import InputError
from shardopt.pretrain.activations import Simulation
from shardopt.pretrain.loss import loss_in_forward
from shardopt.pretrain.model import ModelConfig, checkpoint_activations, give_storage, meta_model, transformers_config
from tests.allocations import peak_of_cpu_memory

TINY = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4}
MIDDLE = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8}
# Every other layer attends to a window.
GEMMA = {"model_type": "gemma2", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5, "head_dim": 16}
LENGTH, VOCABULARY = 128, 2000


def made(shape: dict[str, Any]) -> Any:
    given = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0} | shape
    return meta_model(transformers_config(ModelConfig(**given), VOCABULARY, 0, LENGTH))


def measured(shape: dict[str, Any], sequences: int, computing: str, chunks: int, checkpointing: bool) -> int:
    """The most that a second micro-batch allocates, whose gradients are added to the first one's."""
    model = made(shape)
    loss_in_forward(model, chunks)
    if checkpointing:
        checkpoint_activations(model)
    give_storage(model, torch.device("cpu"))
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, 0.02)
    if computing == "bf16":
        model.to(torch.bfloat16)
    tokens = torch.zeros(sequences, LENGTH + 1, dtype=torch.int64)

    def micro_batch() -> None:
        with torch.autocast("cpu", torch.bfloat16) if computing == "autocast" else nullcontext():
            loss, _ = model(input_ids=tokens[:, :-1], targets=tokens[:, 1:], use_cache=False)
        loss.backward()

    micro_batch()
    with peak_of_cpu_memory() as peak:
        micro_batch()
    return peak.nbytes


@pytest.mark.parametrize(
    ("shape", "computing", "chunks", "checkpointing"),
    [
        (TINY, "fp32", 1, False),
        (TINY, "autocast", 1, False),
        (MIDDLE, "fp32", 1, False),
        (MIDDLE, "bf16", 4, False),
        (MIDDLE, "autocast", 1, True),
        (GEMMA, "bf16", 1, False),
    ],
)
def test_simulated_peak_is_that_of_a_real_micro_batch(shape, computing, chunks, checkpointing):
    model = made(shape)
    weights = {name: param.shape for name, param in model.named_parameters()}
    simulation = Simulation(model, LENGTH, chunks, checkpointing)
    found = measured(shape, 3, computing, chunks, checkpointing)
    assert simulation.measure(3, computing).of(3) == pytest.approx(found, rel=0.05)
    assert sum(simulation.counts.values()) == shape["num_hidden_layers"]
    assert len(simulation.counts) < shape["num_hidden_layers"]
    assert weights.keys() > {name for name, _ in model.named_parameters()}


def test_micro_batches_of_other_sizes_grow_by_as_much_a_sequence():
    simulation = Simulation(made(TINY), LENGTH)
    assert simulation.measure(2, "fp32").of(6) == pytest.approx(simulation.peak(6, "fp32"), rel=0.02)
    assert simulation.peak(6, "fp32") == pytest.approx(measured(TINY, 6, "fp32", 1, False), rel=0.05)


def test_gradients_that_are_kept_are_not_counted():
    """Those of a wide model take more than the activations of a short micro-batch."""
    wide = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 2}
    peak = Simulation(made(wide), LENGTH).peak(1, "fp32")
    assert peak == pytest.approx(measured(wide, 1, "fp32", 1, False), rel=0.05)
    assert peak < 4 * sum(p.numel() for p in made(wide).parameters())


def test_a_model_that_does_not_run_without_data_is_told_by_name():
    simulation = Simulation(made(TINY), LENGTH)
    simulation.model.model.forward = lambda **kwargs: kwargs["input_ids"].sum().item()
    with pytest.raises(InputError, match=r"LlamaForCausalLM does not run without data \(\w+"):
        simulation.peak(1, "fp32")
