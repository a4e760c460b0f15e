"""Run the parts of scripts/bench_all.yaml that have no result yet, and make a page of all results.

    python scripts/bench_all.py                          results in bench/, the page is bench/benchmarks.md
    python scripts/bench_all.py --out docs/benchmarks    ... in docs/benchmarks/, the page is docs/benchmarks.md
    python scripts/bench_all.py --only lr-byte byte      these parts alone
    python scripts/bench_all.py --list                   each part's command, and whether its result is there
    python scripts/bench_all.py --page                   the page alone, of what results there are

Every part is a command that anybody can run by itself. In the list `{out}` is the part's folder of results, `{runs}`
that of all training runs, `{stdlib}` Python's own sources, and `{best:PART:KEY}` the value of a key in the best config
of a study that ran before.

A part's folder has part.json (command, machine, time), the part's own JSON and PNG files, and table.txt, Markdown that
the page shows (of a study the page makes the table). It appears when the part has succeeded, so that a second call does
what is missing; a study that was stopped goes on with the runs it lacks. The exit status is 1 if a part has failed;
parts that need it are left for the next call.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scripts import bench_page

ROOT = Path(__file__).parent.parent
LIST = ROOT / "scripts" / "bench_all.yaml"
RUNS = Path("bench/runs")
STUDIES = ("compare", "sweep")


class NotYet(Exception):
    """A part needs the result of one that has none."""


@dataclass(frozen=True)
class Part:
    """One line of the list.

    Attributes:
        name: of its folder.
        chapter: of the page; the parts of one stand together.
        title: its heading.
        minutes: about how long it takes on two idle cores.
        says: what the page says of it, Markdown.
        command: with places to fill in; see the module.
    """

    name: str
    chapter: str
    title: str
    minutes: float
    command: str
    says: str = ""

    def words(self, out: Path, runs: Path = RUNS, guess: str | None = None) -> list[str]:
        """The command's words, filled in.

        Args:
            out: the folder of all results.
            runs: the folder of all training runs.
            guess: stands for the best value of a study that has no result; None: there must be one.

        Raises:
            NotYet: a study that the command names has no result.
        """

        def best(match: re.Match[str]) -> str:
            folders = out / match[1], runs / match[1]
            config = next((path for folder in folders if (path := folder / "best.yaml").exists()), None)
            if config is not None:
                value: Any = yaml.safe_load(config.read_text(encoding="utf-8"))
                for key in match[2].split("."):
                    value = value[key]
                return str(value)
            if guess is None:
                raise NotYet(f"{self.name} needs the result of {match[1]}")
            return guess

        places = {"{out}": str(out / self.name), "{runs}": str(runs), "{stdlib}": sysconfig.get_path("stdlib")}
        words = [re.sub(r"\{best:([\w-]+):([\w.]+)\}", best, word) for word in shlex.split(self.command)]
        return [re.sub(r"\{(?:out|runs|stdlib)\}", lambda m: places[m[0]], word) for word in words]

    @property
    def is_study(self) -> bool:
        return self.command.split()[:1] == ["shardopt"] and self.command.split()[1] in STUDIES

    @property
    def study_name(self) -> str:
        words = shlex.split(self.command)
        return words[words.index("--name") + 1]


def read_parts(path: Path = LIST) -> list[Part]:
    """The parts of a list, in its order."""
    listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    parts = [Part(chapter=chapter["chapter"], **part) for chapter in listed for part in chapter["parts"]]
    names = [part.name for part in parts]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: {', '.join(sorted(repeated))} stands twice")
    return parts


def machine() -> dict[str, Any]:
    """What the figures depend on beside the command."""
    import torch

    cpus = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpus.read_text()) if cpus.exists() else []
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def run(part: Part, out: Path, runs: Path = RUNS) -> bool:
    """Run a part; whether it has succeeded, and so left its folder.

    Raises:
        NotYet: it needs the result of another.
    """
    words = part.words(out, runs)
    aside = out / f".{part.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    # Results are made aside: a part that fails in the middle has no folder.
    doing = [word.replace(str(out / part.name), str(aside)) for word in words]
    began, load = time.monotonic(), os.getloadavg()[0]
    print(f"== {part.name}, about {part.minutes:g} min: {shlex.join(words)}", flush=True)
    with subprocess.Popen(doing, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
    if process.returncode:
        print(f"-- {part.name} failed with status {process.returncode}; what it left is in {aside}", flush=True)
        return False
    if part.is_study:
        folder = runs / part.study_name
        for name in ("results.json", "curves.png", "best.yaml"):
            if (folder / name).exists():
                shutil.copy(folder / name, aside / name)
    elif not (aside / "table.txt").exists():
        (aside / "table.txt").write_text("".join(said), encoding="utf-8")
    for text in aside.glob("*.md"):  # what was printed too; in docs/ it would be a page of the site
        text.unlink()
    about = {
        "command": shlex.join(words),
        "seconds": round(time.monotonic() - began),
        "date": datetime.date.today().isoformat(),
        "load_before": load,
        **machine(),
    }
    (aside / "part.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    aside.replace(out / part.name)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of the results; by default %(default)s")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these parts alone, in the list's order")
    parser.add_argument("--list", action="store_true", help="list the parts and stop")
    parser.add_argument("--page", action="store_true", help="make the page of what results there are, and run nothing")
    arguments = parser.parse_args()
    parts, out = read_parts(), arguments.out
    if unknown := sorted(set(arguments.only or ()) - {part.name for part in parts}):
        parser.error(f"--only {unknown[0]}: is none of {', '.join(part.name for part in parts)}")
    chosen = [part for part in parts if not arguments.only or part.name in arguments.only]
    if arguments.list:
        for part in chosen:
            done = "done" if (out / part.name / "part.json").exists() else f"{part.minutes:g} min"
            print(f"{part.name} ({done}): {shlex.join(part.words(out, guess='BEST'))}")
        left = sum(part.minutes for part in chosen if not (out / part.name / "part.json").exists())
        print(f"{left:g} minutes are left, on two idle cores")
        return 0
    failed = False
    for part in [] if arguments.page else chosen:
        if (out / part.name / "part.json").exists():
            print(f"== {part.name}: there", flush=True)
            continue
        try:
            failed |= not run(part, out)
        except NotYet as e:
            print(f"-- {e}", flush=True)
            failed = True
        bench_page.write(parts, out)
    page = bench_page.write(parts, out)
    print(f"page: {page}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
