"""`shardopt runs`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

_SORTS = ("age", "name", "loss", "held-out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, and the function that runs the command."""
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), help="of runs, of a study, or of one run; by default runs"
    )
    parser.add_argument("--sort", choices=_SORTS, default="age", help="the least first; by default %(default)s")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_runs)


def _runs(arguments: argparse.Namespace) -> int:
    from shardopt.pretrain import runs
    from shardopt.pretrain.report import Report

    found = runs.list_runs(arguments.folder, arguments.sort)
    if arguments.json:
        print(json.dumps([run.as_dict() for run in found], indent=1))
        return 0
    report = Report(True)
    if not found:
        report.say(f"there is no run in {arguments.folder}")
        return 0
    report.console.print(runs.table(found))
    for name, reason in runs.reasons(found).items():
        report.say(f"{name} {reason}")
    return 0
