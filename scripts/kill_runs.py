"""Do to small runs what happens to large ones, and hold what they end with against a run that nobody disturbed.

    python scripts/kill_runs.py random --kills 20             one rank at a time, restarted by torchrun --max-restarts
    python scripts/kill_runs.py random --kills 20 --by-hand   all processes at a time, started again by the same command
    python scripts/kill_runs.py phases [--by-hand]            a kill in each phase of a step and of a save
    python scripts/kill_runs.py frozen                        SIGSTOP of one rank in each phase of a step, and in a save
    python scripts/kill_runs.py signals                       SIGTERM and SIGINT through each command that starts
                                                              ranks, and the end of a SLURM job's time
    python scripts/kill_runs.py full                          a disk that is full in each write (mounts a tmpfs: root)
    python scripts/kill_runs.py elastic                       4, then 2, then 3 ranks

`--engines` takes names, or sections as YAML: fsdp ddp "{name: zero, stage: 1}"; or `all`, which are ten. A random kill
comes while the ranks start, between two steps or in a save (which all happen in the background), as chance has it.

The jobs are torchrun's agent and its ranks, forked from this process, which has imported everything: a start takes a
second instead of ten. `signals` starts the commands themselves.

One line of JSON for each engine, then a table of what was done, where. The exit status is 1 if a run started again at a
step before its newest complete checkpoint, took more restarts than there were kills, took its next step (or waited for
a frozen rank) more than run.timeout_minutes and 30 s after a fault, did not name the frozen rank, or ended with other
weights or other losses, to the bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process with threads cannot be forked

# For the ranks, as are engines and loop below.
import torch.distributed.run  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401

from scripts import stand_in_slurm, struck_rank  # noqa: E402
from scripts.forked import Forked, torchrun  # noqa: E402
from scripts.struck_rank import OF_A_SAVE, OF_A_STEP, ON_RANK_0, Notes, Strike  # noqa: E402
from shardopt import checkpoint  # noqa: E402
from shardopt.engines import ddp, fsdp, single, zero  # noqa: E402, F401
from shardopt.pretrain import loop  # noqa: E402, F401
from shardopt.pretrain.record import read_metrics  # noqa: E402

EVERY_ENGINE = [
    "single", "ddp", "{name: zero, stage: 1}", "{name: zero, stage: 2}", "{name: zero, replicate: 2}", "fsdp",
    "{name: fsdp, replicate: 2}", "{name: deepspeed, stage: 1}", "{name: deepspeed, stage: 2}",
    "{name: deepspeed, stage: 3}",
]  # fmt: skip
# This many of the kills come in the start, and so many seconds it takes.
_IN_THE_START, _START = 0.3, 2.0
_LONGEST_START = 240.0
_LONGEST_END = 300.0
# Of the frozen runs: long enough for ranks that start at different moments on a busy machine.
_TIMEOUT_MINUTES = 0.2
_GRACE = 30.0


def corpus(folder: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(40)]
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(words, k=100)))


def config(folder: Path, name: str, engine: str, steps: int) -> dict[str, Any]:
    return {
        "run": {"name": name, "dir": str(folder / "runs"), "device": "cpu", "timeout_minutes": 1},
        "model": {
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 64, "attention_dropout": 0.1,
        },
        "data": {
            "sources": [{"source": "text", "paths": [str(folder / "text")]}],
            "block_size": 32, "holdout": 0.1, "cache": str(folder / "cache"),
        },
        "optimizer": {"name": "ademamix", "lr": 3e-3, "state_dtype": "bf16"},
        "schedule": {"warmup": 2},
        "engine": yaml.safe_load(engine) if engine.startswith("{") else {"name": engine},
        "train": {"steps": steps, "global_batch": 8, "micro_batch": 2},
        "eval": {"every": 10, "batches": 1, "sample_tokens": 0},
        "checkpoint": {"every": 4},
        "tracking": {"log_every": 1, "wandb": {"mode": "disabled"}},
    }  # fmt: skip


@dataclass
class Run:
    """A run, the job that it is in, and what was done to it."""

    folder: Path
    name: str
    ranks: int
    settings: dict[str, Any]
    max_restarts: int = 0
    starter: str = ""  # a command of `COMMANDS`; none forks
    strikes: list[Strike] = field(default_factory=list)  # one for each attempt of the job that is started next
    job: Forked | subprocess.Popen[bytes] | None = None
    began: float = 0.0  # when that was started
    done: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    newest: int = 0  # step of the newest complete checkpoint that was seen
    longest: float = 0.0  # seconds from a fault to the first step after it

    @property
    def here(self) -> Path:
        return Path(self.settings["run"]["dir"]) / self.name

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def notes(self) -> Notes:
        return Notes(self.folder / f"{self.name}.notes")

    def start(self) -> None:
        path = self.folder / f"{self.name}.yaml"
        path.write_text(yaml.safe_dump(self.settings))
        self.began = time.time()
        with self.log.open("ab") as log:
            if not self.starter:
                self.job = Forked(lambda: self._agent(path), log.fileno())
                return
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            if self.starter == "sbatch":
                environment |= stand_in_slurm.install(self.folder, self.ranks)
            command = COMMANDS[self.starter].format(python=sys.executable, root=ROOT, ranks=self.ranks, config=path)
            self.job = subprocess.Popen(command.split(), env=environment, stdout=log, stderr=log, cwd=self.folder)

    def _agent(self, path: Path) -> None:
        command = f"--standalone --nproc-per-node {self.ranks} --max-restarts {self.max_restarts} rank"
        torchrun(command.split(), lambda _: struck_rank.main(str(path), self.strikes, self.notes))

    def ended(self) -> bool:
        return self.job is None or self.job.poll() is not None

    def workers(self, attempt: int = 0) -> list[dict[str, Any]]:
        """The notes of the ranks of the newest attempt, if it is that one or a later one and they are all there."""
        ranks = [note for note in self.notes.read("rank") if note["time"] >= self.began and note["attempt"] >= attempt]
        newest = max((note["attempt"] for note in ranks), default=0)
        found = [note for note in ranks if note["attempt"] == newest and psutil.pid_exists(note["pid"])]
        return found if len(found) == self.ranks else []

    def step(self) -> int:
        path = self.here / "metrics.jsonl"
        rows = read_metrics(path) if path.exists() else []
        return rows[-1]["step"] if rows else 0

    def wait(self, ready: Callable[[], Any]) -> bool:
        """Whether `ready()` came true before the job ended, or before the longest start was over."""
        deadline = time.monotonic() + _LONGEST_START
        while not ready():
            if self.ended():
                return False
            if time.monotonic() > deadline:
                self.faults.append(f"nothing within {_LONGEST_START:g} s after {self.done.total()} faults")
                return False
            time.sleep(0.02)
        return True

    def end(self, seconds: float = _LONGEST_END) -> int | None:
        """The job's status when it ends; None, and a fault, where it had to be killed."""
        assert self.job is not None
        try:
            return self.job.wait(seconds)
        except subprocess.TimeoutExpired:
            self.faults.append(f"still there {seconds:g} s after {self.done.total()} faults, see {self.log}")
            self.kill_all()
            return None

    def note_checkpoint(self) -> None:
        newest = step_of(checkpoint.latest(self.here / "checkpoints"))
        if newest < self.newest:
            self.faults.append(f"checkpoint {self.newest} was complete, and then the newest is {newest}")
        self.newest = max(newest, self.newest)

    def kill_all(self) -> None:
        if self.job is None or self.ended():
            return
        job = psutil.Process(self.job.pid)
        for process in [job, *job.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.job.wait()

    def finish(self, whole: Run, started: bool = False, losses: bool = True) -> None:
        """Run to the last step undisturbed, and compare with the run that always was.

        Args:
            started: the job is there already.
            losses: compare the losses too.
        """
        if not started:
            self.strikes, self.starter = [], ""
            self.start()
        status = self.end(600)
        if status != 0:
            self.faults.append(f"status {status}, see {self.log}")
        elif self.weights() != whole.weights():
            self.faults.append("ended with other weights")
        elif losses and self.losses() != whole.losses():
            self.faults.append("ended with other losses")
        self.check_starts()

    def check_starts(self) -> None:
        """No attempt may begin before the newest checkpoint that was complete when the one before was struck, or long
        after it was."""
        newest = 0
        struck: float | None = None
        for note in sorted(self.notes.read("began") + self.notes.read("strike"), key=lambda note: note["time"]):
            if note["event"] == "strike":
                newest = max(newest, int(note["newest"].rpartition("-")[2] or 0))
                struck = note["time"] if struck is None else struck
                continue
            if note["step"] < newest:
                self.faults.append(f"began at step {note['step']}, and checkpoint {newest} was complete")
            if struck is not None:
                self.longest = max(self.longest, note["time"] - struck)
            struck = None
        if self.longest > 60 * self.settings["run"]["timeout_minutes"] + _GRACE:
            self.faults.append(f"{self.longest:.0f} s from a fault to the next attempt's first step")

    def weights(self) -> str:
        return hashlib.sha256((self.here / "export" / "model.safetensors").read_bytes()).hexdigest()

    def losses(self) -> list[float]:
        return [row["loss"] for row in read_metrics(self.here / "metrics.jsonl")]


def step_of(folder: Path | None) -> int:
    return int(folder.name.rpartition("-")[2].split(".")[0]) if folder is not None else 0


COMMANDS = {
    "torchrun": "{python} -m torch.distributed.run --standalone --nproc-per-node {ranks} {root}/launch/pretrain.py "
    "{config}",
    "shardopt": "{python} -m shardopt pretrain --nproc-per-node {ranks} {config}",
    "sbatch": "bash {root}/launch/slurm.sbatch {config}",
}


@dataclass
class Lab:
    """Where the runs are, and what was asked for."""

    folder: Path
    arguments: argparse.Namespace
    number: int = 0

    def phases(self, known: list[str], engine: str) -> list[str]:
        """Those of a case that were asked for and that the engine has."""
        wanted = self.arguments.phases or known
        return [p for p in known if p in wanted and (p != "gather" or engine not in ("ddp", "single"))]

    def runs(self, engine: str, steps: int, max_restarts: int = 0, **changes: Any) -> tuple[Run, Run]:
        """A run that has ended, undisturbed, and another that is to end as it did."""
        self.number += 1
        pair = []
        for name, restarts in (("whole", 0), ("struck", max_restarts)):
            settings = config(self.folder, f"{name}-{self.number}", engine, steps)
            for key, value in changes.items():
                section, _, name_of_key = key.partition("__")
                settings[section][name_of_key] = value
            ranks = self.arguments.ranks * settings["engine"].get("replicate", 1) if engine != "single" else 1
            pair.append(Run(self.folder, f"{name}-{self.number}", ranks, settings, restarts))
        whole, struck = pair
        whole.start()
        if whole.end(600) != 0:
            raise SystemExit(f"{engine}: the undisturbed run failed, see {whole.log}")
        return whole, struck


# -------------------------------------------------------------------- kills


def kill_at_random(run: Run, attempt: int, draw: random.Random, by_hand: bool) -> bool:
    """Kill once, in attempt number `attempt`; False where the run has ended before."""
    if not run.wait(lambda: run.workers(attempt)):
        return False
    began = run.step()
    if draw.random() < _IN_THE_START:
        time.sleep(draw.uniform(0.0, _START))
    else:  # at least one checkpoint further
        goal = max(began, run.newest) + draw.randint(5, 12)
        if not run.wait(lambda: run.step() >= goal):
            return False
        time.sleep(draw.uniform(0.0, 0.3))
    phase = "saving" if list(run.here.glob("checkpoints/.*")) else "training" if run.step() > began else "starting"
    newest = checkpoint.latest(run.here / "checkpoints")
    run.notes.add("strike", do="kill all" if by_hand else "kill", phase=phase, newest=newest.name if newest else "")
    if by_hand:
        run.kill_all()
        run.start()
    else:
        workers = run.workers(attempt)
        if not workers:
            return False
        if workers[0]["attempt"] != attempt:
            run.faults.append(f"attempt {attempt} failed by itself")
        os.kill(draw.choice(workers)["pid"], signal.SIGKILL)
    run.done[phase] += 1
    run.note_checkpoint()
    return True


def at_random(lab: Lab, engine: str, draw: random.Random) -> Run:
    kills, by_hand = lab.arguments.kills, lab.arguments.by_hand
    # Some more than kills, so that one that fails by itself is counted and does not end it.
    whole, run = lab.runs(engine, 30 * kills + 20, 0 if by_hand else kills + 5)
    run.start()
    for count in range(kills):
        if not kill_at_random(run, 0 if by_hand else count, draw, by_hand):
            run.faults.append(f"ended before kill {count + 1}")
            break
    run.finish(whole, started=True)
    return run


def in_phases(lab: Lab, engine: str, draw: random.Random) -> Run:
    """A kill in each phase of a step and a save: one rank under --max-restarts; by hand, one rank or the whole job."""
    phases = lab.phases(OF_A_STEP + OF_A_SAVE, engine)
    by_hand = lab.arguments.by_hand
    draw.shuffle(phases)
    whole, run = lab.runs(engine, 10 * len(phases) + 10, 0 if by_hand else len(phases) + 5)
    strikes = []
    for number, phase in enumerate(phases):
        rank = 0 if phase in ON_RANK_0 else draw.randrange(run.ranks)
        # Not before the fourth checkpoint is there that makes one go.
        steps = 20 if phase == "delete" and number == 0 else draw.randint(6, 9)
        do = "kill all" if by_hand and number % 2 else "kill"
        strikes.append(Strike(do, phase, rank, steps, calls=draw.randint(0, 1)))
    if by_hand:
        for strike in strikes:
            run.strikes = [strike]
            run.start()
            run.end()
            run.note_checkpoint()
        run.finish(whole)
    else:
        run.strikes = strikes
        run.start()
        run.finish(whole, started=True)
    for event in run.notes.read("strike"):
        run.done[event["phase"] + (" (all)" if event["do"] == "kill all" else "")] += 1
    if run.done.total() != len(strikes):
        run.faults.append(f"{run.done.total()} of {len(strikes)} kills came: an attempt failed by itself")
    return run


# -------------------------------------------------------------------- frozen ranks


def frozen(lab: Lab, engine: str, draw: random.Random) -> Run:
    """The others must end within the timeout and half a minute, and name the rank that does not answer."""
    phases = lab.phases([*OF_A_STEP, "data", "document"], engine)
    whole, run = lab.runs(engine, 10 * len(phases) + 10, run__timeout_minutes=_TIMEOUT_MINUTES)
    for phase in phases:
        # The store is torchrun's, so any rank may be the one.
        rank = 0 if phase in ON_RANK_0 else draw.randrange(run.ranks)
        before, said = len(run.notes.read("strike")), run.log.stat().st_size if run.log.exists() else 0
        run.strikes = [Strike("stop", phase, rank, draw.randint(6, 9))]
        run.start()
        if not run.wait(lambda count=before: len(run.notes.read("strike")) > count):
            run.faults.append(f"{phase}: not reached")
            continue
        others = [psutil.Process(note["pid"]) for note in run.workers() if note["rank"] != rank]
        since = time.monotonic()
        _, waiting = psutil.wait_procs(others, timeout=60 * _TIMEOUT_MINUTES + _GRACE)
        seconds = time.monotonic() - since
        run.kill_all()
        run.done[phase] += 1
        with run.log.open("rb") as log:
            log.seek(said)
            named = f"rank {rank}: no answer, stopped or gone".encode() in log.read()
        if waiting:
            run.faults.append(f"{phase}: the others still waited after {seconds:.0f} s")
        elif not named:
            run.faults.append(f"{phase}: rank {rank} was not named, see {run.log}")
        run.note_checkpoint()
    run.finish(whole)
    return run


# -------------------------------------------------------------------- signals


def signals(lab: Lab, engine: str, draw: random.Random) -> Run:
    """Whoever is asked to stop must leave a checkpoint of the last step that was made."""
    cases = [(starter, number) for starter in ("torchrun", "shardopt") for number in (signal.SIGTERM, signal.SIGINT)]
    cases.append(("sbatch", signal.SIGUSR1))
    whole, run = lab.runs(engine, 300)
    for starter, number in cases:
        run.starter = starter
        began = run.step()
        run.start()
        goal = began + draw.randint(3, 9)
        if not run.wait(lambda goal=goal: run.step() >= goal):
            run.faults.append(f"{starter}: ended before {number.name}, see {run.log}")
            continue
        assert run.job is not None
        job = psutil.Process(run.job.pid)
        reached = [job]
        if number == signal.SIGINT:  # a terminal's Ctrl-C reaches every process
            reached += job.children(recursive=True)
        for process in reached:
            process.send_signal(number)
        status = run.end()
        run.done[f"{number.name} {starter}"] += 1
        saved = step_of(checkpoint.latest(run.here / "checkpoints"))
        if saved != run.step() or (starter != "torchrun" and status != 0):
            run.faults.append(
                f"{number.name} {starter}: status {status}, checkpoint {saved}, last step {run.step()}, see {run.log}"
            )
        run.note_checkpoint()
    run.finish(whole)
    return run


# -------------------------------------------------------------------- full disks

# Where the disk is full, and whether the run goes on.
_WHILE_IT_TRAINS = {"data", "index", "document", "metrics"}
_GOES_ON = {*_WHILE_IT_TRAINS, "loss.png"}
_WRITES = [
    "cache", "meta of the cache", "config.yaml", "config of the model", "data", "index", "document", "metrics",
    "export", "loss.png",
]  # fmt: skip


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def full(lab: Lab, engine: str, draw: random.Random) -> Run:
    """Each is told (or the run goes on), and the next start, with space again, ends as if nothing had been."""
    whole, run = lab.runs(engine, 12 * 8)
    with small_disk(lab.folder) as disk:
        run.settings["run"]["dir"], run.settings["data"]["cache"] = str(disk / "runs"), str(disk / "cache")
        for phase in lab.phases(_WRITES, engine):
            said = run.log.stat().st_size if run.log.exists() else 0
            run.strikes = [Strike("full", phase, 0, draw.randint(3, 6) if phase in _WHILE_IT_TRAINS else 0)]
            count = len(run.notes.read("strike"))
            run.start()
            if phase in _WHILE_IT_TRAINS:
                if run.wait(lambda count=count: len(run.notes.read("strike")) > count):
                    goal = run.step() + 6  # what a background save met is said at the next one
                    if not run.wait(lambda goal=goal: run.step() >= goal):
                        run.faults.append(f"{phase}: the run ended by it, see {run.log}")
                run.kill_all()
            status = run.end(600)
            if len(run.notes.read("strike")) == count:
                run.faults.append(f"{phase}: not reached")
                continue
            run.done[phase] += 1
            with run.log.open("rb") as log:
                log.seek(said)
                text = log.read().decode(errors="replace")
            if phase not in _GOES_ON and status == 0:
                run.faults.append(f"{phase}: nothing came of it")
            if phase not in ("metrics", "loss.png") and "No space left on device" not in text:
                run.faults.append(f"{phase}: the reason was not said, see {run.log}")
            run.note_checkpoint()
        run.finish(whole, losses=False)
        lost = Counter(whole.losses()) - Counter(run.losses())
        extra = Counter(run.losses()) - Counter(whole.losses())
        if extra:
            run.faults.append("ended with other losses")
        run.done["(rows of metrics lost)"] = lost.total()
    return run


# -------------------------------------------------------------------- other numbers of ranks


def elastic(lab: Lab, engine: str, draw: random.Random) -> Run:
    """Stopped on 4 ranks, gone on with on 2 and then on 3."""
    changes: dict[str, Any] = {"train__global_batch": 24, "optimizer__state_dtype": "fp32"}
    changes["model__attention_dropout"] = 0.0  # each rank draws its own
    lab.arguments.ranks = 4
    whole, run = lab.runs(engine, 48, **changes)
    while len(run.done) < 2:
        run.ranks = (4, 2)[len(run.done)]
        began = run.step()
        run.start()
        if not run.wait(lambda began=began: run.step() >= began + 12):
            run.faults.append(f"{run.ranks} ranks: ended by itself, see {run.log}")
            break
        assert run.job is not None
        run.job.send_signal(signal.SIGTERM)
        run.end()
        run.done[f"{run.ranks} ranks to step {run.step()}"] += 1
        if run.ranks == 4 and run.losses() != whole.losses()[: run.step()]:
            run.faults.append("on as many ranks, other losses")
    run.ranks = 3
    run.start()
    if run.end(600) != 0:
        run.faults.append(f"3 ranks: see {run.log}")
    worst = max(abs(a - b) / b for a, b in zip(run.losses(), whole.losses(), strict=True))
    run.done[f"3 ranks to step {run.step()}, largest relative difference of a loss {worst:.1e}"] += 1
    if worst > 1e-5:
        run.faults.append(f"losses differ by {worst:.1e}")
    return run


CASES = {
    "random": at_random, "phases": in_phases, "frozen": frozen, "signals": signals, "full": full, "elastic": elastic,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--kills", type=int, default=20, help="per engine, at random")
    parser.add_argument("--engines", nargs="+", default=["fsdp"], help="names, sections as YAML, or all")
    parser.add_argument("--phases", nargs="+", help="of the cases that have phases; all by default")
    parser.add_argument("--ranks", type=int, default=2, help="of each replica, with an engine's replicate")
    parser.add_argument("--by-hand", action="store_true", help="kill torchrun too, and start the command again")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--keep", type=Path, help="a new folder for the runs and their logs, which stays")
    arguments = parser.parse_args(argv)
    total: Counter[str] = Counter()
    failed = False
    with tempfile.TemporaryDirectory(prefix="shardopt-kills-") as scratch:
        folder = Path(scratch) if arguments.keep is None else arguments.keep.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        corpus(folder / "text")
        lab = Lab(folder, arguments)
        for number, engine in enumerate(EVERY_ENGINE if arguments.engines == ["all"] else arguments.engines):
            began = time.monotonic()
            run = CASES[arguments.case](lab, engine, random.Random(arguments.seed + number))
            run.kill_all()
            seconds = round(time.monotonic() - began)
            report = {"case": arguments.case, "engine": engine, "done": dict(run.done), "seconds": seconds}
            report["longest"] = round(run.longest, 1)
            print(json.dumps(report | {"count": run.done.total(), "faults": run.faults}), flush=True)
            failed = failed or bool(run.faults)
            total += run.done
    width = max(map(len, total), default=0)
    for what, count in total.items():
        print(f"{what:{width}} {count:5}")
    print(f"{'in all':{width}} {total.total():5}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
