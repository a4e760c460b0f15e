"""Messages, bytes and peak memory of ZeRO-2's gradients on many ranks: simulated, nothing is sent.

    python scripts/simulate_ranks.py [--ranks 8 64 1024] [--models 1.3B 8B]

One rank of torch's fake process group runs a backward of a model on the meta device through ZeroOptimizer itself, by
the path that NCCL takes. Counted are the collectives it starts, the part that each sends to one rank (a message of a
reduce-scatter's ring, or of the all-to-all that bf16 takes), the bytes that a rank sends, and the most that gradients
take at a time: waiting, packed, in flight and received, without this rank's own part. Times are not simulated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from shardopt import AdEMAMix, ZeroOptimizer

SIZES = {
    "1.3B": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
MIB = 2**20


def simulate(size: str, ranks: int, wire: str, bucket_mb: float | None) -> dict[str, Any]:
    """Counts of one backward."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        config = {"vocab_size": 32000, "num_key_value_heads": 8, "tie_word_embeddings": False} | SIZES[size]
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**config, use_cache=False))
        optimizer = ZeroOptimizer(model, AdEMAMix, bucket_mb=bucket_mb, reduce_dtype=wire, lr=1e-3)
        reducer, parts, flying = optimizer.reducer, [], []
        started = reducer.comm.reduce_scatter

        def counted(sent: Sequence[Sequence[torch.Tensor]]) -> Any:
            parts.append(sent[0][0].nbytes)
            flying.append(len(reducer._flying) + 1)
            return started(sent)

        with mock.patch.object(reducer.comm, "reduce_scatter", counted), optimizer.accumulate():
            # In the order of backward: the last registered first.
            torch.stack([p.sum() for p in model.parameters()]).sum().backward()
        largest = max(p.nbytes for p in model.parameters())
        return {
            "bucket": 2 * reducer.piece_bytes,
            "collectives": len(parts),
            "in flight": max(flying),
            "message": sorted(parts)[len(parts) // 2],
            "sent": optimizer.wire_bytes["reduce"],
            "peak": reducer.peak_bytes,
            "largest": largest,
        }
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--models", choices=list(SIZES), nargs="+", default=list(SIZES))
    arguments = parser.parse_args()
    columns = ["model", "ranks", "wire", "bucket_mb", "collectives", "in flight", "message, KiB", "sent, GiB"]
    columns += ["peak, MiB", "largest gradient, MiB"]
    print(f"| {' | '.join(columns)} |\n|---{'|--:' * (len(columns) - 1)}|")
    for size in arguments.models:
        for ranks in arguments.ranks:
            for wire, bucket_mb in (("fp32", None), ("bf16", None), ("bf16", 25.0)):
                row = simulate(size, ranks, wire, bucket_mb)
                asked = f"{row['bucket'] / MIB:.0f}{' (given)' if bucket_mb else ''}"
                cells = [size, ranks, wire, asked, row["collectives"], row["in flight"], f"{row['message'] / 1024:.1f}"]
                cells += [f"{row['sent'] / 2**30:.2f}", f"{row['peak'] / MIB:.0f}", f"{row['largest'] / MIB:.0f}"]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
