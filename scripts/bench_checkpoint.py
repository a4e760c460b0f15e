"""How long training stops for a checkpoint, and how long saving and loading take, beside dcp and DeepSpeed.

    OMP_NUM_THREADS=1 python scripts/bench_checkpoint.py                                     # 33.7M, short
    OMP_NUM_THREADS=1 python scripts/bench_checkpoint.py --sizes 33.7M 124M --rounds 15 --out docs

Two ranks on gloo hold the same model under FSDP2, DeepSpeed ZeRO-2 and our ZeRO-2, with AdEMAMix's fp32 state. Each
round does every operation once, in turn, between barriers; an operation takes as long as its slower rank.

- copy: the bytes that a save writes, each rank its own file's, to memory: new memory (the system hands out zeroed
  pages) or memory that was used before. A save in the background cannot stop training for less.
- stall: until `Saver.save`, in the background, returns. Then training goes on, and the write is waited for untimed.
- save: `checkpoint.save`, synced to the disk and checksummed. dcp.save syncs, without checksums; DeepSpeed does
  neither: "and synced" syncs its files too.
- load: from the page cache. Ours checks every checksum.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from shardopt import checkpoint, engines
from shardopt.distributed import Ranks
from shardopt.engines import DeepspeedConfig, FsdpConfig, ZeroConfig
from shardopt.engines.base import Engine, EngineInputs
from shardopt.optim import registry
from tests.distributed.pool import on_ranks

RANKS = 2
# vocabulary, width, width of the MLP, blocks, tied embeddings
SIZES = {"33.7M": (8192, 512, 1376, 8, False), "124M": (50304, 768, 2048, 12, True)}
CONFIGS = {"fsdp": FsdpConfig(), "deepspeed-2": DeepspeedConfig(stage=2), "zero-2": ZeroConfig(stage=2)}
COPY, COPY_AGAIN = "copy to new memory", "copy to used memory"
STALL, DCP_STALL = "stall of Saver.save", "stall of dcp.async_save"
# operation: at most so many times another one of the same engine
TARGETS = [
    (STALL, 1.5, COPY),
    ("checkpoint.save", 1.0, "dcp.save"),
    ("checkpoint.load", 1.0, "dcp.load"),
    ("checkpoint.save", 1.0, "save_checkpoint and synced"),
    ("checkpoint.load", 1.0, "load_checkpoint"),
]


def llama(size: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, width, mlp, blocks, tied = SIZES[size]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=blocks,
            num_attention_heads=width // 64,
            tie_word_embeddings=tied,
            use_cache=False,
        )
    )


# -- on every rank --------------------------------------------------------------------------------------------------


class Contender:
    """An engine whose state is saved and loaded in every way there is, below `root`."""

    def __init__(self, name: str, size: str, root: Path, rank: int) -> None:
        torch.manual_seed(0)
        model = llama(size)
        ranks = Ranks(rank, RANKS, rank, torch.device("cpu"), True)
        inputs = EngineInputs(
            ranks, model, lambda _: None, registry.spec("ademamix", lr=1e-3), list(model.model.layers)
        )
        self.name, self.root, self.rank = name, root / name, rank
        self.engine: Engine = engines.build(CONFIGS[name], inputs)
        self.engine.state.init()
        generator = torch.Generator().manual_seed(rank)
        for s in self.engine.state.slices():
            if s.kind not in ("weight", "buffer"):  # zeros are read and written faster
                s.tensors[0].detach().uniform_(generator=generator)
        self.saver = checkpoint.Saver(self.root / "saver", 1, ranks=ranks, asynchronous=True)
        self.gloo = dist.new_group(backend="gloo")
        self.step = 0
        checkpoint.save(self.root / "size", self.engine.state)
        own = self.root / "size" / f"rank-{rank:05d}.data"
        self.source = torch.ones(own.stat().st_size, dtype=torch.uint8)
        self.target = torch.ones_like(self.source)

    def operations(self) -> dict[str, tuple[Callable[[], Any], Callable[[Any], None]]]:
        """By name: what is timed, and what follows it untimed, with its result."""
        state, root = self.engine.state, self.root

        def nothing(_: Any) -> None:
            pass

        def emptied(_: Any) -> None:
            """So that no save overwrites, or removes, what another has written, and each finds as much freed memory."""
            dist.barrier()
            written = [root / folder for folder in ("ours", "dcp", "deepspeed")]
            for folder in (*written, *self.saver.root.glob("step-*")) if self.rank == 0 else ():
                shutil.rmtree(folder, ignore_errors=True)

        def waited(_: Any) -> None:
            self.saver.wait()
            emptied(_)

        def background() -> None:
            self.step += 1
            self.saver.save(self.step, state)

        found: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
            COPY: (self.source.clone, nothing),
            COPY_AGAIN: (lambda: self.target.copy_(self.source), nothing),
            STALL: (background, waited),
            "checkpoint.save": (lambda: checkpoint.save(root / "ours", state), nothing),
            "checkpoint.load": (lambda: checkpoint.load(root / "ours", state), emptied),
        }
        if self.name == "fsdp":
            whole = plain_state(self.engine)

            def finished(response: Any) -> None:
                response.result()
                emptied(response)

            found[DCP_STALL] = (
                lambda: dcp.async_save(whole, checkpoint_id=root / "dcp", process_group=self.gloo),
                finished,
            )
            found["dcp.save"] = (lambda: dcp.save(whole, checkpoint_id=root / "dcp"), nothing)
            found["dcp.load"] = (lambda: dcp.load(whole, checkpoint_id=root / "dcp"), emptied)
        if self.name == "deepspeed-2":
            host, folder = self.engine.model, root / "deepspeed"

            def synced() -> None:
                host.save_checkpoint(folder, tag="now")
                # Of rank 0 are all files that do not bear another rank's number.
                for path in folder.glob(f"now/*rank_{self.rank}_*" if self.rank else "now/*"):
                    with path.open("rb") as file:
                        os.fsync(file.fileno())

            found["save_checkpoint"] = (lambda: host.save_checkpoint(folder, tag="now"), emptied)
            found["save_checkpoint and synced"] = (synced, nothing)
            found["load_checkpoint"] = (lambda: host.load_checkpoint(folder, tag="now"), emptied)
        return found


def plain_state(engine: Engine) -> dict[str, Any]:
    """FSDP2's weights and state as a flat state dict of DTensors."""
    tensors: dict[str, Any] = {}
    for name, param in engine.model.named_parameters():
        tensors[name] = param.detach()
        tensors |= {f"{name}/{k}": v for k, v in engine.optimizer.state[param].items() if isinstance(v, torch.Tensor)}
    return tensors


_contenders: list[Contender] = []  # of this rank process


def build(rank: int, world_size: int, size: str, names: list[str], root: Path) -> tuple[int, dict[str, int]]:
    """The number of parameters, and for each engine the bytes that this rank writes."""
    _contenders[:] = [Contender(name, size, root, rank) for name in names]
    return sum(p.numel() for p in llama(size).parameters()), {c.name: c.source.numel() for c in _contenders}


def turn(rank: int, world_size: int) -> dict[tuple[str, str], float]:
    """Seconds of every operation of every engine, done once."""
    seconds = {}
    for contender in _contenders:
        for name, (timed, after) in contender.operations().items():
            dist.barrier()
            begin = time.perf_counter()
            result = timed()
            seconds[contender.name, name] = time.perf_counter() - begin
            after(result)
            del result
    return seconds


def end(rank: int, world_size: int) -> None:
    while _contenders:
        contender = _contenders.pop()
        contender.saver.close()
        contender.engine.close()


# -- in the process that leads --------------------------------------------------------------------------------------


def measure(size: str, names: list[str], rounds: int, root: Path) -> dict[str, Any]:
    """Median and least milliseconds by engine and operation, and the bytes that the ranks write."""
    built = on_ranks(RANKS, build, size, names, root, timeout=600)
    taken: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        replies = on_ranks(RANKS, turn, timeout=600)
        for key in replies[0] if number else ():  # the first round makes files and buffers
            taken.setdefault(key, []).append(1e3 * max(reply[key] for reply in replies))
        print(f"{size}: round {number} of {rounds}", file=sys.stderr, flush=True)
    on_ranks(RANKS, end)
    rows: dict[str, dict[str, dict[str, float]]] = {name: {} for name in names}
    for (name, operation), ms in taken.items():
        rows[name][operation] = {"median_ms": statistics.median(ms), "min_ms": min(ms)}
    written = {name: sum(sizes[name] for _, sizes in built) for name in names}
    return {"parameters": built[0][0], "bytes": written, "rows": rows}


def report(results: dict[str, Any], rounds: int) -> str:
    header = (
        f"AdEMAMix with fp32 state on {RANKS} ranks on gloo, one thread each, {os.cpu_count()} cores "
        f"({platform.machine()}), torch {torch.__version__}; {rounds} rounds of all operations in turn"
    )
    lines = [
        header,
        "",
        "| parameters | engine | operation | median, ms | least, ms | × copy |",
        "|---|---|---|--:|--:|--:|",
    ]
    for size, result in results.items():
        for engine, rows in result["rows"].items():
            for operation, row in rows.items():
                ratio = row["min_ms"] / rows[COPY]["min_ms"]
                times = f"{row['median_ms']:.0f} | {row['min_ms']:.0f} | {ratio:.2f}"
                lines.append(f"| {size} | {engine}, {result['bytes'][engine] / 1e6:.0f} MB | {operation} | {times} |")
    lines.append("")
    for size, result in results.items():
        for engine, rows in result["rows"].items():
            for operation, limit, other in TARGETS:
                if operation in rows and other in rows:
                    by_median, by_least = (rows[operation][k] / rows[other][k] for k in ("median_ms", "min_ms"))
                    verdict = "met" if by_median <= limit else "NOT met"
                    ratio = f"{by_median:.2f} × {other} by medians, {by_least:.2f} × by the least"
                    lines.append(f"- {size}, {engine}: {operation} {ratio} (at most {limit:.2f}: {verdict})")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(6.5 * len(results), 5), squeeze=False)
    for axis, (size, result) in zip(axes[0], results.items(), strict=True):
        bars = [(f"{e}: {o}", row["median_ms"]) for e, rows in result["rows"].items() for o, row in rows.items()][::-1]
        ours = ("Saver", "checkpoint.")
        colours = ["tab:blue" if any(word in label for word in ours) else "tab:gray" for label, _ in bars]
        axis.barh([label for label, _ in bars], [ms for _, ms in bars], color=colours)
        axis.set_xlabel("median, ms")
        axis.set_title(f"{size} parameters, {RANKS} ranks", fontsize=9)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["33.7M"], choices=list(SIZES))
    parser.add_argument("--only", nargs="*", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--root", type=Path, help="a folder on the disk to write to; default: a temporary one")
    parser.add_argument("--out", type=Path, help="folder for bench_checkpoint.json, .md and .png")
    arguments = parser.parse_args()
    results = {}
    for size in arguments.sizes:
        folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=arguments.root))
        try:
            results[size] = measure(size, arguments.only, arguments.rounds, folder)
        finally:
            shutil.rmtree(folder)
    text = report(results, arguments.rounds)
    print(text)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "bench_checkpoint.json").write_text(json.dumps(results, indent=1) + "\n")
        (arguments.out / "bench_checkpoint.md").write_text(text + "\n")
        plot(results, arguments.out / "bench_checkpoint.png")


if __name__ == "__main__":
    main()
