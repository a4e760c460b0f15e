"""Every key of a run's config, read off the models: as a list, as a page of the documentation, as a JSON schema."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import yaml

from shardopt.optim import registry
from shardopt.pretrain.config import Config, OptimizerConfig

_UNITS = {"mb": "MB", "minutes": "minutes", "hours": "hours", "warmup": "steps"}  # of numbers, by how the name ends
_TYPES = {"integer": "int", "number": "float", "boolean": "true or false", "string": "text", "object": "mapping"}
_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_WIDTH = 80


class Key(NamedTuple):
    """One key.

    Args:
        name: as an override has it: train.steps.
        type: its values, in words.
        default: in YAML, or "required".
        unit: of a number; "" for none.
        text: what it is.
    """

    name: str
    type: str
    default: str
    unit: str
    text: str


class Group(NamedTuple):
    """The keys of a section; of one kind of it where there are several (`where` is then such as "name: zero")."""

    path: str
    where: str
    text: str
    keys: list[Key]


@cache
def groups() -> list[Group]:
    """All sections, in the order of the config."""
    schema = Config.model_json_schema(mode="serialization")
    return [group for name, node in schema["properties"].items() for group in _groups(schema["$defs"], name, node)]


def find(name: str) -> list[Group]:
    """The sections and keys that `name` stands for: "train", "train.steps", "engine.replicate"; [] for none."""
    found = []
    for group in groups():
        keys = [key for key in group.keys if f"{key.name}.".startswith(f"{name}.")]
        if keys or f"{group.path}.".startswith(f"{name}."):
            found.append(group._replace(keys=keys))
    return found


def shown(value: Any) -> str:
    """`value` as YAML on one line."""
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("\n...\n").strip()


def _groups(defs: dict[str, Any], path: str, node: dict[str, Any]) -> Iterator[Group]:
    """The group of the section at `path`, and of those in it."""
    if "discriminator" in node:
        tag = node["discriminator"]["propertyName"]
        if "default" in node and "description" not in node:  # a section of its own
            kind = Key(
                f"{path}.{tag}",
                _words(node),
                node["default"][tag],
                "",
                "How weights, gradients and state are sharded; each has keys of its own.",
            )
            yield Group(path, "", "", [kind])
        for value in _kinds(node):
            reference = node["discriminator"]["mapping"][value]
            yield from _section(defs, path, f"{tag}: {value}", defs[reference.split("/")[-1]])
    elif "$ref" in node:
        yield from _section(defs, path, "", defs[node["$ref"].split("/")[-1]])
    for part in [*node.get("anyOf", []), *([node["items"]] if "items" in node else [])]:
        yield from _groups(defs, path, part)


def _kinds(node: dict[str, Any]) -> list[str]:
    """The names of a union's members, as they are declared; the mapping is by name."""
    named = {reference: value for value, reference in node["discriminator"]["mapping"].items()}
    return [named[member["$ref"]] for member in node["oneOf"]]


def _section(defs: dict[str, Any], path: str, where: str, node: dict[str, Any]) -> Iterator[Group]:
    keys, below = [], []
    for name, field in node.get("properties", {}).items():
        inner = list(_groups(defs, f"{path}.{name}", field))
        below += inner
        if "const" not in field and ("$ref" not in field or not inner):
            keys.append(_key(f"{path}.{name}", field))
    if path == "optimizer":
        keys += _optimizer_keys(OptimizerConfig().name)
        below += [_other_optimizer(name) for name in registry.names() if name != OptimizerConfig().name]
    yield Group(path, where, _line(node.get("description", "")), keys)
    yield from below


def _key(name: str, field: dict[str, Any]) -> Key:
    unit = next((part["unit"] for part in [field, *field.get("anyOf", [])] if "unit" in part), "")
    default = shown(field["default"]) if "default" in field else "required"
    words = _words(field)
    numeric = words.startswith(("int", "float"))
    unit = unit or (_UNITS.get(name.split("_")[-1], "") if numeric else "")
    return Key(name, words, default, unit, _line(field.get("description", "")))


def _words(field: dict[str, Any]) -> str:
    """The values of a field of a JSON schema."""
    if "discriminator" in field:
        return " | ".join(_kinds(field))
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "anyOf" in field:
        return " or ".join(map(_words, field["anyOf"]))
    kind = field.get("type")
    if "$ref" in field:
        return "section"
    if kind == "null":
        return "null"
    if kind == "array":
        count = f"{field['minItems']} " if field.get("minItems") == field.get("maxItems") is not None else ""
        return f"list of {count}{_words(field['items'])}"
    if kind == "string" and field.get("format") == "path":
        return "path"
    limits = (f" {sign} {field[key]:g}" for key, sign in _LIMITS.items() if key in field)
    return _TYPES.get(str(kind), "any") + ",".join(limits)


def _line(text: str) -> str:
    """A docstring's text on one line, with YAML's word for None."""
    return re.sub(r"\bNone\b", "null", " ".join(text.split()))


# -- the optimizer's keys are its class's own arguments ---------------------------------------------------------------


def _optimizer_keys(name: str) -> list[Key]:
    """The keys of the named optimizer, from its signature and the Args of its docstring."""
    texts = _arguments(registry.spec(name).cls)
    return [
        _key(f"optimizer.{key}", _field(key, value) | {"default": value, "description": texts.get(key, "")})
        for key, value in optimizer_defaults(name).items()
    ]


def _other_optimizer(name: str) -> Group:
    cls = registry.spec(name).cls
    keys = ", ".join(f"{key} {shown(value)}" for key, value in registry.defaults(name).items())
    return Group("optimizer", f"name: {name}", f"{cls.__module__.split('.')[0]}'s {cls.__name__}: {keys}.", [])


def optimizer_defaults(name: str) -> dict[str, Any]:
    """What the launcher gives the named optimizer for each key that a config leaves out."""
    # OptimizerConfig.spec seeds ours by the run's seed.
    return registry.defaults(name) | ({"seed": "run.seed"} if name == "ademamix" else {})


def _field(key: str, default: Any) -> dict[str, Any]:
    """The JSON schema of an argument with this default."""
    if key.endswith("_warmup"):
        whole = {"type": "integer", "minimum": 1, "unit": "steps"}
        return {"anyOf": [whole, {"enum": ["total"]}, {"type": "null"}]}
    if key == "state_dtype":
        return {"anyOf": [{"type": "string"}, {"type": "object"}]}
    if key == "seed":
        return {"type": "integer", "minimum": 0}
    if isinstance(default, bool):
        return {"type": "boolean"}
    if isinstance(default, int | float):
        return {"type": "number"}
    if isinstance(default, tuple) and all(isinstance(one, int | float) for one in default):
        return {"type": "array", "items": {"type": "number"}, "minItems": len(default), "maxItems": len(default)}
    return {"type": "string"} if isinstance(default, str) else {}


def _arguments(cls: type) -> dict[str, str]:
    """What the docstring of `cls` says of each argument, in its section Args."""
    _, _, rest = (inspect.getdoc(cls) or "").partition("\nArgs:\n")
    section = textwrap.dedent(re.split(r"\n(?=\S)", rest)[0])
    entries = re.findall(r"^(\w[\w, ]*): (.*(?:\n .*)*)", section, re.MULTILINE)
    return {name.strip(): _sentence(text) for names, text in entries for name in names.split(",")}


def _sentence(text: str) -> str:
    line = _line(text)
    return line[:1].upper() + line[1:]


# -- forms ------------------------------------------------------------------------------------------------------------


def as_text(found: list[Group]) -> str:
    """For a terminal of 80 columns."""
    lines: list[str] = []
    for path, where, text, keys in found:
        title = f"{path} {{{where}}}" if ": " in where else f"{path}, {where}" if where else path
        lines += ["", title, *textwrap.wrap(text, _WIDTH), *([""] if keys else [])]
        for key in keys:
            values = f"{key.type}, in {key.unit}" if key.unit else key.type
            default = "required" if key.default == "required" else f"default {key.default}"
            lines += textwrap.wrap(f"  {key.name}  ({values}; {default})", _WIDTH, subsequent_indent="      ")
            lines += textwrap.wrap(key.text, _WIDTH, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines).strip()


def as_markdown() -> str:
    """docs/config.md."""
    lines = [
        "# Every key of a config",
        "",
        "Made by `shardopt config --markdown`; the texts stand beside the fields in the code. In a terminal,",
        "`shardopt config train` or `shardopt config train.steps` shows a part of it. For completion in an editor,",
        "`shardopt config --schema > schema.json` writes a JSON schema; name it in the first line of a config:",
        "",
        "```yaml",
        "# yaml-language-server: $schema=schema.json",
        "```",
        "",
        "`shardopt init --model llama-124m` writes a config with every key and its text as comments. Each key may be",
        "changed behind a command as `key.sub=value`, whose value is YAML: `train.steps=50`,",
        "`data.sources='[{source: text, paths: notes}]'`.",
    ]
    section = ""
    for path, where, text, keys in groups():
        if path.split(".")[0] != section:
            section = path.split(".")[0]
            lines += ["", f"## {section}"]
        if where or path != section:
            lines += ["", f"### {path}, {f'`{where}`' if ': ' in where else where}" if where else f"### {path}"]
        lines += ["", *textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)] if text else []
        if keys:
            lines += ["", "| key | values | default | unit | |", "| --- | --- | --- | --- | --- |"]
        for key in keys:
            name, kind, default, unit, what = (cell.replace("|", "\\|") for cell in key)
            default = default if default == "required" else f"`{default}`"
            lines.append(f"| `{name}` | {kind} | {default} | {unit} | {what} |")
    return "\n".join(lines) + "\n"


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, for editors: what is written there, short forms included."""
    schema = Config.model_json_schema()
    kinds = []
    for name in registry.names():
        keys = {key: _field(key, value) for key, value in registry.defaults(name).items()}
        kind = {"properties": {"name": {"const": name}, **keys}, "additionalProperties": False}
        kinds.append(kind if name == OptimizerConfig().name else kind | {"required": ["name"]})
    schema["$defs"]["OptimizerConfig"] |= {"additionalProperties": True, "anyOf": kinds}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | _for_editors(schema)


def _for_editors(node: Any) -> Any:
    """Without titles, which repeat the keys; a member of a union fits without its tag, which has a default."""
    if isinstance(node, list):
        return [_for_editors(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: value for key, value in node.items() if not (key == "title" and isinstance(value, str))}
    return {"anyOf" if key == "oneOf" else key: _for_editors(value) for key, value in kept.items()}
