"""What only a GPU can show of the Triton kernel: cases of scripts/gpu_check.py."""

from __future__ import annotations

import gc
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import shardopt
from shardopt.slices import Layout, Range

Row = tuple[str, bool | None, str]  # what, whether it holds (None: it was not run), in what figures
DEVICE = "cuda"
SAME = "the same bits"
SHAPES = (("50M", (50_000_000,), 1), ("500 x 10k", (10_000,), 500), ("8 x 4096^2", (4096, 4096), 8))
SIZES = (1, 130, 5000, 40_001)
WEIGHTS: list[tuple[torch.dtype, str | None]] = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.bfloat16, "fp32"),
    (torch.bfloat16, "split"),
    (torch.float16, "fp32"),
]
OPTIONS: list[dict[str, Any]] = [
    {"betas": (0.0, 0.99, 0.9999), "state_dtype": "bf16"},
    {"second_moment": "yogi", "state_dtype": "bf16", "maximize": True},
    {"alpha_warmup": 7, "beta3_warmup": 9, "eps_root": 1e-3, "eps": 0.0},
    {"weight_ema": 0.9, "state_dtype": {"m2": "bf16", "weight_ema": "bf16"}},
    {"weight_ema": 0.9, "state_dtype": "block8", "weight": torch.bfloat16},
    {"lr": 0.0, "state_dtype": "bf16", "weight_ema": 0.9},
    {"betas": (0.4, 0.3, 0.9999), "state_dtype": "block8"},
    {"grad": torch.bfloat16},
    {"grad": torch.float16, "state_dtype": "block16"},
    {"layout": Layout.contiguous("p", (3 << 32,), (1 << 33) - 2500, 5000), "sizes": (5000,), "state_dtype": "bf16"},
    {"layout": Layout.contiguous("p", (3 << 32,), (1 << 33) - 2499, 5000), "sizes": (5000,), "state_dtype": "bf16"},
    {"layout": Layout("p", (70, 201), (Range(77, 0, 4900, 70, 201),)), "sizes": (4900,), "state_dtype": "bf16"},
    {
        "layout": Layout("p", (9, 3 << 30), (Range(640, 0, 4608, 512, 3 << 30),)),
        "sizes": (4608,),
        "state_dtype": "block8",
    },
]


# -- correctness ---------------------------------------------------------------------------------------------------


def after_steps(
    device: str,
    kernel: str,
    *,
    weight: torch.dtype = torch.float32,
    grad: torch.dtype | None = None,
    sizes: tuple[int, ...] = SIZES,
    layout: Layout | None = None,
    lr: float = 1e-2,
    steps: int = 3,
    **options: Any,
) -> dict[str, Tensor]:
    """Weights and state, on the CPU, after steps on the same data on any device."""
    random = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n, generator=random).to(weight).to(device)) for n in sizes]
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    optimizer = shardopt.AdEMAMix(named, lr=lr, weight_decay=0.1, kernel=kernel, **options)
    if layout is not None:
        optimizer.set_layout(params[0], layout)
    for _ in range(steps):
        for param in params:
            scale = torch.randn(param.shape, generator=random).exp()
            value = (torch.randn(param.shape, generator=random) * scale).to(grad or weight).to(device)
            if value.dtype != param.dtype:
                param.grad_dtype = value.dtype
            param.grad = value
        optimizer.step()
    assert optimizer.kernel == kernel
    found = {f"p{i}": p.detach().cpu() for i, p in enumerate(params)}
    for i, param in enumerate(params):
        found |= {f"p{i}.{key}": v.cpu() for key, v in optimizer.state[param].items() if isinstance(v, Tensor)}
    return found


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Empty if all bits are the same, else which tensors differ in how many elements, and by how many fp32 ulp."""
    parts = []
    for key, value in expected.items():
        a, b = (t.contiguous().view(-1).view(torch.uint8).view(t.numel(), -1) for t in (found[key], value))
        wrong = (a != b).any(1)
        if wrong.any():
            ulp = ""
            if value.dtype == torch.float32:
                codes = [t.contiguous().view(-1).view(torch.int32).long() for t in (found[key], value)]
                ulp = f" by up to {int((codes[0] - codes[1]).abs().max())} ulp"
            parts.append(f"{key}: {int(wrong.sum())} of {value.numel()}{ulp}")
    return "; ".join(parts)


def bits() -> Iterator[Row]:
    yield from launches()
    yield from formats()


def formats() -> Iterator[Row]:
    cases: list[dict[str, Any]] = [
        {"state_dtype": state, "weight": weight, "master_weights": master}
        for state in ("fp32", "bf16", "block16", "block8")
        for weight, master in WEIGHTS
    ]
    for case in [*cases, *OPTIONS]:
        expected = after_steps("cpu", "torch", **case)
        text = " ".join(f"{key}={value}" for key, value in case.items() if value is not None and key != "layout")
        for kernel in ("triton", "torch"):
            wrong = differences(after_steps(DEVICE, kernel, **case), expected)
            yield f"{kernel}: {text.replace('torch.', '')}", not wrong, wrong or SAME


def launches() -> list[Row]:
    from shardopt.optim.kernels import triton as module

    kernel, grids = module._step_kernel, []

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return kernel[grid]

    params = tensors((10_000,), 500, torch.float32)
    optimizer = shardopt.AdEMAMix(params, kernel="triton")
    module._step_kernel = Counted()
    try:
        optimizer.step()
    finally:
        module._step_kernel = kernel
    return [("500 tensors of 10k", len(grids) == 1, f"{len(grids)} launch of {grids[0][0]} programs")]


def graphs() -> Iterator[Row]:
    for options in (
        {},
        {"state_dtype": "bf16", "alpha_warmup": 6, "beta3_warmup": 7, "weight_ema": 0.9},
        {"state_dtype": "block8", "betas": (0.0, 0.99, 0.999), "beta3_warmup": 20},
    ):
        wrong = replays(**options)
        yield f"graph: {options or 'defaults'}", not wrong, wrong or SAME


def replays(**options: Any) -> str:
    """Three eager steps and ten replays beside thirteen eager ones; empty if they agree in every bit."""
    random = torch.Generator(DEVICE).manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n, device=DEVICE, generator=random)) for n in SIZES]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p in [*params, *twins]:
        p.grad = torch.zeros_like(p)
    lr = torch.tensor(1e-2, device=DEVICE)
    named, twins_named = ([(f"p{i}", p) for i, p in enumerate(tensors)] for tensors in (params, twins))
    captured = shardopt.AdEMAMix(named, lr=lr, kernel="triton", capturable=True, **options)
    eager = shardopt.AdEMAMix(twins_named, kernel="triton", **options)  # of the same names: the same random bits

    def step(number: int, go: Callable[[], Any]) -> None:
        lr.fill_(1e-2 / number)
        eager.param_groups[0]["lr"] = float(lr)
        for p, twin in zip(params, twins, strict=True):
            assert p.grad is not None
            assert twin.grad is not None
            p.grad.copy_(torch.randn(p.shape, device=DEVICE, generator=random))
            twin.grad.copy_(p.grad)
        go()
        eager.step()

    replay = capture(captured, lambda number: step(number, captured.step))
    for number in range(4, 14):
        step(number, replay)
        for i, pair in enumerate(zip(params, twins, strict=True)):
            found, expected = (
                {"weight": p.detach().cpu(), **{k: v.cpu() for k, v in o.state[p].items() if k != "step"}}
                for o, p in zip((captured, eager), pair, strict=True)
            )
            wrong = differences(found, expected)
            if wrong:
                return f"replay {number}, tensor {i}: {wrong}"
    count = int(captured.state[params[0]]["step"])
    return "" if count == 13 else f"the step is {count}, not 13"


def capture(optimizer: Any, warm_up: Callable[[int], Any]) -> Callable[[], Any]:
    """A graph of a step, after steps 1 to 3 on a stream of their own, as torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for number in (1, 2, 3):
            warm_up(number)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()

    def replay(held: Any = optimizer) -> None:  # a graph does not keep alive what it reads
        graph.replay()

    return replay


def large() -> list[Row]:
    free, _ = torch.cuda.mem_get_info()
    if free < 30 << 30:
        return [("2^31 elements", None, f"needs 30 GB, {free >> 30} are free")]
    size, piece = (1 << 31) + 5000, 6000
    outcomes = []
    for start, count in ((0, size), (size - piece, piece)):
        param = torch.nn.Parameter(torch.zeros(count, dtype=torch.bfloat16, device=DEVICE))
        optimizer = shardopt.AdEMAMix([("p", param)], lr=0.1, state_dtype="bf16", kernel="triton")
        optimizer.set_layout(param, Layout.contiguous("p", (size,), start, count))
        param.grad = torch.full((count,), 0.3, dtype=torch.bfloat16, device=DEVICE)
        for _ in range(2):
            optimizer.step()
        state = optimizer.state[param]
        kept = {"weight": param.detach(), **{key: state[key] for key in ("m1", "m2", "nu")}}
        outcomes.append({key: value[-piece:].cpu() for key, value in kept.items()})
        del param, optimizer, state, kept
        gc.collect()
        torch.cuda.empty_cache()
    wrong = differences(*outcomes)
    return [("2^31 + 5000 elements", not wrong, wrong or "the last 6000 as they are alone")]


# -- speed ---------------------------------------------------------------------------------------------------------


def tensors(shape: tuple[int, ...], count: int, dtype: torch.dtype) -> list[Tensor]:
    found: list[Tensor] = []
    for _ in range(count):
        param = torch.nn.Parameter(torch.randn(shape, device=DEVICE, dtype=dtype))
        param.grad = torch.randn_like(param)
        found.append(param)
    return found


def milliseconds(go: Callable[[], Any], calls: int = 40, rounds: int = 7) -> float:
    """Median over rounds of the time of one of `calls` calls that are issued back to back."""
    for _ in range(3):
        go()
    times = []
    for _ in range(rounds):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            go()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / calls)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a device copy of 2 GiB."""
    source = torch.empty(1 << 29, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / (milliseconds(lambda: target.copy_(source)) * 1e-3)


def contestants() -> Iterator[tuple[str, torch.dtype, float, Callable[..., Any]]]:
    """Name, dtype of weights and gradients, bytes that must move per element, and how to make it."""

    def ours(**options: Any) -> Callable[..., Any]:
        return lambda params, **more: shardopt.AdEMAMix(params, kernel="triton", **options, **more)

    def adamw(**options: Any) -> Callable[..., Any]:
        return lambda params, **more: torch.optim.AdamW(params, **options, **more)

    fp32, bf16, scale = torch.float32, torch.bfloat16, 8 / 128
    yield "ours, fp32 state", fp32, 36, ours()
    yield "ours, bf16 state", fp32, 24, ours(state_dtype="bf16")
    yield "ours, block16 state", fp32, 24 + 3 * scale, ours(state_dtype="block16")
    yield "ours, block8 state", fp32, 18 + 3 * scale, ours(state_dtype="block8")
    yield "ours, bf16 weights and state", bf16, 18, ours(state_dtype="bf16")
    yield "ours, split master, bf16 state", bf16, 22, ours(state_dtype="bf16", master_weights="split")
    yield "torch AdamW fused", fp32, 28, adamw(fused=True)
    yield "torch AdamW foreach", fp32, 28, adamw(foreach=True)
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes

        yield "bitsandbytes AdEMAMix", fp32, 36, lambda params: bitsandbytes.optim.AdEMAMix(params)
        yield "bitsandbytes AdEMAMix8bit", fp32, 18 + 24 / 256, lambda params: bitsandbytes.optim.AdEMAMix8bit(params)


def graph_of(make: Callable[..., Any], params: list[Tensor]) -> Callable[[], Any]:
    optimizer = make(params, capturable=True)
    return capture(optimizer, lambda number: optimizer.step())


def speed() -> Iterator[Row]:
    bandwidth = copy_bandwidth()
    yield "copy", True, f"{bandwidth / 1e9:.0f} GB/s read and written"
    for label, shape, count in SHAPES:
        for name, dtype, moved, make in contestants():
            params = tensors(shape, count, dtype)
            total = moved * count * torch.Size(shape).numel()
            text = ""
            kinds = [("step", lambda make=make, params=params: make(params).step)]
            if not name.startswith("bitsandbytes"):
                kinds.append(("GPU", lambda make=make, params=params: graph_of(make, params)))
            for kind, prepare in kinds:
                took = milliseconds(prepare())
                rate = total / (took * 1e-3)
                text += f"{kind} {took:7.3f} ms {rate / 1e9:5.0f} GB/s {rate / bandwidth:4.0%}   "
            yield f"{label}: {name}", True, text.strip()
            del params, kinds, prepare
            gc.collect()
            torch.cuda.empty_cache()


def tune() -> Iterator[Row]:
    from shardopt.optim.kernels import triton as module

    chosen = module._BLOCK, dict(module._OPTIONS)
    try:
        for block, warps in ((256, 1), (256, 2), (512, 2), (512, 4), (1024, 4), (1024, 8), (2048, 8)):
            module._BLOCK = block
            module._OPTIONS["num_warps"] = warps
            text = ""
            for label, shape, count in SHAPES[:2]:
                for state in ("fp32", "bf16", "block8"):
                    make = lambda p, state=state, **o: shardopt.AdEMAMix(p, kernel="triton", state_dtype=state, **o)  # noqa: E731
                    took = milliseconds(graph_of(make, tensors(shape, count, torch.float32)))
                    text += f"{label} {state} {took:.3f}  "
                    gc.collect()
                    torch.cuda.empty_cache()
            mark = " (chosen)" if (block, warps) == (chosen[0], chosen[1]["num_warps"]) else ""
            yield f"{block} elements, {warps} warps{mark}", True, text + "ms"
    finally:
        module._BLOCK = chosen[0]
        module._OPTIONS.update(chosen[1])
