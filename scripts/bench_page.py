"""The page of scripts/bench_all.py, and the tables and plots that its parts have in common."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Protocol

from shardopt.pretrain.plot import canvas, limits, save

INTRODUCTION = Path(__file__).with_name("bench_intro.md")
"""What the page of docs/ begins with, written by hand; its links are those of a page there."""
HOW = """What follows is made by `scripts/bench_all.sh --out {out}` from the results in `{out}/`. Each part's command
repeats it alone, from the repository's root with PYTHONPATH=. (one that names another's runs needs that one first).
± is the sample standard deviation over seeds.
"""


class Listed(Protocol):
    """What the page needs of a part; see `bench_all.Part`."""

    name: str
    chapter: str
    title: str
    says: str


@dataclass(frozen=True)
class Line:
    """A curve: y over x, and half the width of its band."""

    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    style: str = "-"


@dataclass(frozen=True)
class Panel:
    """Curves by their labels, and what their axes are.

    Attributes:
        marks: vertical lines, by their labels.
        settled: the y axis shows all but the first tenth of each curve.
    """

    title: str
    xlabel: str
    ylabel: str
    lines: Mapping[str, Line]
    xscale: str = "linear"
    yscale: str = "linear"
    marks: Mapping[str, float] = field(default_factory=dict)
    settled: bool = False


def draw(panels: Sequence[Panel], target: Path, title: str = "") -> None:
    """Draw panels, up to three side by side, as a PNG of 150 pixels an inch."""
    columns = len(panels) if len(panels) <= 3 else 2
    rows = math.ceil(len(panels) / columns)
    figure = canvas(6 * columns, 4.5 * rows)
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True):
        for number, (label, line) in enumerate(panel.lines.items()):
            color = f"C{number % 10}"
            marker = "o" if len(line.x) <= 20 else ""
            axes.plot(line.x, line.y, line.style, color=color, marker=marker, markersize=4, linewidth=1.4, label=label)
            if line.spread is not None:
                low, high = ([y + sign * s for y, s in zip(line.y, line.spread, strict=True)] for sign in (-1, 1))
                axes.fill_between(line.x, low, high, color=color, alpha=0.2, linewidth=0)
        for label, x in panel.marks.items():
            axes.axvline(x, color="black", linewidth=0.6, linestyle=":")
            axes.annotate(
                label, (x, 1), xycoords=("data", "axes fraction"), fontsize=7, rotation=90, va="top", ha="right"
            )
        axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel, xscale=panel.xscale, yscale=panel.yscale)
        if panel.settled:
            axes.set_ylim(*limits([y for line in panel.lines.values() for y in list(line.y)[len(line.y) // 10 :]]))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    if title:
        figure.suptitle(title, parse_math=False)
    save(figure, target)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; all columns but the first are to the right."""
    lines = [f"| {' | '.join(header)} |", "|---" + "|--:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def keep(out: Path, results: Mapping[str, Any], text: str) -> None:
    """Write a part's results.json and table.txt."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")


def with_spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± sample standard deviation."""
    if not values:
        return ""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


@dataclass(frozen=True)
class Paired:
    """A two-sided paired t-test over seeds.

    Attributes:
        differences: second less first, of the seeds that both have.
        p: of no difference; NaN of fewer than two seeds.
    """

    differences: list[float]
    p: float

    @classmethod
    def of(cls, first: Mapping[int, float], second: Mapping[int, float]) -> Paired:
        """Of two variants' figures by seed."""
        from scipy.special import stdtr

        differences = [second[seed] - first[seed] for seed in sorted(first.keys() & second.keys())]
        n = len(differences)
        if n < 2:
            return cls(differences, math.nan)
        mean, spread = fmean(differences), stdev(differences)
        if spread == 0:
            return cls(differences, 1.0 if mean == 0 else 0.0)
        return cls(differences, float(2 * stdtr(n - 1, -abs(mean) / spread * math.sqrt(n))))

    def words(self) -> list[str]:
        return ["", ""] if not self.differences else [with_spread(self.differences), _p(self.p)]


def _p(p: float) -> str:
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def study_table(results: Mapping[str, Any]) -> str:
    """The table of a study's results.json, with paired tests against its baseline."""
    baseline = next(v for v in results["variants"] if v["name"] == results["baseline"])
    header = ["variant", "training loss", "held-out loss", "bits a byte"]
    tested = ["p"] if len(results["seeds"]) > 1 else []
    header += [f"training − {baseline['name']}", *tested, f"held-out − {baseline['name']}", *tested, "tokens to it"]
    rows = []
    for variant in results["variants"]:
        runs, own = variant["runs"], variant is baseline
        row = [f"{variant['name']}{'' if len(runs) == len(results['seeds']) else f' ({len(runs)} seeds)'}"]
        row += [with_spread(_figures(variant, key).values()) for key in FIGURES]
        for key in FIGURES[:2]:
            test = Paired.of(_figures(baseline, key), _figures(variant, key))
            row += ["", ""][: 1 + len(tested)] if own else test.words()[: 1 + len(tested)]
        whole = runs[0]["tokens"] if runs else 0
        reached = variant["tokens_to_baseline"]
        row.append("" if own else f"{100 * reached / whole:.0f} %" if reached is not None and whole else "not reached")
        rows.append(row)
    seeds = results["seeds"]
    note = f"Seeds {seeds[0]} to {seeds[-1]}; " if len(seeds) > 1 else f"Seed {seeds[0]}; "
    tokens = max((run["tokens"] for variant in results["variants"] for run in variant["runs"]), default=0)
    note += f"{tokens / 1e6:.1f}M tokens. Losses in nats a token; below zero a row is better than {baseline['name']}. "
    note += "Tokens to it: the share of its tokens after which a row's held-out loss is first at that one's last."
    if tested:
        note += " p of a paired t-test over seeds, not corrected for the number of rows."
    return table(header, rows) + f"\n\n{note}"


FIGURES = ("train_loss", "eval_loss", "eval_bits_per_byte")


def _figures(variant: Mapping[str, Any], key: str) -> dict[int, float]:
    return {run["seed"]: run[key] for run in variant["runs"] if run[key] is not None}


def write(parts: Sequence[Listed], out: Path) -> Path:
    """Write the page from what results there are; its path.

    It stands in the folder of the results, or, where that is below docs/, beside it, after what is written by hand.
    """
    of_docs = out.parent.name == "docs"
    page = out.with_suffix(".md") if of_docs else out / "benchmarks.md"
    at = out.name + "/" if of_docs else ""
    above = INTRODUCTION.read_text(encoding="utf-8") if of_docs else "# Benchmarks\n"
    lines, chapter = [above, HOW.format(out=out)], None
    for part in parts:
        folder = out / part.name
        if not (folder / "part.json").exists():
            continue
        if part.chapter != chapter:
            chapter = part.chapter
            lines.append(f"## {chapter}\n")
        lines += [f"### {part.title}\n", *([part.says.strip() + "\n"] if part.says else []), _made(folder), ""]
        lines.append(_table(folder))
        for picture in sorted(folder.glob("*.png")):
            lines.append(f"\n![{part.title}]({at}{part.name}/{picture.name})")
        lines.append("")
    missing = [part.name for part in parts if not (out / part.name / "part.json").exists()]
    if missing:
        lines.append(f"Not run yet: {', '.join(missing)}.\n")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines), encoding="utf-8")
    return page


def _made(folder: Path) -> str:
    about = json.loads((folder / "part.json").read_text(encoding="utf-8"))
    gpus = "".join(f", {gpu}" for gpu in about["gpus"])
    return (
        f"    {about['command']}\n\n{about['processor']}, {about['cores']} cores{gpus}, torch {about['torch']}, commit "
        f"{about['commit']}, {about['date']}. It took {about['seconds'] / 60:.1f} min; the load before it was "
        f"{about['load_before']:.1f}."
    )


def _table(folder: Path) -> str:
    own = folder / "table.txt"
    if own.exists():
        text = own.read_text(encoding="utf-8").strip()
        # What a script printed for a terminal keeps its columns.
        return text if any(line.startswith("|") for line in text.splitlines()) else textwrap.indent(text, "    ")
    return study_table(json.loads((folder / "results.json").read_text(encoding="utf-8")))
