"""The commands that look after checkpoints: `shardopt checkpoint inspect | list | convert`, `shardopt export`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from shardopt.errors import InputError, MissingExtraError

NAMES = ("checkpoint", "export")
_TARGETS = ("shardopt", "torch", "paper", "bitsandbytes", "torchtitan", "deepspeed", "trainer")
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main(argv: Sequence[str]) -> int:
    """Run a command of `NAMES` in this process alone; the exit status: 0 done, 1 damage was found, 2 bad input."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (InputError, MissingExtraError) as e:
        print(f"shardopt: {e}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shardopt")
    commands = parser.add_subparsers(required=True, metavar="command")
    checkpoint = commands.add_parser("checkpoint", help="look into checkpoints").add_subparsers(
        required=True, metavar="command"
    )

    inspect = checkpoint.add_parser("inspect", help="say what is in a checkpoint, and who wrote it")
    inspect.add_argument("path", help="a checkpoint, or a run's folder for its newest")
    inspect.add_argument("--step", type=int, help="of a run's checkpoints; by default the newest")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    inspect.add_argument("--verify", action="store_true", help="read all data too, and compare every checksum")
    inspect.set_defaults(run=_inspect)

    listing = checkpoint.add_parser("list", help="list a run's checkpoints")
    listing.add_argument("path", metavar="run", help="a run's folder, or that of its checkpoints")
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(run=_list)

    convert = checkpoint.add_parser("convert", help="write a checkpoint in the format of another code, or read one")
    convert.add_argument("source", help="of any format: a checkpoint or run of shardopt, a .pt file, a folder")
    convert.add_argument("target", help="a new folder; a new .pt file for torch, paper, bitsandbytes")
    convert.add_argument("--to", choices=_TARGETS, default="shardopt", help="by default %(default)s")
    convert.add_argument("--optimizer", choices=["ademamix", "adamw"], help="make the state this optimizer's")
    convert.add_argument("--drop", action="append", default=[], metavar="KEY", help="leave this state or count out")
    convert.set_defaults(run=_convert)

    export = commands.add_parser("export", help="write a checkpoint's weights for transformers, without starting a job")
    export.add_argument("source", help="a run's folder, or a checkpoint")
    export.add_argument(
        "out", nargs="?", help="a new folder; by default export-STEP in the run's folder, which a program has not"
    )
    export.add_argument("--to", choices=["safetensors"], default="safetensors", help="the format")
    export.add_argument("--dtype", choices=_DTYPES, help="of the weights; by default as in the checkpoint")
    export.add_argument("--averaged", action="store_true", help="the weight EMA in the place of the weights")
    export.add_argument("--step", type=int, help="of a run's checkpoints; by default the newest")
    export.set_defaults(run=_export)
    return parser


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


def _export(arguments: argparse.Namespace) -> int:
    import torch

    from shardopt.checkpoint.export import MODEL, export_checkpoint
    from shardopt.checkpoint.store import listing
    from shardopt.checkpoint.stored import SLICES, Stored, locate, step_of

    folder = locate(arguments.source, arguments.step)
    Stored(folder)  # what is wrong with it is said first
    step = step_of(folder)
    if (
        arguments.out is None
        and folder.name != SLICES
        and not {"config.yaml", MODEL} & listing(folder.parent.parent).keys()
    ):
        raise InputError(f"{folder} is not in a run's folder: name the folder to write, after {arguments.source}")
    out = arguments.out or folder.parent.parent / ("export" if step is None else f"export-{step}")
    dtype = getattr(torch, _DTYPES[arguments.dtype]) if arguments.dtype else None
    beside = export_checkpoint(folder, out, dtype=dtype, averaged=arguments.averaged)
    missing = (
        ""
        if "config.json" in beside
        else ". The model's config is not known: write it there before you load it "
        f"(model.config.save_pretrained({str(out)!r})), and the tokenizer, too"
    )
    print(f"{folder} is exported to {out}{missing}")
    return 0
