"""The same run on every engine, killed and moved between them: how far apart the losses are. Writes a table and a plot.

    python scripts/study_engines.py scripts/bench.yaml [key.sub=value ...] --out bench/engines
        [--engines ddp "{name: zero, stage: 2}" ...] [--formats fp32 bf16] [--ranks 2] [--moves 3]

For each state format one run on each engine (`shardopt pretrain --nproc-per-node RANKS`), and one that is killed
(SIGKILL, all its processes) --moves times and goes on from its newest checkpoint on the next engine of the list.
Compared with the first engine are the training losses of every step: the largest difference, and that of the last step.
An engine that does not take a state format (DeepSpeed in blocks) is left out there. Engines add up gradients in other
orders, so from three ranks on they differ in last bits (a sum of two has one order). In fp32 such a difference stays as
small as it is until the training itself makes it grow. Where the state is stored in fewer bits it mostly disappears,
since the bits that round are the same on every engine; but now and then it decides which way a value is rounded, and is
then a step of that format.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

from scripts.bench_page import Line, Panel, draw, keep, table
from shardopt.checkpoint import latest
from shardopt.checkpoint.stored import step_of
from shardopt.errors import InputError
from shardopt.pretrain.config import load
from shardopt.pretrain.record import read_metrics

ENGINES = ["ddp", "{name: zero, stage: 1}", "{name: zero, stage: 2}", "fsdp", "{name: deepspeed, stage: 2}"]
FORMATS = ["fp32", "bf16", "block16", "block8"]
MOVED = "killed and moved"


def short(engine: str) -> str:
    """An engine as its name and stage: zero-2."""
    section = yaml.safe_load(engine)
    return engine if isinstance(section, str) else "-".join(map(str, section.values()))


class Runs:
    """Starts runs of one config, which differ in engine and state format."""

    def __init__(self, config: str, overrides: list[str], ranks: int, folder: Path) -> None:
        self.config, self.overrides, self.ranks, self.folder = config, overrides, ranks, folder
        self.steps = load(config, overrides).train.steps

    def settings(self, engine: str, state: str) -> list[str]:
        section = engine if engine.startswith("{") else f"{{name: {engine}}}"
        return [f"engine={section}", f"optimizer.state_dtype={state}"]

    def taking(self, engines: list[str], state: str) -> list[str]:
        """Those of the engines that take the state format."""

        def takes(engine: str) -> bool:
            try:
                load(self.config, [*self.overrides, *self.settings(engine, state)]).check_ranks(self.ranks)
            except InputError as error:
                print(f"{short(engine)}, {state}: {error}", file=sys.stderr)
                return False
            return True

        return list(filter(takes, engines))

    def start(self, name: str, engine: str, state: str, every: int) -> subprocess.Popen[bytes]:
        settings = [f"run.name={name}", f"run.dir={self.folder}", *self.settings(engine, state)]
        settings += ["tracking.log_every=1", f"checkpoint.every={every}", "checkpoint.async=false"]
        command = [sys.executable, "-m", "shardopt", "pretrain", "--nproc-per-node", str(self.ranks), self.config]
        return subprocess.Popen([*command, *self.overrides, *settings], stdout=sys.stderr)

    def finish(self, job: subprocess.Popen[bytes]) -> None:
        if job.wait():
            raise SystemExit(f"study_engines: a run ended with status {job.returncode}: {job.args}")

    def losses(self, name: str) -> list[float]:
        """The training loss of every step."""
        rows = read_metrics(self.folder / name / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, self.steps + 1)), f"{name} has lost rows"
        return [row["loss"] for row in rows]

    def whole(self, engine: str, state: str) -> list[float]:
        name = f"{short(engine)}-{state}"
        self.finish(self.start(name, engine, state, self.steps))
        return self.losses(name)

    def moved(self, engines: list[str], state: str, moves: int) -> tuple[list[float], list[tuple[int, str]]]:
        """Losses of the run that is killed, and at which steps it went on, on which engine."""
        name, every = f"moved-{state}", max(1, self.steps // (4 * moves + 4))
        went: list[tuple[int, str]] = []
        for move in range(moves + 1):
            engine = engines[move % len(engines)]
            job = self.start(name, engine, state, every)
            if move == moves:
                self.finish(job)
                break
            self.kill_after(job, name, (move + 1) * self.steps // (moves + 1))
            newest = latest(self.folder / name / "checkpoints")
            went.append((0 if newest is None else step_of(newest), short(engines[(move + 1) % len(engines)])))
        return self.losses(name), went

    def done(self, name: str) -> int:
        path = self.folder / name / "metrics.jsonl"
        rows = read_metrics(path) if path.exists() else []
        return rows[-1]["step"] if rows else 0

    def kill_after(self, job: subprocess.Popen[bytes], name: str, step: int) -> None:
        while self.done(name) < step:
            if job.poll() is not None:
                raise SystemExit(f"study_engines: {name} ended before step {step}, with status {job.returncode}")
            time.sleep(0.05)
        first = psutil.Process(job.pid)
        for process in [first, *first.children(recursive=True)]:
            process.kill()
        job.wait()


def apart(losses: list[float], others: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(losses, others, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument(
        "--engines", nargs="+", default=ENGINES, help="names, or sections as YAML; the first is compared with"
    )
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="of the optimizer's state")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--moves", type=int, default=3, help="kills of the run that is moved")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, table.txt and engines.png")
    arguments = parser.parse_intermixed_args()
    engines = arguments.engines
    losses: dict[str, dict[str, list[float]]] = {}
    went: dict[str, list[tuple[int, str]]] = {}
    with tempfile.TemporaryDirectory(prefix="study-engines-") as folder:
        runs = Runs(arguments.config, arguments.overrides, arguments.ranks, Path(folder))
        for state in arguments.formats:
            taking = runs.taking(engines, state)
            if not taking:
                parser.error(f"no engine takes {state} state: change the config, --ranks or --engines")
            losses[state] = {short(engine): runs.whole(engine, state) for engine in taking}
            losses[state][MOVED], went[state] = runs.moved(taking, state, arguments.moves)
    first, *others = losses[arguments.formats[0]]
    gaps = {s: {name: apart(of[name], of[first]) for name in others if name in of} for s, of in losses.items()}
    rows = [
        [name, *(f"{max(of[name]):.1e}, {of[name][-1]:.1e}" if name in of else "not taken" for of in gaps.values())]
        for name in others
    ]
    text = table([f"against {first}", *losses], rows)
    text += (
        f"\n\nDifference of the training loss, nats a token: the largest of {runs.steps} steps, and the last step's; "
    )
    text += f"{arguments.ranks} ranks."
    moves = [f"{state}: " + ", ".join(f"{step} {name}" for step, name in of) for state, of in went.items()]
    text += f" The run that was killed went on after step (state format: step engine) {'; '.join(moves)}."
    keep(arguments.out, {"losses": losses, "moved": went, "ranks": arguments.ranks}, text)
    state, steps = arguments.formats[0], list(range(1, runs.steps + 1))
    marks = {f"killed, on {name}": float(step) for step, name in went[state]}
    curves = {name: Line(steps, of, style=STYLES[i % 4]) for i, (name, of) in enumerate(losses[state].items())}
    furthest = {s: Line(steps, [max(max(v), EQUAL) for v in zip(*of.values(), strict=True)]) for s, of in gaps.items()}
    panels = [
        Panel(f"training loss, {state} state", "step", "nats a token", curves, marks=marks),
        Panel(f"furthest from {first}", "step", f"nats a token ({EQUAL:.0e}: equal)", furthest, yscale="log"),
    ]
    draw(panels, arguments.out / "engines.png")
    print(text)


STYLES = ("-", "--", "-.", ":")
EQUAL = 1e-8  # below what fp32 tells apart in a loss: where a logarithmic axis shows no difference

if __name__ == "__main__":
    main()
