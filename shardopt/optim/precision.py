"""Storage formats, and the random bits that round to them. Nobody else looks inside a format.

bf16 and the block formats are rounded stochastically: up with the probability that keeps the mean. The 16 random
bits of an element come from a counter, not from a generator: from (seed, parameter, state tensor, step), mixed
into a stream key, and then from the element's index in the whole parameter. So they do not depend on ranks,
layouts, devices or kernels, and every kernel computes them with the same integer arithmetic:

    mix64(z)        the finalizer of splitmix64 (Steele, Lea, Flood 2014)
    base            mix64(mix64(seed) ^ name_key)                                                  per parameter
    stream          mix64(base + step 0x9E3779B97F4A7C15)                                          per step
    number          index >> 1: two elements share a word
    ka, kb          low and high half of mix64(stream + (number >> 20) 0xD1B54A32D192ED03)
    x               low32(number) 0xED5AD4BB + ka;  x ^= x >> 16;  x += kb;  x *= 0xAC4C1B51
    word(tensor)    x ^= x >> before;  x *= multiplier;  x ^ (x >> after)

The low half of a word is for the even element, the high half for the odd one. Every tensor has a last round of its own
(schema.py has the numbers). The multipliers are those of triple32 (C. Wellons, hash-prospector), the first of which
costs nothing where numbers follow one another; with one less (lowbias32) the two halves of a word were measurably too
even together. The keys change every 2^20 words: far up in a number, a single bit would reach too few bits of the word.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 128  # elements that share a scale

_KEPT = 20  # log2 of how many words have the same keys
_MASK64 = (1 << 64) - 1
_MASK32 = (1 << 32) - 1


# -- random bits --------------------------------------------------------------------------------------------


class Word(NamedTuple):
    """The last round of a tensor's random words."""

    before: int
    multiplier: int
    after: int


def mix64(z: Any) -> Any:
    """Of an unsigned 64-bit int, or of each of a numpy array of uint64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK64
    return z ^ (z >> 31)


def base_key(seed: int, name_key: int) -> int:
    """The unsigned 64-bit key of a parameter under a seed; `name_key` is `slices.name_key` of its name."""
    return mix64(mix64(seed & _MASK64) ^ name_key)


def stream_key(base: int, step: int) -> int:
    return mix64((base + step * 0x9E3779B97F4A7C15) & _MASK64)


def random_words(word: Word, stream: int, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The 32-bit words first .. first + count of a tensor, as int32."""
    words = torch.empty(count, dtype=torch.int32, device=device)
    done = 0
    while done < count:
        number = first + done
        some = min(count - done, (1 << _KEPT) - number % (1 << _KEPT))
        x = words[done : done + some]
        x.copy_(torch.arange(number & _MASK32, (number & _MASK32) + some, device=device))
        _hash(x, word, stream, number >> _KEPT)
        done += some
    return words


def _hash(x: Tensor, word: Word, stream: int, high: int) -> Tensor:
    """Words from the low halves (int32) of their numbers, in place; `high` is what all of these are >> _KEPT."""
    keys = mix64((stream + high * 0xD1B54A32D192ED03) & _MASK64)
    x.mul_(_signed(0xED5AD4BB)).add_(_signed(keys & _MASK32))
    _xor_shifted(x, 16).add_(_signed(keys >> 32)).mul_(_signed(0xAC4C1B51))
    return _xor_shifted(_xor_shifted(x, word.before).mul_(_signed(word.multiplier)), word.after)


def _signed(word: int) -> int:
    """The int32 of the same bits."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _xor_shifted(x: Tensor, by: int) -> Tensor:
    """x ^= x >> by of int32 words, with zeros shifted in."""
    return x.bitwise_xor_((x >> by).bitwise_and_(_MASK32 >> by))


def random_bits(word: Word, base: int, step: int, start: int, length: int, device: torch.device | str) -> Tensor:
    """The 16 random bits (int32, 0 .. 65535) that round elements start .. start + length of one tensor."""
    first = start >> 1
    words = random_words(word, stream_key(base, step), first, ((start + length + 1) >> 1) - first, device)
    halves = torch.stack([words & 0xFFFF, (words >> 16) & 0xFFFF], 1).view(-1)
    return halves.narrow(0, start & 1, length)


def random_bits_at(word: Word, base: int, step: int, indices: Tensor) -> Tensor:
    """The 16 random bits (int32, 0 .. 65535) that round the elements of these indices (int64) of one tensor."""
    number, stream = indices >> 1, stream_key(base, step)
    words = number.int()  # the low halves
    high = number >> _KEPT
    for one in high.unique().tolist():
        some = high == one
        words[some] = _hash(words[some], word, stream, one)
    return torch.where(indices & 1 == 1, words >> 16, words) & 0xFFFF


# -- formats ------------------------------------------------------------------------------------------------


def blocks(length: int) -> int:
    """Number of scales of a range of `length` elements in a block format."""
    return -(-length // BLOCK)


@dataclass(frozen=True)
class Format(abc.ABC):
    """A way to store a state tensor. Subclasses say how values become codes and back.

    Args:
        name: what `state_dtype` calls it.
        code: what the rows of a kernel's table call it.
        signed: whether values may be negative; a block format without a sign (of nu) is a finer one.
    """

    name: str
    code: int
    signed: bool = True

    in_blocks: ClassVar[bool] = False  # every `BLOCK` elements share an fp32 scale

    @abc.abstractmethod
    def dtype(self, weight: torch.dtype) -> torch.dtype:
        """dtype of the codes, for weights of dtype `weight`."""

    @abc.abstractmethod
    def decode(self, codes: Tensor, scale: Tensor | None) -> Tensor:
        """The values of consecutive elements from the start of a block, fp32 or fp64; not always a copy."""

    @abc.abstractmethod
    def encode(self, values: Tensor, bits: Tensor | None, codes: Tensor, scale: Tensor | None) -> None:
        """Store flat `values` (fp32; consecutive elements from the start of a block) into `codes` and `scale`.

        A finite value stays finite. A NaN stays one, in a block format together with the rest of its block, as does
        an infinite value there.

        Args:
            bits: 16 random bits per element (int32), or None to round to nearest.
        """


class _Fp32(Format):
    """fp32 as it is; float64 for float64 weights."""

    def dtype(self, weight: torch.dtype) -> torch.dtype:
        return torch.float64 if weight == torch.float64 else torch.float32

    def decode(self, codes: Tensor, scale: Tensor | None) -> Tensor:
        return codes if codes.dtype == torch.float64 else codes.float()

    def encode(self, values: Tensor, bits: Tensor | None, codes: Tensor, scale: Tensor | None) -> None:
        codes.copy_(values)


class _Bf16(_Fp32):
    """bf16, rounded stochastically."""

    def dtype(self, weight: torch.dtype) -> torch.dtype:
        return torch.bfloat16

    def encode(self, values: Tensor, bits: Tensor | None, codes: Tensor, scale: Tensor | None) -> None:
        codes.copy_(values if bits is None else round_bf16(values.float(), bits))


class _InBlocks(Format):
    """Codes under an fp32 scale for every `BLOCK` elements. Subclasses make both from the largest of each block."""

    in_blocks = True

    @abc.abstractmethod
    def _encode(self, values: Tensor, bits: Tensor, largest: Tensor, scale: Tensor) -> Tensor:
        """Set `scale` and return the codes, in any dtype. `largest` is the largest magnitude of each block."""

    def encode(self, values: Tensor, bits: Tensor | None, codes: Tensor, scale: Tensor | None) -> None:
        assert scale is not None
        values = values.float()
        bits = torch.full_like(values, 0x8000, dtype=torch.int32) if bits is None else bits
        padded = torch.nn.functional.pad(values.abs(), (0, scale.numel() * BLOCK - values.numel()))
        largest = padded.view(-1, BLOCK).amax(1)
        codes.copy_(self._encode(values, bits, largest, scale))
        wrong = ~largest.isfinite()  # a block with such a value reads as NaN: codes 0 under a scale of NaN
        scale.masked_fill_(wrong, torch.nan)
        codes.masked_fill_(_per_element(wrong, codes), 0)


class _Block16(_InBlocks):
    """A small float under a power-of-two scale: 11 mantissa bits, and 4 exponent bits (5 where there is no sign).

    The code is the fp32 bit pattern of the scaled value without its low 12 bits; the scale puts the largest
    element's exponent at the top of the range (field 15, or 31), and fp32's own subnormals make ours.
    """

    def dtype(self, weight: torch.dtype) -> torch.dtype:
        return torch.int16

    def decode(self, codes: Tensor, scale: Tensor | None) -> Tensor:
        raw = codes.int()
        magnitude = ((raw & (0x7FFF if self.signed else 0xFFFF)) << 12).view(torch.float32)
        magnitude = magnitude * 2.0**112 * _per_element(scale, codes)
        return torch.where(raw < 0, -magnitude, magnitude) if self.signed else magnitude

    def _encode(self, values: Tensor, bits: Tensor, largest: Tensor, scale: Tensor) -> Tensor:
        top = 15 if self.signed else 31
        # power of two at or below the largest element, times what maps its exponent field to `top`
        exponent = (largest.view(torch.int32) >> 23) & 0xFF
        exponent = exponent.clamp(top, 253)
        scale.copy_(((exponent - (top - 15)) << 23).view(torch.float32))
        inverse = ((254 - exponent + (top - 15)) << 23).view(torch.float32)
        raw = (values * _per_element(inverse, values) * 2.0**-112).view(torch.int32)
        code = ((raw & 0x7FFFFFFF) + (bits >> 4)) >> 12
        code = code.clamp(max=0x7FFF if self.signed else 0xFFFF)
        if self.signed:
            return torch.where(raw < 0, code | 0x8000, code)
        return torch.where((code == 0) & (values > 0), 1, code)


class _Block8(_InBlocks):
    """Eight bits: evenly spaced for the signed averages, squares of 0 .. 255 for nu (so evenly spaced in sqrt)."""

    def dtype(self, weight: torch.dtype) -> torch.dtype:
        return torch.int8 if self.signed else torch.uint8

    def decode(self, codes: Tensor, scale: Tensor | None) -> Tensor:
        values = codes.float()
        return (values if self.signed else values * values) * _per_element(scale, codes)

    def _encode(self, values: Tensor, bits: Tensor, largest: Tensor, scale: Tensor) -> Tensor:
        scale.copy_(largest * (1.0 / (127.0 if self.signed else 255.0 * 255.0)))
        step = scale
        if not self.signed:
            values, step = square_root(values), square_root(scale)
        inverse = torch.where(step >= (2.0**-110 if self.signed else 2.0**-63), 65536.0 / step, 0.0)
        fixed = torch.round(values * _per_element(inverse, values)).int()  # in 2^-16 of a step
        if self.signed:
            return ((fixed + bits) >> 16).clamp(max=127)
        below, rest = fixed >> 16, fixed & 0xFFFF
        # between k^2 and (k + 1)^2, up with the probability that keeps the mean of nu itself:
        # rest - rest (1 - rest) / (2 k + 1)
        above = (rest - bits).clamp(min=0) * (2 * below + 1) > (rest * (0x10000 - rest)) >> 16
        code = (below + above).clamp(max=255)
        return torch.where(code > 0, code, (values > 0).int())


def _per_element(of_block: Tensor | None, like: Tensor) -> Tensor:
    assert of_block is not None
    return of_block.repeat_interleave(BLOCK)[: like.numel()]


FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        _Fp32("fp32", 1),
        _Bf16("bf16", 2),
        _Block16("block16", 3),
        _Block8("block8", 4),
    )
}
BLOCK_FORMATS = tuple(name for name, fmt in FORMATS.items() if fmt.in_blocks)


def round_bf16(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 to bf16: up in magnitude with probability equal to the part cut off.

    NaN stays NaN, -0.0 stays -0.0, and what is finite stays finite: past bf16's largest value it is cut off.
    """
    raw = values.contiguous().view(torch.int32)
    raw = torch.where(values.isnan(), raw | 0x400000, raw)  # or a NaN of low bits alone would be cut to an infinity
    bits = torch.where((raw & 0x7FFFFFFF) >= 0x7F7F0000, 0, bits)
    # 16 of the 32 bits are kept, so an arithmetic shift is as good as a logical one
    return ((raw + bits) >> 16).to(torch.int16).view(torch.bfloat16)


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
    """Round an fp32 master to its weight: nearest, in bf16 with ties away from zero as the split has it."""
    return split_fp32(values)[0] if dtype == torch.bfloat16 else values.to(dtype)


@torch.no_grad()
def follow_weight(master: Tensor, weight: Tensor) -> None:
    """Take a weight that somebody else has set into its fp32 master: the elements that no longer round to it."""
    ours, torchs = round_to_weight(master, weight.dtype), master.to(weight.dtype)  # they differ at ties
    torch.where((ours == weight) | (torchs == weight), master, weight, out=master)


def square_root(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Correctly rounded, which torch's own is not on a CPU with MKL (a fifth of the fp32 results are an ulp off)."""
    out = torch.empty_like(x) if out is None else out
    if x.dtype == torch.float32 and x.device.type == "cpu":
        np.sqrt(x.detach().numpy(), out=out.numpy())
        return out
    return torch.sqrt(x, out=out)
