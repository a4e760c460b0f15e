"""`shardopt init`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, and the function that runs the command."""
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the preset")
    parser.add_argument("--model", default="quickstart", metavar="PRESET", help="by default %(default)s; see --list")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a new file; by default PRESET.yaml here")
    parser.add_argument("--list", action="store_true", help="list the presets and stop")
    parser.set_defaults(run=_init)


def _init(arguments: argparse.Namespace) -> int:
    from shardopt.pretrain import presets
    from shardopt.pretrain.config import read

    if arguments.list:
        print("\n".join(presets.names()))
        return 0
    source = presets.path_of(arguments.model)
    out = arguments.out or Path(source.name)
    tree = read(source, arguments.overrides)
    head = f"{presets.head(source)} Written by `shardopt init --model {arguments.model}`."
    presets.write(out, presets.commented(tree, head))
    ranks = "" if tree.get("engine", {}).get("name") == "single" else " --nproc-per-node 2"
    print(f"{out} is written. Look it over, then:\n    shardopt pretrain {shlex.quote(str(out))}{ranks}")
    return 0
