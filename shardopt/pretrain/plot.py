"""loss.png: the train loss, raw and smoothed, and the held-out loss of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardopt.pretrain.replacing import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 100
"""Losses that can be told apart without smoothing."""


def draw_loss(rows: Sequence[Mapping[str, Any]], target: Path, title: str) -> None:
    """Draw the `loss` and `eval_loss` of rows of metrics over their `step`, as a PNG of 1200 × 675 pixels.

    Smoothing is an exponential average over about a fiftieth of the logged steps, corrected for its start; up to a
    hundred steps there is nothing to smooth, and each has a point of its own.
    The first steps fall from far above: the y axis ends where the rest, all but the first twentieth, ends.
    Without any loss nothing is drawn.
    """
    from matplotlib.ticker import MaxNLocator

    train, held_out = (
        [(row["step"], row[name]) for row in rows if row.get(name) is not None] for name in ("loss", "eval_loss")
    )
    if not train and not held_out:
        return
    figure = canvas(8, 4.5)
    axes = figure.add_subplot()
    if train:
        steps, losses = [step for step, _ in train], [loss for _, loss in train]
        if len(train) <= FEW:
            axes.plot(steps, losses, "o-", color="tab:blue", markersize=4, linewidth=1.8, label="train")
        else:
            axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="train, raw")
            axes.plot(steps, smooth(losses, len(losses) / 50), color="tab:blue", linewidth=1.8, label="train, smoothed")
    if held_out:
        label = f"held-out ({held_out[-1][1]:.3f} at step {held_out[-1][0]})"
        points = [step for step, _ in held_out], [loss for _, loss in held_out]
        axes.plot(*points, "o--", color="tab:red", markersize=5, linewidth=1, label=label, zorder=3)
    if len(train) >= 40:
        axes.set_ylim(*limits([*(loss for _, loss in train[len(train) // 20 :]), *(loss for _, loss in held_out[1:])]))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save(figure, target)


def canvas(width: float, height: float) -> Figure:
    """A figure of inches, of 150 pixels each, with a canvas of its own: pyplot would choose a back end for the whole
    process and keep the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, target: Path) -> None:
    """Write `figure` as a PNG, aside and then in its place."""
    with replacing(target) as aside:
        figure.savefig(aside, format="png", dpi=150)


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Of an axis that shows all of `values`."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 0.1
    return low - margin, high + margin


def smooth(values: list[float], span: float) -> list[float]:
    """Exponential average over about `span` values, corrected for its start."""
    decay = 1 - 1 / span
    averages = accumulate(values, lambda average, value: decay * average + (1 - decay) * value, initial=0.0)
    return [average / (1 - decay**count) for count, average in enumerate(averages) if count]
