"""`shardopt report`."""

from __future__ import annotations

import argparse
from pathlib import Path

_NAME = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, and the function that runs the command."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or one of runs, such as a study's"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"by default {_NAME} in RUN; of several, in the working directory"
    )
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from shardopt.pretrain.page.write import write
    from shardopt.pretrain.report import Report

    target = arguments.output or (arguments.runs[0] / _NAME if len(arguments.runs) == 1 else Path(_NAME))
    records = write(arguments.runs, target)
    runs = records[0].name if len(records) == 1 else f"{len(records)} runs"
    print(f"{runs}: {target}, {target.stat().st_size / 1e3:,.0f} kB, opens in any browser")
    damage = [f"{record.folder}/{text}" for record in records for text in record.damage]
    for text in damage:
        Report(True).warn(text)
    return 1 if damage else 0
