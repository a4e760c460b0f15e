"""How fast a batch that was shown once is forgotten, AdEMAMix against AdamW. Writes a table and a plot.

    python scripts/study_forgetting.py scripts/bench.yaml --out bench/forgetting [--seeds 0 1 2] [--shown 0.25 0.5 0.75]
        [--set NAME.KEY=VALUE ...] [key.sub=value ...]

The experiment of the paper (arXiv 2409.03137): of each optimizer and seed two runs, which differ in that one of them
trains on some batches of held-out text, each once, in the place of the step's own batch. The loss on such a batch less
the same of the run that never saw it, over the steps since, is what it still knows of it. Batches are the first ones of
the held-out text, shown after the given shares of the run's steps, and scored every --every steps and right after
they are shown. A difference from before a batch is shown comes of the batches that were shown earlier. A run is one
process with one thread; --jobs of them at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import multiprocessing
import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch

from scripts.bench_page import Line, Panel, draw, keep, table, with_spread
from shardopt.distributed import Ranks
from shardopt.pretrain.begin import begin
from shardopt.pretrain.config import load
from shardopt.pretrain.loop import Run
from shardopt.pretrain.scoring import losses
from shardopt.pretrain.signals import stop_signals
from shardopt.pretrain.study.plan import optimizers

OPTIMIZERS = ["adamw", "ademamix"]
AFTER = (1, 10, 50, 200)  # steps since a batch was shown, in the table


@dataclass(frozen=True)
class Job:
    """One run: with the batches of `shown` in the place of those steps' own, or, where it is a control, without."""

    optimizer: str
    seed: int
    control: bool
    config: str
    overrides: list[str]
    shown: list[int]  # after how many steps each batch is trained on
    scored: list[int]  # after how many steps all batches are scored


def losses_of(job: Job) -> dict[int, list[float]]:
    """Mean loss on each batch, in nats a token, by the steps done."""
    torch.set_num_threads(1)
    found: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        ranks = Ranks.start("cpu")
        stack.callback(ranks.stop)
        settings = [f"run.dir={folder}", f"run.seed={job.seed}", "engine={name: single}"]
        config = load(job.config, [*job.overrides, *settings])
        never = 10 * config.train.steps
        config = load(job.config, [*job.overrides, *settings, f"eval.every={never}", f"checkpoint.every={never}"])
        run = Run(begin(config, ranks, stack))
        rows = config.train.global_batch
        batches = [run.holdout_data.batch(i * rows, (i + 1) * rows) for i in range(len(job.shown))]
        own = run.batches.attempt

        def attempt(step: int) -> torch.Tensor:
            drawn = own(step)
            return batches[job.shown.index(step)] if step in job.shown and not job.control else drawn

        run.batches.attempt = attempt
        with stop_signals() as stop, run.report.training(config.train.steps) as bar:
            for step in range(max(job.scored)):
                run.advance(stop, bar)
                if step + 1 in job.scored:
                    with torch.no_grad():
                        found[step + 1] = [
                            losses(run.engine, batch)[0].item() / batch[:, 1:].numel() for batch in batches
                        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--set", action="append", default=[], metavar="NAME.KEY=VALUE", help="as in shardopt compare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shown", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="shares of the run's steps")
    parser.add_argument("--every", type=int, default=25, help="steps between scores")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, table.txt and forgetting.png")
    arguments = parser.parse_intermixed_args()
    base = load(arguments.config, arguments.overrides)
    steps = base.train.steps
    shown = [math.floor(share * steps) for share in arguments.shown]
    scored = {step for step in range(1, steps + 1) if step % arguments.every == 0 or step == steps}
    scored |= {s + after for s in shown for after in (*AFTER, 0) if 0 < s + after <= steps}
    jobs = [
        Job(v.name, seed, control, arguments.config, [*arguments.overrides, *v.overrides], shown, sorted(scored))
        for v in optimizers(base, OPTIMIZERS, arguments.set)
        for seed in arguments.seeds
        for control in (False, True)
    ]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        found = {
            (job.optimizer, job.seed, job.control): o for job, o in zip(jobs, pool.map(losses_of, jobs, 1), strict=True)
        }
    # What is known of batch i: the loss of the run that never saw it less that of the run that did.
    known: dict[str, dict[int, list[dict[int, float]]]] = {
        name: {i: [] for i in range(len(shown))} for name in OPTIMIZERS
    }
    for name in OPTIMIZERS:
        for seed in arguments.seeds:
            seen, control = found[name, seed, False], found[name, seed, True]
            for i in range(len(shown)):
                known[name][i].append({step: control[step][i] - seen[step][i] for step in seen})
    rows: list[list[object]] = []
    for i, step in enumerate(shown):
        for name in OPTIMIZERS:
            cells = [[one[step + a] for one in known[name][i]] if step + a <= steps else [] for a in AFTER]
            cells.append([one[steps] for one in known[name][i]])
            rows.append([f"{name}, shown after {step}", *map(with_spread, cells)])
    header = ["batch", *(f"{a} step{'s' * (a > 1)} later" for a in AFTER), "at the end"]
    text = (
        table(header, rows)
        + "\n\nNats a token that the loss on the batch is below that of a run that never saw it: mean "
    )
    text += f"± standard deviation over seeds {', '.join(map(str, arguments.seeds))}; {steps} steps."
    keep(arguments.out, {"steps": steps, "shown": shown, "seeds": arguments.seeds, "known": known}, text)
    panels = []
    for i, step in enumerate(shown):
        lines = {}
        for name in OPTIMIZERS:
            at = [s for s in sorted(scored) if step - 2 * arguments.every <= s]
            values = [[one[s] for one in known[name][i]] for s in at]
            spread = [stdev(v) if len(v) > 1 else 0.0 for v in values]
            lines[name] = Line([s - step for s in at], [fmean(v) for v in values], spread)
        panels.append(
            Panel(
                f"batch shown after {step} steps",
                "steps since",
                "loss below the control's, nats a token",
                lines,
                marks={"shown": 0.0},
            )
        )
    draw(panels, arguments.out / "forgetting.png")
    print(text)


if __name__ == "__main__":
    main()
