"""Processes that are forked instead of started: a rank costs no import of torch, and restarts after a second.

    forked.torchrun(["--standalone", "--nproc-per-node", "2", "-m", "shardopt", "pretrain", config], rank)

Whoever forks has one thread, and has imported what the ranks need.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

# What torchrun's agent handles itself; a program that is started has the system's handlers.
_HANDLED = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Forked:
    """A process that calls a function, with as much of subprocess.Popen as torchrun's agent uses.

    Args:
        call: its exit status is what it returns or exits with.
        output: file descriptor of its standard output and error; None keeps this process's.
        environment: its environment; None keeps this process's.
    """

    def __init__(
        self, call: Callable[[], Any], output: int | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_run(call, output, environment))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        began = time.monotonic()
        while self.poll() is None:
            if timeout is not None and time.monotonic() - began > timeout:
                raise subprocess.TimeoutExpired(["a forked process"], timeout)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _run(call: Callable[[], Any], output: int | None, environment: Mapping[str, str] | None) -> int:
    status: Any = 1
    try:
        os.setsid()
        for number in _HANDLED:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if output is not None:
            os.dup2(output, 1)
            os.dup2(output, 2)
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        status = call()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else int(status is not None)


def torchrun(argv: list[str], rank: Callable[[list[str]], Any]) -> None:
    """torchrun with `argv`, except that each rank calls `rank` with what would have been Python's arguments."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    def fork(handler: SubprocessHandler, command: tuple[str, ...], environment: dict[str, str]) -> Forked:
        return Forked(lambda: rank(list(command[1:])), environment=environment)

    SubprocessHandler._popen = fork  # type: ignore[assignment, method-assign]
    run.main(argv)
