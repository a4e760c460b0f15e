"""What came of a study: each variant's held-out loss over its seeds, and what it took, as numbers and as a table."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

import torch
from rich import box
from rich.table import Table

from shardopt import __version__
from shardopt.checkpoint import inspect
from shardopt.errors import InputError
from shardopt.pretrain.record import read_metrics
from shardopt.pretrain.replacing import replacing
from shardopt.pretrain.report import count, one_line
from shardopt.pretrain.study.plan import Study, Trial, Variant

_WEIGHTS = ("weight", "buffer")


@dataclass(frozen=True)
class Finished:
    """What a finished run has left.

    Attributes:
        rows: of its metrics.
        loss: held-out loss after its last step, nats per token; infinite where it was not finite.
        bits: the same in bits per byte of the held-out text.
        train_loss: mean over the last tenth of its steps, nats per token; infinite where it was not finite.
        step_time: median of its rows, seconds.
        state_bytes: of the optimizer's state, from the last checkpoint.
    """

    trial: Trial
    rows: list[dict[str, Any]]
    loss: float
    bits: float
    train_loss: float
    tokens: int
    step_time: float
    state_bytes: int

    @property
    def seed(self) -> int:
        return self.trial.config.run.seed


def read(trial: Trial) -> Finished:
    """The figures of a finished run.

    Raises:
        InputError: its metrics or its checkpoint are gone.
    """
    path, newest = trial.config.folder / "metrics.jsonl", trial.checkpoint
    rows = read_metrics(path) if path.exists() else []
    if newest is None or not rows or "eval_loss" not in rows[-1]:
        raise InputError(f"{trial.config.folder} has lost its metrics or its checkpoint: remove it, to run it again")
    kinds = inspect.describe(newest)["kinds"]
    loss, bits = (math.inf if (value := rows[-1].get(key)) is None else value for key in _HELD_OUT)
    last = [math.inf if row["loss"] is None else row["loss"] for row in rows if row["step"] > 0.9 * rows[-1]["step"]]
    times = [row["step_time"] for row in rows if row.get("step_time") is not None]
    state = sum(row["bytes"] for kind, row in kinds.items() if kind not in _WEIGHTS)
    return Finished(trial, rows, loss, bits, fmean(last), rows[-1]["tokens"], median(times), state)


_HELD_OUT = ("eval_loss", "eval_bits_per_byte")


@dataclass(frozen=True)
class Curve:
    """A figure of a variant's runs over the tokens seen, at the steps that all of them have logged.

    Attributes:
        spread: sample standard deviation over the seeds; 0 where there is one.
    """

    tokens: list[int]
    mean: list[float]
    spread: list[float]

    @classmethod
    def of(cls, runs: Sequence[Finished], key: str) -> Curve:
        at = [{row["tokens"]: row[key] for row in run.rows if row.get(key) is not None} for run in runs]
        tokens = sorted(set.intersection(*map(set, at))) if at else []
        values = [[one[n] for one in at] for n in tokens]
        return cls(tokens, [fmean(v) for v in values], [stdev(v) if len(v) > 1 else 0.0 for v in values])

    def tokens_to(self, loss: float) -> float | None:
        """Tokens after which the mean is first `loss` or less, interpolated between two points; None: never."""
        for i, mean in enumerate(self.mean):
            if mean <= loss:
                if i == 0:
                    return self.tokens[0]
                above, before = self.mean[i - 1], self.tokens[i - 1]
                return before + (self.tokens[i] - before) * (above - loss) / (above - mean)
        return None


@dataclass(frozen=True)
class Row:
    """A variant's results.

    Attributes:
        runs: those that are finished.
        loss, spread: mean and sample standard deviation of the final held-out loss over seeds; None: too few runs.
        gain, gain_spread: the same of what it is below the baseline's with the same seed.
        tokens_to_baseline: tokens after which its held-out loss is the baseline's final one; None: never.
    """

    variant: Variant
    runs: list[Finished]
    loss: float | None
    spread: float | None
    gain: float | None
    gain_spread: float | None
    tokens_to_baseline: float | None

    @property
    def held_out(self) -> Curve:
        return Curve.of(self.runs, "eval_loss")

    @property
    def train(self) -> Curve:
        return Curve.of(self.runs, "loss")


class Results:
    """The finished runs of a study.

    Raises:
        InputError: see `read`.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        of = {variant.name: [read(t) for t in study.trials if t.variant is variant and t.finished]
              for variant in study.variants}  # fmt: skip
        baseline = of[study.baseline]
        target, _ = _mean([run.loss for run in baseline])
        by_seed = {run.seed: run.loss for run in baseline}
        self.rows = []
        for variant in study.variants:
            runs = of[variant.name]
            gains = [by_seed[run.seed] - run.loss for run in runs if run.seed in by_seed]
            reached = None if target is None or not runs else Curve.of(runs, "eval_loss").tokens_to(target)
            self.rows.append(Row(variant, runs, *_mean([run.loss for run in runs]), *_mean(gains), reached))

    @property
    def best(self) -> Row | None:
        """The lowest mean of bits per byte among the variants whose seeds are all finished; None: there is none."""
        whole = [row for row in self.rows if len(row.runs) == len(self.study.seeds)]
        bits = {row.variant.name: fmean(run.bits for run in row.runs) for row in whole}
        finite = [row for row in whole if math.isfinite(bits[row.variant.name])]
        return min(finite, key=lambda row: bits[row.variant.name], default=None)

    def write(self) -> None:
        """results.json, and best.yaml: the config of the best variant, as a run of its own."""
        self._replace("results.json", json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n")
        if (best := self.best) is not None:
            tree = self.study.config_of(best.variant)
            run = tree.run.model_copy(update={"name": f"{tree.run.name}-best"})
            said = f"# {best.variant.name}, the lowest held-out loss of {self.study.folder}\n"
            self._replace("best.yaml", said + tree.model_copy(update={"run": run}).as_yaml())

    def _replace(self, name: str, text: str) -> None:
        with replacing(self.study.folder / name) as aside:
            aside.write_text(text, encoding="utf-8")

    def as_dict(self) -> dict[str, Any]:
        """All figures as JSON has them; what is not finite, or of too few runs, is null."""
        best = self.best
        return {
            "study": self.study.name,
            "config": self.study.path,
            "overrides": self.study.overrides,
            "seeds": self.study.seeds,
            "baseline": self.study.baseline,
            "best": best.variant.name if best else None,
            "shardopt": __version__,
            "torch": torch.__version__,
            "machine": f"{platform.node()}, {platform.machine()}",
            "variants": [self._variant(row) for row in self.rows],
        }

    def _variant(self, row: Row) -> dict[str, Any]:
        runs, curve = row.runs, row.held_out
        return {
            "name": row.variant.name,
            "settings": dict(row.variant.settings),
            "eval_loss": _plain(row.loss),
            "eval_loss_spread": _plain(row.spread),
            "gain": _plain(row.gain),
            "gain_spread": _plain(row.gain_spread),
            "tokens_to_baseline": row.tokens_to_baseline,
            "step_time": _plain(_mean([run.step_time for run in runs])[0]),
            "state_bytes": runs[0].state_bytes if runs else None,
            "curve": {"tokens": curve.tokens, "eval_loss": curve.mean, "spread": curve.spread},
            "runs": [
                {"name": run.trial.name, "seed": run.seed, "eval_loss": _plain(run.loss),
                 "eval_bits_per_byte": _plain(run.bits), "train_loss": _plain(run.train_loss),
                 "tokens": run.tokens, "step_time": run.step_time}
                for run in runs
            ],
        }  # fmt: skip

    def table(self) -> Table:
        """For a terminal of 80 columns; the best variant's loss is bold."""
        best, key = self.best, self._only_key()
        before = "" if key is None else f"{key}-"  # what the names of all variants begin with
        table = Table(box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
        table.add_column(one_line(key or "variant"), overflow="fold")
        baseline = self.study.baseline.removeprefix(before)
        columns = ("held-out loss", f"below {baseline}", "tokens to it", "ms/step", "state")
        for header in columns:
            table.add_column(one_line(header), justify="right", overflow="fold")
        for row in self.rows:
            name = one_line(row.variant.name.removeprefix(before))
            table.add_row(name, *self._cells(row), style="bold" if row is best else None)
        return table

    def _only_key(self) -> str | None:
        """The last word of the one key in which all variants differ, where they are named after it."""
        keys = {key.rpartition(".")[2] for row in self.rows for key in row.variant.settings}
        key = keys.pop() if len(keys) == 1 else None
        return key if all(row.variant.name.startswith(f"{key}-") for row in self.rows) else None

    def _cells(self, row: Row) -> list[str]:
        runs, seeds = row.runs, len(self.study.seeds)
        if not runs:
            return [f"0 of {seeds} runs", "", "", "", ""]
        few = f" ({len(runs)} of {seeds})" if len(runs) < seeds else ""
        is_baseline, reached = row.variant.name == self.study.baseline, row.tokens_to_baseline
        share = "" if reached is None else f"{count(round(reached))} ({100 * reached / runs[0].tokens:.0f} %)"
        return [
            _with_spread(row.loss, row.spread) + few,
            "" if is_baseline or row.gain is None else _with_spread(row.gain, row.gain_spread),
            "" if is_baseline or row.gain is None else share or "not reached",
            f"{1000 * fmean(run.step_time for run in runs):,.1f}",
            inspect.size(runs[0].state_bytes),
        ]


def _mean(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None of too few values."""
    if not values:
        return None, None
    if not all(map(math.isfinite, values)):
        return math.inf, None
    return fmean(values), stdev(values) if len(values) > 1 else None


def _plain(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _with_spread(value: float | None, spread: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
