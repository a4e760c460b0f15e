"""A panel as the lines and labels of an SVG image, which the page shows where scripts are off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shardopt.pretrain.page.curves import Mark, Panel, Point, thin

# Units of the image; on a phone one of them is 0.7 pixels.
WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 54, 18, 10, 26
_INNER = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
_MOST_POINTS = 300
DOTS = 60
"""Points of a curve that are no more are drawn as dots, too."""


@dataclass(frozen=True)
class Line:
    """`path` and `dots` are in SVG's words; dots are lines of no length."""

    run: int
    raw: bool
    path: str
    dots: str


@dataclass(frozen=True)
class Drawing:
    """Ticks are places in the image and their labels; marks are places on the x axis and their texts."""

    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    marks: list[tuple[int, float, str]]


def draw(panel: Panel, marks: Sequence[Mark] = ()) -> Drawing:
    """`panel` with its first view."""
    x0, x1, y0, y1 = panel.view
    width, height = _INNER

    def x(step: float) -> float:
        return (step - x0) / (x1 - x0) * width

    def y(value: float) -> float:
        return (y1 - value) / (y1 - y0) * height

    def line(points: Sequence[Point]) -> tuple[str, str]:
        path, pen = [], "M"
        for step, value in points:
            if value is None:
                pen = "M"
            else:
                path.append(f"{pen}{x(step):.1f} {y(value):.1f}")
                pen = "L"
        places = [part[1:] for part in path] if len(points) <= DOTS else []
        return "".join(path), "".join(f"M{place}h0" for place in places)

    return Drawing(
        [(x(tick), label(tick)) for tick in ticks(x0, x1, 5)],
        [(y(tick), label(tick)) for tick in ticks(y0, y1, 6)],
        [Line(one.run, one.raw, *line(thin(one.points, _MOST_POINTS))) for one in panel.series],
        [(mark.run, x(mark.step), mark.text) for mark in marks if x0 <= mark.step <= x1],
    )


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers from `low` to `high`, a step of 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * (1 - 1e-9))
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def label(number: float) -> str:
    """A tick in few characters: 0.25, 12k, 1.5M, 1e-5."""
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size and (size > 1e3 or abs(number) >= 1e4):
            return f"{number / size:.4g}{name}"
    text = f"{number:.4g}"
    return text.replace("e-0", "e-") if "e" in text else text
