"""`shardopt runs`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from shardopt.errors import InputError

_SORTS = ("age", "name", "loss", "held-out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, and the function that runs the command."""
    parser.add_argument("folder", nargs="?", default="runs", help="of runs, of a study, or of one run; by default runs")
    parser.add_argument("--sort", choices=_SORTS, default="age", help="the least first; by default %(default)s")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_runs)


def _runs(arguments: argparse.Namespace) -> int:
    from shardopt.pretrain import runs
    from shardopt.pretrain.report import Report, one_line

    if "://" in arguments.folder:
        raise InputError(f"{arguments.folder}: stores are not supported here; give a local folder")
    found = runs.list_runs(Path(arguments.folder), arguments.sort)
    if arguments.json:
        print(json.dumps([run.as_dict() for run in found], indent=1, allow_nan=False))
        return 0
    report = Report(True)
    if not found:
        report.say(f"there is no run in {arguments.folder}")
        return 0
    report.console.print(runs.table(found, report.console.width))
    for name, reason in runs.reasons(found).items():
        report.say(f"{one_line(name)} {reason}")
    return 0
