"""`shardopt export`."""

from __future__ import annotations

import argparse

from shardopt.commands import models
from shardopt.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, and the function that runs the command."""
    parser.add_argument("source", help="a run's folder, or a checkpoint")
    parser.add_argument(
        "out", nargs="?", help="a new folder; by default export-STEP in the folder of the launcher's run"
    )
    parser.add_argument("--to", choices=["safetensors"], default="safetensors", help="the format")
    models.add_dtype(parser, "of the weights; by default as in the checkpoint")
    parser.add_argument(
        "--raw", action="store_true", help="the weights themselves, not the weight EMA that the run kept of them"
    )
    parser.add_argument("--step", type=int, help="of a run's checkpoints; by default the newest")
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    from shardopt.checkpoint.export import MODEL, export_checkpoint
    from shardopt.checkpoint.store import listing
    from shardopt.checkpoint.stored import SLICES, Stored, locate, step_of
    from shardopt.checkpoint.verify import naming_whole

    folder = locate(arguments.source, arguments.step)
    with naming_whole(folder):
        stored = Stored(folder)  # what is wrong with it is said first
    step = step_of(folder)
    if (
        arguments.out is None
        and folder.name != SLICES
        and not {"config.yaml", MODEL} & listing(folder.parent.parent).keys()
    ):
        raise InputError(f"{folder} is not in a run's folder: name the folder to write, after {arguments.source}")
    out = arguments.out or folder.parent.parent / ("export" if step is None else f"export-{step}")
    with naming_whole(folder):
        beside = export_checkpoint(folder, out, dtype=models.dtype(arguments), raw=arguments.raw)
    missing = (
        ""
        if "config.json" in beside
        else ". The model's config is not known: write it there before you load it "
        f"(model.config.save_pretrained({str(out)!r})), and the tokenizer, too"
    )
    averaged = not arguments.raw and any(kind == "weight_ema" for _, kind in stored.keys)
    print(f"{folder}{', its weight EMA,' if averaged else ''} is exported to {out}{missing}")
    return 0
