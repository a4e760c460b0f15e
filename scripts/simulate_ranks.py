"""Messages, bytes and peak memory of ZeRO-2's gradients on many ranks: simulated, nothing is sent.

    python scripts/simulate_ranks.py [--ranks 8 64 1024] [--models 1.3B 8B] [--out bench/ranks]

One rank of torch's fake process group runs a backward of a model on the meta device through ZeroOptimizer itself, by
the path that NCCL takes. Counted are the collectives it starts, the part that each sends to one rank (a message of a
reduce-scatter's ring, or of the all-to-all that bf16 takes), the bytes that a rank sends, and the most that gradients
take at a time: waiting, packed, in flight and received, without this rank's own part; and what the rank holds besides
(its part of the state, in fp32). Times of a network are not simulated; "layout" is how long ZeroOptimizer takes to lay
out the parameters here. --out writes results.json, table.txt and a plot.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.bench_page import Line, Panel, draw, keep, table
from shardopt import AdEMAMix, ZeroOptimizer

SIZES = {
    "124M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
             "num_key_value_heads": 12},
    "1.3B": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}  # fmt: skip
MIB, GIB = 2**20, 2**30
STATE_BYTES = 12  # m1, m2 and nu of an element in fp32


def simulate(size: str, ranks: int, wire: str, bucket_mb: float | None) -> dict[str, Any]:
    """Counts of one backward."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        config = {"vocab_size": 32000, "num_key_value_heads": 8, "tie_word_embeddings": False} | SIZES[size]
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**config, use_cache=False))
        began = time.perf_counter()
        optimizer = ZeroOptimizer(model, AdEMAMix, bucket_mb=bucket_mb, reduce_dtype=wire, lr=1e-3)
        layout = time.perf_counter() - began
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
            "weights": sum(p.nbytes for p in model.parameters()),
            "state": STATE_BYTES * sum(part.numel() for part in optimizer.layouts),
            "layout": layout,
        }
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--models", choices=list(SIZES), nargs="+", default=list(SIZES))
    parser.add_argument("--out", type=Path, help="folder for results.json, table.txt and ranks.png")
    arguments = parser.parse_args()
    header = ["model", "ranks", "wire", "bucket_mb", "collectives", "in flight", "message, KiB", "sent, GiB"]
    header += ["peak, MiB", "largest gradient, MiB", "weights, GiB", "state, GiB", "layout, s"]
    found, rows = [], []
    for size in arguments.models:
        for ranks in arguments.ranks:
            for wire, bucket_mb in (("fp32", None), ("bf16", None), ("bf16", 25.0)):
                row = simulate(size, ranks, wire, bucket_mb)
                asked = f"{row['bucket'] / MIB:.0f}{' (given)' if bucket_mb else ''}"
                cells = [size, ranks, wire, asked, row["collectives"], row["in flight"], f"{row['message'] / 1024:.1f}"]
                cells += [f"{row['sent'] / GIB:.2f}", f"{row['peak'] / MIB:.0f}", f"{row['largest'] / MIB:.0f}"]
                cells += [f"{row['weights'] / GIB:.2f}", f"{row['state'] / GIB:.3f}", f"{row['layout']:.2f}"]
                found.append({"model": size, "ranks": ranks, "wire": wire, "bucket_mb": bucket_mb} | row)
                rows.append(cells)
                print(f"{size}, {ranks} ranks, {wire}: {row['layout']:.2f} s", file=sys.stderr)
    text = table(header, rows)
    print(text)
    if arguments.out is not None:
        keep(arguments.out, {"simulated": True, "rows": found}, text + "\n\nSimulated: nothing was sent.")
        plot(found, arguments.models, arguments.out / "ranks.png")


def plot(found: Sequence[dict[str, Any]], models: Sequence[str], target: Path) -> None:
    """What a rank holds and sends, and the time of the layout, over the number of ranks."""

    def lines(key: str, unit: float) -> dict[str, Line]:
        of = {
            m: [row for row in found if (row["model"], row["wire"], row["bucket_mb"]) == (m, "fp32", None)]
            for m in models
        }
        return {m: Line([row["ranks"] for row in rows], [row[key] / unit for row in rows]) for m, rows in of.items()}

    panels = [
        Panel(title, "ranks", unit, lines(key, scale), xscale="log", yscale="log")
        for title, key, unit, scale in (
            ("state held by a rank, fp32", "state", "GiB", GIB),
            ("gradients sent by a rank, fp32", "sent", "GiB a step", GIB),
            ("most gradients at a time", "peak", "MiB", MIB),
            ("layout of the parameters", "layout", "seconds", 1.0),
        )
    ]
    draw(panels, target, "SIMULATED: our ZeRO-2")


if __name__ == "__main__":
    main()
