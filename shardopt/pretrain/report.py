"""The console of a run: the memory of each rank, progress, results.

Rank 0 alone prints. On a terminal there is a progress bar; elsewhere (a log file, CI) plain lines. Whatever
came from outside, such as generated text, is printed without its control characters and never read as markup.
"""

from __future__ import annotations

import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from shardopt.engines.state import ShardedState

# Shown first and in this order; a kind that is not listed comes after them under its own name.
_LABELS = {
    "weight": "weights",
    "buffer": "buffers",
    "gradient": "gradients",
    "master": "master weights",
    "master_low": "master, low bits",
    "m1": "m1, fast average",
    "m2": "m2, slow average",
    "nu": "nu, second moment",
    "weight_ema": "weight EMA",
}
_MOST_RANK_COLUMNS = 4
_LABEL_WIDTH = 14
COLUMNS = 65
"""What is left of a line of 80 beside a label."""
_SAMPLE_CHARACTERS = 800
# A terminal need not be drawn more often, and a step may be short.
_REDRAW_SECONDS = 0.1


@dataclass(frozen=True)
class Holdings:
    """Bytes by kind ("weight", "gradient", "m1", ...): on each rank, and what one process alone would hold.

    A kind that is absent takes no bytes.
    """

    per_rank: tuple[Mapping[str, int], ...]
    unsharded: Mapping[str, int]

    @property
    def kinds(self) -> list[str]:
        """In the order in which they are shown."""
        present = {kind for sizes in (self.unsharded, *self.per_rank) for kind in sizes}
        return [kind for kind in _LABELS if kind in present] + sorted(present - _LABELS.keys())

    def shown(self) -> tuple[list[str], dict[str, list[int]]]:
        """Columns, and bytes by kind: each rank up to 4 ranks, beyond that the least and most, then the unsharded size.

        The last kind is the total.
        """
        few = len(self.per_rank) <= _MOST_RANK_COLUMNS

        def sizes(by_rank: list[int], unsharded: int) -> list[int]:
            return [*(by_rank if few else (min(by_rank), max(by_rank))), unsharded]

        rows = {
            _LABELS.get(kind, kind): sizes([rank.get(kind, 0) for rank in self.per_rank], self.unsharded.get(kind, 0))
            for kind in self.kinds
        }
        rows["total"] = sizes([sum(held.values()) for held in self.per_rank], sum(self.unsharded.values()))
        ranks = [f"rank {rank}" for rank in range(len(self.per_rank))] if few else ["least", "most"]
        return [*ranks, "unsharded"], rows

    def as_dict(self) -> dict[str, Any]:
        """What `shown` gives, as JSON values."""
        columns, rows = self.shown()
        return {"columns": columns, "bytes": rows}


def holdings(state: ShardedState) -> Holdings:
    """Bytes that every rank holds, from the slices themselves, once the state exists. A collective.

    The unsharded size of a tensor is its number of elements times the bytes per element where its first
    element is held. A gradient counts as large as its weight.
    """
    held = Counter(gradient=state.gradient_bytes())
    whole: dict[tuple[str, str], int] = {}
    for piece in state.slices():
        held[piece.kind] += piece.nbytes
        layout = piece.layout
        # Only the rank with the first element reports it, so that a sharded model is not listed once per rank.
        if layout.ranges and layout.ranges[0].global_start == 0:
            whole[piece.kind, piece.name] = round(piece.nbytes * layout.numel / layout.local_numel)
    reports = state.ranks.gather((held, whole))
    # Replicas report the same tensor; it counts once.
    merged = {key: size for _, sizes in reports for key, size in sizes.items()}
    unsharded: Counter[str] = Counter()
    for (kind, _), size in merged.items():
        unsharded[kind] += size
    unsharded["gradient"] = unsharded["weight"]
    return Holdings(tuple(held for held, _ in reports), unsharded)


def render(held: Holdings) -> Table:
    """`held` as a table of at most 80 columns.

    The share is what the rank that holds most holds of the unsharded size.
    """
    columns, shown = held.shown()
    totals, whole = [sum(sizes.values()) for sizes in held.per_rank], sum(held.unsharded.values())
    unit, name = unit_of(max(*totals, whole))
    decimals = 2 if max(*totals, whole) < 1000 * unit else 1  # 8 characters at most

    def cells(sizes: Sequence[int]) -> list[str]:
        *ranks, unsharded = sizes
        share = f"{100 * max(ranks) / unsharded:.1f} %" if unsharded else ""
        return [*(f"{size / unit:,.{decimals}f}" for size in sizes), share]

    table = Table(box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0), show_footer=True, footer_style="bold")
    table.add_column(f"{name} held", footer="total", overflow="fold")
    styles = {"unsharded": "dim", "share": "cyan"}
    for header, footer in zip([*columns, "share"], cells(shown["total"]), strict=True):
        table.add_column(header, footer=footer, justify="right", no_wrap=True, style=styles.get(header))
    for label, sizes in shown.items():
        if label != "total":
            table.add_row(one_line(label), *cells(sizes))
    return table


@dataclass(frozen=True)
class Result:
    """Outcome of a run; what is None was not made. `plot` and `tracking` are rank 0's, the rest is on every rank.

    Attributes:
        status: "stopped" before its last step by `stopped_by`, a signal or another rank.
        tokens, seconds: tokens of the whole run, seconds of this start, which went on after `tokens_before`.
        loss: train loss of the last row of metrics, the mean of `loss_steps` steps, in nats per token.
        skipped: steps skipped because a loss or a gradient was not finite.
        tracking: see `Tracker.where`.
    """

    run_name: str
    status: Literal["finished", "stopped"]
    folder: Path
    step: int
    tokens: int
    seconds: float
    tokens_before: int = 0
    stopped_by: str | None = None
    loss: float | None = None
    loss_steps: int = 1
    holdout_loss: float | None = None
    holdout_bits_per_byte: float | None = None
    skipped: int = 0
    checkpoint: Path | None = None
    plot: Path | None = None
    export: Path | None = None
    tracking: Mapping[str, str] = field(default_factory=dict)
    sample: str | None = None


class Report:
    """The console of a run; on ranks other than 0 every method does nothing.

    Args:
        is_main: whether this is rank 0.
        console: where to print; by default standard output, as wide as the terminal, else 80 columns.
        clock: seconds, for the rate and the time left.
    """

    def __init__(
        self, is_main: bool, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console(highlight=False)
        self.console.quiet = not is_main
        self.clock = clock
        self._since = "it was resumed"
        self._warnings: list[str] = []
        self._listener: Callable[[str], None] = self._warnings.append

    def listen(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with every warning, those before now too."""
        for message in self._warnings:
            listener(message)
        self._listener = listener

    def say(self, message: str) -> None:
        """One line, which may come from outside; above the progress bar where there is one."""
        self._line(Text(self._safe(message)))

    def warn(self, message: str) -> None:
        """One line that must not be missed."""
        self._line(Text.assemble(("warning: ", "bold yellow"), self._safe(message)))
        self._listener(message)

    def start(
        self, run_name: str, facts: Mapping[str, object], held: Holdings, step: int = 0, branched: bool = False
    ) -> None:
        """Print the run's name, a line or a list of lines per fact that is not None, and the memory of each rank.

        Args:
            step: where the run goes on, `branched` from another run or resumed.
        """
        word = "branched" if branched else "resumed"
        self._since = "it branched" if branched else "it was resumed"
        self.title(run_name, f"{word} at step {step:,}" if step else "")
        self.facts(facts)
        self.console.print()
        self.console.print(render(held))
        self.console.print()

    def evaluated(
        self,
        step: int,
        loss: float,
        bits_per_byte: float | None = None,
        of_sources: Mapping[str, float] | None = None,
    ) -> None:
        """One line with the held-out loss at `step`, and one with the bits per byte of each source."""
        self.say(f"step {step:,}: held-out loss {held_out_words(loss, bits_per_byte)}")
        if of_sources:
            parts = ", ".join(f"{label} {figure:.3f}" for label, figure in of_sources.items())
            self.say(f"  bits per byte of {parts}")

    def show(self, parts: Iterable[RenderableType]) -> None:
        """Lines, which may come from outside, tables and panels, one below the other."""
        for part in parts:
            self.say(part) if isinstance(part, str) else self.console.print(part)

    @contextmanager
    def training(
        self, total: int, start: int = 0, work: Callable[[int, int], int] = lambda start, stop: stop - start
    ) -> Iterator[Training]:
        """The progress of steps `start` + 1 .. `total`; from `work`, the work of steps start + 1 .. stop, follows the
        time left."""
        training = Training(self, total, start, work)
        with training.bar or nullcontext():
            yield training

    def end(self, result: Result) -> None:
        """Print the results of the run and their places on disk."""
        stopped = result.stopped_by and f"stopped by {result.stopped_by}; run it again to go on"
        self.title(result.run_name, stopped or result.status)
        facts: dict[str, object] = {}
        if result.loss is not None:
            mean = "" if result.loss_steps == 1 else f", mean of the last {result.loss_steps} steps"
            facts["train loss"] = f"{result.loss:.4f} at step {result.step:,}{mean}"
        if result.holdout_loss is not None:
            facts["held-out loss"] = held_out_words(result.holdout_loss, result.holdout_bits_per_byte)
        resumed = f" since {self._since}, {count(result.tokens)} in all" if result.tokens_before else ""
        seen = count(result.tokens - result.tokens_before)
        facts["tokens seen"] = f"{seen} in {duration(result.seconds)}{resumed}"
        if result.skipped:
            facts["skipped steps"] = f"{result.skipped:,}: their loss or gradient was not finite"
        facts |= {"run folder": result.folder, "checkpoint": result.checkpoint, "loss curve": result.plot}
        self.facts(facts | {"export": result.export, **result.tracking})
        if (text := result.sample) is not None:
            if len(text) > _SAMPLE_CHARACTERS:
                text = text[:_SAMPLE_CHARACTERS] + " ..."
            body = Text(self._safe(text), overflow="fold")
            self.console.print(Panel(body, title="sample", title_align="left", border_style="dim", box=box.ROUNDED))

    def title(self, run_name: str, note: str) -> None:
        """A rule with the name of what follows."""
        title = Text(self._safe(run_name), style="bold", overflow="fold")
        if note:
            title.append(f" {self._safe(note)}", style="not bold")
        self.console.print(Rule(title, align="left", style="dim"))

    def facts(self, facts: Mapping[str, object]) -> None:
        """A line or a list of lines per fact that is not None."""
        for label, value in facts.items():
            if isinstance(value, list):
                value = f"\n{'':{_LABEL_WIDTH}} ".join(value)
            if value is not None:
                self._line(Text.assemble((f"{label:<{_LABEL_WIDTH}} ", "cyan"), self._safe(str(value))))

    def _line(self, text: Text) -> None:
        # The terminal wraps, not we: a path stays in one piece for whoever copies or greps it.
        self.console.print(text, soft_wrap=True)

    def _safe(self, text: str) -> str:
        return printable(text, self.console.encoding)


class Training:
    """The steps of a run as they pass: a bar on a terminal, elsewhere one line per logged step. See `Report`."""

    def __init__(self, report: Report, total: int, start: int, work: Callable[[int, int], int]) -> None:
        self._report, self._total, self._work = report, total, work
        self._loss: float | None = None
        self._rate: float | None = None
        # Recent steps tell the time left: a start that compiles, or a pause to evaluate, is soon forgotten.
        self._passed: deque[tuple[float, int]] = deque([(report.clock(), start)], maxlen=64)
        self._drawn = float("-inf")
        self.bar: Progress | None = None
        console = report.console
        if console.is_interactive and console.is_terminal and not console.quiet:
            columns = BarColumn(bar_width=None), TextColumn("{task.description}", markup=False)
            # No thread of its own: the loop forks workers and its step must not wait for a lock.
            self.bar = Progress(*columns, console=console, auto_refresh=False, expand=True)
            self._task = self.bar.add_task(self._describe(start), total=total, completed=start)

    def step(self, step: int, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        """Step `step` is done; the loss and the rate where this step is logged, else those before stand.

        Elsewhere than on a terminal, a step with a loss is printed.
        """
        now = self._report.clock()
        self._passed.append((now, step))
        self._loss = self._loss if loss is None else loss
        self._rate = self._rate if tokens_per_second is None else tokens_per_second
        if self.bar is None:
            if loss is not None:
                self._report.say(self._describe(step))
        elif now - self._drawn >= _REDRAW_SECONDS or step == self._total:
            self._drawn = now
            self.bar.update(self._task, completed=step, description=self._describe(step), refresh=True)

    def _describe(self, step: int) -> str:
        width = len(f"{self._total:,}")
        parts = [f"step {step:>{width},}/{self._total:,}"]
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4f}")
        if self._rate is not None:
            parts.append(f"{_rate(self._rate):>6} tokens/s")
        (then, first), (now, last) = self._passed[0], self._passed[-1]
        if last > first and step < self._total:
            seconds = self._work(step, self._total) * (now - then) / self._work(first, last)
            parts.append(f"{duration(seconds)} left")
        return "  ".join(parts)


def printable(text: str, encoding: str = "utf-8") -> str:
    """`text` with every control, format or unassigned character but newline and tab written as an escape.

    What `encoding` cannot hold becomes a question mark.
    """
    kept = "".join(
        character
        if character in "\n\t" or not unicodedata.category(character).startswith("C")
        else character.encode("unicode_escape").decode()
        for character in text.replace("\r\n", "\n")
    )
    return kept.encode(encoding, "replace").decode(encoding)


def one_line(text: str) -> Text:
    """A name in a cell of a table: in one line, without control characters, and never read as markup."""
    return Text(printable(text).replace("\n", "\\n").replace("\t", "\\t"))


def unit_of(largest: int) -> tuple[int, str]:
    """One unit for a whole table, so that its columns compare at a glance."""
    # 10 of it, so that the small rows keep their digits.
    for power, name, least in ((4, "TiB", 10), (3, "GiB", 10), (2, "MiB", 1)):
        if largest >= least * 1024**power:
            return 1024**power, name
    return 1024, "KiB"


def count(number: int) -> str:
    """`number` in few characters: 26,039 or 3.88 M."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f} {name}"
    return f"{number:,}"


def _rate(number: float) -> str:
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{name}"
    return f"{number:.0f}"


def held_out_words(loss: float, bits_per_byte: float | None) -> str:
    """A held-out loss in nats per token, with the bits per byte where they are known."""
    return f"{loss:.4f}" if bits_per_byte is None else f"{loss:.4f}, {bits_per_byte:.3f} bits per byte"


def duration(seconds: float) -> str:
    """`seconds` as 1:23, 2:03:04 or 3 d 4 h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
