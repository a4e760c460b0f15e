"""What this machine and its packages offer a run: whether one can start, and what would make it faster."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from shardopt import AdEMAMix, __version__
from shardopt.checkpoint.blocks import checksum
from shardopt.engines.zero.transports import shared_memory
from shardopt.errors import InputError
from shardopt.optim.kernels.bytes_alone import bytes_alone
from shardopt.optim.kernels.cpu import Compiler, shipped
from shardopt.pretrain import versions
from shardopt.pretrain.cores import usable_cores

_ELEMENTS = 1 << 22  # of the step that is timed: far more than a cache holds, and a few milliseconds
_TURNS, _TURNS_SECONDS = 5, 0.8  # at least, and for how long: on a busy machine one of many has both cores to itself
_CHECKSUM_BYTES = 1 << 25
_LITTLE_DISK = 5 * 2**30
_FEW_FILES = 1024
_NEEDED = "pretrain"  # the extra without which no run starts
_FOR_DEVELOPERS = {"dev", "test"}


class Finding(NamedTuple):
    """One thing looked at.

    Attributes:
        name: of the thing.
        verdict: "ok"; "note": a run starts, with less; "fail": no run starts.
        text: what was found.
        remedy: a command or a change that helps; empty where nothing is to be done.
        figures: of `text`, by name; bytes and seconds.
    """

    name: str
    verdict: Literal["ok", "note", "fail"]
    text: str
    remedy: str = ""
    figures: dict[str, Any] = {}  # noqa: RUF012  nobody changes it


def examine(folder: Path) -> list[Finding]:
    """All findings, in the order in which they are read. Takes a few seconds; `folder` is where runs would be kept."""
    looks: list[Callable[[], Iterator[Finding]]] = [
        _versions, _extras, _compiler, _kernel, _processes, _transport, _gpus, lambda: _disk(folder),
    ]  # fmt: skip
    return [finding for look in looks for finding in look()]


def can_start(findings: list[Finding]) -> bool:
    return all(finding.verdict != "fail" for finding in findings)


def _versions() -> Iterator[Finding]:
    text = f"{platform.python_version()}, {platform.system()} on {platform.machine()}"
    yield Finding("python", "ok", text, figures={"version": platform.python_version()})
    refused = [package for package in versions.declared() if package.extra == versions.ALWAYS and package.refused]
    text = "; ".join([__version__, *map(str, refused)])
    remedy = "pip install shardopt" if refused else ""
    yield Finding("shardopt", "fail" if refused else "ok", text, remedy, {"version": __version__})
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield Finding("torch", "ok", f"{torch.__version__}, {built}", figures={"version": str(torch.__version__)})


def _extras() -> Iterator[Finding]:
    """The packages of each extra that shardopt declares."""
    extras: dict[str, list[versions.Package]] = {}
    for package in versions.declared():
        if package.extra not in (versions.ALWAYS, *_FOR_DEVELOPERS):
            extras.setdefault(package.extra, []).append(package)
    if not extras:
        yield Finding("extras", "note", "shardopt itself is not installed", "pip install -e '.[pretrain]'")
    for extra, packages in extras.items():
        missing = [package.name for package in packages if package.installed is None]
        refused = [str(package) for package in packages if package.refused]
        there = [str(package) for package in packages if package.installed is not None and not package.refused]
        wrong = bool(missing or refused)
        verdict: Literal["ok", "note", "fail"] = "ok" if not wrong else "fail" if extra == _NEEDED else "note"
        told = {"missing: ": missing, "too old: ": refused, "": there}
        text = "; ".join(what + ", ".join(names) for what, names in told.items() if names)
        remedy = f"pip install 'shardopt[{extra}]'" if wrong else ""
        yield Finding(extra, verdict, text, remedy, {"packages": {one.name: one.installed for one in packages}})


def _compiler() -> Iterator[Finding]:
    try:
        compiler = Compiler()
    except InputError as error:
        remedy = "" if shipped() else "apt install gcc, or a wheel of shardopt, which has the kernel built"
        yield Finding("compiler", "note", str(error), remedy)
    else:
        first = compiler.version.splitlines()[0]
        yield Finding("compiler", "ok", f"{compiler.name}: {first}", figures={"path": compiler.name, "version": first})


def _kernel() -> Iterator[Finding]:
    """The CPU kernel, and the time of its step by what a loop takes that only moves the same bytes."""
    param = torch.nn.Parameter(torch.ones(_ELEMENTS))
    param.grad = torch.full_like(param, 1e-3)
    optimizer = AdEMAMix([("weight", param)], weight_decay=0.1)
    kernel, threads = optimizer.kernel, torch.get_num_threads()
    optimizer.init_state()
    changed = [param, *(optimizer.state[param][key] for key in ("m1", "m2", "nu"))]
    moved = param.grad.nbytes + 2 * sum(tensor.nbytes for tensor in changed)
    calls: list[Callable[[], object]] = [optimizer.step]
    try:
        calls.append(bytes_alone(param.grad.element_size(), [t.element_size() for t in changed])(_ELEMENTS))
    except InputError as error:
        compared = f"not compared with its bytes alone: {error}"
    for call in calls:  # touches all memory
        call()
    turns: list[list[float]] = []
    began = time.perf_counter()
    while len(turns) < _TURNS or time.perf_counter() - began < _TURNS_SECONDS:
        turns.append([_seconds(call) for call in calls])  # in turn: whoever else is here slows both
    step, *alone = (min(of) for of in zip(*turns, strict=True))
    figures: dict[str, Any] = {"kernel": kernel, "threads": threads, "bytes_per_second": moved / step}
    if alone:
        figures["of_bytes_alone"] = step / alone[0]
        compared = f"{step / alone[0]:.2f} of what its bytes alone take"
    text = f"{kernel}, on {threads} thread{'s' if threads > 1 else ''}: {moved / step / 1e9:.1f} GB/s, {compared}"
    fast = kernel == "c"
    yield Finding("kernel", "ok" if fast else "note", text, "" if fast else "a C compiler (see above)", figures)


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _processes() -> Iterator[Finding]:
    cores = usable_cores()
    files, processes = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
    unlimited = resource.RLIM_INFINITY
    most = "any number of" if processes == unlimited else f"{processes:,}"
    text = f"{cores} cores; at most {most} processes and {files:,} open files"
    few = files != unlimited and files < _FEW_FILES
    figures = {"cores": cores, "processes": None if processes == unlimited else processes, "open_files": files}
    yield Finding("limits", "note" if few else "ok", text, f"ulimit -n {_FEW_FILES}" if few else "", figures)


def _transport() -> Iterator[Finding]:
    if not (dist.is_available() and dist.is_gloo_available()):
        yield Finding("gloo", "fail", "this torch has no gloo, by which ranks agree", "another build of torch")
        return
    reason = shared_memory.refusal()
    if reason is None:
        yield Finding("transport", "ok", "memory: CPU ranks read each other's", figures={"transport": "memory"})
    else:
        remedy = "sysctl kernel.yama.ptrace_scope=0" if "yama" in reason else ""
        yield Finding("transport", "note", f"sockets: {reason}", remedy, {"transport": "sockets"})


def _gpus() -> Iterator[Finding]:
    count = torch.cuda.device_count()
    if not count:
        why = "torch sees none" if torch.version.cuda else "this torch is built without CUDA"
        yield Finding("GPU", "note", f"none: {why}; runs are on the CPU", figures={"gpus": []})
        return
    found = [torch.cuda.get_device_properties(number) for number in range(count)]
    names = ", ".join(f"{each.name}, {each.total_memory / 2**30:.1f} GiB" for each in found)
    yield Finding("GPU", "ok", f"{count}: {names}", figures={"gpus": [each.name for each in found]})
    if dist.is_nccl_available():
        version = ".".join(map(str, torch.cuda.nccl.version()))
        yield Finding("NCCL", "ok", version, figures={"version": version})
    else:
        yield Finding("NCCL", "fail", "this torch has none, which ranks on GPUs need", "a build of torch with NCCL")


def _disk(folder: Path) -> Iterator[Finding]:
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        yield Finding("disk", "fail", f"{there} cannot be written to", "run.dir=FOLDER of your own")
        return
    free = shutil.disk_usage(there).free
    block = bytes(_CHECKSUM_BYTES)
    rate = _CHECKSUM_BYTES / _seconds(lambda: checksum(block))
    text = f"{free / 2**30:,.1f} GiB free in {there}; checksums at {rate / 1e9:.1f} GB/s"
    little = free < _LITTLE_DISK
    remedy = "checkpoint.dir=FOLDER elsewhere" if little else ""
    figures = {"folder": str(there), "free_bytes": free, "checksum_bytes_per_second": rate}
    yield Finding("disk", "note" if little else "ok", text, remedy, figures)
