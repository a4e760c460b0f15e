"""Memory and time of a forward and backward with the loss in chunks of the sequence (train.loss_chunks).

    OMP_NUM_THREADS=1 python scripts/bench_loss.py [--vocabulary 128256] [--block 2048] [--chunks 1 4 16] [--rounds 3]

A Llama of two layers of 256 on one sequence. Every number of chunks has a process of its own, whose memory is the most
that it ever had resident (VmHWM) over what it had before.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time

import torch

from shardopt.pretrain.loss import loss_in_forward
from shardopt.pretrain.metrics import peak_memory
from shardopt.pretrain.model import ModelConfig, initialise, meta_model, transformers_config


def measure(chunks: int, vocabulary: int, block: int, rounds: int) -> tuple[int, float, float]:
    """Bytes, median seconds, and the loss."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    section = ModelConfig(model_type="llama", max_position_embeddings=block, **shape)
    model = meta_model(transformers_config(section, vocabulary, 0, block))
    loss_in_forward(model, chunks)
    cpu = torch.device("cpu")
    initialise(model, cpu, 0)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    tokens = torch.randint(vocabulary, (1, block + 1), generator=torch.Generator().manual_seed(0))
    before, seconds, loss = peak_memory(cpu), [], torch.zeros(())
    for _ in range(rounds):
        began = time.perf_counter()
        nats, _ = model(input_ids=tokens[:, :-1], targets=tokens[:, 1:], use_cache=False)
        loss = nats / block
        loss.backward()
        seconds.append(time.perf_counter() - began)
    return peak_memory(cpu) - before, statistics.median(seconds), loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--block", type=int, default=2048)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logits = 4 * arguments.vocabulary * arguments.block
    print(f"logits whole in fp32: {logits / 2**20:,.0f} MiB; torch {torch.__version__}")
    print(f"{'chunks':>6} {'memory':>12} {'seconds':>8} {'loss':>12}")
    for chunks in arguments.chunks:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            given = (chunks, arguments.vocabulary, arguments.block, arguments.rounds)
            held, seconds, loss = pool.apply(measure, given)
        print(f"{chunks:6} {held / 2**20:8,.0f} MiB {seconds:8.2f} {loss:12.7f}")


if __name__ == "__main__":
    main()
