"""`shardopt compare`: optimizers on the same data from the same start."""

from __future__ import annotations

import argparse

from shardopt.commands import studies


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, and the function that runs the command."""
    studies.add_arguments(parser, seeds=3)
    parser.add_argument("--optimizers", required=True, metavar="NAME,…", help="such as ademamix,adamw,adam")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME.KEY=VALUE",
        help="a hyper-parameter of one of them, such as adamw.lr=3e-3; else those of CONFIG that it has too",
    )  # fmt: skip
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from shardopt.pretrain.config import load
    from shardopt.pretrain.study.plan import optimizers

    names = [name.strip() for name in arguments.optimizers.split(",")]
    variants = optimizers(load(arguments.config, arguments.overrides), names, arguments.set)
    return studies.run(arguments, variants, "compare", baseline="adamw" if "adamw" in names else names[0])
