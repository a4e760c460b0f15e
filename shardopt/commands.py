"""The commands that look after checkpoints: `shardopt checkpoint inspect | list`, `shardopt export`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from shardopt.errors import InputError, MissingExtraError

NAMES = ("checkpoint", "export")
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
    inspect.add_argument("path", type=Path, help="a checkpoint, or a run's folder for its newest")
    inspect.add_argument("--step", type=int, help="of a run's checkpoints; by default the newest")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    inspect.set_defaults(run=_inspect)

    listing = checkpoint.add_parser("list", help="list a run's checkpoints")
    listing.add_argument("path", type=Path, metavar="run", help="a run's folder, or that of its checkpoints")
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(run=_list)

    export = commands.add_parser("export", help="write a checkpoint's weights for transformers, without starting a job")
    export.add_argument("source", type=Path, help="a run's folder, or a checkpoint")
    export.add_argument("out", type=Path, nargs="?", help="a new folder; by default export-STEP in the run's folder")
    export.add_argument("--to", choices=["safetensors"], default="safetensors", help="the format")
    export.add_argument("--dtype", choices=_DTYPES, help="of the weights; by default as in the checkpoint")
    export.add_argument("--averaged", action="store_true", help="the weight EMA in the place of the weights")
    export.add_argument("--step", type=int, help="of a run's checkpoints; by default the newest")
    export.set_defaults(run=_export)
    return parser


def _inspect(arguments: argparse.Namespace) -> int:
    from shardopt.checkpoint import inspect
    from shardopt.checkpoint.stored import locate

    what = inspect.describe(locate(arguments.path, arguments.step))
    print(json.dumps(what, indent=1) if arguments.json else inspect.as_text(what))
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from shardopt.checkpoint import inspect

    rows = inspect.list_run(arguments.path)
    print(json.dumps(rows, indent=1) if arguments.json else inspect.list_as_text(rows))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    import torch

    from shardopt.checkpoint.export import export_checkpoint
    from shardopt.checkpoint.stored import locate, step_of

    folder = locate(arguments.source, arguments.step)
    step = step_of(folder)
    out = arguments.out or folder.parent.parent / ("export" if step is None else f"export-{step}")
    dtype = getattr(torch, _DTYPES[arguments.dtype]) if arguments.dtype else None
    beside = export_checkpoint(folder, out, dtype=dtype, averaged=arguments.averaged)
    print(
        f"{folder} is exported to {out}" + ("" if beside else ", weights alone: its config and tokenizer are not known")
    )
    return 0
