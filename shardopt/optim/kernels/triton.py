# mypy: allow-untyped-defs
"""The CUDA kernel, in Triton: one launch for a whole table, however many tensors it has.

A program takes 256 elements of one row. Which row, it reads from a map that is built once for a layout of rows
(`table.cache`); everything that changes from step to step, pointers included, goes to the device in one asynchronous
copy from pinned memory. Rows that differ in what is known at compile time get a launch for each kind: formats, betas
under a half, how the row begins. A row that does not begin on 16 bytes has narrow loads. So has a row's last, partial
piece, through a mask; all others are loaded and stored four elements at a time.

The step is bound by memory (fp32 moves 36 bytes per element, bf16 state and fp32 weights 24), with block8 also by
instructions. A thread has four elements, so that the registers let many programs run at once: they hide the latency
of the chain from the map to the row to the tensors, and the arithmetic (about 60 instructions, twice that with random
bits). Two neighbours share a random word, which is computed once where the row begins at an even index. Nothing is
used twice, so there is nothing to tile. On an H100: docs/gpu.md.

The arithmetic is that of optim/reference.py, operation for operation: `enable_fp_fusion=False` keeps the compiler
from contracting multiply-adds, division and square root are the correctly rounded ones, subnormals are kept.

A captured table (capturable=True) takes one small launch before, which computes on the device, in double, what depends
on the step and the learning rate. The buffers that a CUDA graph reads are kept for as long as the process lives.

What is checked where: the tests run this code in Triton's interpreter, bit for bit against the torch path, and
compile it for several GPUs to look at the instructions (wide loads, no contraction, nothing flushed to zero). Neither
runs on a GPU: alignment faults, capture and speed show on one alone, by scripts/gpu_check.py and the tests that are
marked `cuda`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from shardopt.errors import InputError
from shardopt.optim import schema
from shardopt.optim.kernels.table import Table
from shardopt.optim.precision import BLOCK, FORMATS, mix64

_BLOCK = 256  # elements of a program; a multiple of precision.BLOCK
_OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}

# Triton reads only constants that are marked as such.
_FP32, _BF16, _BLOCK16, _BLOCK8 = (tl.constexpr(FORMATS[name].code) for name in ("fp32", "bf16", "block16", "block8"))
_FP16 = tl.constexpr(schema.TYPES[torch.float16])
_FP32_MASTER, _SPLIT_MASTER = (tl.constexpr([*schema.MASTERS].index(name) + 1) for name in ("fp32", "split"))
_SKIP, _YOGI = tl.constexpr(schema.SKIP), tl.constexpr(schema.FLAG_BITS["yogi"])
_SCALE_BLOCK = tl.constexpr(BLOCK)
_ONE_WORD = 8  # bytes


# The fields of schema.SEGMENT, in 64-bit words: what a captured step reads.
_FIELDS: Mapping[str, Any] = schema.SEGMENT.fields or {}
_PLACE = {name: field[1] // _ONE_WORD for name, field in _FIELDS.items()}
_WORDS = tl.constexpr(schema.SEGMENT.itemsize // _ONE_WORD)

# A row on the device, in 64-bit words: the first fields of a row as they are, then what is worked out from the rest,
# then, two by two, the doubles as floats, the rates 1 - beta, and the gradient's sign.
_COPIED = (*schema.POINTERS, *schema.SCALES, "length", "start", "row", "stride")
assert schema.SEGMENT.names is not None
assert schema.SEGMENT.names[: len(_COPIED)] == _COPIED
_ROW = (*_COPIED, "stream", "first", "flags")
_NUMBERS = (*schema.DOUBLES, "rate1", "rate2", "rate3", "sign")
_ROW_PLACE = {name: i for i, name in enumerate(_ROW)}
_NUMBER_PLACE = {name: i for i, name in enumerate(_NUMBERS)}
_UNSIGNED = {tensor.key for tensor in schema.STATE_TENSORS if not tensor.signed}
_FLOATS, _COLUMNS = tl.constexpr(len(_ROW)), tl.constexpr(len(_ROW) + (len(_NUMBERS) + 1) // 2)


# Places by name, looked up while compiling.


@triton.constexpr_function
def _field(name):
    return _PLACE[name]


@triton.constexpr_function
def _word(name):
    return _ROW_PLACE[name]


@triton.constexpr_function
def _number(name):
    return _NUMBER_PLACE[name]


@triton.constexpr_function
def _last_round(name, part):
    return getattr(schema.WORDS[name], part)


@triton.constexpr_function
def _unsigned(name):
    return name in _UNSIGNED


# What a kernel is compiled for: the bytes schema.KINDS of a row in one number, with the bits to shift each down by.
_KIND_BITS = {name: 8 * i for i, name in enumerate(schema.KINDS)}
# In the place of flags: the row begins on 16 bytes everywhere; its elements lie in rows of the whole parameter; its
# first element has an even index, so that two neighbours share a random word; one of its betas is under a half.
_ALIGNED, _ROWS, _EVEN, _LOW = (tl.constexpr(1 << i) for i in (6, 5, 4, 7))


def kind_of(**codes: int) -> int:
    """The number KIND of the codes of some `schema.KINDS`; the others are 0."""
    return sum(code << _KIND_BITS[name] for name, code in codes.items())


@triton.constexpr_function
def _code(kind, name):
    """The code of one of `schema.KINDS` in the number KIND, while compiling."""
    return (kind >> _KIND_BITS[name]) & 255


@triton.constexpr_function
def _flag(kind, bit):
    return (kind >> _KIND_BITS["flags"]) & bit != 0


# -- random bits: see precision.py ------------------------------------------------------------------------------


@triton.jit
def _mix64(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _hash(stream, number, ahead):
    """What the random words of an element share: of the words `ahead` (uint32) of a number (uint64).

    The keys change where the number of a word, of which two elements have one, passes a multiple of 2^20.
    """
    here = _mix64(stream + (number >> 20) * 0xD1B54A32D192ED03)
    after = _mix64(stream + ((number >> 20) + 1) * 0xD1B54A32D192ED03)
    low = number.to(tl.uint32)
    x = low + ahead
    passed = (x >> 20) != (low >> 20)
    x = x * 0xED5AD4BB + tl.where(passed, after.to(tl.uint32), here.to(tl.uint32))
    x ^= x >> 16
    x += tl.where(passed, (after >> 32).to(tl.uint32), (here >> 32).to(tl.uint32))
    return x * 0xAC4C1B51


@triton.jit
def _hash_at(stream, index):
    """The same, of elements of any indices (uint64)."""
    number = index >> 1
    keys = _mix64(stream + (number >> 20) * 0xD1B54A32D192ED03)
    x = number.to(tl.uint32) * 0xED5AD4BB + keys.to(tl.uint32)
    x ^= x >> 16
    x += (keys >> 32).to(tl.uint32)
    return x * 0xAC4C1B51


@triton.jit
def _bits(x, odd, NAME: tl.constexpr, PAIRS: tl.constexpr):
    """The 16 random bits of a tensor: half a word, the upper one where the element's index is odd.

    Args:
        x: of each element; with PAIRS of each two, and `odd` is not read.
    """
    x ^= x >> _last_round(NAME, "before")
    x *= _last_round(NAME, "multiplier")
    x ^= x >> _last_round(NAME, "after")
    return tl.interleave(x & 0xFFFF, x >> 16) if PAIRS else (x >> (odd * 16)) & 0xFFFF


# -- memory: `at` is the address of a row's first element ------------------------------------------------------------


@triton.jit
def _pointers(at, TYPE: tl.constexpr, block, offsets, ALIGNED: tl.constexpr):
    base = at.to(tl.pointer_type(TYPE))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base + block + offsets


@triton.jit
def _read(at, TYPE: tl.constexpr, block, left, offsets, ALIGNED: tl.constexpr, FULL: tl.constexpr):
    pointers = _pointers(at, TYPE, block, offsets, ALIGNED)
    return tl.load(pointers) if FULL else tl.load(pointers, mask=offsets < left, other=0)


@triton.jit
def _write(at, TYPE: tl.constexpr, values, block, left, offsets, ALIGNED: tl.constexpr, FULL: tl.constexpr):
    pointers = _pointers(at, TYPE, block, offsets, ALIGNED)
    if FULL:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=offsets < left)


@triton.jit
def _to_bf16(x, bits):
    """By random bits; past the largest bf16 it is cut off. Arithmetic leaves a NaN quiet: it is one after the cut."""
    raw = x.to(tl.uint32, bitcast=True)
    return ((raw + tl.where((raw & 0x7FFFFFFF) < 0x7F7F0000, bits, 0)) >> 16).to(tl.uint16)


@triton.jit
def _nearest_bf16(x):
    raw = x.to(tl.uint32, bitcast=True)
    is_nan = (raw & 0x7FFFFFFF) > 0x7F800000
    return tl.where(is_nan, (raw >> 16) | 0x40, (raw + 0x8000) >> 16).to(tl.uint16)


@triton.jit
def _read_values(at, TYPE: tl.constexpr, block, left, offsets, ALIGNED: tl.constexpr, FULL: tl.constexpr):
    if TYPE == _FP32:
        x = _read(at, tl.float32, block, left, offsets, ALIGNED, FULL)
    elif TYPE == _BF16:
        x = _read(at, tl.uint16, block, left, offsets, ALIGNED, FULL).to(tl.uint32) << 16
        x = x.to(tl.float32, bitcast=True)
    else:
        tl.static_assert(TYPE == _FP16)
        x = _read(at, tl.float16, block, left, offsets, ALIGNED, FULL).to(tl.float32)
    return x


@triton.jit
def _of_scales(block, left, offsets):
    """block, left and offsets of the scales of these elements."""
    return block // _SCALE_BLOCK, (left + _SCALE_BLOCK - 1) // _SCALE_BLOCK, tl.arange(0, offsets.shape[0])


@triton.jit
def _read_state(
    row, NAME: tl.constexpr, KIND: tl.constexpr, block, left, offsets, ALIGNED: tl.constexpr, FULL: tl.constexpr
):
    FORMAT: tl.constexpr = _code(KIND, NAME + "_format")
    IS_NU: tl.constexpr = _unsigned(NAME)
    at = tl.load(row + _word(NAME))
    if FORMAT <= _BF16:
        x = _read_values(at, FORMAT, block, left, offsets, ALIGNED, FULL)
    else:
        scale = _read(tl.load(row + _word(NAME + "_scale")), tl.float32, *_of_scales(block, left, offsets), False, FULL)
        scale = scale[:, None]
        if FORMAT == _BLOCK16:
            codes = _read(at, tl.uint16, block, left, offsets, ALIGNED, FULL).to(tl.uint32)
            magnitude = codes if IS_NU else codes & 0x7FFF
            x = (magnitude << 12).to(tl.float32, bitcast=True) * (2.0**112) * scale
            if not IS_NU:
                x = (x.to(tl.uint32, bitcast=True) | ((codes & 0x8000) << 16)).to(tl.float32, bitcast=True)
        elif IS_NU:
            x = _read(at, tl.uint8, block, left, offsets, ALIGNED, FULL).to(tl.float32)
            x = x * x * scale
        else:
            x = _read(at, tl.int8, block, left, offsets, ALIGNED, FULL).to(tl.float32) * scale
    return x


@triton.jit
def _to_nearest(x):
    """Whole numbers (int32), halves to even ones. From 2^23 on there are no others."""
    size = tl.abs(x)
    size = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size).to(tl.int32)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def _write_state(
    row,
    NAME: tl.constexpr,
    KIND: tl.constexpr,
    x,
    hashed,
    odd,
    block,
    left,
    offsets,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
):
    FORMAT: tl.constexpr = _code(KIND, NAME + "_format")
    bits = _bits(hashed, odd, NAME, _flag(KIND, _EVEN)) if FORMAT > _FP32 else hashed
    IS_NU: tl.constexpr = _unsigned(NAME)
    at = tl.load(row + _word(NAME))
    if FORMAT == _FP32:
        _write(at, tl.float32, x, block, left, offsets, ALIGNED, FULL)
    elif FORMAT == _BF16:
        _write(at, tl.uint16, _to_bf16(x, bits), block, left, offsets, ALIGNED, FULL)
    else:
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # in the order of the values
        if not FULL:
            magnitude = tl.where(offsets < left, magnitude, 0)
        largest = tl.max(magnitude, axis=1)
        wrong = largest >= 0x7F800000  # a block with a value that is not finite: codes 0 under a scale of NaN
        if FORMAT == _BLOCK16:
            TOP: tl.constexpr = 31 if IS_NU else 15
            LIMIT: tl.constexpr = 0xFFFF if IS_NU else 0x7FFF
            exponent = tl.minimum(tl.maximum(largest >> 23, TOP), 253)
            scale = ((exponent - (TOP - 15)) << 23).to(tl.float32, bitcast=True)
            inverse = ((254 - exponent + (TOP - 15)) << 23).to(tl.float32, bitcast=True)
            raw = (x * inverse[:, None] * (2.0**-112)).to(tl.uint32, bitcast=True)
            code = tl.minimum(((raw & 0x7FFFFFFF) + (bits >> 4)) >> 12, LIMIT)
            code = tl.where((code == 0) & (x > 0.0), 1, code) if IS_NU else code | ((raw >> 16) & 0x8000)
            code = tl.where(wrong[:, None], 0, code)
            _write(at, tl.uint16, code.to(tl.uint16), block, left, offsets, ALIGNED, FULL)
        else:
            PER_STEP: tl.constexpr = 1.0 / (255.0 * 255.0) if IS_NU else 1.0 / 127.0
            LEAST: tl.constexpr = 2.0**-63 if IS_NU else 2.0**-110
            y = tl.sqrt_rn(x) if IS_NU else x
            scale = largest.to(tl.float32, bitcast=True) * PER_STEP
            step = tl.sqrt_rn(scale) if IS_NU else scale
            inverse = tl.where(step >= LEAST, tl.div_rn(tl.full(step.shape, 65536.0, tl.float32), step), 0.0)
            fixed = _to_nearest(y * inverse[:, None])  # in 2^-16 of a step: precision._Block8
            if IS_NU:
                below, rest = fixed >> 16, fixed & 0xFFFF
                above = tl.maximum(rest - bits.to(tl.int32), 0) * (2 * below + 1) > (rest * (0x10000 - rest)) >> 16
                code = tl.minimum(below + above.to(tl.int32), 255)
                code = tl.where((code == 0) & (x > 0.0), 1, code)
                code = tl.where(wrong[:, None], 0, code)
                _write(at, tl.uint8, code.to(tl.uint8), block, left, offsets, ALIGNED, FULL)
            else:
                code = tl.minimum((fixed + bits.to(tl.int32)) >> 16, 127)
                code = tl.where(wrong[:, None], 0, code)
                _write(at, tl.int8, code.to(tl.int8), block, left, offsets, ALIGNED, FULL)
        scale = tl.where(wrong, float("nan"), scale)
        scales = tl.load(row + _word(NAME + "_scale"))
        _write(scales, tl.float32, scale, *_of_scales(block, left, offsets), False, FULL)


@triton.jit
def _scalar(row, NAME: tl.constexpr):
    """One of _NUMBERS."""
    return tl.load((row + _FLOATS).to(tl.pointer_type(tl.float32), bitcast=True) + _number(NAME))


# -- the update -------------------------------------------------------------------------------------------------


@triton.jit
def _average(x, new, beta, rate, KIND: tl.constexpr):
    """reference.average: from the side of the larger share."""
    if _flag(KIND, _LOW):
        x = tl.where(beta < 0.5, new + (x - new) * beta, x + (new - x) * rate)
    else:
        x = x + (new - x) * rate
    return x


@triton.jit
def _update(row, block, left, KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Elements `block` to `block + left` (at most BLOCK) of a row. Everything is loaded before anything is stored."""
    WEIGHT: tl.constexpr = _code(KIND, "weight_type")
    GRAD: tl.constexpr = _code(KIND, "grad_type")
    M1: tl.constexpr = _code(KIND, "m1_format")
    M2: tl.constexpr = _code(KIND, "m2_format")
    NU: tl.constexpr = _code(KIND, "nu_format")
    WEIGHT_EMA: tl.constexpr = _code(KIND, "weight_ema_format")
    MASTER: tl.constexpr = _code(KIND, "master_kind")
    IS_YOGI: tl.constexpr = _flag(KIND, _YOGI)
    groups = tl.arange(0, BLOCK // _SCALE_BLOCK)
    offsets = groups[:, None] * _SCALE_BLOCK + tl.arange(0, _SCALE_BLOCK)[None, :]

    g = _read_values(tl.load(row + _word("grad")), GRAD, block, left, offsets, ALIGNED, FULL)
    weight_at = tl.load(row + _word("weight"))
    master_at = tl.load(row + _word("master"))
    if MASTER == _FP32_MASTER:
        w = _read_values(master_at, _FP32, block, left, offsets, ALIGNED, FULL)
    else:
        w = _read_values(weight_at, WEIGHT, block, left, offsets, ALIGNED, FULL)
    if MASTER == _SPLIT_MASTER:
        low = _read(master_at, tl.int16, block, left, offsets, ALIGNED, FULL).to(tl.int32)
        raw = w.to(tl.uint32, bitcast=True)
        low = tl.where(((raw & 0x7FFFFFFF) == 0) & (low < 0), 0, low)  # as precision.join_fp32
        w = (raw + low.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    m2 = _read_state(row, "m2", KIND, block, left, offsets, ALIGNED, FULL)
    nu = _read_state(row, "nu", KIND, block, left, offsets, ALIGNED, FULL)
    if M1 != 0:
        m1 = _read_state(row, "m1", KIND, block, left, offsets, ALIGNED, FULL)
    if WEIGHT_EMA != 0:
        weight_ema = _read_state(row, "weight_ema", KIND, block, left, offsets, ALIGNED, FULL)
        weight_ema_rate = _scalar(row, "weight_ema_rate")
    lr = _scalar(row, "lr")

    g = g * _scalar(row, "sign")
    fast = g
    if M1 != 0:
        fast = _average(m1, g, _scalar(row, "beta1"), _scalar(row, "rate1"), KIND)
    m2 = _average(m2, g, _scalar(row, "beta3"), _scalar(row, "rate3"), KIND)
    squared = g * g
    squared = tl.where(squared > 2.0**127, 2.0**127, squared)  # reference.LARGEST_SQUARE
    if IS_YOGI:
        away = nu - squared
        by = squared * _scalar(row, "rate2")
        nu = nu - tl.where(away > 0.0, by, tl.where(away < 0.0, -by, 0.0))
    else:
        nu = _average(nu, squared, _scalar(row, "beta2"), _scalar(row, "rate2"), KIND)
    moves = lr != 0.0
    denominator = tl.sqrt_rn(nu + _scalar(row, "eps_root")) + _scalar(row, "eps")
    u = tl.div_rn(fast * _scalar(row, "m1_factor") + m2 * _scalar(row, "m2_factor"), denominator)
    w = tl.where(moves, w - (u + w * _scalar(row, "decay")), w)

    ROUNDS_WEIGHT: tl.constexpr = WEIGHT == _BF16 and MASTER == 0
    hashed = tl.zeros(offsets.shape, tl.uint32)
    odd = hashed
    if M1 > _FP32 or M2 > _FP32 or NU > _FP32 or WEIGHT_EMA > _FP32 or ROUNDS_WEIGHT:
        stream = tl.load(row + _word("stream")).to(tl.uint64)
        start = tl.load(row + _word("start"))
        if _flag(KIND, _ROWS):
            length = tl.load(row + _word("row"))
            number = block.to(tl.int64) + offsets
            index = start + number // length * tl.load(row + _word("stride")) + number % length
            hashed = _hash_at(stream, index.to(tl.uint64))
            odd = (index & 1).to(tl.uint32)
        elif _flag(KIND, _EVEN):
            words = groups[:, None] * (_SCALE_BLOCK // 2) + tl.arange(0, _SCALE_BLOCK // 2)[None, :]
            hashed = _hash(stream, (start + block).to(tl.uint64) >> 1, words.to(tl.uint32))
        else:
            first = (start + block).to(tl.uint64)
            places = (first & 1).to(tl.uint32) + offsets.to(tl.uint32)
            hashed = _hash(stream, first >> 1, places >> 1)
            odd = places & 1
    if M1 != 0:
        _write_state(row, "m1", KIND, fast, hashed, odd, block, left, offsets, ALIGNED, FULL)
    _write_state(row, "m2", KIND, m2, hashed, odd, block, left, offsets, ALIGNED, FULL)
    _write_state(row, "nu", KIND, nu, hashed, odd, block, left, offsets, ALIGNED, FULL)
    if moves:
        if WEIGHT == _FP32:
            _write(weight_at, tl.float32, w, block, left, offsets, ALIGNED, FULL)
        elif WEIGHT == _FP16:
            _write(weight_at, tl.float16, w.to(tl.float16), block, left, offsets, ALIGNED, FULL)
        else:
            code = _to_bf16(w, _bits(hashed, odd, "weight", _flag(KIND, _EVEN))) if ROUNDS_WEIGHT else _nearest_bf16(w)
            _write(weight_at, tl.uint16, code, block, left, offsets, ALIGNED, FULL)
            if MASTER == _SPLIT_MASTER:
                rest = w.to(tl.uint32, bitcast=True) - (code.to(tl.uint32) << 16)
                _write(master_at, tl.uint16, rest.to(tl.uint16), block, left, offsets, ALIGNED, FULL)
        if MASTER == _FP32_MASTER:
            _write(master_at, tl.float32, w, block, left, offsets, ALIGNED, FULL)
    if WEIGHT_EMA != 0:
        weight_ema = weight_ema + (w - weight_ema) * weight_ema_rate
        _write_state(row, "weight_ema", KIND, weight_ema, hashed, odd, block, left, offsets, ALIGNED, FULL)


@triton.jit
def _step_kernel(table, owners, KIND: tl.constexpr, BLOCK: tl.constexpr):
    ALIGNED: tl.constexpr = _flag(KIND, _ALIGNED)
    program = tl.program_id(0)
    row = table + tl.load(owners + program).to(tl.int64) * _COLUMNS
    flags = tl.load(row + _word("flags"))
    block = (program - tl.load(row + _word("first"))) * BLOCK
    left = tl.load(row + _word("length")) - block
    if (flags & _SKIP) == 0:
        if left >= BLOCK:  # a mask of its own would keep the compiler from wide loads
            _update(row, block, left, KIND, ALIGNED, BLOCK, True)
        else:
            _update(row, block, left, KIND, ALIGNED, BLOCK, False)


# -- captured steps: the scalars of a row, on the device ------------------------------------------------------------


@triton.jit
def _double(row, FIELD: tl.constexpr, live):
    return tl.load(row + FIELD, mask=live, other=0).to(tl.float64, bitcast=True)


@triton.jit
def _count(address, live):
    """The int64 number at each address."""
    return tl.load(address.to(tl.pointer_type(tl.int64)), mask=live, other=1)


@triton.jit
def _unbias(beta, step):
    """reference.bias_correction; exp(x) - 1 after W. Kahan, accurate for small x."""
    x = step * tl.log(beta)
    e = tl.exp(x)
    less_one = tl.where(e == 1.0, x, tl.where(e < 0.5, e - 1.0, (e - 1.0) * x / tl.log(e)))
    return tl.where(beta == 0.0, 1.0, -1.0 / less_one)


@triton.jit
def _scalars_kernel(table, count, BLOCK: tl.constexpr):
    """Rows of schema.SEGMENT follow the table in the same buffer."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = index < count
    row = table + index * _COLUMNS
    given = table + count * _COLUMNS + index * _WORDS
    c = (row + _FLOATS).to(tl.pointer_type(tl.float32), bitcast=True)

    step_at = tl.load(given + _field("step_pointer"), mask=live, other=0)
    schedule_at = tl.load(given + _field("schedule_pointer"), mask=live, other=0)
    lr_at = tl.load(given + _field("lr_pointer"), mask=live, other=0)
    count_of_steps = _count(step_at, live)
    step = count_of_steps.to(tl.float64)
    scheduled = _count(tl.where(schedule_at == 0, step_at, schedule_at), live).to(tl.float64)
    lr = tl.load(lr_at.to(tl.pointer_type(tl.float32)), mask=live & (lr_at != 0), other=1.0).to(tl.float64)
    lr = tl.where(lr_at == 0, _double(given, _field("lr"), live), lr)

    beta1 = _double(given, _field("beta1"), live)
    warmup = _double(given, _field("alpha_warmup"), live)
    alpha = _double(given, _field("alpha_final"), live)
    alpha = tl.where(warmup > scheduled, alpha * (scheduled / tl.where(warmup > 0.0, warmup, 1.0)), alpha)
    warmup = _double(given, _field("beta3_warmup"), live)
    beta3 = _double(given, _field("beta3_final"), live)
    fraction = scheduled / tl.where(warmup > 0.0, warmup, 1.0)
    end = tl.log(beta3)
    start = tl.log(beta1)
    rising = tl.where(beta1 == 0.0, end / fraction, start * end / ((1.0 - fraction) * end + fraction * start))
    beta3 = tl.where(warmup > scheduled, tl.exp(rising), beta3)
    weight_ema_rate = tl.where(step == 1.0, 1.0, _double(given, _field("weight_ema_rate"), live))

    tl.store(c + _number("lr"), lr.to(tl.float32), mask=live)
    tl.store(c + _number("beta3"), beta3.to(tl.float32), mask=live)
    tl.store(c + _number("rate3"), (1.0 - beta3).to(tl.float32), mask=live)
    correction2 = _unbias(_double(given, _field("beta2"), live), step)
    scale = tl.sqrt(correction2)
    eps, eps_root = _double(given, _field("group_eps"), live), _double(given, _field("group_eps_root"), live)
    decay = lr * _double(given, _field("group_weight_decay"), live)
    tl.store(c + _number("alpha"), alpha.to(tl.float32), mask=live)
    tl.store(c + _number("m1_factor"), (lr * _unbias(beta1, step) / scale).to(tl.float32), mask=live)
    tl.store(c + _number("m2_factor"), (lr * alpha / scale).to(tl.float32), mask=live)
    tl.store(c + _number("eps"), (eps / scale).to(tl.float32), mask=live)
    tl.store(c + _number("eps_root"), (eps_root / correction2).to(tl.float32), mask=live)
    tl.store(c + _number("decay"), decay.to(tl.float32), mask=live)
    tl.store(c + _number("weight_ema_rate"), weight_ema_rate.to(tl.float32), mask=live)
    key = tl.load(given + _field("key"), mask=live, other=0).to(tl.uint64)
    stream = _mix64(key + count_of_steps.to(tl.uint64) * 0x9E3779B97F4A7C15)
    tl.store(row + _word("stream"), stream.to(tl.int64), mask=live)


# -- the host's side ----------------------------------------------------------------------------------------------

_INTERPRETED = not isinstance(_step_kernel, triton.runtime.JITFunction)
_captured: list[Any] = []  # what replayed CUDA graphs read
_SPARE = "triton_spare"  # in a table's cache: pinned memory for a step that is captured


class _Launch(NamedTuple):
    """The rows of one kind: the row of each program, their number, and the kind."""

    owners: Tensor
    programs: int
    kind: int


class TritonKernel:
    name = "triton"
    takes_strides = False
    takes_addresses = False

    def refusal(self, weight: Tensor) -> str | None:
        wanted = "cpu" if _INTERPRETED else "cuda"
        if weight.device.type != wanted:
            with_interpreter = " under TRITON_INTERPRET=1" if _INTERPRETED else ""
            return f"the Triton kernel is for {wanted} tensors{with_interpreter}, the parameter is on {weight.device}"
        if schema.TYPES.get(weight.dtype) not in (1, 2, 5):
            return f"the Triton kernel takes fp32, bf16 and fp16 weights, not {weight.dtype}"
        return None

    def check(self, table: Table) -> None:
        """
        Raises:
            InputError: a CUDA graph is being captured of what cannot be in one.
        """
        if not _capturing(table):
            return
        if not table.capturable:
            raise InputError("a CUDA graph of AdEMAMix's step needs capturable=True: the step would stand still")
        if any(isinstance(lr, Tensor) and lr.device != table.device for lr in table.learning_rates):
            raise InputError(f"a CUDA graph reads lr on {table.device}: move lr there, or give a number")
        if _SPARE not in table.cache:
            raise InputError("a CUDA graph of AdEMAMix's step needs memory from a step before: take one, then capture")

    def run(self, table: Table) -> None:
        if not len(table.rows):
            return
        with torch.cuda.device(table.device) if table.device.type == "cuda" else nullcontext():
            capturing = _capturing(table)
            table.captured |= capturing
            raw = table.rows.view(np.int64).reshape(-1, _WORDS.value)
            launches = _launches(table, raw, capturing)
            count = len(raw)
            words = count * (_COLUMNS.value + (_WORDS.value if table.capturable else 0))
            host = table.cache.pop(_SPARE) if capturing else _pinned(words, table.device)
            _fill(host.numpy(), raw, table)
            device = host.to(table.device, non_blocking=True)
            if capturing:
                _captured.append((host, device, launches))
            if table.capturable:
                if not capturing and table.device.type == "cuda" and _SPARE not in table.cache:
                    table.cache[_SPARE] = _pinned(words, table.device)  # pinning may not be captured
                _scalars_kernel[(triton.cdiv(count, 64),)](device, count, BLOCK=64, **_OPTIONS)
            for launch in launches:
                _step_kernel[(launch.programs,)](device, launch.owners, KIND=launch.kind, BLOCK=_BLOCK, **_OPTIONS)


def _capturing(table: Table) -> bool:
    return table.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _pinned(words: int, device: torch.device) -> Tensor:
    # Fresh at every step: torch's allocator hands a pinned block out again only when its copy is done.
    return torch.empty(words, dtype=torch.int64, pin_memory=device.type == "cuda")


def _fill(out: np.ndarray, raw: np.ndarray, table: Table) -> None:
    """The rows as the device reads them, and after them, for captured tables, the rows as they came."""
    count = len(raw)
    rows = out[: count * _COLUMNS.value].reshape(count, _COLUMNS.value)
    rows[:, : len(_COPIED)] = raw[:, : len(_COPIED)]
    step, key = (raw[:, _PLACE[name]].view(np.uint64) for name in ("step", "key"))
    rows[:, _ROW_PLACE["stream"]] = mix64(key + step * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)
    rows[:, _ROW_PLACE["first"]] = table.cache["triton_first"]
    rows[:, _ROW_PLACE["flags"]] = table.rows["flags"]
    doubles = raw[:, _PLACE["lr"] : _PLACE["lr"] + len(schema.DOUBLES)].view(np.float64)
    floats = rows[:, _FLOATS.value :].view(np.float32)
    floats[:, : len(schema.DOUBLES)] = doubles
    for rate, beta in (("rate1", "beta1"), ("rate2", "beta2"), ("rate3", "beta3")):
        floats[:, _NUMBER_PLACE[rate]] = 1.0 - doubles[:, schema.DOUBLES.index(beta)]
    floats[:, _NUMBER_PLACE["sign"]] = np.where(table.rows["flags"] & schema.FLAG_BITS["maximize"], -1.0, 1.0)
    if table.capturable:
        out[count * _COLUMNS.value :] = raw.ravel()


def _low(table: Table) -> np.ndarray:
    """Whether a beta of each row is under a half, or may be at a captured step."""
    rows = table.rows
    betas = [rows["beta2"], rows["beta3"], np.where(rows["m1_format"], rows["beta1"], 1.0)]
    if table.capturable:
        betas[1] = np.minimum(rows["beta3_final"], np.where(rows["beta3_warmup"] > 0, rows["beta1"], 1.0))
    return np.minimum.reduce(betas) < 0.5


def _launches(table: Table, raw: np.ndarray, capturing: bool) -> list[_Launch]:
    """A launch for each kind of row, kept from step to step while the kinds are the same."""
    bytes_of_rows = table.rows.view(np.uint8).reshape(len(raw), -1)
    kinds = bytes_of_rows[:, _FIELDS[schema.KINDS[0]][1] :][:, : len(schema.KINDS)].copy()
    addresses = np.bitwise_or.reduce(raw[:, : len(schema.POINTERS)], axis=1)
    kinds[:, -1] = kinds[:, -1] & _YOGI.value | np.where(addresses & 15, 0, _ALIGNED.value)
    kinds[:, -1] |= np.where(table.rows["row"], _ROWS.value, 0).astype(np.uint8)
    kinds[:, -1] |= np.where((table.rows["row"] == 0) & (table.rows["start"] & 1 == 0), _EVEN.value, 0).astype(np.uint8)
    kinds[:, -1] |= np.where(_low(table), _LOW.value, 0).astype(np.uint8)
    cache = table.cache
    known = cache.get("triton_kinds")
    if known is not None:  # a row that is skipped this time keeps its kind, so that nothing is built anew
        kinds = np.where((table.rows["flags"] & schema.SKIP)[:, None], known, kinds)
        if np.array_equal(kinds, known):
            return cache["triton_launches"]
    programs = -(-table.rows["length"] // _BLOCK)
    first = np.zeros(len(raw), dtype=np.int64)
    launches = []
    for kind in np.unique(kinds, axis=0):
        members = np.nonzero((kinds == kind).all(1))[0]
        total = int(programs[members].sum())
        first[members] = np.cumsum(programs[members]) - programs[members]
        words = _pinned((total + 1) // 2, table.device)
        words.view(torch.int32).numpy()[:total] = np.repeat(members, programs[members])
        codes = dict(zip(schema.KINDS, map(int, kind), strict=True))
        codes["grad_type"] = codes["grad_type"] or codes["weight_type"]  # rows that have had no gradient yet
        device = words.to(table.device, non_blocking=True)
        if capturing:
            _captured.append(words)
        if total:
            launches.append(_Launch(device.view(torch.int32), total, kind_of(**codes)))
    cache["triton_kinds"], cache["triton_first"], cache["triton_launches"] = kinds, first, launches
    return launches
