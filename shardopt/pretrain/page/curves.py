"""The curves of the page: which figures, over which steps, thinned so that a long run fits into it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shardopt.pretrain.page.records import Record
from shardopt.pretrain.plot import FEW, limits, smooth

Point = tuple[int, float | None]
"""A step and the figure after it; None: it was not finite, and the curve has a gap."""

TITLES = {
    "loss": "Train loss (nats a token)",
    "eval_loss": "Held-out loss (nats a token)",
    "eval_bits_per_byte": "Bits per byte of held-out text",
    "bits_per_byte": "Bits per byte of training text",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
}
_OF_SOURCE = "eval_bits_per_byte/"
_SMOOTHED = ("loss", "bits_per_byte", "grad_norm", "tokens_per_second")
_NO_CURVES = ("step", "tokens")
# Of one curve, and of all: at some 25 bytes a point the page stays below 2 MB.
_MOST_POINTS, _ALL_POINTS, _LEAST_POINTS = 1000, 48_000, 40
MANY_RUNS = 8
"""More runs have the main curves alone, without what lies behind the smoothed ones, and no configs."""
# Of one run, and of all.
_MOST_MARKS, _ALL_MARKS = 50, 500


@dataclass(frozen=True)
class Series:
    """One curve. `run` is the number of its record; `raw` lies behind its smoothed curve."""

    run: int
    points: list[Point]
    raw: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves of one figure over the steps of all runs.

    Attributes:
        main: whether it is shown at once.
        view: lowest and highest step and value that are shown at first; the steps are those of all panels.
    """

    key: str
    title: str
    main: bool
    series: list[Series]
    view: tuple[float, float, float, float]


@dataclass(frozen=True)
class Mark:
    """A step of a run at which something has happened."""

    run: int
    step: int
    text: str


def panels(records: Sequence[Record]) -> list[Panel]:
    """A panel for each figure that any run has, the main ones first."""
    found = list(dict.fromkeys(key for record in records for row in record.rows for key in row))
    sources = [key for key in found if key.startswith(_OF_SOURCE)]
    main = [*(key for key in TITLES if key in found), *sources]
    few = len(records) <= MANY_RUNS
    other = [key for key in found if few and key not in (*main, *_NO_CURVES) and "/" not in key]
    curves = {
        key: [one for run, record in enumerate(records) for one in _series(run, record, key, few)]
        for key in [*main, *other]
    }
    curves = {key: sorted(series, key=lambda one: not one.raw) for key, series in curves.items() if series}
    steps = [record.rows[i]["step"] for record in records if record.rows for i in (0, -1)]
    most = max(_LEAST_POINTS, min(_MOST_POINTS, _ALL_POINTS // max(1, sum(map(len, curves.values())))))
    return [
        Panel(
            key,
            _title(key),
            key in main,
            [Series(one.run, thin(one.points, most), one.raw) for one in series],
            (min(steps), max(max(steps), min(steps) + 1), *limits(_settled(series))),
        )
        for key, series in curves.items()
    ]


def marks(records: Sequence[Record]) -> list[Mark]:
    """The stages, the later starts and the warnings of each run, of many warnings the newest."""
    found, most = [], max(1, min(_MOST_MARKS, _ALL_MARKS // max(1, len(records))))
    for run, record in enumerate(records):
        events = [e for e in record.events if e["event"] == "warning" or (e["event"] == "start" and e["step"])]
        found += [Mark(run, step, f"{record.name}: {text}") for step, text in record.stages]
        for event in events[-most:]:
            text = f"resumed at step {event['step']:,}" if event["event"] == "start" else str(event.get("text", ""))
            found.append(Mark(run, event["step"], f"{record.name}: {text}"))
    return found


def _title(key: str) -> str:
    if key.startswith(_OF_SOURCE):
        return f"Bits per byte of held-out text: {key.removeprefix(_OF_SOURCE)}"
    return TITLES.get(key, key)


def _series(run: int, record: Record, key: str, few: bool) -> Iterable[Series]:
    points = [(row["step"], _finite(row[key])) for row in record.rows if key in row]
    values = [value for _, value in points if value is not None]
    if not values:
        return
    smoothed = key in _SMOOTHED and len(values) > FEW
    if few or not smoothed:
        yield Series(run, points, raw=smoothed)
    if smoothed:
        rest = iter(smooth(values, len(values) / 50))
        yield Series(run, [(step, None if value is None else next(rest)) for step, value in points])


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def thin(points: list[Point], most: int) -> list[Point]:
    """At most `most` points: the first, the last, and of each stretch the lowest, the highest and a gap it may have."""
    if len(points) <= most:
        return points
    has_gaps = any(value is None for _, value in points)
    stretches = max(1, (most - 2) // (3 if has_gaps else 2))
    kept = {0, len(points) - 1}
    for i in range(stretches):
        part = range(len(points) * i // stretches, len(points) * (i + 1) // stretches)
        finite = [(value, j) for j in part if (value := points[j][1]) is not None]
        if finite:
            kept |= {min(finite)[1], max(finite)[1]}
        kept.update([j for j in part if points[j][1] is None][:1])
    return [points[j] for j in sorted(kept)]


def _settled(series: Sequence[Series]) -> list[float]:
    """All values but those of the first twentieth of long curves, which fall from far above."""
    kept = [one.points[len(one.points) // 20 if len(one.points) >= 40 else 0 :] for one in series]
    return [value for points in kept for _, value in points if value is not None] or [0.0]
