"""The base of every section of the config: typed, immutable, and without unknown keys."""

from __future__ import annotations

import types
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, model_validator

from shardopt.checkpoint.store import as_folder, is_local
from shardopt.errors import InputError


def _is_folder(value: Any) -> Path:
    try:
        value = _as_path(value) if isinstance(value, str) else value
    except InputError as error:
        raise ValueError(str(error)) from error
    if not isinstance(value, Path) and not hasattr(value, "protocol"):
        raise ValueError("should be a path or a URL")
    return value


Folder = Annotated[Path, PlainValidator(_is_folder, json_schema_input_type=str), PlainSerializer(str)]
"""A folder on this machine, or in a store by URL."""


def _as_path(text: str) -> Path:
    path = as_folder(text)
    return path.expanduser() if is_local(path) else path


def in_unit(unit: str) -> Any:
    """For Annotated: the unit of a number whose name does not end with it (`_mb`, `_hours`); keys.py shows it."""
    return Field(json_schema_extra={"unit": unit})


Steps = Annotated[int, in_unit("steps")]
Tokens = Annotated[int, in_unit("tokens")]
Sequences = Annotated[int, in_unit("sequences")]


class Section(BaseModel):
    """One section of a run's config; each field is documented where it stands, by a docstring below it.

    Types are strict: an int takes no "3", no 3.5 and no true. What YAML cannot write otherwise is fitted
    first: a list to a tuple, a string to a Path, 1e3 to an int, and "1e-3" to a float, which PyYAML reads as a
    string.

    Raises:
        pydantic.ValidationError: an unknown key, a missing one, or a value of the wrong type.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        return {key: _fit(fields[key].annotation, value) if key in fields else value for key, value in data.items()}


def _fit(annotation: Any, value: Any) -> Any:
    """`value` as the Python object that `annotation` wants, where YAML has another for it; else unchanged."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return value if annotation == Folder else _fit(args[0], value)
    if origin in (Union, types.UnionType):
        # A string stays a string where the field takes strings: only then is the choice of a member unclear.
        if isinstance(value, str) and str in args:
            return value
        for member in args:
            fitted = _fit(member, value)
            if fitted is not value:
                return fitted
        return value
    if annotation is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        if annotation is Path:
            return _as_path(value)
        if annotation is float:
            with suppress(ValueError):
                return float(value)
    if isinstance(value, (list, tuple)) and origin is tuple:  # of members of one type
        return tuple(_fit(args[0], item) for item in value)
    if isinstance(value, dict) and origin is dict and len(args) == 2:
        return {key: _fit(args[1], item) for key, item in value.items()}
    return value
