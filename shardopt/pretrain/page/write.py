"""The page put together: one HTML file with its images, style and script inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import yaml

from shardopt import __version__
from shardopt.errors import writing
from shardopt.pretrain.page import curves, drawing, tables
from shardopt.pretrain.page.records import Record, read
from shardopt.pretrain.page.story import story
from shardopt.pretrain.replacing import replacing
from shardopt.pretrain.report import printable

_SAMPLES = 5


def write(paths: Sequence[Path], target: Path) -> list[Record]:
    """Write a page of the runs in `paths` to `target`.

    Returns:
        The runs.

    Raises:
        InputError: see `records.read` and `tables.study`.
        StorageError: `target` cannot be written.
    """
    records = read(paths)
    page = render(records, [(path.absolute().name, tables.study(path)) for path in paths])
    with writing(target, "--output"), replacing(target) as aside:
        aside.write_text(page, encoding="utf-8")
    return records


def render(records: Sequence[Record], studies: Sequence[tuple[str, tables.Table | None]] = ()) -> str:
    """The page of some runs, and the results of studies by name."""
    panels, marks = curves.panels(records), curves.marks(records)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html").render(
        title=records[0].name if len(records) == 1 else f"{len(records)} runs",
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        records=records,
        damaged=any(record.damage for record in records),
        figures=tables.figures(records),
        studies=[(name, table) for name, table in studies if table is not None],
        panels=[(panel, drawing.draw(panel, marks if panel.key == "loss" else ())) for panel in panels],
        image=drawing,
        data=_for_the_script(records, panels, marks),
        differences=tables.differences(records),
        stories=[story(record, len(records)) for record in records],
        memory=[tables.memory(record) for record in records],
        texts=tables.texts(records),
        samples=[_samples(record) for record in records],
        versions=tables.versions(records),
        configs=[] if len(records) > curves.MANY_RUNS else [_as_yaml(record) for record in records],
    )


def _for_the_script(
    records: Sequence[Record], panels: Sequence[curves.Panel], marks: Sequence[curves.Mark]
) -> dict[str, Any]:
    return {
        "dots": drawing.DOTS,
        "most_digits": drawing.MOST_DIGITS,
        "runs": [{"name": record.name, "tokens": _tokens(record)} for record in records],
        "panels": [
            {
                "key": panel.key,
                "view": panel.view,
                "series": [
                    {
                        "run": one.run,
                        "raw": one.raw,
                        "x": [step for step, _ in one.points],
                        "y": [None if value is None else float(f"{value:.5g}") for _, value in one.points],
                    }
                    for one in panel.series
                ],
            }
            for panel in panels
        ],
        "marks": [asdict(mark) for mark in marks],
    }


def _tokens(record: Record) -> list[tuple[int, int]]:
    """Steps and the tokens seen by then, at those between which they grow evenly."""
    points = [(0, 0), *((row["step"], row["tokens"]) for row in record.rows if isinstance(row.get("tokens"), int))]
    kept = points[:1]
    for before, (step, tokens) in pairwise(points):
        (s0, t0), (s1, t1) = kept[-1], before
        if s1 > s0 and (tokens - t1) * (s1 - s0) != (t1 - t0) * (step - s1):
            kept.append(before)
    return kept if len(points) < 2 else [*kept, points[-1]]


def _samples(record: Record) -> list[tuple[int, str]]:
    """The newest, newest first."""
    rows = [row for row in record.samples if isinstance(row.get("text"), str) and isinstance(row.get("step"), int)]
    return [(row["step"], printable(row["text"])) for row in rows[: -_SAMPLES - 1 : -1]]


def _as_yaml(record: Record) -> str:
    return yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True)
