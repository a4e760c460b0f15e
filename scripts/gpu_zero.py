"""What only GPUs can show of ZeRO's native path; `python scripts/gpu_check.py zero` runs it.

As many ranks as there are GPUs, over NCCL; on a single one its group of one rank takes the same path. Each case gives a
row: what, whether it holds, in what figures.

- the weights after five steps are those of one process with the whole batch, with fp32 and with bf16 on the wire
- a step waits for the device at most once (torch.cuda.set_sync_debug_mode)
- gradients take two buckets besides this rank's part (torch.cuda.max_memory_allocated)
- hooks on gradients see what was reduced, under ZeRO and DistributedDataParallel
- waiting for a collective behind a kernel of 200 ms does not hold the processor, with a timeout given too
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from shardopt import AdEMAMix, ZeroOptimizer
from shardopt.engines import gradient_hooks
from shardopt.engines.zero import optimizer as module
from shardopt.engines.zero.transports.backends import NativeCommunicator

Row = tuple[str, bool, str]  # what, whether it holds, in what figures
OPTIONS: dict[str, Any] = {"lr": 1e-3, "alpha": 5.0, "alpha_warmup": 10, "beta3_warmup": 10}
BUCKET_MB = 8


def _native(group: Any, device: torch.device, timeout: timedelta | None = None, *, in_flight: int = 1) -> Any:
    return NativeCommunicator(group, timeout, in_stream=True) if group is not None else real(group, device, timeout)


real = module.communicator


def _layers(count: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(count)]).cuda()


def _made(model: nn.Module, **options: Any) -> ZeroOptimizer:
    with mock.patch.object(module, "communicator", _native):
        return ZeroOptimizer(model, AdEMAMix, bucket_mb=BUCKET_MB, **OPTIONS, **options)


def _numbers(rank: int, world_size: int, wire: Any) -> Row:
    ours, alone = _layers(4), _layers(4)
    optimizer, reference = _made(ours, reduce_dtype=wire), AdEMAMix(list(alone.named_parameters()), **OPTIONS)
    for step in range(5):
        batches = [
            torch.randn(8, 1024, generator=torch.Generator().manual_seed(10 * step + r)) for r in range(world_size)
        ]
        with optimizer.accumulate():
            ours(batches[rank].cuda()).square().mean().backward()
        optimizer.step()
        for batch in batches:
            (alone(batch.cuda()).square().mean() / world_size).backward()
        reference.step()
        reference.zero_grad()
    pairs = zip(ours.parameters(), alone.parameters(), strict=True)
    difference = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    optimizer.close()
    return (
        f"numbers, {wire} on the wire",
        difference < (1e-5 if wire == "fp32" else 1e-2),
        f"differ by {difference:.1e}",
    )


def _waits(dtype: torch.dtype, optimizer_class: Any) -> Row:
    model = _layers(4).to(dtype)
    with mock.patch.object(module, "communicator", _native):
        optimizer = ZeroOptimizer(model, optimizer_class, bucket_mb=BUCKET_MB, lr=1e-3)
    x = torch.randn(8, 1024, device="cuda", dtype=dtype)
    for step in range(3):
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if step == 2 else "default")
            with optimizer.accumulate():
                model(x).square().mean().backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
    optimizer.close()
    found = [str(w.filename).rsplit("/", 1)[-1] + f":{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    name = f"{dtype}"[6:] + f", {optimizer_class.__name__}"
    return f"waits for the device in a step, {name}", len(found) <= 1, f"{len(found)} {' '.join(found)}"


def _peak(world_size: int) -> Row:
    model = _layers()
    optimizer = _made(model)
    x = torch.ones(1, 1024, device="cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with optimizer.accumulate():
            model(x).sum().backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        optimizer.step()
    optimizer.close()
    buckets = peak / (BUCKET_MB * 2**20)
    return "peak of a backward", buckets <= 2.3, f"{buckets:.2f} buckets of {BUCKET_MB} MiB"


def _hooks(kind: str) -> Row:
    """Statistics of gradients of 3, and a guard that a NaN on one rank stops on all."""
    from torch.nn.parallel import DistributedDataParallel

    model = nn.Linear(64, 8, bias=False).cuda()
    target: Any = _made(model) if kind == "zero" else DistributedDataParallel(model, [torch.cuda.current_device()])
    statistics = gradient_hooks.GradientStatistics()
    gradient_hooks.attach([statistics], target)
    (model if kind == "zero" else target)(torch.full((3, 64), 1.0, device="cuda")).sum().backward()
    if kind == "zero":
        target.step()
        target.close()
    torch.cuda.synchronize()
    largest = statistics.read()["largest"]
    return f"hooks on gradients, {kind}", largest == 3.0, f"largest {largest}"


def _processor() -> Row:
    comm = NativeCommunicator(dist.group.WORLD, timedelta(seconds=60), in_stream=True)
    flat = torch.ones(dist.get_world_size() * 1024, device="cuda")
    comm.reduce_scatter([[part] for part in flat.chunk(comm.size)]).finish(torch.empty(1024, device="cuda"), False)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    torch.cuda._sleep(int(0.2 * 1.5e9))
    reduction = comm.reduce_scatter([[part] for part in flat.chunk(comm.size)])
    reduction.finish(torch.empty(1024, device="cuda"), False)
    issued = time.perf_counter() - begun
    torch.cuda.synchronize()
    took = time.perf_counter() - begun
    return "the processor goes on while it waits", issued < took / 4, f"{1e3 * issued:.0f} of {1e3 * took:.0f} ms"


def _serve(rank: int, world_size: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("nccl", init_method=store, rank=rank, world_size=world_size)
    rows = [_numbers(rank, world_size, "fp32"), _numbers(rank, world_size, "bf16")]
    rows += [_waits(torch.float32, AdEMAMix), _waits(torch.bfloat16, AdEMAMix), _waits(torch.bfloat16, torch.optim.SGD)]
    rows += [_peak(world_size), _processor(), _hooks("zero"), _hooks("ddp")]
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, rows)
    if rank == 0:
        held = [all(each[i][1] for each in everyone) for i in range(len(rows))]
        text = "\n".join(f"{what}\t{int(ok)}\t{figures}" for (what, _, figures), ok in zip(rows, held, strict=True))
        Path(folder, "rows").write_text(text)
    dist.destroy_process_group()


def zero() -> list[Row]:
    """All cases, in processes of their own."""
    import torch.multiprocessing as processes

    world_size = torch.cuda.device_count()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_serve, (world_size, folder), nprocs=world_size)
        lines = [line.split("\t") for line in Path(folder, "rows").read_text().splitlines()]
    return [(f"ZeRO, {world_size} ranks: {what}", ok == "1", figures) for what, ok, figures in lines]
