"""Stopping a run after its step: Ctrl-C, or a scheduler's SIGTERM."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# The environment variable by which torchrun's agent is told how many seconds after a signal it kills the ranks; that of
# torch 2.11 does not read it, and kills them after 30.
SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


@dataclass
class Stop:
    asked: str | None = None
    at: float = 0.0


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM ask the run to stop after its step; a second SIGINT, 2 s later or more, interrupts it.

    torchrun passes on the Ctrl-C that the terminal has already sent to every process, hence the two seconds.
    """
    stop = Stop()

    def ask(number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if stop.asked is not None and number == signal.SIGINT and now - stop.at > 2:
            raise KeyboardInterrupt
        if stop.asked is None:
            stop.asked, stop.at = signal.Signals(number).name, now

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def seconds_to_kill(means: str = SHUTDOWN_TIMEOUT) -> str:
    """How long torchrun waits after a signal before it kills ranks, and by what `means` that is set, for a message."""
    from torch.distributed.launcher.api import LaunchConfig

    if "shutdown_timeout" not in LaunchConfig.__dataclass_fields__:
        return "30 s (always, in this torch)"
    return f"{os.environ.get(SHUTDOWN_TIMEOUT, '30')} s ({means})"


def patience_of_torchrun() -> str:
    """How long torchrun, if it has started this process, waits for a checkpoint; for a message."""
    return f"; torchrun waits {seconds_to_kill()} for it" if "TORCHELASTIC_RUN_ID" in os.environ else ""
