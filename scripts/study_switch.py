"""From AdamW to AdEMAMix in mid-run, against both from the start. Writes a table and a plot.

    python scripts/study_switch.py STUDY --at 1500 --out bench/switch [--seeds 0 1 2] [key.sub=value ...]

STUDY is the folder of a `shardopt compare` of ademamix and adamw whose runs kept their checkpoints at step --at
(checkpoint.keep_every). For each seed a branch (run.from) of the adamw run goes on with the ademamix run's config; its
warm-ups of alpha and beta3 begin at the branch and last for what is left. The branches stay in STUDY/switch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from scripts.bench_page import Line, Paired, Panel, draw, keep, table, with_spread
from shardopt.checkpoint.folders import step_folder
from shardopt.pretrain.config import load
from shardopt.pretrain.plot import smooth
from shardopt.pretrain.record import read_metrics

TRUNKS = ("adamw", "ademamix")


def branch(study: Path, seed: int, at: int, overrides: list[str]) -> Path:
    """Train the branch of a seed, or what it lacks; its run folder."""
    name = f"switch-seed{seed}"
    config = study / "configs" / f"ademamix-seed{seed}.yaml"
    left = load(str(config), overrides).train.steps - at
    settings = [f"run.name={name}", f"run.dir={study / 'switch'}", f"checkpoint.every={left}"]
    settings += [f"run.from={step_folder(study / f'adamw-seed{seed}' / 'checkpoints', at)}"]
    settings += [f"optimizer.{key}_warmup={left}" for key in ("alpha", "beta3")]
    command = [sys.executable, "-m", "shardopt", "pretrain", str(config), *settings, *overrides]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return study / "switch" / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="for the branches")
    parser.add_argument("--at", type=int, required=True, help="step of the switch")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, table.txt and switch.png")
    arguments = parser.parse_intermixed_args()
    study, seeds = arguments.study, arguments.seeds
    runs = {name: {seed: study / f"{name}-seed{seed}" for seed in seeds} for name in TRUNKS}
    switched = f"adamw, from {arguments.at} on ademamix"
    runs[switched] = {seed: branch(study, seed, arguments.at, arguments.overrides) for seed in seeds}
    rows = {name: {s: read_metrics(run / "metrics.jsonl") for s, run in of.items()} for name, of in runs.items()}
    curves, final = {}, {}
    for name, of in rows.items():
        steps = [row["step"] for row in of[seeds[0]]]
        losses = [fmean(of[seed][i]["loss"] for seed in seeds) for i in range(len(steps))]
        held = {
            row["step"]: fmean(of[seed][i]["eval_loss"] for seed in seeds)
            for i, row in enumerate(of[seeds[0]])
            if "eval_loss" in row
        }
        curves[name] = {"step": steps, "loss": losses, "eval_step": list(held), "eval_loss": list(held.values())}
        final[name] = {seed: of[seed][-1]["eval_loss"] for seed in seeds}
    lines = [
        [
            name,
            with_spread(list(of.values())),
            *([""] * 2 if name == "adamw" else Paired.of(final["adamw"], of).words()),
        ]
        for name, of in final.items()
    ]
    text = table(["run", "held-out loss", "− adamw", "p"], lines)
    text += (
        f"\n\nSeeds {', '.join(map(str, seeds))}; p of a paired t-test over them. The branches' own warm-ups begin at "
    )
    text += f"step {arguments.at}."
    keep(arguments.out, {"at": arguments.at, "curves": curves, "final": final}, text)
    span = {name: max(1.0, len(curve["step"]) / 50) for name, curve in curves.items()}
    mark = {"the switch": float(arguments.at)}
    train = {n: Line(c["step"], smooth(c["loss"], span[n])) for n, c in curves.items()}
    held_out = {n: Line(c["eval_step"], c["eval_loss"]) for n, c in curves.items()}
    panels = [
        Panel("training loss, smoothed", "step", "nats a token", train, marks=mark, settled=True),
        Panel("held-out loss", "step", "nats a token", held_out, marks=mark, settled=True),
    ]
    draw(panels, arguments.out / "switch.png", f"mean of {len(seeds)} seeds")
    print(text)


if __name__ == "__main__":
    main()
