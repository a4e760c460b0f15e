"""How a state tensor is stored, and the random bits that round it. Nobody else looks inside a format.

bf16 and the block formats are rounded stochastically: up with the probability that keeps the mean. The 16 random
bits of an element come from a counter, not from a generator: from (seed, parameter, state tensor, step), mixed
into a stream key, and then from the element's index in the whole parameter. So they do not depend on ranks,
layouts, devices or kernels, and every kernel computes them with the same integer arithmetic:

    mix64(z)            the finalizer of splitmix64 (Steele, Lea, Flood 2014)
    base                mix64(mix64(seed) ^ name_key)                                         per parameter
    stream(step, pair)  mix64(base + (4 step + pair) 0x9E3779B97F4A7C15)                       per step
    ka, kb              low and high half of mix64(stream + (index >> 32) 0xD1B54A32D192ED03)
    word(index)         x = low32(index) ^ ka;  x ^= x >> 17;  x *= 0xED5AD4BB;  x ^= x >> 11;
                        x += kb;  x *= 0xAC4C1B51;  x ^= x >> 15;  x *= 0x31848BAB;  x ^= x >> 14

A word serves two tensors: its low half rounds the first of the pair, its high half the second. The pairs are
(m1, m2), (nu, weight), (weight_ema, nothing). Shifts and multipliers are those of triple32 (C. Wellons,
hash-prospector); with two rounds (lowbias32) the two halves of a word were measurably too even together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from shardopt.errors import InputError
from shardopt.optim.reference import square_root
from shardopt.slices import Slice, local_tensor

BLOCK = 128  # elements that share a scale
FORMATS = {"fp32": 1, "bf16": 2, "block16": 3, "block8": 4}
BLOCK_FORMATS = ("block16", "block8")
# state tensor -> (pair, bits to shift its half of the word down by)
STREAMS = {"m1": (0, 0), "m2": (0, 16), "nu": (1, 0), "weight": (1, 16), "weight_ema": (2, 0)}
ROUNDED = ("m1", "m2", "nu", "weight_ema")

FLOAT_MAX, FLOAT_TINY = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
_MASK64 = (1 << 64) - 1
_MASK32 = (1 << 32) - 1


# -- random bits --------------------------------------------------------------------------------------------


def mix64(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK64
    return z ^ (z >> 31)


def base_key(seed: int, name_key: int) -> int:
    """The unsigned 64-bit key of a parameter under a seed; `name_key` is `slices.name_key` of its name."""
    return mix64(mix64(seed & _MASK64) ^ name_key)


def stream_key(base: int, step: int, pair: int) -> int:
    return mix64((base + (4 * step + pair) * 0x9E3779B97F4A7C15) & _MASK64)


def random_words(stream: int, start: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """The 32-bit words of the elements start .. start + length of a parameter, as int64 in 0 .. 2^32 - 1."""
    words = torch.empty(length, dtype=torch.int64, device=device)
    done = 0
    while done < length:  # the keys change where the index passes a multiple of 2^32
        index = start + done
        count = min(length - done, (1 << 32) - (index & _MASK32))
        keys = mix64((stream + (index >> 32) * 0xD1B54A32D192ED03) & _MASK64)
        low = index & _MASK32
        x = torch.arange(low, low + count, dtype=torch.int64, device=device) ^ (keys & _MASK32)
        x ^= x >> 17
        x = (x * 0xED5AD4BB) & _MASK32
        x ^= x >> 11
        x = (x + (keys >> 32)) & _MASK32
        x = (x * 0xAC4C1B51) & _MASK32
        x ^= x >> 15
        x = (x * 0x31848BAB) & _MASK32
        x ^= x >> 14
        words[done : done + count] = x
        done += count
    return words


def random_bits(kind: str, base: int, step: int, start: int, length: int, device: torch.device | str) -> Tensor:
    """The 16 random bits (int32, 0 .. 65535) that round elements start .. start + length of one state tensor."""
    pair, shift = STREAMS[kind]
    return ((random_words(stream_key(base, step, pair), start, length, device) >> shift) & 0xFFFF).int()


# -- formats ------------------------------------------------------------------------------------------------


def formats_of(state_dtype: str | Mapping[str, str]) -> dict[str, str]:
    """The format of each state tensor that may be rounded.

    Raises:
        InputError: an unknown format or state key.
    """
    chosen: dict[str, str] = dict.fromkeys(ROUNDED, "fp32")
    if isinstance(state_dtype, Mapping):
        unknown = sorted(set(state_dtype) - set(ROUNDED))
        if unknown:
            raise InputError(f"state_dtype names {unknown[0]!r}: the state tensors are {', '.join(ROUNDED)}")
        chosen.update(state_dtype)
    else:
        chosen = dict.fromkeys(ROUNDED, state_dtype)
    for value in chosen.values():
        if value not in FORMATS:
            raise InputError(f"state_dtype must be one of {', '.join(FORMATS)} (or a mapping to them), got {value!r}")
    return chosen


def storage_dtype(fmt: str, kind: str, param_dtype: torch.dtype) -> torch.dtype:
    """dtype of the stored tensor; "fp32" means float64 where the parameter is float64."""
    if fmt == "fp32":
        return torch.float64 if param_dtype == torch.float64 else torch.float32
    if fmt == "block8":
        return torch.uint8 if kind == "nu" else torch.int8
    return torch.bfloat16 if fmt == "bf16" else torch.int16


def format_of(kind: str, stored: Tensor, has_scale: bool) -> str:
    """The format of a stored state tensor, from its dtype (and whether a scale stands beside it)."""
    if has_scale:
        return "block16" if stored.dtype == torch.int16 else "block8"
    return "bf16" if stored.dtype == torch.bfloat16 else "fp32"


def blocks(length: int) -> int:
    return -(-length // BLOCK)


def round_bf16(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 to bf16: up in magnitude with probability equal to the part cut off; NaN stays NaN, -0.0 stays -0.0."""
    raw = values.contiguous().view(torch.int32)
    # 16 of the 32 bits are kept, so an arithmetic shift is as good as a logical one
    rounded = ((raw + bits) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isnan(), values.to(torch.bfloat16), rounded)


def split_fp32(values: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 as a bf16 rounded half away from zero plus the missing 16 bits (int16); `join_fp32` inverts it.

    Nearest-even high halves would give two fp32 values one code at a tie.
    """
    raw = values.contiguous().view(torch.int32)
    high = torch.where(values.isnan(), (raw >> 16) | 0x40, (raw + 0x8000) >> 16)
    return high.to(torch.int16).view(torch.bfloat16), (raw - (high << 16)).to(torch.int16)


def join_fp32(high: Tensor, low: Tensor) -> Tensor:
    raw = high.contiguous().view(torch.int16).int() << 16
    # A weight set to zero by hand leaves its old low half behind: below zero there is nothing to subtract from.
    left = torch.where(((raw & 0x7FFFFFFF) == 0) & (low < 0), 0, low.int())
    return (raw + left).view(torch.float32)


def round_to_weight(values: Tensor, dtype: torch.dtype) -> Tensor:
    """What the model sees of an fp32 master: nearest, in bf16 with ties away from zero as the split has it."""
    return split_fp32(values)[0] if dtype == torch.bfloat16 else values.to(dtype)


def decode(kind: str, codes: Tensor, scale: Tensor | None) -> Tensor:
    """The stored values of consecutive elements from the start of a block, as a new flat fp32 (or fp64) tensor."""
    if scale is None:
        return codes if codes.dtype == torch.float64 else codes.float()
    per_element = scale.repeat_interleave(BLOCK)[: codes.numel()]
    if codes.dtype == torch.int16:
        raw = codes.int()
        if kind == "nu":
            return ((raw & 0xFFFF) << 12).view(torch.float32) * 2.0**112 * per_element
        magnitude = ((raw & 0x7FFF) << 12).view(torch.float32) * 2.0**112 * per_element
        return torch.where(raw < 0, -magnitude, magnitude)
    values = codes.float()
    return values * values * per_element if kind == "nu" else values * per_element


def encode(kind: str, values: Tensor, bits: Tensor | None, codes: Tensor, scale: Tensor | None) -> None:
    """Store flat `values` (fp32; consecutive elements from the start of a block) into `codes` and `scale`.

    Args:
        bits: 16 random bits an element (int32), or None to round to nearest.
    """
    if scale is None:
        if codes.dtype != torch.bfloat16 or bits is None:
            codes.copy_(values)
        else:
            codes.copy_(round_bf16(values, bits))
        return
    if bits is None:
        bits = torch.full(values.shape, 0x8000, dtype=torch.int32, device=values.device)
    padded = torch.nn.functional.pad(values.abs(), (0, scale.numel() * BLOCK - values.numel()))
    largest = padded.view(-1, BLOCK).amax(1)
    if codes.dtype == torch.int16:
        _encode_block16(kind, values, bits, codes, scale, largest)
    else:
        _encode_block8(kind, values, bits, codes, scale, largest)


def _encode_block16(kind: str, values: Tensor, bits: Tensor, codes: Tensor, scale: Tensor, largest: Tensor) -> None:
    """A small float under a power-of-two scale: 11 mantissa bits, and 4 exponent bits (5 and no sign for nu).

    The code is the fp32 bit pattern of the scaled value without its low 12 bits; the scale puts the largest
    element's exponent at the top of the range (field 15, or 31), and fp32's own subnormals make ours.
    """
    top = 31 if kind == "nu" else 15
    # power of two at or below the largest element, times what maps its exponent field to `top`
    exponent = (largest.view(torch.int32) >> 23) & 0xFF
    exponent = exponent.clamp(top, 253)
    scale.copy_(((exponent - (top - 15)) << 23).view(torch.float32))
    inverse = ((254 - exponent + (top - 15)) << 23).view(torch.float32)
    scaled = values * inverse.repeat_interleave(BLOCK)[: values.numel()] * 2.0**-112
    raw = scaled.view(torch.int32)
    code = ((raw & 0x7FFFFFFF) + (bits >> 4)) >> 12
    code = code.clamp(max=0xFFFF if kind == "nu" else 0x7FFF)
    if kind == "nu":
        code = torch.where((code == 0) & (values > 0), 1, code)
    else:
        code = torch.where(raw < 0, code | 0x8000, code)
    codes.copy_(code.to(torch.int16))


def _encode_block8(kind: str, values: Tensor, bits: Tensor, codes: Tensor, scale: Tensor, largest: Tensor) -> None:
    """Eight bits: evenly spaced for the signed averages, squares of 0 .. 255 for nu (so evenly spaced in sqrt)."""
    steps = 255.0 * 255.0 if kind == "nu" else 127.0
    scale.copy_(largest.clamp(max=FLOAT_MAX) * (1.0 / steps))
    inverse = torch.where(scale >= FLOAT_TINY, 1.0 / scale, 0.0)
    x = values * inverse.repeat_interleave(BLOCK)[: values.numel()]
    uniform = bits.float() * 2.0**-16
    if kind == "nu":
        below = torch.floor(square_root(x))
        # between k^2 and (k + 1)^2, up with the probability that keeps the mean of nu itself
        above = (x - below * below) > uniform * (2.0 * below + 1.0)
        code = (below + above.float()).clamp(0.0, 255.0)
        code = torch.where((code == 0) & (values > 0), 1.0, code)
    else:
        code = torch.floor(x + uniform).clamp(-127.0, 127.0)
    codes.copy_(code.to(codes.dtype))


# -- slices: what checkpoints read and write ------------------------------------------------------------------


def read_slice(piece: Slice) -> Tensor:
    """The values of a slice as a flat fp32 (or fp64) tensor of `layout.local_numel` elements, in global order."""
    parts = [decode(piece.kind, codes, scale) for codes, scale in _slice_ranges(piece)]
    return torch.cat(parts) if parts else torch.empty(0)


def write_slice(piece: Slice, values: Tensor) -> None:
    """Store what `read_slice` returned, in the slice's own format, rounded to nearest."""
    done = 0
    for codes, scale in _slice_ranges(piece):
        encode(piece.kind, values[done : done + codes.numel()].to(codes.device), None, codes, scale)
        done += codes.numel()


def _slice_ranges(piece: Slice) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Codes and scales (views) of each range; a block format's blocks start anew in every range."""
    values = local_tensor(piece.tensors[0]).view(-1)
    block = 0
    for r in piece.layout.ranges:
        scale = None
        if len(piece.tensors) > 1:
            scale = local_tensor(piece.tensors[1]).narrow(0, block, blocks(r.length))
            block += blocks(r.length)
        yield values.narrow(0, r.local_start, r.length), scale
