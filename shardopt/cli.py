"""The command line: `shardopt pretrain CONFIG [key.sub=value ...]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from shardopt import __version__
from shardopt.errors import InputError, MissingExtraError


def main(argv: Sequence[str] | None = None, command: str | None = None) -> int:
    """Run a command; the exit status: 0 done or stopped on request, 2 bad input, 1 anything else.

    Args:
        argv: the command and its arguments; by default those of this process.
        command: what a script of its own runs, so that `argv` does not name it.
    """
    parser = argparse.ArgumentParser(
        prog=None if command else "shardopt", description="Sharded AdEMAMix for language-model pretraining."
    )
    parser.add_argument("--version", action="version", version=f"shardopt {__version__}")
    if command is None:
        parser.add_argument("command", choices=["pretrain"], help="pretrain a language model")
    parser.add_argument("config", help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the file")
    parser.add_argument(
        "--nproc-per-node", metavar="N", help="start N ranks here (a number, or gpu); not needed under torchrun"
    )
    parser.add_argument("--print-config", action="store_true", help="show the resolved config and stop")
    arguments = parser.parse_intermixed_args(argv)
    try:
        return _pretrain(arguments)
    except (InputError, MissingExtraError) as e:
        # Every rank has the same error, and one of them says it.
        if os.environ.get("RANK", "0") == "0":
            print(f"shardopt: {e}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130


def _pretrain(arguments: argparse.Namespace) -> int:
    if arguments.nproc_per_node is not None and "RANK" not in os.environ and not arguments.print_config:
        return _start_ranks(arguments)
    try:
        from shardopt.pretrain import config as configuration
    except ModuleNotFoundError as e:
        raise MissingExtraError(e.name or "a package", "pretrain") from e
    config = configuration.load(arguments.config, arguments.overrides)
    if arguments.print_config:
        if os.environ.get("RANK", "0") == "0":
            print(config.as_yaml(), end="")
        return 0
    from shardopt.pretrain.loop import NonFiniteError, pretrain

    try:
        pretrain(config)
    except NonFiniteError as e:
        if os.environ.get("RANK", "0") == "0":
            print(f"shardopt: {e}", file=sys.stderr, flush=True)
        return 1
    return 0


def _start_ranks(arguments: argparse.Namespace) -> int:
    """torchrun, without its traceback where a rank has already said what is wrong or was asked to stop."""
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    wanted = arguments.nproc_per_node
    count = torch.cuda.device_count() if wanted == "gpu" else int(wanted) if wanted.isdecimal() else 0
    if count < 1:
        raise InputError(
            f"--nproc-per-node: {wanted!r} starts no rank; give a number of at least 1, or gpu on a machine with GPUs"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    command = ["-m", "shardopt", "pretrain", arguments.config, *arguments.overrides]
    try:
        torchrun(["--standalone", "--nproc_per_node", str(count), *command])
    except SignalException:
        return 0  # torchrun has passed the signal on, and the ranks have saved and stopped
    except ChildFailedError as e:
        _, failure = e.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
