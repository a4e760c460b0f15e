"""AdEMAMix's settings as text: from a command line through HfArgumentParser, or in TrainingArguments.optim_args."""

from __future__ import annotations

import ast
from dataclasses import asdict, dataclass, field
from typing import Any

from shardopt.errors import InputError

_WORDS = {"none": None, "true": True, "false": False}


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

    A word that is not a Python literal stays text.

    Raises:
        InputError: something that is not key=value, or a key that stands twice.
    """
    try:
        call = ast.parse(f"dict({text or ''})", mode="eval").body
    except SyntaxError:
        call = None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise InputError(f"optim_args: {text!r} is not key=value (as in 'alpha=8,betas=(0.9,0.999,0.99)')")
    values = {str(keyword.arg): _value(ast.unparse(keyword.value)) for keyword in call.keywords}
    if len(values) < len(call.keywords):
        raise InputError(f"optim_args: a key stands twice in {text!r}")
    return values


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return _WORDS.get(text.lower(), text)


def plain(settings: AdEMAMixArguments | None) -> dict[str, Any]:
    """The settings as AdEMAMix takes them."""
    given = asdict(settings) if settings is not None else {}
    return {key: _value(value) if isinstance(value, str) else value for key, value in given.items()}
