"""What pydantic found wrong with a config, in the words of its YAML."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from shardopt.engines import EngineConfig
from shardopt.errors import InputError, did_you_mean

# What to write where pydantic's own words are about Python.
_WRITE = {
    "bool_type": "write true or false",
    "tuple_type": "write a list",
    "dict_type": "write a mapping",
    "is_instance_of": "write a path",
    "too_short": "must not be empty",
}


def explain(error: Any, root: type[BaseModel]) -> str:
    """One problem that pydantic found in a config of the class `root`, as one line that names the key."""
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return str(cause)
    *parts, last = map(str, error["loc"])
    places = error["loc"]
    # Without the tags of union members, which nobody writes.
    kept = [i for i, p in enumerate(parts) if isinstance(places[i], int) or p in _keys_at(root, parts[:i])]
    location = [*(parts[i] for i in kept), last]
    key = as_key([*(places[i] for i in kept), places[-1]])
    if error["type"] == "unexpected_keyword_argument":
        (known,) = (e.__dataclass_fields__ for e in get_args(EngineConfig) if e.name == parts[-1])
        hint = did_you_mean(last, known, "engine.") or f"; known: {', '.join(known)}"
        return (
            f"{key}: the engine {parts[-1]} has no such key{hint} (to change the engine and its keys at once, write "
            f"engine='{{name: ...}}')"
        )
    if error["type"] == "extra_forbidden":
        known = _keys_at(root, location[:-1])
        listed = f"; known: {', '.join(sorted(known))}"
        if len(parts) > 1 and last in _keys_at(root, parts[:1]):  # such as micro_batch in a stage
            return f"{key}: there is no such key{listed}; {last} is a key of {parts[0]}: write {parts[0]}.{last}"
        hint = did_you_mean(last, known, key.removesuffix(last)) or listed
        return f"{key}: there is no such key{hint}"
    if error["type"] == "missing":
        return f"{key}: is required"
    if error["type"] == "union_tag_not_found":
        return f"{key}: {error['ctx']['discriminator']} is required"
    value = error["input"]
    if error["type"] in ("model_type", "model_attributes_type"):
        first, annotation = next(iter(_keys_at(root, location).items()))
        words = [word for word in get_args(annotation) if isinstance(word, str)]
        scalars = int | float if annotation in (int, float) else str | int | float
        fits = value in words if words else isinstance(value, scalars) and not isinstance(value, bool)
        hint = "" if fits else did_you_mean(value, words, f"{key}.{first}=")
        example = value if fits else "..."
        such_as = f"{{{first}: {example}}}" if isinstance(places[-1], int) else f"{key}.{first}={example}"
        return f"{key}: is a section, not a value; write its keys, such as {such_as}{hint}"
    if error["type"] == "union_tag_invalid":
        tag, tags = error["ctx"]["tag"], error["ctx"]["expected_tags"].replace("'", "")
        hint = did_you_mean(tag, tags.split(", "))
        return f"{key}.{error['ctx']['discriminator'][1:-1]}: {tag!r} is not one of {tags}{hint}"
    may_be_null = type(None) in get_args(_keys_at(root, location[:-1]).get(last))
    if error["type"] == "too_short" and may_be_null:
        return f"{key}: must not be empty; for none write {key}=null, or leave it out"
    message = _WRITE.get(error["type"]) or str(cause or error["msg"])
    if error["type"] == "string_pattern_mismatch":  # of a name
        marks = " ".join(mark for mark in ".+-_" if re.fullmatch(error["ctx"]["pattern"], f"a{mark}"))
        message = f"write letters, digits and any of {marks}, a letter, digit or _ first"
    shown = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)  # as YAML spells them
    got = "" if message.startswith(f"{value}: ") else f", got {shown}"  # which it names already
    off = f"; for none write {key}=null" if may_be_null and value == 0 else ""
    return f"{key}: {message[0].lower()}{message[1:]}{got}{off}"


def as_key(places: Sequence[str | int]) -> str:
    """A place in a config as messages name it: train.stages[0].weights; in quotes what one would not see there."""
    keys = (p if isinstance(p, int) or (p and p.isprintable() and p == p.strip()) else repr(p) for p in places)
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def _keys_at(annotation: Any, location: Sequence[str]) -> dict[str, Any]:
    """The keys that the config knows at `location` (a union member's tag in it is passed over) and their types."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType, list, tuple):
        members = [_keys_at(member, location) for member in get_args(annotation)]
        return {key: kind for keys in members for key, kind in keys.items()}
    fields: dict[str, Any] = {}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = {f.alias or n: f.annotation for n, f in annotation.model_fields.items()}
    elif hasattr(annotation, "__dataclass_fields__"):
        fields = dict.fromkeys(annotation.__dataclass_fields__)
    if not location:
        return fields
    return _keys_at(fields.get(location[0], annotation), location[1:])
