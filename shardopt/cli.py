"""The command line: `shardopt pretrain CONFIG [key.sub=value ...]`, and the commands of commands/."""

from __future__ import annotations

import argparse
import gc
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from shardopt import __version__, commands
from shardopt.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from shardopt.pretrain.config import Config

PRETRAIN = "pretrain"
# How long a rank waits for rank 0 to print the error that both have.
_SAYING = timedelta(seconds=30)
# Longer than the ranks wait for each other, so that they can say whom they waited for.
_KILL_AFTER = timedelta(seconds=30)
STATUS = "SHARDOPT_STATUS"
"""The environment variable with the file into which rank 0 writes how the run has ended in order: finished, or stopped
with a checkpoint. It is for whoever started the ranks: torchrun's exit status after a signal says neither."""


class _Prefixed(logging.Formatter):
    """ "warning: " and the like before a message that no handler but Python's last resort shows, as reports have it."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


# transformers imports torchao where it is installed, which warns of CUDA libraries and of torch, on every rank.
_NOISY = ("torchao", "torch.utils._pytree")


def main(argv: Sequence[str] | None = None, command: str | None = None) -> int:
    """Run a command; the exit status: 0 done, or stopped on request with a checkpoint; 2 bad input; else another.

    Args:
        argv: the command and its arguments; by default those of this process.
        command: what a script of its own runs, so that `argv` does not name it.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Prefixed())
    if command is None:
        if given[:1] and given[0] in commands.COMMANDS:
            return commands.main(given)
        if given[:1] != [PRETRAIN]:
            _overview().parse_args(given)
        given = given[1:]
    arguments = parser(None if command else f"shardopt {PRETRAIN}").parse_intermixed_args(given)
    try:
        return _pretrain(arguments)
    except (InputError, MissingExtraError) as e:
        if arguments.debug:
            traceback.print_exc()
        _say(str(e))
        return 2
    except KeyboardInterrupt:
        return 130


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of `shardopt pretrain`'s arguments."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Pretrain a language model with sharded AdEMAMix.",
        epilog="example:\n  shardopt pretrain configs/quickstart.yaml --nproc-per-node 2 optimizer.lr=1e-3\n"
        "more: docs/training.md, docs/data.md, docs/checkpoints.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.sub=value", help="replaces a value of the file"
    )
    parser.add_argument(
        "--nproc-per-node", metavar="N", help="start N ranks here (a number, or gpu); not needed under torchrun"
    )
    parser.add_argument("--print-config", action="store_true", help="show the resolved config and stop")
    commands.add_debug(parser)
    return parser


def _overview() -> argparse.ArgumentParser:
    """What `shardopt --help` shows; it takes no command that there is."""
    helps = {PRETRAIN: "pretrain a language model"} | {name: each.help for name, each in commands.COMMANDS.items()}
    width = max(map(len, helps))
    listing = "\n".join(f"  {name:{width}}  {text}" for name, text in helps.items())
    parser = argparse.ArgumentParser(
        prog="shardopt",
        description="Sharded AdEMAMix for language-model pretraining.",
        epilog=f"commands (each has a --help of its own):\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"shardopt {__version__}")
    parser.add_argument("command", choices=list(helps), metavar="command")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    return parser


@contextmanager
def _importing() -> Iterator[None]:
    """Collect no garbage: what modules make stays, and to look through all of it again and again takes a second."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # nor do collections look through it later
        gc.enable()


def _pretrain(arguments: argparse.Namespace) -> int:
    from shardopt.pretrain import versions

    versions.check(["pretrain"])
    try:
        with _importing():
            from shardopt.pretrain import config as configuration
    except ModuleNotFoundError as e:
        raise MissingExtraError(e.name or "a package", "pretrain") from e
    config = configuration.load(arguments.config, arguments.overrides)
    versions.check([config.engine.name])  # an engine that needs packages has an extra of its name
    if arguments.print_config:
        if os.environ.get("RANK", "0") == "0":
            print(config.as_yaml(), end="")
        return 0
    if arguments.nproc_per_node is not None and "RANK" not in os.environ:
        return _start_ranks(arguments, config)
    with _importing():
        from shardopt.pretrain.loop import NonFiniteError, pretrain

    try:
        result = pretrain(config)
    except NonFiniteError as e:
        _say(str(e))
        return 1
    if os.environ.get("RANK", "0") == "0" and STATUS in os.environ:
        _write_status(Path(os.environ[STATUS]), result.status)
    return 0


def _write_status(path: Path, status: str) -> None:
    try:
        path.write_text(status)
    except OSError as e:
        raise InputError(f"{STATUS}: cannot write {path}: {e.strerror or e}; the run is {status}") from e


def _say(error: str) -> None:
    """Print an error that every rank has, once, and return on no rank before it is printed.

    torchrun kills the other ranks as soon as one has ended, rank 0 among them.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    line = f"shardopt: {error}"
    if rank == 0:
        print(line, file=sys.stderr, flush=True)
    import torch.distributed as dist

    if world_size == 1 or dist.is_initialized():  # a group that is not ours belongs to processes that nobody ends
        return
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=_SAYING))
        key = f"shardopt/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        store.set(key, "") if rank == 0 else store.wait([key], _SAYING)
    except (dist.DistError, RuntimeError, ValueError):
        if rank != 0:  # rank 0 has no such error, or is gone: this rank's own
            print(line, file=sys.stderr, flush=True)


def _start_ranks(arguments: argparse.Namespace, config: Config) -> int:
    """Start the ranks as torchrun does, without its traceback and log, since a rank says what is wrong."""
    import torch
    from torch.distributed.elastic.agent.server import api as agent
    from torch.distributed.elastic.multiprocessing import api as processes
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    from shardopt.checkpoint import latest
    from shardopt.pretrain.cores import usable_cores
    from shardopt.pretrain.events import read_events
    from shardopt.pretrain.signals import SHUTDOWN_TIMEOUT, seconds_to_kill

    wanted = arguments.nproc_per_node
    count = torch.cuda.device_count() if wanted == "gpu" else int(wanted) if wanted.isdecimal() else 0
    if count < 1:
        raise InputError(
            f"--nproc-per-node: {wanted!r} starts no rank; give a number of at least 1, or gpu on a machine with GPUs"
        )
    config.check_ranks(count)
    cores = usable_cores()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    patience = timedelta(minutes=config.run.timeout_minutes) + _KILL_AFTER
    os.environ.setdefault(SHUTDOWN_TIMEOUT, str(math.ceil(patience.total_seconds())))
    for logger in (agent.logger, processes.logger):  # whom they signal and which process failed
        logger.setLevel(logging.CRITICAL)
    debug = ["--debug"] if arguments.debug else []
    command = ["-m", "shardopt", PRETRAIN, *debug, arguments.config, *arguments.overrides]
    with TemporaryDirectory(prefix="shardopt-") as scratch:
        status = Path(os.environ.setdefault(STATUS, str(Path(scratch) / "status")))
        status.unlink(missing_ok=True)
        started = time.time()
        try:
            torchrun(["--standalone", "--nproc_per_node", str(count), *command])
        except processes.SignalException as e:  # torchrun has passed it on to the ranks, and they have ended
            if status.exists():
                return 0
            saved = latest(config.store / "checkpoints")
            events = read_events(config.folder / "events.jsonl")
            if any(one["event"] == "start" and one["time"] >= started for one in events):
                _say(
                    f"{e.sigval.name} ended the run before its checkpoint was complete (torchrun kills the ranks after "
                    f"{seconds_to_kill(f'{SHUTDOWN_TIMEOUT}, or run.timeout_minutes')}); "
                    f"{f'the newest is {saved}' if saved else 'there is none'}"
                )
            else:
                newest = f"the newest checkpoint is {saved}" if saved else "it has no checkpoint"
                _say(f"{e.sigval.name} ended the run before its first step; {newest}")
            return 128 + e.sigval
        except ChildFailedError as e:
            rank, failure = e.get_first_failure()
            if failure.exitcode < 0:  # it could say nothing
                _say(f"rank {rank} was ended by {failure.signal_name()}")
            return failure.exitcode if failure.exitcode > 0 else 1
        finally:
            if status.parent == Path(scratch):
                del os.environ[STATUS]
    return 0


if __name__ == "__main__":
    sys.exit(main())
