"""Time of one optimizer step, ours and others', against fused AdamW. Prints tables.

    python scripts/bench_peers.py [--rounds 15] [--seconds 10] [--only NAME ...] [--plot docs/bench_step.png]

Everything runs in this one process. Each optimizer is timed in turn with fused AdamW, step by step, and the ratio is
the median over such pairs (so that another job on the machine slows both alike). Three shapes: one tensor of 50M,
500 tensors of 10,000, eight of 4096 x 4096 elements. "bytes" is what the update must move: weight and state read and
written, gradient read. "bytes alone" are loops that add the gradient to so many tensors and compute nothing else: what
the memory allows. "of copy" is the share of the bandwidth at which this machine copies 400 MB (`Tensor.copy_`).
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from scripts.bench_step import now, ours, parameters
from shardopt.optim.kernels.bytes_alone import bytes_alone

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "1 x 50M": [(50_000_000,)],
    "500 x 10k": [(10_000,)] * 500,
    "8 x 4096 x 4096": [(4096, 4096)] * 8,
}


class AuthorsLoop(torch.optim.Optimizer):
    """The paper's update as one writes it first: a Python loop over tensors, an operation at a time."""

    def __init__(self, params: list[Tensor], lr: float = 1e-3, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        beta1, beta2, beta3, alpha, eps = 0.9, 0.999, 0.9999, 5.0, 1e-8
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, m1=torch.zeros_like(p), m2=torch.zeros_like(p), nu=torch.zeros_like(p))
                state["step"] += 1
                m1, m2, nu, t, g = state["m1"], state["m2"], state["nu"], state["step"], p.grad
                m1.mul_(beta1).add_(g, alpha=1 - beta1)
                m2.mul_(beta3).add_(g, alpha=1 - beta3)
                nu.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                denominator = (nu / (1 - beta2**t)).sqrt().add_(eps)
                update = (m1 / (1 - beta1**t)).add_(m2, alpha=alpha).div_(denominator)
                p.add_(update.add_(p, alpha=group["weight_decay"]), alpha=-group["lr"])


def compiled_step(params: list[Tensor]) -> Callable[[], None]:
    """The same update as one torch.compile'd function over all tensors (20 s to compile)."""
    states = [[torch.zeros_like(p) for _ in range(3)] for p in params]
    count = torch.zeros(())

    def update(ps: list[Tensor], gs: list[Tensor], ss: list[list[Tensor]], t: Tensor) -> None:
        t.add_(1)
        for p, g, (m1, m2, nu) in zip(ps, gs, ss, strict=True):
            m1.mul_(0.9).add_(g, alpha=0.1)
            m2.mul_(0.9999).add_(g, alpha=1e-4)
            nu.mul_(0.999).addcmul_(g, g, value=1e-3)
            u = (m1 / (1 - 0.9**t) + 5.0 * m2) / ((nu / (1 - 0.999**t)).sqrt() + 1e-8)
            p.sub_(1e-3 * (u + 0.1 * p))

    compiled = torch.compile(update)

    @torch.no_grad()
    def step() -> None:
        compiled(params, [p.grad for p in params if p.grad is not None], states, count)

    return step


def streaming(changed: int) -> Callable[[list[Tensor]], Callable[[], object]]:
    """Bytes alone of fp32 parameters, one after the other."""
    loop = bytes_alone(4, [4] * changed)

    def build(params: list[Tensor]) -> Callable[[], None]:
        calls = [loop(p.numel()) for p in params]

        def step() -> None:
            for call in calls:
                call()

        return step

    return build


@dataclass
class Contender:
    name: str
    build: Callable[[list[Tensor]], Callable[[], object]]
    bytes_per_element: float
    weight: torch.dtype = torch.float32
    times: list[float] = field(default_factory=list)
    base: list[float] = field(default_factory=list)  # of the fused AdamW beside it

    @property
    def ratio(self) -> float:
        return statistics.median(a / b for a, b in zip(self.times, self.base, strict=True))


def contenders(tensors: int, device: str) -> list[Contender]:
    def adamw(**options: bool) -> Callable[[list[Tensor]], Callable[[], object]]:
        return lambda params: torch.optim.AdamW(params, weight_decay=0.1, **options).step

    def pytorch_optimizer(params: list[Tensor]) -> Callable[[], object]:
        from pytorch_optimizer import AdEMAMix

        return AdEMAMix(params, weight_decay=0.1, weight_decouple=True).step

    def bitsandbytes(params: list[Tensor]) -> Callable[[], object]:
        from bitsandbytes.optim import AdEMAMix

        return AdEMAMix(params, weight_decay=0.1).step

    bf16 = torch.bfloat16
    found = [
        Contender("torch AdamW fused", adamw(fused=True), 28),
        Contender("torch AdamW foreach", adamw(foreach=True), 28),
        Contender("shardopt fp32", ours(), 36),
        Contender("shardopt bf16", ours(state_dtype="bf16"), 24),
        Contender("shardopt block16", ours(state_dtype="block16"), 24.19),
        Contender("shardopt block8", ours(state_dtype="block8"), 18.19),
        Contender("shardopt bf16, bf16 weights", ours(state_dtype="bf16"), 18, bf16),
        Contender("shardopt bf16, split master", ours(state_dtype="bf16", master_weights="split"), 22, bf16),
        Contender("shardopt fp32, torch kernel", ours(kernel="torch"), 36),
        Contender("authors' loop", lambda params: AuthorsLoop(params).step, 36),
        Contender("pytorch-optimizer AdEMAMix", pytorch_optimizer, 36),
        Contender("bitsandbytes AdEMAMix", bitsandbytes, 36),
    ]
    if tensors <= 8:  # 500 tensors take minutes to compile
        found.insert(2, Contender("AdEMAMix, torch.compile", compiled_step, 36))
        if device == "cpu":
            found += [
                Contender("bytes alone, 4 read, 3 written", streaming(3), 28),
                Contender("bytes alone, 5 read, 4 written", streaming(4), 36),
            ]
    return found


def copy_bandwidth(device: str) -> Callable[[], float]:
    """Bytes read and written a second by a copy of 400 MB; call it again for another measurement."""
    source, target = (torch.ones(100_000_000, device=device) for _ in range(2))

    def measure() -> float:
        start = now(device)
        target.copy_(source)
        return 2 * source.numel() * 4 / (now(device) - start)

    return measure


def small_against_large(contender: Contender, rounds: int, device: str) -> float:
    """Time an element of 500 small tensors over that of one large tensor, in turn, four steps at a time.

    The first of the four is not counted: it finds nothing in the cache, as it would between a forward and backward.
    """
    sides = []
    for title in ("500 x 10k", "1 x 50M"):
        params = parameters(SHAPES[title], contender.weight, device)
        sides.append((contender.build(params), sum(p.numel() for p in params)))
        sides[-1][0]()  # creates the state
    ratios = []
    for _ in range(rounds):
        each = []
        for step, elements in sides:
            times = []
            for _ in range(4):
                begin = now(device)
                step()
                times.append(now(device) - begin)
            each.append(statistics.median(times[1:]) / elements)
        ratios.append(each[0] / each[1])
    return statistics.median(ratios)


def measure(
    shapes: list[tuple[int, ...]], rounds: int, seconds: float, only: list[str], device: str
) -> tuple[list[Contender], float]:
    """Contenders with their times, and the median copy bandwidth in bytes a second."""
    chosen = [c for c in contenders(len(shapes), device) if not only or any(word in c.name for word in only)]
    copy = copy_bandwidth(device)
    copies = [copy() for _ in range(3)]
    for contender in chosen:
        sets = {dtype: parameters(shapes, dtype, device) for dtype in {chosen[0].weight, contender.weight}}
        try:
            steps = [c.build(sets[c.weight]) for c in (chosen[0], contender)]
            for step in steps * 2:  # creates the state, compiles
                step()
        except Exception as e:
            warnings.warn(f"{contender.name} is left out: {type(e).__name__}: {str(e)[:200]}", stacklevel=1)
            continue
        start = time.perf_counter()
        for number in range(rounds):
            for times, step in zip((contender.base, contender.times), steps, strict=True):
                begin = now(device)
                step()
                times.append(now(device) - begin)
            if time.perf_counter() - start > seconds and number >= 2:
                break
        copies.append(copy())
        del sets, steps
        gc.collect()
    return [c for c in chosen if c.times], statistics.median(copies)


def table(title: str, shapes: list[tuple[int, ...]], found: list[Contender], copy: float) -> str:
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    lines = [
        f"### {title}: {max(len(c.times) for c in found)} rounds, copy {copy / 1e9:.1f} GB/s",
        "",
        f"| optimizer | ms | against {found[0].name} | ns per element | bytes per element | GB/s | of copy |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in found:
        seconds = statistics.median(c.times)
        rate = c.bytes_per_element * elements / seconds
        lines.append(
            f"| {c.name} | {seconds * 1e3:.2f} | {c.ratio:.2f} | {seconds / elements * 1e9:.3f} | "
            f"{c.bytes_per_element:g} | {rate / 1e9:.1f} | {rate / copy:.0%} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, list[Contender]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(6 * len(results), 5), squeeze=False)
    for axis, (title, found) in zip(axes[0], results.items(), strict=True):
        names, ratios = [c.name for c in found], [c.ratio for c in found]
        axis.barh(names, ratios, color=["tab:orange" if "shardopt" in name else "tab:blue" for name in names])
        axis.bar_label(axis.containers[0], fmt=" %.2f")
        axis.axvline(1.0, color="black", linewidth=0.5)
        axis.set(title=f"{title}, time of a step", xscale="log", xlabel=f"{found[0].name} = 1")
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=10, help="for each optimizer and shape, at most about")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--only", nargs="*", default=[], help="contenders whose name holds one of these words")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--plot", type=Path, help="a picture to draw")
    arguments = parser.parse_args()
    threads = torch.get_num_threads() if arguments.device == "cpu" else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {threads} threads or GPU\n")
    results = {}
    for title in arguments.shapes:
        only = ["torch AdamW fused", *arguments.only] if arguments.only else []
        found, copy = measure(SHAPES[title], arguments.rounds, arguments.seconds, only, arguments.device)
        print(table(title, SHAPES[title], found, copy), end="\n\n", flush=True)
        results[title] = found
        gc.collect()
    if {"1 x 50M", "500 x 10k"} <= set(results):
        print("500 tensors of 10k against one of 50M, per element, in turn:")
        for contender in [c for c in results["500 x 10k"] if c.name.startswith("shardopt")]:
            print(f"  {contender.name}: {small_against_large(contender, arguments.rounds, arguments.device):.2f}")
    if arguments.plot is not None:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
