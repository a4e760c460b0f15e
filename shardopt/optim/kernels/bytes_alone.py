"""A loop that only moves bytes: what the memory of this machine allows a step of so many bytes."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shardopt.errors import InputError
from shardopt.optim.kernels.cpu import Compiler

_TYPES = {1: "uint8_t", 2: "uint16_t", 4: "uint32_t"}


def _call(function: Any, count: ctypes.c_long, pointers: Sequence[ctypes.c_void_p], alive: object) -> None:
    function(count, *pointers)


def bytes_alone(read: int, changed: Sequence[int]) -> Callable[[int], Callable[[], object]]:
    """A loop on the CPU that reads elements of `read` bytes and adds them to arrays of elements of `changed` bytes.

    Returns:
        A function that makes the arrays, of so many elements, and returns the loop over them.

    Raises:
        InputError: no C compiler, or it failed.
    """
    arrays = ", ".join(f"{_TYPES[size]} *restrict a{i}" for i, size in enumerate(changed))
    adds = " ".join(f"a{i}[i] += ({_TYPES[size]})x;" for i, size in enumerate(changed))
    source = f"""#include <stdint.h>
    void stream(long n, const {_TYPES[read]} *restrict g, {arrays}) {{
    #pragma omp parallel for schedule(dynamic, 1)
        for (long from = 0; from < n; from += 32768) {{
            const long to = from + 32768 < n ? from + 32768 : n;
    #pragma GCC ivdep
            for (long i = from; i < to; i++) {{ const {_TYPES[read]} x = g[i]; {adds} }}
        }}
    }}"""
    with tempfile.TemporaryDirectory(prefix="shardopt-") as folder:
        library = Path(folder) / "stream.so"
        options = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        compiler = Compiler()
        done = subprocess.run([*compiler.command, *options], input=source, text=True, capture_output=True)
        if done.returncode:
            raise InputError(f"the C compiler {compiler.name!r} cannot build a loop: {done.stderr.strip()[-500:]}")
        function = ctypes.CDLL(str(library)).stream

    def build(count: int) -> Callable[[], object]:
        held = [torch.zeros(count * size, dtype=torch.uint8) for size in (read, *changed)]
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in held]
        return partial(_call, function, ctypes.c_long(count), pointers, held)

    return build
