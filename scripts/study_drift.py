"""Drift of rounded state from its fp32 twin. Prints a table and draws docs/drift.png.

    python scripts/study_drift.py [--steps 40000] [--elements 4096] [--seed 0] [--plot docs/drift.png]

Gradients g = scale (snr mu + noise) with signal-to-noise 0, 0.02, 0.2 and 1 (a quarter of the elements each), whose
scale falls to 0.3 halfway; lr = 0, so that every format sees the same gradients. For each format and signal:

    slope   regression of m2 on its fp32 twin (1 is unbiased)
    noise   relative RMS of the difference, in m2 and in nu
    nu      ratio of the means of nu (1 is unbiased)

"nearest bf16" is what peers do on bf16 parameters: state in the parameter's dtype, rounded to nearest at every step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import shardopt
from shardopt.optim.states import read_slice, state_slices

SIGNALS = (0.0, 0.02, 0.2, 1.0)
FORMATS = ("bf16", "block16", "block8")
BETAS = (0.9, 0.999, 0.9999)


@dataclass
class Twin:
    """One optimizer with lr = 0; `values` reads a state tensor in fp32."""

    values: Callable[[str], torch.Tensor]
    step: Callable[[torch.Tensor], None]


def ours(state_dtype: str, elements: int, seed: int) -> Twin:
    param = torch.nn.Parameter(torch.zeros(elements))
    optimizer = shardopt.AdEMAMix([("w", param)], lr=0.0, betas=BETAS, state_dtype=state_dtype, seed=seed)

    def step(grad: torch.Tensor) -> None:
        param.grad = grad
        optimizer.step()

    def values(key: str) -> torch.Tensor:
        return next(read_slice(piece) for piece in state_slices(optimizer) if piece.kind == key)

    return Twin(values, step)


def nearest(elements: int) -> Twin:
    state = {key: torch.zeros(elements, dtype=torch.bfloat16) for key in ("m2", "nu")}

    def step(grad: torch.Tensor) -> None:
        g = grad.bfloat16()
        state["m2"].mul_(BETAS[2]).add_(g, alpha=1 - BETAS[2])
        state["nu"].mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])

    return Twin(lambda key: state[key].float(), step)


@dataclass
class Result:
    slope: float
    noise_m2: float
    nu: float
    noise_nu: float
    history: list[tuple[int, float, float]] = field(default_factory=list)  # step, noise of m2, ratio of nu


def compare(twin: Twin, exact: Twin, part: slice) -> Result:
    a, b = (t.values("m2")[part].double() for t in (twin, exact))
    c, d = (t.values("nu")[part].double() for t in (twin, exact))
    return Result(
        slope=((a * b).sum() / (b * b).sum()).item(),
        noise_m2=((a - b).square().mean().sqrt() / b.square().mean().sqrt()).item(),
        nu=(c.mean() / d.mean()).item(),
        noise_nu=((c - d).square().mean().sqrt() / d.square().mean().sqrt()).item(),
    )


def study(steps: int, elements: int, seed: int, looks: int = 40) -> dict[tuple[str, float], Result]:
    """Each format and signal-to-noise ratio after `steps` steps, on `elements` elements a signal."""
    total = elements * len(SIGNALS)
    generator = torch.Generator().manual_seed(seed)
    twins = {"fp32": ours("fp32", total, seed), "nearest bf16": nearest(total)}
    twins |= {name: ours(name, total, seed) for name in FORMATS}
    signal = torch.tensor(SIGNALS).repeat_interleave(elements) * torch.randn(total, generator=generator).sign()
    parts = {snr: slice(i * elements, (i + 1) * elements) for i, snr in enumerate(SIGNALS)}
    histories: dict[tuple[str, float], list[tuple[int, float, float]]] = {}
    for step in range(1, steps + 1):
        scale = 1e-3 * (1.0 if step <= steps // 2 else 0.3)
        grad = scale * (signal + torch.randn(total, generator=generator))
        for twin in twins.values():
            twin.step(grad)
        if step % max(1, steps // looks) == 0:
            for name, twin in twins.items():
                for snr, part in parts.items():
                    found = compare(twin, twins["fp32"], part)
                    histories.setdefault((name, snr), []).append((step, found.noise_m2, found.nu))
    results = {}
    for name, twin in twins.items():
        for snr, part in parts.items():
            results[name, snr] = compare(twin, twins["fp32"], part)
            results[name, snr].history = histories[name, snr]
    return results


def table(results: dict[tuple[str, float], Result]) -> str:
    lines = [
        "| state | signal/noise | slope of m2 | noise of m2 | mean nu | noise of nu |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {snr:g} | {r.slope:.4f} | {r.noise_m2:.2%} | {r.nu:.4f} | {r.noise_nu:.2%} |"
        for (name, snr), r in results.items()
        if name != "fp32"
    ]
    return "\n".join(lines)


def plot(results: dict[tuple[str, float], Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name in ("nearest bf16", *FORMATS):
        steps, noise, nu = zip(*results[name, 0.2].history, strict=True)
        left.plot(steps, noise, label=name)
        right.plot(steps, nu, label=name)
    left.set(title="relative RMS error of m2 (signal/noise 0.2)", xlabel="step", yscale="log")
    right.set(title="mean nu / mean nu in fp32", xlabel="step", yscale="log")
    right.axhline(1.0, color="black", linewidth=0.5)
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--elements", type=int, default=4096, help="for each signal-to-noise ratio")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("docs/drift.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small
    results = study(arguments.steps, arguments.elements, arguments.seed)
    print(table(results))
    plot(results, arguments.plot)


if __name__ == "__main__":
    main()
