"""curves.png: train and held-out loss of a study's variants, with bands of one standard deviation over seeds."""

from __future__ import annotations

from pathlib import Path

from shardopt.pretrain.plot import canvas, limits, save, smooth
from shardopt.pretrain.study.results import Curve, Results


def draw(results: Results, target: Path) -> None:
    """Draw the mean over seeds of each variant, as a PNG of 1800 × 750 pixels; without a finished run nothing.

    Train losses are smoothed as in loss.png. The y axes show all but the first twentieth of the curves.
    """
    rows = [row for row in results.rows if row.runs]
    if not rows:
        return
    figure = canvas(12, 5)
    left, right = figure.subplots(1, 2)
    seeds = len(results.study.seeds)
    for number, row in enumerate(rows):
        color = f"C{number % 10}"
        style = ("-", "--", ":")[number // 10 % 3]
        train, held_out, name = row.train, row.held_out, row.variant.name
        span = max(1.0, len(train.mean) / 50)
        smoothed = Curve(train.tokens, smooth(train.mean, span), smooth(train.spread, span))
        _band(left, smoothed, color, style, name)
        _band(right, held_out, color, style, f"{name}, {held_out.mean[-1]:.3f}" if held_out.mean else name)
    mean = f", mean of {seeds} seeds ± 1 standard deviation" if seeds > 1 else ""
    for axes, what, curves in (
        (left, "train loss, smoothed", [row.train for row in rows]),
        (right, "held-out loss", [row.held_out for row in rows]),
    ):
        axes.set_title(what + mean, fontsize="medium")
        axes.set_xlabel("tokens")
        axes.set_ylabel("nats per token")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if shown := [value for curve in curves for value in _settled(curve)]:
            axes.set_ylim(*limits(shown))
        axes.ticklabel_format(axis="x", scilimits=(-3, 4), useMathText=True)
    right.legend(frameon=False)
    figure.suptitle(results.study.name, parse_math=False)
    save(figure, target)


def _settled(curve: Curve) -> list[float]:
    """The edges of a band, but for its first points, which fall from far above; of a few points all."""
    points = len(curve.mean)
    first = max(1, points // 20) if points >= 10 else 0
    return [m + sign * s for m, s in list(zip(curve.mean, curve.spread, strict=True))[first:] for sign in (-1, 1)]


def _band(axes, curve: Curve, color: str, style: str, label: str) -> None:  # type: ignore[no-untyped-def]
    marker = "o" if len(curve.mean) <= 20 else ""
    axes.plot(curve.tokens, curve.mean, style, color=color, linewidth=1.6, marker=marker, markersize=4, label=label)
    low, high = ([m + sign * s for m, s in zip(curve.mean, curve.spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(curve.tokens, low, high, color=color, alpha=0.2, linewidth=0)
