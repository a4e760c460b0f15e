"""The tables of the page: figures, differing keys, memory, data, versions and what a study has found."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from shardopt.errors import InputError
from shardopt.pretrain.data_facts import in_short, size, source_figures
from shardopt.pretrain.page.records import Record
from shardopt.pretrain.record import summary
from shardopt.pretrain.report import count, duration, unit_of
from shardopt.pretrain.strict_yaml import as_written, flat

# Rows of metrics whose steps tell the time left.
_RECENT = 20
# Of the run alone: its name heads the column.
_NAMES = ("run.name", "run.dir")


@dataclass(frozen=True)
class Table:
    """Text by row and column. The first cell of a row heads it.

    Attributes:
        runs: numbers of the runs that the columns after the first are of, or the rows; None: of none.
        of_rows: whether it is the rows.
    """

    head: list[str]
    rows: list[list[str]]
    runs: list[int] | None = None
    of_rows: bool = False


def by_run(records: Sequence[Record], rows: Mapping[str, Sequence[str]], of_rows: bool | None = None) -> Table:
    """A table of what `rows` says of each run by name, without names that are empty for all.

    Runs are columns where they are few (or `of_rows` is false), else rows.
    """
    kept = {name: list(cells) for name, cells in rows.items() if any(cells)}
    names, runs = [record.name for record in records], list(range(len(records)))
    if len(records) > 3 if of_rows is None else of_rows:
        cells = [[name, *(values[i] for values in kept.values())] for i, name in enumerate(names)]
        return Table(["run", *kept], cells, runs, of_rows=True)
    return Table(["", *names], [[name, *cells] for name, cells in kept.items()], runs)


def figures(records: Sequence[Record]) -> Table:
    """How far each run is and what it has come to."""
    each = [_figures(record) for record in records]
    return by_run(records, {name: [one[name] for one in each] for name in each[0]})


def _figures(record: Record) -> dict[str, str]:
    rows, whole, about = record.rows, summary(record.rows), record.start.get("about", {})

    def last(key: str, show: Callable[[float], str]) -> str:
        row = next((row for row in reversed(rows) if key in row), None)
        return "" if row is None else "not finite" if row[key] is None else show(row[key])

    rates = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second") is not None]
    best = "" if "best_eval_loss" not in whole else f"{whole['best_eval_loss']:.4f} at {whole['best_eval_step']:,}"
    return {
        "state": record.state,
        "step": f"{record.step:,}" + (f" of {record.steps:,}" if record.steps is not None else ""),
        "time left": _left(record) if record.running else "",
        "tokens": count(int(whole["tokens"])) if whole else "",
        "time of its steps": duration(3600 * whole["hours"]) if whole else "",
        "train loss": last("loss", "{:.4f}".format),
        "held-out loss": last("eval_loss", "{:.4f}".format),
        "best, at step": best,
        "bits per byte": last("eval_bits_per_byte", "{:.4f}".format),
        "tokens/s, median": count(round(median(rates))) if rates else "",
        "peak memory, rank 0": last("memory_bytes", size),
        "skipped steps": last("skipped_steps", lambda n: f"{n:,}" if n else ""),
        "went back": last("rewinds", lambda n: f"{n:,} times" if n else ""),
        "parameters": count(about["parameters"]) if "parameters" in about else "",
        "engine": f"{about['engine']}, {ranks(about)}" if {"engine", "world_size"} <= about.keys() else "",
        "optimizer": str(record.section("optimizer").get("name", "")),
    }


def _left(record: Record) -> str:
    times = [row["step_time"] for row in record.rows[-_RECENT:] if row.get("step_time") is not None]
    if not times or record.steps is None:
        return ""
    return duration(median(times) * max(0, record.steps - record.rows[-1]["step"]))


def ranks(about: Mapping[str, Any]) -> str:
    """The number of ranks in words."""
    return f"{about['world_size']} rank{'s' * (about['world_size'] != 1)}"


def differences(records: Sequence[Record]) -> Table | None:
    """The keys of the configs that are not the same in all runs; None for one run."""
    if len(records) < 2:
        return None
    trees = [flat(record.config) for record in records]
    keys = [key for key in dict.fromkeys(key for tree in trees for key in tree) if key not in _NAMES]
    differing = [key for key in keys if any(key not in tree or tree[key] != trees[0].get(key) for tree in trees)]
    return by_run(records, {key: [as_written(t[key]) if key in t else "—" for t in trees] for key in differing})


def memory(record: Record) -> Table | None:
    """What the ranks held at the newest start; None where nothing tells."""
    held = record.start.get("memory")
    if held is None:
        return None
    unit, name = unit_of(max(max(sizes) for sizes in held["bytes"].values()))
    rows = [[kind, *(f"{one / unit:,.2f}" for one in sizes)] for kind, sizes in held["bytes"].items()]
    return Table([name, *held["columns"]], rows)


def versions(records: Sequence[Record]) -> Table:
    """What each run was started with last."""
    abouts = [record.start.get("about", {}) for record in records]
    keys = dict.fromkeys(key for about in abouts for key in about)
    rows = {key.replace("_", " "): [str(about.get(key) or "") for about in abouts] for key in keys}
    return by_run(records, rows)


@dataclass(frozen=True)
class Text:
    """The report on the text that some runs, by name, were trained on: facts, and a table of the sources.

    The table is None where the report is of another version, as its one fact then says.
    """

    runs: list[str]
    facts: dict[str, list[str]]
    sources: Table | None


def texts(records: Sequence[Record]) -> list[Text]:
    """A report for each text; runs with the same share one."""
    reports: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for record in records:
        if record.data is not None:
            reports.setdefault(json.dumps(record.data, sort_keys=True), ([], record.data))[0].append(record.name)
    return [_text(names, report) for names, report in reports.values()]


def _text(names: list[str], report: dict[str, Any]) -> Text:
    try:
        facts, sources = in_short(report), _sources(report)
    except (LookupError, TypeError) as e:
        return Text(names, {"data": [f"data.json is of another version of shardopt ({e!r})"]}, None)
    lines = {label: value if isinstance(value, list) else [str(value)] for label, value in facts.items() if value}
    return Text(names, lines, sources)


def _sources(report: dict[str, Any]) -> Table:
    rows = [source_figures(one) for one in report["sources"]]
    return Table(list(rows[0]), [list(row.values()) for row in rows])


def study(folder: Path) -> Table | None:
    """The results of the study in a folder; None where it has none.

    Raises:
        InputError: they cannot be read.
    """
    path = folder / "results.json"
    if not path.is_file():
        return None
    try:
        return _study(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise InputError(f"{path} is no study's of this version ({e!r}): run the study again, or remove it") from e


def _study(found: Mapping[str, Any]) -> Table:
    head = ["variant", "held-out loss", f"below {found['baseline']}", "tokens to it", "ms/step", "state"]

    def cell(value: float | None, show: Callable[[float], str]) -> str:
        return "" if value is None else show(value)

    def spread(one: Mapping[str, Any], key: str) -> str:
        value, deviation = one[key], one[f"{key}_spread"]
        return cell(value, "{:.4f}".format) + cell(deviation, " ± {:.4f}".format)

    rows = [
        [
            one["name"] + (" (best)" if one["name"] == found["best"] else ""),
            spread(one, "eval_loss"),
            "" if one["name"] == found["baseline"] else spread(one, "gain"),
            "" if one["name"] == found["baseline"] else cell(one["tokens_to_baseline"], lambda n: count(round(n))),
            cell(one["step_time"], lambda seconds: f"{1000 * seconds:,.1f}"),
            cell(one["state_bytes"], size),
        ]
        for one in found["variants"]
    ]
    return Table(head, rows)
