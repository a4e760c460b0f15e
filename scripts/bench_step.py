"""Time of one step of AdEMAMix, against what its bytes alone take and against fused AdamW. Prints a table of targets.

    python scripts/bench_step.py [--rounds 15] [--seconds 10] [--elements 50000000]
    python scripts/bench_step.py --cached        # the arithmetic alone; also on a machine that others use

Everything runs in this one process, and what is compared takes turns, step by step, so that another job on the machine
slows all alike: a ratio is the median over such turns, with the ratio of the minima beside it. "bytes alone" is a loop
over the very bytes of the step (weight and state read and written, gradient read) that only adds: what the memory
allows. Other optimizers: scripts/bench_peers.py.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import shardopt
from shardopt.optim.kernels import choose
from shardopt.optim.kernels.bytes_alone import bytes_alone
from shardopt.optim.kernels.cpu import CpuKernel


def ours(**options: object) -> Callable[[list[Tensor]], Callable[[], object]]:
    return lambda params: shardopt.AdEMAMix(params, weight_decay=0.1, **options).step  # type: ignore[arg-type]


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    made: list[Tensor] = []
    for shape in shapes:
        value = torch.randn(shape, generator=generator, device=device)
        made.append(torch.nn.Parameter((0.02 * value).to(dtype)))
        made[-1].grad = (0.01 * value).to(dtype)
    return made


@dataclass
class Case:
    """A kind of step over one large tensor, and its targets."""

    name: str
    options: dict[str, object]
    bytes_target: float
    adamw_target: float | None = None
    weight: torch.dtype = torch.float32
    grad: torch.dtype | None = None

    def params(self, elements: int) -> list[Tensor]:
        (param,) = parameters([(elements,)], self.weight, "cpu")
        if self.grad is not None:
            value, param.grad = param.grad, None
            param.grad_dtype = self.grad
            param.grad = value.to(self.grad)  # type: ignore[union-attr]
        return [param]


BF16 = torch.bfloat16
CASES = [
    Case("fp32 state", {}, 1.05),
    Case("bf16 state", {"state_dtype": "bf16"}, 1.05, 0.92),
    Case("block16 state", {"state_dtype": "block16"}, 1.3, 1.0),
    Case("block8 state", {"state_dtype": "block8"}, 1.3, 1.0),
    Case("bf16 weights and state", {"state_dtype": "bf16"}, 1.1, weight=BF16),
    Case("bf16 weights and state, fp32 gradients", {"state_dtype": "bf16"}, 1.1, weight=BF16, grad=torch.float32),
    Case("the same, fp32 master", {"state_dtype": "bf16", "master_weights": "fp32"}, 1.1, weight=BF16),
    Case("the same, split master", {"state_dtype": "bf16", "master_weights": "split"}, 1.1, weight=BF16),
    Case("fp32 state and average", {"weight_ema": 0.99}, 1.3),
    Case("bf16 state and average", {"state_dtype": "bf16", "weight_ema": 0.99}, 1.3),
    Case("m1, nu fp32, m2 bf16", {"state_dtype": {"m2": "bf16"}}, 1.3),
    Case("m1 bf16, m2 block16, nu block8", {"state_dtype": {"m1": "bf16", "m2": "block16", "nu": "block8"}}, 1.3),
]


def cached(calls: int) -> None:
    """Nanoseconds per element of the C kernel alone, one thread, in the cache: minima of many short calls.

    Two sizes are timed, and the difference told, which is without what a call costs.
    """
    kernel = choose("c", torch.ones(1))
    assert isinstance(kernel, CpuKernel)
    step, sizes = kernel._step, (4096, 16384)
    seconds: list[float] = []

    def timed(*arguments: object) -> None:
        begin = time.perf_counter()
        step(*arguments)
        seconds.append(time.perf_counter() - begin)

    print("| in the cache, one thread | ns per element |\n|---|---|")
    torch.set_num_threads(1)
    kernel._step = timed  # type: ignore[assignment]
    for case in CASES:
        best = []
        for size in sizes:
            optimizer_step = ours(**case.options)(case.params(size))
            seconds.clear()
            for _ in range(calls):
                optimizer_step()
            best.append(min(seconds))
        print(f"| {case.name} | {(best[1] - best[0]) / (sizes[1] - sizes[0]) * 1e9:.2f} |", flush=True)


def in_turn(steps: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each, taking turns, for about so long in all."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in [*steps.values()] * 2:  # creates state, warms up
        step()
    start = time.perf_counter()
    for number in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
        if time.perf_counter() - start > seconds and number >= 4:
            break
    return times


def against(times: dict[str, list[float]], name: str, base: str, scale: float = 1.0) -> tuple[float, float]:
    """Ratio of two in the median over turns, and of their minima."""
    pairs = zip(times[name], times[base], strict=True)
    return statistics.median(a / b for a, b in pairs) * scale, min(times[name]) / min(times[base]) * scale


def verdict(what: str, found: tuple[float, float], target: float, unit: str = "") -> str:
    met = "yes" if found[0] <= target else "no, but the minima" if found[1] <= target else "no"
    return f"| {what} | {found[0]:.3g} ({found[1]:.3g}){unit} | {target:g}{unit} | {met} |"


def large_steps(elements: int, rounds: int, seconds: float) -> None:
    adamw = torch.optim.AdamW(parameters([(elements,)], torch.float32, "cpu"), fused=True, weight_decay=0.1)
    for case in CASES:
        (param,) = case.params(elements)
        optimizer = shardopt.AdEMAMix([("w", param)], weight_decay=0.1, **case.options)  # type: ignore[arg-type]
        optimizer.init_state()
        tensors = [t for t in optimizer.state[param].values() if isinstance(t, Tensor) and t.numel() == elements]
        assert param.grad is not None
        sizes = [param.element_size(), *(t.element_size() for t in tensors)]
        alone = bytes_alone(param.grad.element_size(), sizes)(elements)
        times = in_turn({"ours": optimizer.step, "bytes": alone, "adamw": adamw.step}, rounds, seconds)
        print(verdict(f"{case.name}: of its bytes alone", against(times, "ours", "bytes"), case.bytes_target))
        ratio = against(times, "ours", "adamw")
        if case.adamw_target is None:
            print(f"| {case.name}: of fused AdamW | {ratio[0]:.3g} ({ratio[1]:.3g}) | | |", flush=True)
        else:
            print(verdict(f"{case.name}: of fused AdamW", ratio, case.adamw_target), flush=True)
        del optimizer, alone, tensors, param
        gc.collect()
    plain = shardopt.AdEMAMix(parameters([(elements // 5,)], torch.float32, "cpu"), kernel="torch")
    times = in_turn({"ours": plain.step, "adamw": adamw.step}, rounds, seconds)
    print(
        verdict("without a compiler, fp32 state: of fused AdamW", against(times, "ours", "adamw", 5.0), 4.0), flush=True
    )


def small_steps(rounds: int) -> None:
    """Where Python is the limit: microseconds of many tiny tensors, strides, and the first step."""

    def ours(params: list[Tensor]) -> Callable[[], object]:
        return shardopt.AdEMAMix([(str(i), p) for i, p in enumerate(params)]).step

    def laid_out(memory_format: torch.memory_format) -> list[Tensor]:
        params: list[Tensor] = []
        for _ in range(10):
            params.append(torch.nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=memory_format)))
            params[-1].grad = torch.ones_like(params[-1])
        return params

    many, tiny = parameters([(16,)] * 500, torch.float32, "cpu"), parameters([(16,)] * 10, torch.float32, "cpu")
    transposed: list[Tensor] = [torch.nn.Parameter(torch.randn(16, 18).t()) for _ in range(10)]
    for param in transposed:
        param.grad = torch.ones(18, 16)
    steps = {
        "500 tensors of 16": ours(many),
        "its fused AdamW": torch.optim.AdamW(many, fused=True).step,
        "10 tensors of 16": ours(tiny),
        "its AdamW": torch.optim.AdamW(tiny, fused=True).step,
        "contiguous": ours(laid_out(torch.contiguous_format)),
        "channels_last": ours(laid_out(torch.channels_last)),
        "transposed": ours(transposed),
    }
    times: dict[str, list[float]] = {}
    for some in (["500 tensors of 16", "its fused AdamW"], ["10 tensors of 16", "its AdamW"], [*steps][4:], [*steps]):
        found = in_turn({name: steps[name] for name in some}, 20 * rounds, 15.0)
        times |= {(name if len(some) < len(steps) else f"{name}, others between"): t for name, t in found.items()}
    for name, peer, target in (
        ("500 tensors of 16", "its fused AdamW", 300.0),
        ("10 tensors of 16", "its AdamW", 60.0),
        # caches and branch predictors are another's then, as after a backward
        ("10 tensors of 16, others between", "its AdamW, others between", 60.0),
    ):
        microseconds, adamw = ([f(times[k]) * 1e6 for f in (statistics.median, min)] for k in (name, peer))
        row = f"{name} (fused AdamW: {adamw[0]:.0f} ({adamw[1]:.0f}) µs)"
        print(verdict(row, (microseconds[0], microseconds[1]), target, " µs"))
    for name in ("channels_last", "transposed"):
        print(verdict(f"10 tiny {name} tensors: of contiguous ones", against(times, name, "contiguous"), 2.0))
    first: dict[int, list[float]] = {2000: [], 4000: []}
    for _ in range(5):
        for count, found in first.items():
            step = ours(parameters([(16,)] * count, torch.float32, "cpu"))
            begin = time.perf_counter()
            step()
            found.append((time.perf_counter() - begin) * 1e3)
    print(verdict("first step of 2,000 tensors", (statistics.median(first[2000]), min(first[2000])), 100.0, " ms"))
    print(
        verdict(
            "first step of 4,000 tensors: of 2,000",
            (*[f(first[4000]) / f(first[2000]) for f in (statistics.median, min)],),
            2.2,
        )
    )


def targets(elements: int, rounds: int, seconds: float) -> None:
    print(f"{elements:,} elements in one tensor unless said; median over turns (of the minima)\n")
    print("| | found | target | met |\n|---|---|---|---|")
    large_steps(elements, rounds, seconds)
    for state in ("fp32", "bf16"):
        step, *large = (
            ours(state_dtype=state)(parameters(s, torch.float32, "cpu")) for s in ([(10_000,)] * 500, [(elements,)])
        )
        times = in_turn({"small": step, "large": large[0]}, 4 * rounds, seconds)
        ratio = against(times, "small", "large", elements / 5e6)
        print(
            verdict(f"500 tensors of 10k, {state} state: an element, of one of a large tensor", ratio, 1.25), flush=True
        )
    small_steps(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=10, help="for each row of the table, at most about")
    parser.add_argument("--elements", type=int, default=50_000_000, help="of the large tensor")
    parser.add_argument("--cached", action="store_true", help="the kernel alone, in the cache, and nothing else")
    arguments = parser.parse_args()
    print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads\n"
    )
    if arguments.cached:
        cached(200 * arguments.rounds)
    else:
        targets(arguments.elements, arguments.rounds, arguments.seconds)


if __name__ == "__main__":
    main()
