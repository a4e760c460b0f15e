"""`shardopt config`."""

from __future__ import annotations

import argparse
import json

from shardopt.errors import InputError, did_you_mean


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, and the function that runs the command."""
    parser.add_argument("key", nargs="?", help="a section or a key of one, such as train or train.steps; else all")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--schema", action="store_true", help="a JSON schema of a config file, for editors")
    form.add_argument("--markdown", action="store_true", help="the page docs/config.md")
    parser.set_defaults(run=_config)


def _config(arguments: argparse.Namespace) -> int:
    from shardopt.pretrain import keys

    if arguments.key is not None and (arguments.schema or arguments.markdown):
        raise InputError("--schema and --markdown are of the whole config: leave the key out")
    if arguments.schema:
        print(json.dumps(keys.json_schema(), indent=1))
    elif arguments.markdown:
        print(keys.as_markdown(), end="")
    else:
        found = keys.groups() if arguments.key is None else keys.find(arguments.key)
        if not found:
            known = {name for group in keys.groups() for name in (group.path, *(key.name for key in group.keys))}
            raise InputError(f"{arguments.key}: there is no such key{did_you_mean(arguments.key, sorted(known))}")
        print(keys.as_text(found))
    return 0
