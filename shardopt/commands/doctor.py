"""`shardopt doctor`."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

_WIDTH = 80
_INDENT = 18
_MARKS = {"ok": "ok", "note": "note", "fail": "FAIL"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, and the function that runs the command."""
    parser.add_argument("--dir", default="runs", metavar="FOLDER", help="where runs would be kept; %(default)s")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from shardopt.pretrain.machine import can_start, examine

    findings = examine(Path(arguments.dir).expanduser())
    starts = can_start(findings)
    if arguments.json:
        what = {f.name: {"verdict": f.verdict, "text": f.text, "remedy": f.remedy, **f.figures} for f in findings}
        print(json.dumps({"can_start": starts, "findings": what}, indent=1))
    else:
        for finding in findings:
            head = f"{_MARKS[finding.verdict]:5}{finding.name:{_INDENT - 5}}"
            body = textwrap.wrap(finding.text, _WIDTH - _INDENT, break_on_hyphens=False)
            print(head + f"\n{'':{_INDENT}}".join(body))
            if finding.remedy:
                print(f"{'':{_INDENT}}→ {finding.remedy}")
        print("\na run can start" if starts else "\nno run can start: see FAIL above")
    return 0 if starts else 1
