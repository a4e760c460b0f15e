"""Step time and memory of our ZeRO against the engines people use now, on this machine's CPU ranks.

    OMP_NUM_THREADS=1 python scripts/bench_engines.py [--only NAME ...] [--rounds 20] [--out docs]
    python scripts/bench_engines.py --layouts        only lay out large models for many ranks, and time that

Each contender has rank processes of its own (gloo, one thread each). They take turns, a short burst of steps at a
time, so that a slow minute of the machine is slow for all; those that do not fit into memory together run in
batches, each with the baseline in it, and every ratio is against the baseline of the same batch.

The baseline is DDP whose gradients are views of its buckets, with fused AdamW: the best that comes with torch.

Step time: median and minimum over rounds of a burst's mean, after one untimed step; the minima are there for machines
that others use too. Peak memory: the highest resident size of a rank over its bursts, above what it had before the
model was built (so imports do not count). Nothing is written unless --out names a folder.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BASELINE = "DDP (gradient_as_bucket_view) + AdamW"
ADAMW = {"lr": 1e-3, "weight_decay": 0.1, "fused": True}
ADEMAMIX = {"lr": 1e-3, "weight_decay": 0.1, "alpha": 5.0, "alpha_warmup": 1000, "beta3_warmup": 1000}
BF16 = ADEMAMIX | {"state_dtype": "bf16"}

# name: (host, its settings, optimizer, hyper-parameters)
CONTENDERS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    BASELINE: ("ddp", {"gradient_as_bucket_view": True}, "adamw", ADAMW),
    "DDP + AdamW": ("ddp", {}, "adamw", ADAMW),
    "DDP + AdEMAMix": ("ddp", {}, "ademamix", ADEMAMIX),
    "DDP + AdEMAMix bf16": ("ddp", {}, "ademamix", BF16),
    "ZeRO-1 + AdamW": ("zero", {"stage": 1}, "adamw", ADAMW),
    "ZeRO-2 + AdamW": ("zero", {"stage": 2}, "adamw", ADAMW),
    "ZeRO-1 + AdEMAMix": ("zero", {"stage": 1}, "ademamix", ADEMAMIX),
    "ZeRO-2 + AdEMAMix": ("zero", {"stage": 2}, "ademamix", ADEMAMIX),
    "ZeRO-1 + AdEMAMix, by sockets": ("zero", {"stage": 1, "sockets": True}, "ademamix", ADEMAMIX),
    "ZeRO-2 + AdEMAMix, by sockets": ("zero", {"stage": 2, "sockets": True}, "ademamix", ADEMAMIX),
    "ZeRO-1 + AdEMAMix bf16": ("zero", {"stage": 1}, "ademamix", BF16),
    "ZeRO-2 + AdEMAMix bf16": ("zero", {"stage": 2}, "ademamix", BF16),
    "ZeroRedundancyOptimizer + AdamW": ("zro", {}, "adamw", ADAMW),
    "ZeroRedundancyOptimizer + AdEMAMix": ("zro", {}, "ademamix", ADEMAMIX),
    "FSDP2 + AdamW": ("fsdp", {"reshard": False}, "adamw", ADAMW),
    "FSDP2 + AdEMAMix": ("fsdp", {"reshard": False}, "ademamix", ADEMAMIX),
    "FSDP2 resharding + AdamW": ("fsdp", {"reshard": True}, "adamw", ADAMW),
    "FSDP2 resharding + AdEMAMix": ("fsdp", {"reshard": True}, "ademamix", ADEMAMIX),
    "DeepSpeed ZeRO-1 + AdamW": ("deepspeed", {"stage": 1}, "adamw", ADAMW),
    "DeepSpeed ZeRO-2 + AdamW": ("deepspeed", {"stage": 2}, "adamw", ADAMW),
    "DeepSpeed ZeRO-3 + AdamW": ("deepspeed", {"stage": 3}, "adamw", ADAMW),
    "DeepSpeed ZeRO-1 + AdEMAMix": ("deepspeed", {"stage": 1}, "ademamix", ADEMAMIX),
    "DeepSpeed ZeRO-2 + AdEMAMix": ("deepspeed", {"stage": 2}, "ademamix", ADEMAMIX),
    "DeepSpeed ZeRO-3 + AdEMAMix": ("deepspeed", {"stage": 3}, "ademamix", ADEMAMIX),
}
# name: at most so many times that contender's step or peak memory
TARGETS: dict[str, list[tuple[str, float, str]]] = {}
for _stage in (1, 2):
    TARGETS[f"ZeRO-{_stage} + AdEMAMix"] = [
        ("ms", 0.90, BASELINE),
        ("ms", 0.40, "DeepSpeed ZeRO-2 + AdEMAMix"),
        ("peak_mb", 1.00, "DDP + AdEMAMix"),
        ("peak_mb", 1.00, "ZeroRedundancyOptimizer + AdEMAMix"),
        ("peak_mb", 1.00, f"DeepSpeed ZeRO-{_stage} + AdEMAMix"),
    ]
    TARGETS[f"ZeRO-{_stage} + AdEMAMix, by sockets"] = [("ms", 1.05, BASELINE)]


def llama() -> Any:
    """33.7M parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def optimizer_class(name: str) -> Any:
    import torch

    from shardopt import AdEMAMix

    return {"adamw": torch.optim.AdamW, "ademamix": AdEMAMix}[name]


def ddp(model: Any, settings: dict[str, Any], cls: Any, kwargs: dict[str, Any]) -> Callable[[Any], None]:
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(model, **settings)
    return plain_step(wrapped, cls(list(model.named_parameters()), **kwargs))


def zro(model: Any, settings: dict[str, Any], cls: Any, kwargs: dict[str, Any]) -> Callable[[Any], None]:
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(model)
    return plain_step(wrapped, ZeroRedundancyOptimizer(model.parameters(), cls, **kwargs))


def fsdp(model: Any, settings: dict[str, Any], cls: Any, kwargs: dict[str, Any]) -> Callable[[Any], None]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=settings["reshard"])
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return plain_step(model, cls(list(model.named_parameters()), **kwargs))


def plain_step(model: Any, optimizer: Any) -> Callable[[Any], None]:
    def step(tokens: Any) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def zero(model: Any, settings: dict[str, Any], cls: Any, kwargs: dict[str, Any]) -> Callable[[Any], None]:
    from shardopt import ZeroOptimizer
    from shardopt.engines.zero.transports import shared_memory

    if settings.get("sockets"):  # as where the ranks may not read each other's memory
        shared_memory.join = lambda *_: None  # type: ignore[assignment]
    optimizer = ZeroOptimizer(model, cls, stage=settings["stage"], overlap_gather=model.model.layers, **kwargs)
    assert optimizer.transport == ("sockets" if settings.get("sockets") else "memory")

    def step(tokens: Any) -> None:
        with optimizer.accumulate(last=True):
            model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def deepspeed(model: Any, settings: dict[str, Any], cls: Any, kwargs: dict[str, Any]) -> Callable[[Any], None]:
    import deepspeed as ds

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": settings["stage"]},
        "steps_per_print": 10**9,
    }
    engine, *_ = ds.initialize(
        model=model,
        optimizer=cls(list(model.parameters()), **kwargs),
        config=config,
        dist_init_required=False,
    )

    def step(tokens: Any) -> None:
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()

    return step


HOSTS = {"ddp": ddp, "zro": zro, "fsdp": fsdp, "zero": zero, "deepspeed": deepspeed}


def resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def serve(name: str, rank: int, world_size: int, folder: str, pipe: Any) -> None:
    """One rank: build the contender, then run the bursts that the parent asks for."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.dup2(2, 1)  # what DeepSpeed says of itself is no part of the table
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    host, settings, optimizer, kwargs = CONTENDERS[name]
    if host == "deepspeed":
        import deepspeed as ds
        from deepspeed.accelerator import get_accelerator

        get_accelerator()
        ds.init_distributed("gloo", dist_init_required=False)
    cls = optimizer_class(optimizer)
    before = resident("VmRSS")
    torch.manual_seed(0)
    model = llama()
    step = HOSTS[host](model, settings, cls, kwargs)
    gc.collect()
    generator = torch.Generator().manual_seed(rank)
    pipe.send(sum(p.numel() for p in model.parameters()))
    while (steps := pipe.recv()) is not None:
        batches = [torch.randint(8192, (1, 64), generator=generator) for _ in range(steps + 1)]
        step(batches[0])
        dist.barrier()
        begin = time.perf_counter()
        for tokens in batches[1:]:
            step(tokens)
        model.state_dict()  # the last step lasts until its weights are there
        dist.barrier()
        pipe.send(((time.perf_counter() - begin) / steps, resident("VmHWM") - before))
    dist.destroy_process_group()


class Contender:
    def __init__(self, name: str, world_size: int) -> None:
        self.name, self.seconds, self.peak = name, [], 0
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(name, rank, world_size, self.folder.name, theirs))
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        counts = [pipe.recv() for pipe in self.pipes]  # every rank has built its model
        self.parameters = counts[0]

    def burst(self, steps: int, timed: bool) -> None:
        for pipe in self.pipes:
            pipe.send(steps)
        replies = [pipe.recv() for pipe in self.pipes]
        if timed:
            self.seconds.append(max(seconds for seconds, _ in replies))
            self.peak = max(self.peak, *(peak for _, peak in replies))

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(20)
            if process.is_alive():  # DeepSpeed leaves threads behind
                process.kill()
                process.join()
        self.folder.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), help="contenders; the baseline always runs")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--burst", type=int, default=3, help="timed steps a turn")
    parser.add_argument("--batch", type=int, default=8, help="contenders in memory together")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for engines.json, engines.md and engines.png")
    parser.add_argument("--layouts", action="store_true")
    arguments = parser.parse_args()
    if arguments.layouts:
        layouts()
        return
    names = [name for name in arguments.only if name != BASELINE]
    rows: dict[str, dict[str, Any]] = {}
    size = arguments.batch - 1
    for first in range(0, max(1, len(names)), size):
        batch = [Contender(name, arguments.ranks) for name in [BASELINE, *names[first : first + size]]]
        for round_number in range(arguments.rounds + 1):
            for contender in batch:
                contender.burst(arguments.burst, timed=round_number > 0)
        base, least = statistics.median(batch[0].seconds), min(batch[0].seconds)
        for contender in batch:
            if contender.name in rows:
                continue
            median = statistics.median(contender.seconds)
            rows[contender.name] = {
                "ms": 1e3 * median,
                "min_ms": 1e3 * min(contender.seconds),
                "ratio": median / base,
                "min_ratio": min(contender.seconds) / least,
                "peak_mb": contender.peak / 1e6,
                "parameters": contender.parameters,
            }
            row = rows[contender.name]
            line = f"{contender.name:40} {row['ms']:8.0f} ms {row['ratio']:6.2f} {row['min_ratio']:6.2f}"
            print(line, file=sys.stderr, flush=True)
        for contender in batch:
            contender.end()
    report(rows, arguments)


def layouts() -> None:
    """Buckets for large models on many ranks, by arithmetic alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from shardopt.engines.zero.buckets import lay_out
    from shardopt.slices import named_parameters

    sizes = {"1.3B": (2048, 5504, 24, 16), "8B": (4096, 14336, 32, 32)}
    print("| model | ranks | buckets | padding, % | laid out in, s |\n|---|--:|--:|--:|--:|")
    for name, (hidden, intermediate, blocks, heads) in sizes.items():
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=8,
            tie_word_embeddings=False,
        )
        with torch.device("meta"):
            named = [(n, tuple(p.shape), p.dtype) for n, p in named_parameters(LlamaForCausalLM(config))]
        for ranks in (8, 64, 1024):
            begin = time.perf_counter()
            buckets = lay_out(named, ranks, 25 * 2**20)
            seconds = time.perf_counter() - begin
            held = sum(m.numel for b in buckets for m in b.members)
            padding = 100 * (1 - held / sum(b.numel for b in buckets))
            print(f"| {name} | {ranks} | {len(buckets)} | {padding:.4f} | {seconds:.2f} |")


def report(rows: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    from scripts.bench_all import machine

    about = machine()
    header = (
        f"{rows[BASELINE]['parameters'] / 1e6:.1f}M-parameter Llama, 64 tokens a rank, {arguments.ranks} ranks on "
        f"gloo, one thread each, {about['cores']} cores of {about['processor']}, torch {about['torch']}, commit "
        f"{about['commit']}; median of {arguments.rounds} bursts of {arguments.burst} steps, interleaved. Contenders "
        f"that did not fit into memory together ran in batches of {arguments.batch}: every ratio is against the "
        f"baseline beside it: compare ratios, not milliseconds. ZeRO's ranks read each other's memory, but for those "
        f"by sockets: what remains where that is forbidden (kernel.yama.ptrace_scope above 0, some containers) and "
        f"between hosts. Made by scripts/bench_engines.py --batch {arguments.batch}"
    )
    columns = ["engine + optimizer", "step, ms", "minimum, ms", "× baseline", "minima", "peak memory a rank, MB"]
    lines = [header, "", f"| {' | '.join(columns)} |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[key]:.0f}" for key in ("ms", "min_ms")]
        cells += [f"{row[key]:.2f}" for key in ("ratio", "min_ratio")]
        lines.append(f"| {' | '.join([name, *cells, format(row['peak_mb'], '.0f')])} |")
    lines.append("")
    for name, targets in TARGETS.items():
        for key, limit, other in targets:
            if name in rows and other in rows:
                # Times of different batches are compared by way of the baseline, which ran in both.
                by = "ratio" if key == "ms" else key
                ratio = rows[name][by] / rows[other][by]
                what = "the step" if key == "ms" else "the peak memory"
                verdict = "met" if ratio <= limit else "NOT met"
                least = f", by minima {rows[name]['min_ratio'] / rows[other]['min_ratio']:.2f}" if key == "ms" else ""
                lines.append(f"- {name}: {ratio:.2f} × {what} of {other}{least} (at most {limit:.2f}: {verdict})")
    text = "\n".join(lines)
    print(text)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "engines.json").write_text(json.dumps({"about": header, "rows": rows}, indent=1) + "\n")
        (arguments.out / "engines.md").write_text(text + "\n")
        plot(rows, header, arguments.out / "engines.png")


def plot(rows: dict[str, dict[str, Any]], header: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(rows)[::-1]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 0.32 * len(names) + 1.4), sharey=True)
    for axis, key, label in ((axes[0], "ms", "step, ms"), (axes[1], "peak_mb", "peak memory a rank, MB")):
        colours = ["tab:blue" if n.startswith("ZeRO-") else "tab:gray" for n in names]
        axis.barh(names, [rows[n][key] for n in names], color=colours)
        axis.axvline(rows[BASELINE][key], color="black", linewidth=0.8, linestyle=":")
        axis.set_xlabel(label)
    figure.suptitle(header.split(". ")[0], fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
