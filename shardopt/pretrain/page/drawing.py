"""A panel as the lines and labels of an SVG image, which the page shows where scripts are off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from shardopt.pretrain.page.curves import Mark, Panel, Point, thin

# Units of the image; on a phone one of them is 0.7 pixels.
WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 54, 18, 10, 26
_INNER = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
_MOST_POINTS = 300
MOST_DIGITS = 6
"""Of a label that fits into LEFT."""
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
    """Ticks are places in the image and their labels; marks are places on the x axis and their texts.

    Attributes:
        offset: the number that y labels are to be added to; "" for none.
    """

    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    marks: list[tuple[int, float, str]]
    offset: str = ""


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

    y_ticks = ticks(y0, y1, 6)
    y_labels, offset = labels(y_ticks)
    return Drawing(
        [(x(tick), label(tick)) for tick in ticks(x0, x1, 5)],
        [(y(tick), text) for tick, text in zip(y_ticks, y_labels, strict=True)],
        [Line(one.run, one.raw, *line(thin(one.points, _MOST_POINTS))) for one in panel.series],
        [(mark.run, x(mark.step), mark.text) for mark in marks if x0 <= mark.step <= x1],
        offset,
    )


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers from `low` to `high`, a step of 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * (1 - 1e-9))
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def labels(ticks: Sequence[float]) -> tuple[list[str], str]:
    """Ticks of a y axis as they fit beside it and differ, and the number that they are to be added to; "" for none."""
    steps = [abs(b - a) for a, b in pairwise(ticks)]
    largest = max(map(abs, ticks), default=0)
    digits = max(4, math.ceil(math.log10(largest / min(steps)) + 1)) if steps else 4
    texts = [label(tick, digits) for tick in ticks]
    # A point or a sign is half as wide as a digit.
    if max((len(text) - sum(map(text.count, ".-")) / 2 for text in texts), default=0) <= MOST_DIGITS:
        return texts, ""
    return [label(tick - ticks[0]) for tick in ticks], label(ticks[0], digits)


def label(number: float, digits: int = 4) -> str:
    """A tick in few characters: 0.25, 12k, 1.5M, 1e-5."""
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size and (size > 1e3 or abs(number) >= 1e4):
            return f"{number / size:.{digits}g}{name}"
    if number == 0 or abs(number) >= 1e-3:
        return f"{number:.{digits}g}"
    mantissa, exponent = f"{number:.{digits - 1}e}".split("e")
    return f"{float(mantissa):.{digits}g}e{int(exponent)}"
