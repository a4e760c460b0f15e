"""What `shardopt compare` and `shardopt sweep` have in common."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shardopt.commands import numbers

if TYPE_CHECKING:
    from shardopt.pretrain.study.plan import Variant


def add_arguments(parser: argparse.ArgumentParser, seeds: int) -> None:
    """Declare the arguments of both; `seeds` is the default number of runs of a variant."""
    parser.add_argument("config", help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the file in all runs"
    )
    parser.add_argument(
        "--seeds", type=numbers.at_least(1), default=seeds, metavar="N", help="runs of each; by default %(default)s"
    )
    parser.add_argument(
        "--jobs",
        type=numbers.at_least(1),
        metavar="N",
        help="runs at once; by default one on each GPU, else one on each core",
    )
    parser.add_argument("--name", help="the folder of the runs inside run.dir; by default run.name with the command")
    parser.add_argument("--baseline", help="what the others are held against; by default adamw, else the first")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, write the W&B sweep, and stop")


def run(arguments: argparse.Namespace, variants: Sequence[Variant], command: str, baseline: str) -> int:
    """Run a study of `variants`; the exit status."""
    from shardopt.pretrain.study.plan import Study, check_baseline
    from shardopt.pretrain.study.run import run as run_study

    given = arguments
    baseline = check_baseline(given.baseline or baseline, variants)
    study = Study(given.config, given.overrides, variants, given.seeds, given.name, command, baseline)
    return run_study(study, given.jobs, given.dry_run)
