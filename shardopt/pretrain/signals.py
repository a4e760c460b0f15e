"""Stopping a run after its step: Ctrl-C, or a scheduler's SIGTERM."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# The environment variable by which torchrun's agent is told how many seconds after a signal it kills the ranks.
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


def patience_of_torchrun() -> str:
    """How long torchrun, if it has started this process, waits after a signal before it kills; for a message."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    return f"; torchrun waits {os.environ.get(SHUTDOWN_TIMEOUT, '30')} s for it ({SHUTDOWN_TIMEOUT})"
