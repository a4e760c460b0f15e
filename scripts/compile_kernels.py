"""What the compiler makes of the Triton kernel, for GPUs that need not be here.

    PYTHONPATH=. python scripts/compile_kernels.py                      # every kind, for sm_80, sm_90 and sm_100
    PYTHONPATH=. python scripts/compile_kernels.py --sm 90 --only bf16  # those whose name has "bf16" in it

A kind is what a launch is compiled for: the formats of its tensors, and how its rows lie. A line of the Markdown table
has registers of a thread and shared bytes of a program, bytes that are spilled, and of the memory that is moved the
bytes per element that the formats call for beside those of vector loads and stores (a thread's four codes of one byte
are a word). `faults` says what is wrong with the code; the exit status is 1 where there is something.
tests/optim/test_triton.py calls it. Nothing runs: no speeds here.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardopt.optim.kernels import triton as kernel
from shardopt.optim.precision import FORMATS
from shardopt.optim.schema import FLAG_BITS, MASTERS, ROUNDED, TYPES

TARGETS = (80, 90, 100)
PER_THREAD = kernel._BLOCK // (32 * kernel._OPTIONS["num_warps"])  # elements
_CODE = {"none": 0} | {str(dtype).removeprefix("torch."): code for dtype, code in TYPES.items()}
_CODE |= {"fp32": 1, "bf16": 2, "fp16": 5} | {name: fmt.code for name, fmt in FORMATS.items()}
_SPILL = 16  # bytes a thread that may go through the cache: a quarter of what it reads at the least
_SIZE = {"none": 0, "fp32": 4, "bf16": 2, "fp16": 2, "block16": 2, "block8": 1}
_MEMORY = re.compile(r"^\s*(@\S+\s+)?(?:ld|st)\.global(?:\.\w+)*?\.v(\d)\.b(\d+)", re.MULTILINE)
_NARROW = re.compile(r"^\s*(?:ld|st)\.global(?:\.\w+)*?\.b(?:8|16)\b", re.MULTILINE)  # that no mask guards
_INSTRUCTION = re.compile(r"^\s*(?:@\S+\s+)?([a-z][\w.:]*)\s", re.MULTILINE)


@dataclass(frozen=True)
class Kind:
    """What a launch is compiled for, by the names that AdEMAMix's arguments have."""

    weight: str = "fp32"
    grad: str = "fp32"
    m1: str = "fp32"
    m2: str = "fp32"
    nu: str = "fp32"
    weight_ema: str = "none"
    master: str | None = None
    yogi: bool = False
    aligned: bool = True  # rows begin on 16 bytes
    rows: bool = False  # elements lie in rows of the whole parameter: a part of its columns
    odd: bool = False  # rows begin at an odd index
    low: bool = False  # a beta is under a half

    def __str__(self) -> str:
        states = [self.m1, self.m2, self.nu]
        text = f"{self.weight}, state {states[0] if len(set(states)) == 1 else '/'.join(states)}"
        text += f", master {self.master}" if self.master else ""
        text += f", grad {self.grad}" if self.grad != self.weight else ""
        text += f", average {self.weight_ema}" if self.weight_ema != "none" else ""
        flags = {"yogi": self.yogi, "columns": self.rows, "not on 16 bytes": not self.aligned}
        flags |= {"from an odd index": self.odd, "a beta under 0.5": self.low}
        return ", ".join([text, *(name for name, on in flags.items() if on)])

    def number(self) -> int:
        """The constant KIND."""
        flags = self.yogi * FLAG_BITS["yogi"] | self.aligned * kernel._ALIGNED.value | self.rows * kernel._ROWS.value
        flags |= (not self.rows and not self.odd) * kernel._EVEN.value | self.low * kernel._LOW.value
        return kernel.kind_of(
            weight_type=_CODE[self.weight],
            grad_type=_CODE[self.grad],
            **{f"{key}_format": _CODE[getattr(self, key)] for key in ROUNDED},
            master_kind=[None, *MASTERS].index(self.master),
            flags=flags,
        )

    def bytes_moved(self, least: int = 1) -> int:
        """Bytes per element that a step reads and writes, without the scales of block formats.

        Args:
            least: leave out elements of fewer bytes: a thread's four codes of one byte are a word, not a vector.
        """
        sizes = [_SIZE[getattr(self, key)] for key in ROUNDED]
        moved = _SIZE[self.grad] + 2 * sum(size for size in sizes if size >= least)
        weight = _SIZE[self.weight]
        return moved + {None: 2 * weight, "fp32": weight + 8, "split": 2 * weight + 4}[self.master]


def kinds() -> list[Kind]:
    """Every format with every kind of weight, every option, and rows that lie otherwise."""
    weights: list[tuple[str, str | None]] = [
        ("fp32", None),
        ("bf16", None),
        ("bf16", "fp32"),
        ("bf16", "split"),
        ("fp16", "fp32"),
    ]
    found = [_alike(s, weight=w, grad=w, master=m) for s in FORMATS for w, m in weights]
    found += [_alike(s, aligned=False) for s in FORMATS]
    found += [_alike(s, odd=True, low=True) for s in FORMATS]
    found += [_alike(s, weight="bf16", grad="bf16", rows=True) for s in FORMATS]
    found += [_alike(s, m1="none") for s in FORMATS]
    found += [_alike(s, yogi=True, weight_ema=s) for s in FORMATS]
    found += [
        _alike("bf16", grad="bf16"),
        _alike("block16", grad="fp16"),
        _alike("bf16", weight="bf16", grad="fp32"),
        Kind(m1="block8", m2="block16", nu="bf16"),
        Kind("bf16", "fp16", "block8", "block16", "block8", "block8", "split", yogi=True),
    ]
    return found


def _alike(state: str, **others: Any) -> Kind:
    return Kind(**({"m1": state, "m2": state, "nu": state} | others))


@dataclass(frozen=True)
class Compiled:
    """What came out of the compiler for one GPU."""

    name: str
    sm: int
    ptx: str
    cubin_bytes: int
    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes a program

    def instructions(self) -> list[str]:
        return _INSTRUCTION.findall(self.ptx)

    def wide_bytes(self) -> float:
        """Bytes per element of vector loads and stores that no mask guards: those of a whole program of elements."""
        found = (int(n) * int(bits) // 8 for mask, n, bits in _MEMORY.findall(self.ptx) if not mask)
        return sum(found) / PER_THREAD


def compile_step(kind: Kind, sm: int) -> Compiled:
    """One launch over the rows of a kind. No GPU is needed."""
    return _compiled(
        str(kind), kernel._step_kernel, {"table": "*i64", "owners": "*i32"}, sm, KIND=kind.number(), BLOCK=kernel._BLOCK
    )


def compile_scalars(sm: int) -> Compiled:
    """The small launch before a captured step."""
    return _compiled(
        "scalars of a captured step", kernel._scalars_kernel, {"table": "*i64", "count": "i32"}, sm, BLOCK=64
    )


def _compiled(name: str, function: Any, signature: dict[str, str], sm: int, **constants: int) -> Compiled:
    if kernel._INTERPRETED:
        raise SystemExit("compile_kernels: unset TRITON_INTERPRET: the interpreter compiles nothing")
    names = function.arg_names
    pointers = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature.get(n, "").startswith("*")}
    source = ASTSource(
        function,
        {n: signature.get(n, "constexpr") for n in names},
        {(names.index(n),): value for n, value in constants.items()},
        pointers,
    )
    built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=kernel._OPTIONS)
    used = _resources(built.asm["cubin"])
    return Compiled(
        name,
        sm,
        built.asm["ptx"],
        len(built.asm["cubin"]),
        used["REG"],
        used["STACK"] + used["LOCAL"],
        built.metadata.shared,
    )


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def faults(found: Compiled, kind: Kind | None) -> Iterator[str]:
    """What is wrong with the code: another result than the reference's, or memory that is moved in small pieces.

    Args:
        kind: of a step; None for the scalars, whose doubles may be contracted and approximated on the way.
    """
    if found.spilled > _SPILL:
        yield f"{found.spilled} bytes of registers are spilled"
    if not kind:
        return
    names = found.instructions()
    if inexact := sorted({n for n in names if re.search(r"\.(ftz|approx|full)\b", n)}):
        yield f"inexact arithmetic: {', '.join(inexact)}"
    if any(n.startswith(("fma.", "mad.f", "mad.rn")) for n in names):
        yield "a contracted multiply-add"
    for operation in ("div.rn.f32", "sqrt.rn.f32"):
        if names.count(operation) < 2 * PER_THREAD:  # in whole programs and in the last one of a row
            yield f"fewer {operation} than elements"
    narrow = _NARROW.findall(found.ptx)
    if kind.aligned and narrow:
        yield f"{len(narrow)} loads and stores of less than 4 bytes"
    expected = kind.bytes_moved(least=2) if kind.aligned else 0
    if found.wide_bytes() != expected:
        yield f"wide loads and stores move {found.wide_bytes():g} bytes per element, the formats {expected}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="+", default=list(TARGETS))
    parser.add_argument("--only", default="", help="kinds whose name has this in it")
    parser.add_argument("--out", type=Path, help="a file for the table, beside the console")
    given = parser.parse_args(arguments)
    columns = " | ".join(f"sm_{sm}: registers, shared bytes" for sm in given.sm)
    lines = [
        f"| weights, state | {columns} | spilled | bytes, wide |",
        f"|---|{'--:|' * (len(given.sm) + 2)}",
    ]
    wrong = 0
    for kind in [*(k for k in kinds() if given.only in str(k)), *([] if given.only else [None])]:
        built = [compile_step(kind, sm) if kind else compile_scalars(sm) for sm in given.sm]
        for found in built:
            for fault in faults(found, kind):
                print(f"FAIL {found.name}, sm_{found.sm}: {fault}", file=sys.stderr, flush=True)
                wrong = 1
        each = " | ".join(f"{b.registers}, {b.shared}" for b in built)
        wide = f"{kind.bytes_moved()}, {built[0].wide_bytes():g}" if kind else ""
        lines.append(f"| {built[0].name} | {each} | {max(b.spilled for b in built)} | {wide} |")
        print(lines[-1], flush=True)
    if given.out:
        given.out.write_text("\n".join(lines) + "\n")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
