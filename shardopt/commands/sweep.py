"""`shardopt sweep`: every point of a grid of keys."""

from __future__ import annotations

import argparse

from shardopt.commands import studies


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, and the function that runs the command."""
    studies.add_arguments(parser, seeds=1)
    parser.add_argument(
        "--grid", action="append", required=True, metavar="KEY=VALUE,…",
        help="values of a key, such as optimizer.lr=1e-3,3e-3; of several --grid every combination",
    )  # fmt: skip
    parser.set_defaults(run=_sweep)


def _sweep(arguments: argparse.Namespace) -> int:
    from shardopt.pretrain.study.plan import grid

    variants = grid(arguments.grid, arguments.overrides)
    return studies.run(arguments, variants, "sweep", baseline=variants[0].name)
