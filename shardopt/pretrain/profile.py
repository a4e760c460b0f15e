"""A profile of some steps, by torch's profiler: a Chrome trace of each rank, and on a GPU a snapshot of its memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import Field, model_validator
from torch.profiler import ProfilerActivity, profile, record_function

from shardopt.distributed import Ranks
from shardopt.errors import InputError
from shardopt.pretrain.section import Section


class ProfileConfig(Section):
    """A trace of some steps by torch's profiler."""

    steps: int | str | None = Field(None)
    """Steps to profile, counted from 1: 10-12, or one; null: none. It slows them down."""

    @model_validator(mode="after")
    def _check(self) -> ProfileConfig:
        first, last = self.range
        if self.steps is not None and not 1 <= first <= last:
            raise InputError(f"profile.steps: must be a step or two, as 10-12, got {self.steps!r}")
        return self

    @property
    def range(self) -> tuple[int, int]:
        """The first step and the last; (0, 0) where there is none, or no sense in what was given."""
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", str(self.steps))
        return (int(found[1]), int(found[2] or found[1])) if found else (0, 0)


class Profiler:
    """Profiles the steps that the config names.

    Args:
        config: the `profile` section.
        folder: where rank-NNNNN.trace.json.gz (chrome://tracing, ui.perfetto.dev) is written, and on a GPU
            rank-NNNNN.memory.pickle (pytorch.org/memory_viz).
        ranks: the processes; each writes its own.
        say, warn: called with one line.
    """

    def __init__(
        self,
        config: ProfileConfig,
        folder: Path,
        ranks: Ranks,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._first, self._last = config.range
        self._steps, self._folder, self._ranks, self._say, self._warn = config.steps, folder, ranks, say, warn
        self._cuda = ranks.device.type == "cuda"
        self._running: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number`, from 1."""
        if not self._first <= number <= self._last:
            yield
            return
        if self._running is None:
            self._start()
        with record_function(f"step {number}"):
            yield
        if number == self._last:
            self.close()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._running = profile(activities=activities, record_shapes=True, profile_memory=True)
        if self._cuda:
            torch.cuda.memory._record_memory_history()
        self._running.start()

    def close(self) -> None:
        """End the profile and write it, of however many steps; nothing where none is running."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        rank = f"rank-{self._ranks.rank:05d}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(self._folder / f"{rank}.trace.json.gz"))
            if self._cuda:
                torch.cuda.memory._dump_snapshot(str(self._folder / f"{rank}.memory.pickle"))
        except (OSError, RuntimeError) as error:  # the run is worth more
            self._warn(f"profile: {self._folder} cannot be written: {error}")
        else:
            self._say(f"profile of steps {self._steps}: {self._folder}")
        if self._cuda:
            torch.cuda.memory._record_memory_history(enabled=None)
