"""Commands as processes of their own, forked from the pool's server instead of started: they import no torch.

process = Command(call, *arguments, output=path)      # a module-level function; what it prints is in the file
process = Command(pretrain, argv, output=path)        # `shardopt ARGV`; the ranks that it starts are forked too
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts import forked
from tests.distributed.pool import _context


class Command:
    """A process with as much of subprocess.Popen as the tests need.

    Args:
        call: its exit status is what it returns or exits with.
        output: file for its standard output and error.
        environment: what to change of this process's.
    """

    def __init__(self, call: Callable[..., Any], *arguments: Any, output: Path, **environment: str) -> None:
        self.output = output
        whole = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        self._process = _context.Process(target=_run, args=(str(output), whole, call, arguments), daemon=False)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for the end; what was printed."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(self.output.read_text())
        return self.output.read_text(), None


def _run(output: str, environment: dict[str, str], call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(call(*arguments))


def pretrain(argv: list[str], before: Callable[[], None] | None = None) -> int:
    """For `Command`: the command line, with ranks that torchrun forks; each calls `before` first."""
    from torch.distributed import run

    from shardopt import cli

    torchrun = run.main

    def rank(arguments: list[str]) -> int:
        if before is not None:
            before()
        return cli.main(arguments[arguments.index("shardopt") + 1 :])

    def launch(arguments: list[str]) -> None:
        run.main = torchrun
        forked.torchrun(arguments, rank)

    run.main = launch
    return cli.main(argv)
