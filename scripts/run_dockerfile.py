"""Take the steps of launch/Dockerfile without docker: in a folder that stands for the image's root, and a fresh venv.

    python scripts/run_dockerfile.py --check
    python scripts/run_dockerfile.py --build-arg DEVICE=cpu /tmp/image -- pretrain configs/quickstart.yaml

FROM makes a venv with this Python; ARG, ENV, WORKDIR, COPY and RUN are taken as they stand, with absolute paths in the
folder. RUN lines of apt-get are passed over, and named: they would change this machine. What follows `--` is given to
ENTRYPOINT; without it CMD is. `--check` takes no step: it looks whether every instruction is known, every source of a
COPY is there, and every RUN is shell. The exit status is that of the first step that fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "launch" / "Dockerfile"
INSTRUCTIONS = ("FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "ENTRYPOINT", "CMD")


def instructions(text: str) -> list[tuple[str, str]]:
    """Name and arguments of each instruction, with lines put together and comments left out."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    whole = re.sub(r"\\\s*\n", " ", lines).splitlines()
    return [(name.upper(), rest.strip()) for name, _, rest in (line.strip().partition(" ") for line in whole) if name]


def mistakes(text: str, context: Path = ROOT) -> list[str]:
    """What is wrong with a Dockerfile, as far as can be told without taking a step; empty where nothing is."""
    found = []
    steps = instructions(text)
    if next((name for name, _ in steps if name != "ARG"), None) != "FROM":
        found.append("nothing but ARG stands before FROM")
    for name, rest in steps:
        if name not in INSTRUCTIONS:
            found.append(f"{name} is none of {', '.join(INSTRUCTIONS)}")
        elif name == "COPY":
            *sources, target = rest.split()
            found += [f"COPY {source}: it is not there" for source in sources if not (context / source).exists()]
            if len(sources) > 1 and not target.endswith("/"):
                found.append(f"COPY {rest}: several sources need a folder, with a / at its end")
        elif name == "RUN":
            checked = subprocess.run(["sh", "-n"], input=rest, capture_output=True, text=True)
            found += [f"RUN {rest}: {checked.stderr.strip()}"] if checked.returncode else []
        elif name in ("ENTRYPOINT", "CMD") and not _is_list(rest):
            found.append(f"{name} {rest}: it is no JSON list of strings")
    return found


def _is_list(text: str) -> bool:
    try:
        values = json.loads(text)
    except ValueError:
        return False
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


@dataclass
class Image:
    """What the steps have made so far.

    Args:
        root: the folder in the place of /.
        given: values of --build-arg.
    """

    root: Path
    given: dict[str, str]
    arguments: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path = Path("/")
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def here(self, path: str) -> Path:
        """Where a path of the image is on this machine."""
        return self.root / (self.folder / path).relative_to("/")

    def take(self, name: str, rest: str, context: Path) -> None:
        """Take one step; SystemExit with its status where it fails."""
        print(f"== {name} {rest}", flush=True)
        if name == "FROM":
            self.arguments = {}  # those before it are for FROM alone
            venv.create(self.root / "usr" / "local", with_pip=True, symlinks=True)
            print(f"   a venv with Python {sys.version.split()[0]} stands for it")
        elif name == "ARG":
            key, _, default = rest.partition("=")
            self.arguments[key] = self.given.get(key, default)
        elif name == "ENV":
            self.environment |= dict(pair.split("=", 1) for pair in rest.split())
        elif name == "WORKDIR":
            self.folder = self.folder / rest
            self.here(".").mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            self._copy(*rest.split(), context=context)
        elif name == "RUN" and rest.startswith("apt-get"):
            print("   passed over: this machine's own packages stand for it")
        elif name == "RUN":
            self.run(["sh", "-c", rest])
        elif name == "ENTRYPOINT":
            self.entrypoint = json.loads(rest)
        elif name == "CMD":
            self.command = json.loads(rest)

    def _copy(self, *paths: str, context: Path) -> None:
        *sources, target = paths
        for source in sources:
            here, there = context / source, self.here(target)
            if here.is_dir():
                shutil.copytree(here, there, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                there = there / here.name if target.endswith("/") else there
                there.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(here, there)

    def run(self, command: list[str]) -> None:
        """Run a command in the image's environment; SystemExit with its status where it fails."""
        own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        path = {"PATH": f"{self.root / 'usr/local/bin'}:{os.environ['PATH']}"}
        done = subprocess.run(command, cwd=self.here("."), env=own | self.arguments | self.environment | path)
        if done.returncode:
            _fail(f"{' '.join(command)}: status {done.returncode}", done.returncode)


def _fail(message: str, status: int = 2) -> NoReturn:
    print(f"run_dockerfile: {message}", file=sys.stderr)
    sys.exit(status)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, help="a folder that is not there yet")
    parser.add_argument("command", nargs="*", help="arguments of ENTRYPOINT, after --")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="the value of an ARG")
    parser.add_argument("--check", action="store_true", help="take no step")
    parser.add_argument("--file", type=Path, default=DOCKERFILE, help="by default launch/Dockerfile")
    given = parser.parse_args(argv)
    text = given.file.read_text()
    if found := mistakes(text):
        _fail("\n".join(found))
    if given.check:
        return
    if given.root is None or given.root.exists():
        parser.error("give a folder that is not there yet" + (f": {given.root} is" if given.root else ""))
    values = dict(pair.split("=", 1) for pair in given.build_arg)
    known = {rest.partition("=")[0] for name, rest in instructions(text) if name == "ARG"}
    if unknown := values.keys() - known:
        parser.error(f"--build-arg {', '.join(unknown)}: the file has {', '.join(sorted(known))}")
    image = Image(given.root.absolute(), values)
    for name, rest in instructions(text):
        image.take(name, rest, ROOT)
    image.run([*image.entrypoint, *(given.command or image.command)])


if __name__ == "__main__":
    main()
