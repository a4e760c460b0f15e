"""The configs that come with shardopt, and a config written out with every key and what it is."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

import shardopt
from shardopt.errors import InputError, did_you_mean
from shardopt.optim import registry
from shardopt.pretrain import keys
from shardopt.pretrain.config import Config, parse

FOLDER = Path(shardopt.__file__).parent / "configs"
_WIDTH = 100


def names() -> list[str]:
    """The presets, by name."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def path_of(name: str) -> Path:
    """The file of a preset.

    Raises:
        InputError: an unknown name.
    """
    if name not in names():
        raise InputError(f"there is no preset {name}; there are: {', '.join(names())}{did_you_mean(name, names())}")
    return FOLDER / f"{name}.yaml"


def head(path: Path) -> str:
    """The comment at the top of a preset, on one line."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return ". ".join(line.lstrip("# ").rstrip(".") for line in lines) + "."


def commented(tree: dict[str, Any], head: str) -> str:
    """`tree`, what a config file says, with the text of each key above it and the keys left out as comments.

    A comment without a blank, as in `#keep: 3`, is a key with its default: without the # the config is the same.
    """
    config = parse(tree).as_dict()
    groups = keys.groups()
    lines = textwrap.wrap(
        f"{head} Lines such as #key: value are defaults; take the # away to change one. `shardopt config KEY` explains "
        "a key in the terminal.",
        _WIDTH,
        initial_indent="# ",
        subsequent_indent="# ",
    )
    for name in Config.model_fields:
        lines += ["", *_section(groups, name, config[name], tree.get(name), "")]
    return "\n".join(lines) + "\n"


def _section(groups: list[keys.Group], path: str, value: Any, given: Any, indent: str) -> Iterator[str]:
    """The lines of the section at `path`, whose resolved value is `value`; `given` is what the file says of it."""
    here = [group for group in groups if group.path == path and _is(group.where, value)]
    known = {key.name.split(".")[-1]: key for group in here for key in group.keys}
    sections = {group.path for group in groups}
    yield from _prose(" ".join(group.text for group in here if group.text), indent)
    yield f"{indent}{'' if given else '#'}{path.split('.')[-1]}:"
    inner, given = f"{indent}  ", given or {}
    defaults = {"name": "", **registry.defaults(value["name"])} if path == "optimizer" else {}
    for name, resolved in (defaults | value).items():
        below, own = f"{path}.{name}", given.get(name, {})
        if below in sections and isinstance(resolved, dict) and isinstance(own, dict) and {*own} <= {*resolved}:
            yield from _section(groups, below, resolved, own, inner)  # else it is written in short
            continue
        if below == "optimizer.seed" and not own:
            continue  # it is the run's
        if name in known:
            key = known[name]
            limits = ", ".join(word for word in (key.type if " | " in key.type else "", key.unit) if word)
            yield from _prose(f"{key.text} ({limits})" if limits else key.text, inner)
        line = f"{inner}{'' if name in given else '#'}{name}: {keys.shown(given.get(name, resolved))}"
        if isinstance(own, list) and len(line) > _WIDTH:
            line = f"{inner}{name}:\n" + textwrap.indent(yaml.safe_dump(own, sort_keys=False).rstrip(), f"{inner}  ")
        yield from line.splitlines()


def _is(where: str, value: Any) -> bool:
    """Whether a group is of the kind that `value` is."""
    tag, _, kind = where.partition(": ")
    return not where or (isinstance(value, dict) and str(value.get(tag)) == kind)


def _prose(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def write(target: Path, text: str) -> None:
    """Write a config that is not there yet.

    Raises:
        InputError: it is, or it cannot be written.
    """
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(f"{target} is there already: give another --out") from None
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error}") from error
