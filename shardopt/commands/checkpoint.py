"""`shardopt checkpoint inspect | list | convert`."""

from __future__ import annotations

import argparse
import json
import sys

_TARGETS = ("shardopt", "torch", "paper", "bitsandbytes", "torchtitan", "deepspeed", "trainer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, and the function that runs the command."""
    commands = parser.add_subparsers(required=True, metavar="command")

    inspect = commands.add_parser("inspect", help="say what is in a checkpoint, and who wrote it")
    inspect.add_argument("path", help="a checkpoint, or a run's folder for its newest")
    inspect.add_argument("--step", type=int, help="of a run's checkpoints; by default the newest")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    inspect.add_argument("--verify", action="store_true", help="read all data too, and compare every checksum")
    inspect.set_defaults(run=_inspect)

    listing = commands.add_parser("list", help="list a run's checkpoints")
    listing.add_argument("path", metavar="run", help="a run's folder, or that of its checkpoints")
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(run=_list)

    convert = commands.add_parser("convert", help="write a checkpoint in the format of another code, or read one")
    convert.add_argument("source", help="of any format: a checkpoint or run of shardopt, a .pt file, a folder")
    convert.add_argument("target", help="a new folder; a new .pt file for torch, paper, bitsandbytes")
    convert.add_argument("--to", choices=_TARGETS, default="shardopt", help="by default %(default)s")
    convert.add_argument("--optimizer", choices=["ademamix", "adamw"], help="make the state this optimizer's")
    convert.add_argument("--drop", action="append", default=[], metavar="KEY", help="leave this state or count out")
    convert.set_defaults(run=_convert)


def _inspect(arguments: argparse.Namespace) -> int:
    from shardopt.checkpoint import inspect
    from shardopt.checkpoint.stored import locate
    from shardopt.checkpoint.verify import find_damage
    from shardopt.distributed import Ranks

    folder = locate(arguments.path, arguments.step)
    damage = find_damage(folder, Ranks.current()) if arguments.verify else None
    if damage is not None:
        print(f"shardopt: {damage}", file=sys.stderr)
        return 1
    what = inspect.describe(folder) | ({"verified": True} if arguments.verify else {})
    print(json.dumps(what, indent=1) if arguments.json else inspect.as_text(what))
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from shardopt.checkpoint import inspect

    rows = inspect.list_run(arguments.path)
    print(json.dumps(rows, indent=1) if arguments.json else inspect.list_as_text(rows))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from shardopt.checkpoint.convert import convert

    given = arguments
    state = convert(given.source, given.target, given.to, optimizer=given.optimizer, drop=given.drop)
    kinds = ", ".join(dict.fromkeys(kind for _, kind in state.tensors))
    print(f"{given.source} ({state.source}) is now {given.target} ({given.to}): {kinds}")
    if not state.stateful:
        print("it holds weights alone: there is no optimizer state in it")
    elif not all(len(group) > 1 for group in state.full_groups()):
        print(
            "its hyper-parameters are not known: those in it are defaults, set yours in param_groups after loading it"
        )
    return 0
