"""Stopping a run after its step: Ctrl-C, or a scheduler's SIGTERM."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


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
