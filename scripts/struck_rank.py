"""A rank of kill_runs.py: `shardopt pretrain`, and a fault that this process makes in itself."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

# The functions before which a phase's fault comes; "hook:" names are below.
PHASES = {
    # of a step
    "forward": ["torch.nn.functional:scaled_dot_product_attention"],
    "backward": ["hook:backward"],
    # torch 2.13 has other names for what older ones call reduce_scatter_tensor and all_gather_into_tensor
    "reduce": [
        "torch.distributed:reduce_scatter_single", "torch.distributed:reduce_scatter_tensor",
        "torch.distributed:all_reduce", "hook:reduce_scatter",
    ],
    "step": ["hook:step"],
    "gather": [
        "torch.distributed:all_gather_single", "torch.distributed:all_gather_into_tensor",
        "torch.distributed:all_gather", "hook:all_gather",
    ],
    # of a save, in order
    "plan": ["shardopt.checkpoint.saving:Kept.agree"],
    "begin": ["shardopt.checkpoint.folders:begin"],
    "copy": ["shardopt.checkpoint.staging:Staging.copy"],
    "data": ["shardopt.checkpoint.blocks:write_file"],
    "write": ["os:pwrite"],
    "sync": ["os:fsync"],
    "index": ["shardopt.checkpoint.saving:write_index"],
    "document": ["shardopt.checkpoint.saving:write_document"],
    "publish": ["shardopt.checkpoint.folders:publish"],
    "prune": ["shardopt.checkpoint.folders:prune"],
    "delete": ["shardopt.checkpoint.folders:_delete"],
    # other files of a run
    "metrics": ["shardopt.pretrain.metrics:MetricsFile.write"],
    "export": ["shardopt.checkpoint.export:_Files._flush"],
    "config of the model": ["shardopt.pretrain.model_files:ModelFiles.write"],
    "config.yaml": ["shardopt.pretrain.folder:RunFolder._record"],
    "cache": ["shardopt.pretrain.data.build:pack"],
    "meta of the cache": ["shardopt.pretrain.data.build:write_meta"],
    "loss.png": ["shardopt.pretrain.metrics:draw_loss"],
}  # fmt: skip
OF_A_STEP = ["forward", "backward", "reduce", "step", "gather"]
OF_A_SAVE = ["plan", "begin", "copy", "data", "write", "sync", "index", "document", "publish", "prune", "delete"]
ON_RANK_0 = {"begin", "index", "document", "publish", "prune", "delete"}


@dataclass
class Strike:
    do: str
    """kill, kill all (torchrun too), stop (SIGSTOP), or full: the run's disk is, during the call."""
    phase: str
    rank: int
    steps: int = 0
    """Of this attempt that are left in peace before it."""
    calls: int = 0
    """Calls of the phase that are left in peace after them."""


@dataclass
class Notes:
    """What happens in a job, one JSON object a line: each rank that starts, the step at which an attempt begins, and
    each strike with the newest complete checkpoint at that moment."""

    path: Path

    def add(self, event: str, **what: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, **what, "time": time.time()}) + "\n")

    def read(self, event: str) -> list[dict[str, Any]]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [note for note in map(json.loads, lines) if note["event"] == event]


class Striker:
    """Waits for a strike's moment, and makes it."""

    def __init__(self, strike: Strike, folder: Path, notes: Notes) -> None:
        self.strike, self.folder, self.notes = strike, folder, notes
        self.steps = self.calls = 0
        self.done = False

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def struck(*arguments: Any, **keywords: Any) -> Any:
            if not self.is_now():
                return call(*arguments, **keywords)
            filler = self.make()
            try:
                return call(*arguments, **keywords)
            finally:
                filler.unlink(missing_ok=True)

        return struck

    def is_now(self) -> bool:
        if self.done or self.steps < self.strike.steps:
            return False
        self.calls += 1
        last = self.calls > self.strike.calls
        # A row of metrics is short, and fits in the page that the file has: some rows.
        self.done = last and (self.strike.phase != "metrics" or self.calls > self.strike.calls + 12)
        return last

    def make(self) -> Path:
        from shardopt import checkpoint

        newest = checkpoint.latest(self.folder / "checkpoints")
        self.notes.add("strike", newest=newest.name if newest else "", **asdict(self.strike))
        filler = self.folder.parent / "filler"
        if self.strike.do == "kill all":
            agent = psutil.Process(os.getppid())
            for process in [agent, *agent.children()]:
                if process.pid != os.getpid():
                    process.kill()
        if self.strike.do.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.strike.do == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            fill(filler)
        return filler


def fill(filler: Path) -> None:
    """Use up every byte of the file system."""
    size = 2**20
    with filler.open("wb", buffering=0) as file:
        while size:
            try:
                file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size //= 2


def replace(name: str, wrap: Callable[[Any], Any]) -> None:
    module, _, path = name.partition(":")
    owner = importlib.import_module(module)
    *parents, last = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    if hasattr(owner, last) or module != "torch.distributed":
        setattr(owner, last, wrap(getattr(owner, last)))


def install(name: str, striker: Striker) -> None:
    kind, _, what = name.partition(":")
    now = striker.wrap(lambda *_: None)
    if kind != "hook":
        replace(name, striker.wrap)
    elif what == "step":
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        register_optimizer_step_pre_hook(now)
    elif what == "backward":

        def hooked(call: Callable[..., Any]) -> Callable[..., Any]:
            def attention(*arguments: Any, **keywords: Any) -> Any:
                out = call(*arguments, **keywords)
                if out.requires_grad:
                    out.register_hook(now)
                return out

            return attention

        replace("torch.nn.functional:scaled_dot_product_attention", hooked)
    else:
        from shardopt.engines.zero.transports import backends, shared_memory

        for module in (backends, shared_memory):
            for cls in vars(module).values():
                if isinstance(cls, type) and cls.__module__ == module.__name__ and what in vars(cls):
                    replace(f"{module.__name__}:{cls.__name__}.{what}", striker.wrap)


def main(config_file: str, strikes: list[Strike], notes: Notes) -> int:
    """What each rank of a job runs: strike number i is for attempt number i of the job, if it is this rank's."""
    from shardopt.cli import main as shardopt
    from shardopt.pretrain import config, loop

    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    notes.add("rank", rank=rank, attempt=attempt, pid=os.getpid())
    striker = None
    if attempt < len(strikes) and strikes[attempt].rank == rank:
        striker = Striker(strikes[attempt], config.load(config_file).folder, notes)
        for name in PHASES[strikes[attempt].phase]:
            install(name, striker)
    advance = loop.Run.advance
    began = False

    def counted(run: loop.Run, *arguments: Any) -> None:
        nonlocal began
        if not began and rank == 0:
            notes.add("began", step=run.progress.step)
        began = True
        advance(run, *arguments)
        if striker is not None:
            striker.steps += 1

    loop.Run.advance = counted  # type: ignore[method-assign]
    return shardopt([config_file], command="pretrain")
