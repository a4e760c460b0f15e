"""The one list of what an AdEMAMix step is made of: hyper-parameters, scalars of a step and state tensors.

From it come AdEMAMix's signature, defaults and checks, the state that a parameter must have, and the row that every
kernel reads: the numpy record `SEGMENT`, the C struct (`c_header`) and the places of Triton's loads. A new
hyper-parameter or state tensor is one entry here and its arithmetic in reference.py and the kernels.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, NamedTuple, TypedDict, get_type_hints

import numpy as np
import torch
from torch import Tensor

from shardopt.errors import InputError
from shardopt.optim import precision
from shardopt.optim.precision import FORMATS, Format, Word

StateDtype = str | Mapping[str, str]

# -- state tensors --------------------------------------------------------------------------------------------


class Deciding(NamedTuple):
    """The settings of a group that decide which state its parameters have."""

    beta1: bool  # whether there is one
    weight_ema: bool  # likewise
    master_weights: str | None
    state_dtype: str | tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Deciding:
        dtype = group["state_dtype"]
        named = tuple(dtype.items()) if isinstance(dtype, Mapping) else dtype
        return cls(group["betas"][0] != 0.0, group["weight_ema"] is not None, group["master_weights"], named)


@dataclass(frozen=True)
class StateTensor:
    """A state tensor of one value per element, stored in a format of the user's choice.

    Args:
        key: its key in the optimizer's state. A block format's scales are at `key` + "_scale".
        word: the last round of the random bits that round it.
        signed: whether it may be negative.
        kept: whether a parameter of a group with these settings has one.
    """

    key: str
    word: Word
    signed: bool = True
    kept: Callable[[Deciding], bool] = lambda settings: True


STATE_TENSORS = (
    StateTensor("m1", Word(15, 0x31848BAB, 14), kept=lambda settings: settings.beta1),
    StateTensor("m2", Word(14, 0x846CA68B, 15)),
    StateTensor("nu", Word(16, 0x7FEB352D, 15), signed=False),
    StateTensor("weight_ema", Word(17, 0x2C1B3C6D, 14), kept=lambda settings: settings.weight_ema),
)
WORDS = {tensor.key: tensor.word for tensor in STATE_TENSORS} | {"weight": Word(13, 0xD168AAAD, 14)}
ROUNDED = tuple(tensor.key for tensor in STATE_TENSORS)
UNSIGNED = {tensor.key for tensor in STATE_TENSORS if not tensor.signed}
# `master_weights` -> state key and dtype of what a 16-bit weight lacks
LOW_HALF = "master_low"
MASTERS = {"fp32": ("master", torch.float32), "split": (LOW_HALF, torch.int16)}
COUNTS = ("step", "schedule_step")
SCALES = tuple(f"{key}_scale" for key in ROUNDED)
STATE_KEYS = {*COUNTS, *ROUNDED, *SCALES, *(key for key, _ in MASTERS.values())}


def formats_of(state_dtype: StateDtype) -> dict[str, Format]:
    """The format of each state tensor.

    Raises:
        InputError: an unknown format or state key.
    """
    return _formats(tuple(state_dtype.items())) if isinstance(state_dtype, Mapping) else _formats_named(state_dtype)


@cache  # asked for each parameter
def _formats_named(name: str) -> dict[str, Format]:
    return _formats(tuple(dict.fromkeys(ROUNDED, name).items()))


@cache
def _formats(items: tuple[tuple[str, str], ...]) -> dict[str, Format]:
    given = dict(items)
    if unknown := sorted(set(given) - set(ROUNDED)):
        raise InputError(f"state_dtype names {unknown[0]!r}: the state tensors are {', '.join(ROUNDED)}")
    for value in given.values():
        if value not in FORMATS:
            raise InputError(f"state_dtype must be one of {', '.join(FORMATS)} (or a mapping to them), got {value!r}")
    return {t.key: format_of(t.key, given.get(t.key, "fp32")) for t in STATE_TENSORS}


def format_of(key: str, name: str) -> Format:
    """The format of this name, as the state tensor `key` has it."""
    return replace(FORMATS[name], signed=key not in UNSIGNED)


def master_of(settings: Deciding, weight: torch.dtype) -> tuple[str, torch.dtype] | None:
    """State key and dtype of the master of weights of dtype `weight`, or None where they have none.

    Raises:
        InputError: a dtype that AdEMAMix does not update.
    """
    if weight not in TYPES:
        raise InputError(f"AdEMAMix takes float64, float32, bfloat16 and float16 weights, not {weight}")
    chosen = settings.master_weights if weight.itemsize == 2 else None
    if weight == torch.float16 and chosen != "fp32":
        raise InputError(
            "float16 weights are too coarse near zero to be updated in place: give master_weights='fp32' (split "
            "masters are for bfloat16)"
        )
    return None if chosen is None else MASTERS[chosen]


@cache  # asked for each parameter
def stored_dtypes(settings: Deciding, weight: torch.dtype) -> Mapping[str, tuple[torch.dtype, bool]]:
    """Of each state tensor of weights of this dtype, in the order in which they are made, its dtype and whether it has
    scales beside it.

    Raises:
        InputError: a dtype that AdEMAMix does not update.
    """
    given, master = settings.state_dtype, master_of(settings, weight)
    formats = _formats_named(given) if isinstance(given, str) else _formats(given)
    kept = [tensor.key for tensor in STATE_TENSORS if tensor.kept(settings)]
    found = {key: (formats[key].dtype(weight), formats[key].in_blocks) for key in kept}
    return found if master is None else found | {master[0]: (master[1], False)}


# -- hyper-parameters: each with its default and its check, which returns the value as a group keeps it -----------


def must_be(what: str, test: Callable[[Any], bool]) -> Callable[[str, Any], Any]:
    """The check that a value passes `test`; `what` says in a message what it must be."""

    def check(name: str, value: Any) -> Any:
        if not test(value):
            raise InputError(f"{name} must be {what}, got {value!r}")
        # of numpy's numbers torch.load makes a fuss
        if isinstance(value, np.integer):
            return int(value)
        return float(value) if isinstance(value, numbers.Real) and not isinstance(value, int) else value

    return check


def _within(value: Any, low: float, below: float = math.inf) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= float(value) < below


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


number = must_be("a finite number >= 0", lambda v: _within(v, 0))
decay = must_be("a finite number >= 0 and < 1", lambda v: _within(v, 0, 1))
optional_decay = must_be("None, or a finite number >= 0 and < 1", lambda v: v is None or _within(v, 0, 1))
warmup = must_be("None or a whole number of steps >= 1", lambda v: v is None or (_is_whole(v) and v >= 1))
switch = must_be("True or False", lambda v: isinstance(v, bool))
seed = must_be("a whole number >= 0 and < 2^64", lambda v: _is_whole(v) and 0 <= v < 1 << 64)
second_moment = must_be("'adam' or 'yogi'", ("adam", "yogi").__contains__)
master_weights = must_be("None, 'fp32' or 'split'", (None, *MASTERS).__contains__)


def decays(count: int) -> Callable[[str, Any], tuple[float, ...]]:
    def check(name: str, value: Any) -> tuple[float, ...]:
        if isinstance(value, np.ndarray | Tensor):
            value = value.tolist()
        if not isinstance(value, Sequence) or len(value) != count:
            which = ", ".join(f"beta{i}" for i in range(1, count + 1))
            raise InputError(f"{name} must be {count} numbers ({which}), got {value!r}")
        return tuple(decay(f"beta{i}", beta) for i, beta in enumerate(value, 1))

    return check


def learning_rate(name: str, value: Any) -> float | Tensor:
    if not isinstance(value, Tensor):
        return number(name, value)
    if value.numel() != 1:
        raise InputError(f"{name} must be a number or a tensor of one element, got shape {tuple(value.shape)}")
    if value.device.type == "cpu":
        number(name, value.item())
    return value


def formats(name: str, value: Any) -> StateDtype:
    for one in value.values() if isinstance(value, Mapping) else [value]:
        if not isinstance(one, str):
            raise InputError(f"{name} must be one of {', '.join(FORMATS)} (or a mapping to them), got {one!r}")
    formats_of(value)
    return dict(value) if isinstance(value, Mapping) else value


class HyperParameter(NamedTuple):
    default: Any
    check: Callable[[str, Any], Any]


class HyperParameters(TypedDict, total=False):
    """Hyper-parameters of AdEMAMix, which a group may set too (its docstring explains them)."""

    lr: Annotated[float | Tensor, HyperParameter(1e-3, learning_rate)]
    betas: Annotated[tuple[float, float, float], HyperParameter((0.9, 0.999, 0.9999), decays(3))]
    alpha: Annotated[float, HyperParameter(5.0, number)]
    eps: Annotated[float, HyperParameter(1e-8, number)]
    weight_decay: Annotated[float, HyperParameter(0.0, number)]  # the last that may be given by position
    alpha_warmup: Annotated[int | None, HyperParameter(None, warmup)]
    beta3_warmup: Annotated[int | None, HyperParameter(None, warmup)]
    eps_root: Annotated[float, HyperParameter(0.0, number)]
    second_moment: Annotated[str, HyperParameter("adam", second_moment)]
    maximize: Annotated[bool, HyperParameter(False, switch)]
    state_dtype: Annotated[StateDtype, HyperParameter("fp32", formats)]
    master_weights: Annotated[str | None, HyperParameter(None, master_weights)]
    weight_ema: Annotated[float | None, HyperParameter(None, optional_decay)]
    capturable: Annotated[bool, HyperParameter(False, switch)]
    seed: Annotated[int, HyperParameter(0, seed)]


HYPER_PARAMETERS: dict[str, HyperParameter] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(HyperParameters, include_extras=True).items()
}
# What the paper, its code and others call them.
ALIASES = {
    "beta3": "betas",
    "T_alpha": "alpha_warmup",
    "T_beta3": "beta3_warmup",
    "learning_rate": "lr",
    "wd": "weight_decay",
}
DEFAULTS = {name: entry.default for name, entry in HYPER_PARAMETERS.items()}


def signature(init: Callable[..., None], table: Mapping[str, HyperParameter]) -> inspect.Signature:
    """`init`'s with the hyper-parameters of `table` for its * and **; by position too up to weight_decay."""
    own, kind, last = inspect.signature(init).parameters.values(), inspect.Parameter, [*table].index("weight_decay")
    kinds = [kind.POSITIONAL_OR_KEYWORD if i <= last else kind.KEYWORD_ONLY for i in range(len(table))]
    return inspect.Signature(
        [p for p in own if p.kind is kind.POSITIONAL_OR_KEYWORD]
        + [kind(name, of, default=table[name].default) for name, of in zip(table, kinds, strict=True)]
        + [p for p in own if p.kind is kind.KEYWORD_ONLY]
    )


# -- the scalars of a step ------------------------------------------------------------------------------------


class Scalars(NamedTuple):
    """Scalars of one step of one parameter: the doubles of a row first, then its flags."""

    lr: float
    beta1: float
    beta2: float
    beta3: float  # of this step
    alpha: float  # of this step
    # the update with numerator and denominator divided by sqrt(b2), where b = 1 / (1 - beta ** t):
    m1_factor: float  # lr b1 / sqrt(b2)
    m2_factor: float  # lr alpha / sqrt(b2)
    eps: float  # the group's / sqrt(b2)
    eps_root: float  # the group's / b2
    decay: float  # lr weight_decay
    weight_ema_rate: float = 0.0  # 1 - weight_ema; 1 at the first step, where the average starts
    yogi: bool = False
    maximize: bool = False


FLAGS = tuple(name for name, kind in get_type_hints(Scalars).items() if kind is bool)
DOUBLES = Scalars._fields[: -len(FLAGS)]

# -- a row of a kernel's table: one range of one parameter (see kernels/__init__.py) -------------------------------

TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 5, torch.float64: 6}  # of weights and gradients
NONE = 0  # the format of a state tensor that is not there, and the kind of no master
MASTER_KINDS = {key: kind for kind, (key, _) in enumerate(MASTERS.values(), 1)}
SKIP = 1
FLAG_BITS = {name: 2 << i for i, name in enumerate(FLAGS)}

POINTERS = ("weight", "grad", *ROUNDED, "master")
KINDS = ("weight_type", "grad_type", *(f"{key}_format" for key in ROUNDED), "master_kind", "flags")
SEGMENT = np.dtype(
    [(name, np.uint64) for name in (*POINTERS, *SCALES)]
    + [(name, np.int64) for name in ("length", "start", "row", "stride")]
    + [("key", np.uint64), ("step", np.int64)]
    + [(name, np.float64) for name in DOUBLES]
    # what a captured step computes its scalars from, on the device
    + [(name, np.float64) for name in ("alpha_final", "beta3_final", "alpha_warmup", "beta3_warmup")]
    + [(name, np.float64) for name in ("group_eps", "group_eps_root", "group_weight_decay")]
    + [(name, np.uint64) for name in ("step_pointer", "schedule_pointer", "lr_pointer")]
    # where a weight or gradient is not laid out in order (kernels/__init__.py)
    + [("weight_shape", np.uint64), ("grad_shape", np.uint64), ("local", np.int64)]
    + [(name, np.uint8) for name in KINDS],
    align=True,
)


def c_header() -> str:
    """The row and its codes in C. The compiler checks that every field lies where numpy has it."""
    types = {"u8": "uint64_t", "i8": "int64_t", "f8": "double", "u1": "uint8_t"}
    fields = [(name, *field[:2]) for name, field in (SEGMENT.fields or {}).items()]
    codes = {fmt.name.upper(): fmt.code for fmt in FORMATS.values()} | {"FP16": TYPES[torch.float16], "NONE": NONE}
    codes |= {f"{name.upper()}_MASTER": kind for kind, name in enumerate(MASTERS, 1)} | {"NO_MASTER": NONE}
    codes |= {"SKIP": SKIP, **{name.upper(): bit for name, bit in FLAG_BITS.items()}}
    lines = [
        "#include <stddef.h>",
        "#include <stdint.h>",
        "typedef struct {",
        *(f"    {types[kind.str[1:]]} {name};" for name, kind, _ in fields),
        "} Segment;",
        *(f'_Static_assert(offsetof(Segment, {name}) == {at}, "{name}");' for name, _, at in fields),
        f'_Static_assert(sizeof(Segment) == {SEGMENT.itemsize}, "size");',
        f"enum {{ {', '.join(f'{name} = {code}' for name, code in codes.items())} }};",
        f"#define BLOCK {precision.BLOCK}",
        f"enum {{ {', '.join(f'{key.upper()}_BITS = {1 << i}' for i, key in enumerate(WORDS))} }};",
        "#define WORDS(X) "
        + " ".join(f"X({key}, {key.upper()}_BITS, {a}, {m}u, {b})" for key, (a, m, b) in WORDS.items()),
        f"#define SCALARS(X) {' '.join(f'X({name})' for name in DOUBLES)}",
    ]
    return "\n".join(lines) + "\n"
