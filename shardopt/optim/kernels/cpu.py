"""The CPU kernel: cpu.c, called through ctypes.

A wheel has it compiled, for a few levels of processor. Elsewhere it is built once for this machine, into the user's own
cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shardopt.errors import InputError
from shardopt.optim.kernels import Kernel, Table
from shardopt.optim.schema import TYPES, c_header

_SOURCE = Path(__file__).with_name("cpu.c")
# No contraction (see cpu.c); errno and traps only stand in the vectoriser's way and change no result.
_FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# Tried in this order: not every compiler knows -march=native (arm64 clang) or has OpenMP (Apple's).
_VARIANTS = [["-march=native", "-fopenmp"], ["-mcpu=native", "-fopenmp"], ["-march=native"], ["-fopenmp"], []]
# By platform.machine(), and by torch's word for what the processor can do, the -march that wheels have a library for.
# The bits are the same in all of them.
_LEVELS = {
    "x86_64": {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3", "DEFAULT": "x86-64"},
    "aarch64": {"DEFAULT": "armv8-a"},
}
_PACKAGE = Path(__file__).parents[2]
_SHIPPED = Path(__file__).with_name("shipped")
_DIGEST = 16  # bytes behind the library, by which a damaged one is known: loading a cut file may crash
_CHUNK = 1 << 15  # elements a thread takes at a time; a multiple of precision.BLOCK
_ROW = 128  # elements in the time of which a row is begun
_WORTH_A_THREAD = 1 << 17  # elements, some 0.1 ms: to wake a thread and wait for it may take half as long


class CpuKernel(Kernel):
    """Raises InputError where there is no C compiler; the message says so."""

    name = "c"
    takes_strides = True
    takes_addresses = True

    def __init__(self) -> None:
        library, (pointer, number) = _load(), (ctypes.c_void_p, ctypes.c_int64)
        self._step = library.shardopt_step
        self._step.restype = None
        self._step.argtypes = [pointer, pointer, number, number, ctypes.c_int]
        # facts.py asks by these; torch's and Python's answers may take Python, so the interpreter stays locked
        self.describe, self.holds, self.lists, self.put = (
            ctypes.PYFUNCTYPE(number, pointer, *takes)((f"shardopt_{name}", library))
            for name, takes in {
                "describe": (pointer, number, number, pointer, pointer),
                "holds": (pointer, pointer, number, pointer),
                "lists": (pointer, pointer, number, pointer),
                "put": (pointer, pointer, number, pointer, pointer),
            }.items()
        )

    def refusal(self, weight: Tensor) -> str | None:
        if weight.device.type != "cpu":
            return f"the C kernel is for the CPU, the parameter is on {weight.device}"
        if TYPES.get(weight.dtype) not in (1, 2, 5):
            return f"the C kernel takes fp32, bf16 and fp16 weights, not {weight.dtype}"
        return None

    def run(self, table: Table) -> None:
        call = table.cache.get("c_call")
        if call is None:  # numpy takes longer to give an address than to add up a row
            ends = np.cumsum(-(-table.rows["length"] // _CHUNK)).astype(np.int64)
            chunks = int(ends[-1]) if len(ends) else 0
            worth = min(chunks, 1 + int((table.rows["length"] + _ROW).sum()) // _WORTH_A_THREAD)
            call = table.cache["c_call"] = (table.rows.ctypes.data, ends.ctypes.data, len(ends), worth, ends)
        rows, ends_at, count, worth, _ = call
        if worth:
            self._step(rows, ends_at, count, _CHUNK, 1 if worth == 1 else min(torch.get_num_threads(), worth))


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


def _load() -> ctypes.CDLL:
    """The library: the package's own if it has one and CC names no compiler that runs; else from the cache folder or,
    with a warning, from one that is built for this process alone.

    Raises:
        InputError: no C compiler, or it failed.
    """
    unusable, own = "", shipped()
    if own is not None and not _is_named():
        try:
            return ctypes.CDLL(str(own))
        except OSError as e:  # such as another C library than that of the wheel
            unusable = f"; nor can the package's own library be loaded: {e}"
    try:
        compiler = Compiler()
    except InputError as e:
        raise InputError(f"{e}{unusable}") from e
    try:
        return ctypes.CDLL(str(build(compiler)))
    except (InputError, OSError) as e:  # an OSError of the linker: damaged, or on a file system without execution
        reason = e
    with tempfile.TemporaryDirectory(prefix="shardopt-") as folder:  # only this user can look into
        library = Path(folder) / "cpu.so"
        compiler.run(library)
        try:
            loaded = ctypes.CDLL(str(library))  # stays mapped when the file is gone
        except OSError as e:
            raise InputError(f"{reason}; nor can the library be loaded from {folder}: {e}") from e
    warnings.warn(f"shardopt's C kernel is built anew for every process: {reason}", stacklevel=2)
    return loaded


def _is_named() -> bool:
    """Whether CC names a compiler, with a warning where that one does not run."""
    try:
        return bool(os.environ.get("CC")) and bool(Compiler())
    except InputError as e:
        warnings.warn(f"CC: {e}; the kernel that came with the package is taken", stacklevel=3)
        return False


class Compiler:
    """The C compiler of this machine, for cpu.c behind its header.

    Attributes:
        name, version: as it was found (a path, or what CC says), and what it says of itself.
        command: `name`, split.
        key: of the library that it makes here.

    Raises:
        InputError: there is none, or it does not run.
    """

    def __init__(self) -> None:
        found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if not found:
            raise InputError("no C compiler found (cc, gcc or clang; CC names another)")
        self.name, self.command = found, shlex.split(found)
        try:
            shown = subprocess.run([*self.command, "--version"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as e:
            raise InputError(f"the C compiler {found!r} does not run: {e}") from e
        self.version = shown.stdout
        self.key = _hash(_source(), self.version, repr((self.command, _FLAGS, _VARIANTS)), _processor())

    def run(self, library: Path, variants: Sequence[Sequence[str]] = _VARIANTS) -> None:
        """Compile (a few seconds), with the first of the `variants` of flags that the compiler knows.

        Raises:
            InputError: the compiler failed.
        """
        for variant in variants:
            command = [*self.command, *_FLAGS, *variant, "-x", "c", "-", "-o", str(library), "-lm"]
            done = subprocess.run(command, input=_source(), capture_output=True, text=True)
            if done.returncode == 0:
                return
        raise InputError(f"the C compiler {self.name!r} cannot build the kernel: {done.stderr.strip()[-500:]}")


def _source() -> str:
    return f'{c_header()}#line 1 "{_SOURCE.name}"\n{_SOURCE.read_text()}'


def _hash(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


def shipped() -> Path | None:
    """The library that the package came with, for this processor and this very source; None where there is none."""
    levels = _LEVELS.get(platform.machine(), {})
    level = levels.get(torch.backends.cpu.get_cpu_capability(), levels.get("DEFAULT"))
    library = _SHIPPED / f"{level}-{_hash(_source())}.so"
    return library if library.exists() else None


def ship(package: Path) -> list[Path]:
    """Compile the libraries of a wheel, for all levels of this kind of machine, into the package at `package`.

    Raises:
        InputError: no C compiler, it failed, or wheels have no library for this kind of machine.
    """
    if platform.machine() not in _LEVELS:
        raise InputError(f"wheels have no library for {platform.machine()}, only for {', '.join(_LEVELS)}")
    compiler, folder = Compiler(), package / _SHIPPED.relative_to(_PACKAGE)
    folder.mkdir()
    libraries = [folder / f"{level}-{_hash(_source())}.so" for level in _LEVELS[platform.machine()].values()]
    for library in libraries:
        compiler.run(library, [[f"-march={library.name.rpartition('-')[0]}", "-fopenmp", "-s"]])
    return libraries


def build(compiler: Compiler | None = None) -> Path:
    """The cached library for this source, compiler and CPU; compiled where it is not there yet.

    A library that is there is never replaced: over NFS that would pull it from under a machine that has it mapped.

    Raises:
        InputError: no C compiler, it failed, the cache folder cannot be used, or the library there is damaged.
    """
    compiler = Compiler() if compiler is None else compiler
    folder = cache_folder()
    target = folder / f"cpu-{compiler.key}.so"
    if not target.exists():
        try:
            # Built aside and linked: several ranks may build at once, and each sees a whole file or none.
            handle, name = tempfile.mkstemp(prefix=f"cpu-{compiler.key}-", suffix=".tmp", dir=folder)
        except OSError as e:
            raise InputError(f"cannot write to the cache folder {folder} ({e.strerror}): set XDG_CACHE_HOME") from e
        os.close(handle)
        aside = Path(name)
        try:
            compiler.run(aside)
            code = aside.read_bytes()
            aside.write_bytes(code + hashlib.blake2b(code, digest_size=_DIGEST).digest())
            aside.chmod(0o700)
            with suppress(FileExistsError):
                os.link(aside, target)
        except OSError as e:
            raise InputError(f"cannot write to the cache folder {folder} ({e.strerror}): set XDG_CACHE_HOME") from e
        finally:
            aside.unlink(missing_ok=True)
    status = target.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise InputError(f"{target} is not a file that only this user can write: remove it")
    code = target.read_bytes()
    if hashlib.blake2b(code[:-_DIGEST], digest_size=_DIGEST).digest() != code[-_DIGEST:]:
        raise InputError(f"{target} is damaged: remove it")
    return target


def _processor() -> str:
    """The facts that -march=native depends on: a home folder may be shared by machines of different kinds."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part", "CPU implementer")
    first = info.read_text().split("\n\n")[0].splitlines()
    lines = [line for line in first if line.split(":")[0].strip() in wanted]
    return platform.machine() + "".join(lines)
