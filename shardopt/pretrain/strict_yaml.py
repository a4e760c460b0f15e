"""YAML as a config is written in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, that refuses a key that stands twice, and {a:1}, whose key is "a:1".

    1e-3 is a number; yes, no, on and off are words; 1:30 and 2024-01-31 are text.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  the base class's own

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if ":" in key.value and key.style is None and isinstance(value, yaml.ScalarNode) and value.value == "":
                    problem = f"{key.value}: YAML wants a blank after the colon"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # !!bool x; an int of 5,000 digits
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(problem=f"this is no {kind}: {error}", problem_mark=node.start_mark) from error


def parse(text: str) -> Any:
    """What `text` says, as plain data.

    Raises:
        yaml.YAMLError: it is not YAML, or refused by `Loader`.
    """
    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def as_written(value: Any) -> str:
    """A value of a config on one line, as its YAML has it: null, true, [0.9, 0.999]."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value, default=str, ensure_ascii=False)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of an `as_dict()` by their dotted keys, those of data.sources and train.stages one by one."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and any(isinstance(member, dict) for member in value):
            out |= flat({f"{key}[{i}]": member for i, member in enumerate(value)}, prefix)
        elif isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


_SIGN = "-+0123456789."
for _tag, _pattern, _first in (
    ("null", r"|~|null|Null|NULL", ["", *"~nN"]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", _SIGN),
    (
        "float",
        r"[-+]?(\d[\d_]*\.\d*|\.\d+|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        _SIGN,
    ),
    ("merge", r"<<", "<"),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), list(_first))
