"""The commands beside `shardopt pretrain`: a file each, which is imported when its command is given."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple

from shardopt.errors import InputError, MissingExtraError


class Command(NamedTuple):
    """What `shardopt --help` says of a command; the module of its name has `add_arguments(parser)`."""

    help: str
    example: str  # of its arguments
    page: str  # of the documentation
    overrides: bool = False  # whether it takes key.sub=value, which may stand after an option

    def epilog(self, name: str) -> str:
        return f"example:\n  shardopt {name} {self.example}\nmore: {self.page}"


_DEBUG = "--debug"
COMMANDS = {
    "checkpoint": Command(
        "look into checkpoints, and write those of other codes", "inspect runs/quickstart", "docs/checkpoints.md"
    ),
    "compare": Command(
        "train with several optimizers and compare them",
        "configs/quickstart.yaml --optimizers ademamix,adamw --seeds 3",
        "docs/compare.md",
        overrides=True,
    ),
    "completion": Command(
        "print a script that completes commands and keys in bash",
        "bash > ~/.local/share/bash-completion/completions/shardopt",
        "docs/getting-started.md",
    ),
    "config": Command("list the keys of a config, with their defaults and units", "train.steps", "docs/config.md"),
    "data": Command(
        "prepare a run's text before it starts, and show what it is", "inspect configs/quickstart.yaml", "docs/data.md"
    ),
    "doctor": Command("tell what this machine offers a run, and what is missing", "--json", "docs/doctor.md"),
    "eval": Command(
        "score a trained model: loss and bits per byte", "runs/quickstart --data README.md 'docs/*.md'", "docs/after.md"
    ),
    "export": Command(
        "write a checkpoint's weights for transformers", "runs/quickstart --dtype bf16", "docs/checkpoints.md"
    ),
    "generate": Command("continue a text with a trained model", "runs/quickstart --prompt 'import '", "docs/after.md"),
    "init": Command(
        "write a config of your own, with every key explained", "--model llama-124m", "docs/config.md", overrides=True
    ),
    "plan": Command(
        "tell memory, traffic and hours of a run before it starts",
        "configs/apertus-8b.yaml --world-size 64 --gpu h100",
        "docs/planning.md",
        overrides=True,
    ),
    "report": Command(
        "write a page with the curves and facts of runs",
        "runs/quickstart runs/mine --output both.html",
        "docs/report.md",
    ),
    "runs": Command("list runs: state, step, loss, time left", "runs", "docs/after.md"),
    "sweep": Command(
        "train at every point of a grid and compare them",
        "configs/quickstart.yaml --grid optimizer.lr=3e-3,6e-3",
        "docs/compare.md",
        overrides=True,
    ),
}


def parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command's arguments."""
    parser = argparse.ArgumentParser(
        prog=f"shardopt {name}",
        description=COMMANDS[name].help.capitalize() + ".",
        epilog=COMMANDS[name].epilog(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    importlib.import_module(f"shardopt.commands.{name}").add_arguments(parser)
    add_debug(parser)
    return parser


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Declare the option with which a mistake shows its traceback."""
    parser.add_argument(_DEBUG, action="store_true", help="show where in the code a mistake was noticed")


def main(argv: Sequence[str]) -> int:
    """Run a command of `COMMANDS` in this process alone; the exit status: 0 done, 1 damage was found or a run has
    failed, 2 bad input, 130 interrupted."""
    name = argv[0]
    given = parser(name)
    parse = given.parse_intermixed_args if COMMANDS[name].overrides else given.parse_args
    arguments = parse([word for word in argv[1:] if word != _DEBUG])  # also after a command of a command
    try:
        return _run(arguments)
    except (InputError, MissingExtraError) as e:
        if _DEBUG in argv:
            traceback.print_exc()
        print(f"shardopt: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read the output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(arguments: argparse.Namespace) -> int:
    try:
        status = arguments.run(arguments)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.split(".")[0] == "shardopt":
            raise
        raise MissingExtraError(e.name, "pretrain") from e
    sys.stdout.flush()
    return status
