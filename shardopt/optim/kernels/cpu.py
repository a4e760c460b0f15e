"""The CPU kernel: cpu.c, built once for this machine into the user's own cache folder, called through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shardopt.errors import InputError
from shardopt.optim.kernels import SEGMENT, TYPES, Table

_SOURCE = Path(__file__).with_name("cpu.c")
# No contraction (see cpu.c); errno and traps only stand in the vectoriser's way and change no result.
_FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# Tried in this order: not every compiler knows -march=native (arm64 clang) or has OpenMP (Apple's).
_VARIANTS = [["-march=native", "-fopenmp"], ["-mcpu=native", "-fopenmp"], ["-march=native"], ["-fopenmp"], []]
_CHUNK = 1 << 15  # elements a thread takes at a time; a multiple of precision.BLOCK


class CpuKernel:
    """Raises InputError where there is no C compiler or no safe cache folder; the message says which."""

    name = "c"

    def __init__(self) -> None:
        library = ctypes.CDLL(str(build()))
        library.shardopt_segment_size.restype = ctypes.c_int64
        if library.shardopt_segment_size() != SEGMENT.itemsize:
            raise RuntimeError("cpu.c and kernels.SEGMENT disagree on the size of a segment")
        self._step = library.shardopt_step
        self._step.restype = None
        self._step.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]

    def refusal(self, weight: Tensor) -> str | None:
        if weight.device.type != "cpu":
            return f"the C kernel is for the CPU, the parameter is on {weight.device}"
        if TYPES.get(weight.dtype) not in (1, 2, 5):
            return f"the C kernel takes fp32, bf16 and fp16 weights, not {weight.dtype}"
        return None

    def run(self, table: Table) -> None:
        ends = table.cache.get("c_ends")
        if ends is None:
            ends = table.cache["c_ends"] = np.cumsum(-(-table.rows["length"] // _CHUNK)).astype(np.int64)
        if len(ends):
            threads = min(torch.get_num_threads(), int(ends[-1]))
            self._step(table.rows.ctypes.data, ends.ctypes.data, len(ends), _CHUNK, threads)


def cache_folder() -> Path:
    """The user's own folder for built kernels, made if need be.

    Raises:
        InputError: it belongs to, or can be written by, somebody else: what lies there is not to be loaded.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(root) if root else Path.home() / ".cache") / "shardopt"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as e:
        raise InputError(f"cannot make the cache folder {folder} ({e.strerror}): set XDG_CACHE_HOME") from e
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise InputError(f"{folder} is not a folder of this user: set XDG_CACHE_HOME to one of your own")
    if status.st_mode & 0o022:
        raise InputError(f"other users can write to {folder}: run chmod go-w on it, or set XDG_CACHE_HOME")
    return folder


def build() -> Path:
    """The shared library for this source, compiler and CPU; compiled (about a second) where it is not cached.

    Raises:
        InputError: no C compiler, it failed, or the cache folder is not safe.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise InputError("no C compiler found (cc, gcc or clang; CC names another)")
    command = compiler.split()
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as e:
        raise InputError(f"the C compiler {compiler!r} does not run: {e}") from e
    source = _SOURCE.read_bytes()
    parts = [source, version.encode(), repr((_FLAGS, _VARIANTS)).encode(), _processor().encode()]
    key = hashlib.blake2b(b"\0".join(parts), digest_size=12).hexdigest()
    folder = cache_folder()
    target = folder / f"cpu-{key}.so"
    if target.exists():
        status = target.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise InputError(f"{target} is not a file that only this user can write: remove it")
        return target
    # Built aside and renamed: several ranks may build at once, and each sees a whole file or none.
    handle, aside = tempfile.mkstemp(prefix=f"cpu-{key}-", suffix=".tmp", dir=folder)
    os.close(handle)
    try:
        for variant in _VARIANTS:
            done = subprocess.run(
                [*command, *_FLAGS, *variant, str(_SOURCE), "-o", aside, "-lm"], capture_output=True, text=True
            )
            if done.returncode == 0:
                Path(aside).chmod(0o700)
                Path(aside).rename(target)
                return target
        raise InputError(f"the C compiler {compiler!r} cannot build the kernel: {done.stderr.strip()[-500:]}")
    finally:
        Path(aside).unlink(missing_ok=True)


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines of different kinds."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part", "CPU implementer")
    first = info.read_text().split("\n\n")[0].splitlines()
    lines = [line for line in first if line.split(":")[0].strip() in wanted]
    return platform.machine() + "".join(lines)
