"""AdEMAMix's settings as text: from a command line through HfArgumentParser, or in TrainingArguments.optim_args."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, fields
from typing import Any

from shardopt.errors import InputError


@dataclass
class AdEMAMixArguments:
    """AdEMAMix's own settings for HfArgumentParser; lr and weight decay are TrainingArguments'."""

    alpha: float = field(default=5.0, metadata={"help": "Weight of the slow average."})
    beta3: float = field(default=0.9999, metadata={"help": "Decay of the slow average."})
    alpha_warmup: str = field(
        default="total", metadata={"help": "Steps over which alpha rises: a number, 'total' or 'none'."}
    )
    beta3_warmup: str = field(
        default="total", metadata={"help": "Steps over which beta3 rises: a number, 'total' or 'none'."}
    )
    state_dtype: str = field(default="fp32", metadata={"help": "fp32, bf16, block16 or block8."})
    master_weights: str = field(default="none", metadata={"help": "For 16-bit weights: none, fp32 or split."})


def parse_optim_args(text: str | None) -> dict[str, Any]:
    """ "alpha=8,betas=(0.9,0.999,0.99),state_dtype=bf16,alpha_warmup=none" as values.

    Commas inside brackets do not separate; a word that is not a Python literal stays text.

    Raises:
        InputError: something that is not key=value.
    """
    values: dict[str, Any] = {}
    for item in _split(text or ""):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key.isidentifier() or not value:
            raise InputError(f"optim_args: {item!r} is not key=value (as in 'alpha=8,betas=(0.9,0.999,0.99)')")
        if key in values:
            raise InputError(f"optim_args: {key} stands there twice")
        values[key] = _value(value)
    return values


def _split(text: str) -> list[str]:
    items, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    if depth:
        raise InputError(f"optim_args: the brackets of {text!r} do not match")
    return [item for item in items if item.strip()]


def _value(text: str) -> Any:
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def plain(settings: AdEMAMixArguments | None) -> dict[str, Any]:
    """The settings as AdEMAMix takes them."""
    if settings is None:
        return {}
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    return {key: _value(value) if isinstance(value, str) else value for key, value in values.items()}
