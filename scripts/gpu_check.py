"""Everything that only a GPU can show, by one command, within ten minutes, as a page for docs/.

    PYTHONPATH=. python scripts/gpu_check.py --out docs/gpu.md       # all of it
    PYTHONPATH=. python scripts/gpu_check.py bits graphs             # some cases, on the console alone
    PYTHONPATH=. python scripts/gpu_check.py --unmeasured --out docs/gpu.md      # the page of a machine without a GPU

Each case runs in a process of its own, so that a fault on the device, or a hang, costs that case alone. It is ended at
its limit, and the rows that it had by then stay; all together they take at most `--minutes`, and the page says what was
left out for want of time. Cases that measure run one after another; the others, before them, all at once. The page is
written anew as each of them ends. The exit status is 1 where a check failed or there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a machine that is lent for a check has the sources only

import torch  # noqa: E402

Row = tuple[str, bool | None, str]  # what, whether it holds (None: it was not run), in what figures
SAME = "the same bits"


@dataclass(frozen=True)
class Case:
    """
    Args:
        name: as tests/gpu_cover.yaml and the command line have it.
        limit: seconds.
        where: module and function in scripts/, which yields rows.
        shows: in words, for the page.
        measures: times that other work on the GPU would change.
    """

    name: str
    limit: int
    where: str
    shows: str
    measures: bool = False


CASES = [
    Case("bits", 180, "gpu_kernels:bits", "kernel and torch path have the bits of the CPU, in every format and option"),
    Case("graphs", 60, "gpu_kernels:graphs", "replay N of a captured step is eager step N"),
    Case("large", 60, "gpu_kernels:large", "a tensor of over 2^31 elements ends as that end alone does (30 GB free)"),
    Case("zero", 80, "gpu_zero:zero", "our ZeRO over NCCL on all GPUs: numbers, waits, peak memory, gradient hooks"),
    Case("parts", 50, "gpu_parts:parts", "batches copied ahead, a save's copy, clocks, random numbers, devices' names"),
    Case("engines", 200, "gpu_parts:engines", "a small run, saved and resumed, on every engine, one rank per GPU"),
    Case(
        "speed",
        90,
        "gpu_kernels:speed",
        "a step beside torch's AdamW and bitsandbytes' AdEMAMix; GB/s against a copy",
        measures=True,
    ),
    Case(
        "tune", 60, "gpu_kernels:tune", "the kernel with other block sizes and numbers of warps, in ms", measures=True
    ),
    Case(
        "train",
        240,
        "gpu_train:train",
        "a Llama of 98M parameters trained with AdamW and AdEMAMix: what a step costs",
        measures=True,
    ),
]


@dataclass
class Result:
    """A case and its rows; `seconds` is None where it was not begun."""

    case: Case
    rows: list[Row] = field(default_factory=list)
    seconds: float | None = None


def check(
    cases: Sequence[Case],
    minutes: float,
    run: Callable[[Case, float], Iterator[Row]] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Result]:
    """Run the cases within `minutes` together: those that do not measure all at once, then the others in their order.

    Args:
        run: a case and its seconds to its rows; by default in a process of its own.
    """
    end = clock() + 60 * minutes

    def result(case: Case) -> Result:
        began = clock()
        left = min(end - began, case.limit)
        if left < min(10, case.limit):
            return Result(case, [(case.name, None, "no time was left")])
        rows = list((run or in_process)(case, left))
        return Result(case, rows, clock() - began)

    at_once = [case for case in cases if not case.measures]
    with ThreadPoolExecutor(max(1, len(at_once))) as pool:
        yield from pool.map(result, at_once)
    yield from map(result, (case for case in cases if case.measures))


def in_process(case: Case, seconds: float) -> Iterator[Row]:
    """The rows of a case, from a process that is ended after so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows")
        command = [sys.executable, __file__, "--case", case.name, "--rows", str(file)]
        # a session of its own: the processes that it has started end with it
        child = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            status: int | None = child.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(child.pid, 9)
            child.wait()
        for line in file.read_text().splitlines() if file.exists() else []:
            what, ok, figures = json.loads(line)
            yield what, ok, figures
    if status is None:
        within = seconds < case.limit
        yield case.name, None if within else False, f"ended after {seconds:.0f} s{', as time ran out' * within}"
    elif status:
        yield case.name, False, f"its process ended with {status}: see its output"


def run_case(name: str, file: Path) -> int:
    """In the process of a case: write a line to `file` for each of its rows."""
    module, function = next(case.where for case in CASES if case.name == name).split(":")
    with file.open("w") as rows:
        for row in getattr(importlib.import_module(module), function)():
            print(json.dumps(row), file=rows, flush=True)
    return 0


# -- the page -----------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# On a GPU

Without a GPU the tests go as far as they can. The Triton kernel runs in Triton's interpreter, bit for bit against the
torch path, and every kind of it compiles for sm_80, sm_90 and sm_100: no contracted or approximate arithmetic, and the
bytes of each format in wide loads and stores (`PYTHONPATH=. python scripts/compile_kernels.py`; registers are in
[the optimizer's page](optimizer.md#what-the-compiler-makes-of-the-gpus-kernel)). Code that uses streams and events runs
on a stand-in that records their order and finds races (`tests/fake_cuda.py`), captured steps on one that refuses what a
CUDA graph may not hold. `tests/gpu_cover.yaml` names, for each place in the code that asks for a GPU, the test or the
case below that covers it; a place that is not in it fails the tests.

The rest is `PYTHONPATH=. python scripts/gpu_check.py --out docs/gpu.md`, which takes at most ten minutes and writes
this page. Cases that do not measure run at once, so that seconds add up to more than it took.
"""


def page(results: Sequence[Result], machine: str, seconds: float) -> str:
    """The page as Markdown; results of cases that were not begun have no seconds, those not asked for are not there."""
    text = [INTRODUCTION]
    if not results:
        text.append("**Nothing below has been measured yet**: there was no GPU where this was made.\n")
    else:
        rows = [row for result in results for row in result.rows]
        failed = sum(row[1] is False for row in rows)
        text.append(
            f"Made on {machine}, in {seconds:.0f} s: {sum(row[1] is True for row in rows)} checks hold, {failed} fail, "
            f"{sum(row[1] is None for row in rows)} were not run.\n"
        )
    asked = {result.case.name for result in results}
    results = [*results, *(Result(case) for case in CASES if case.name not in asked)]
    text.append("| case | what it shows | result | s |\n|---|---|---|--:|")
    for result in results:
        took = "" if result.seconds is None else f"{result.seconds:.0f}"
        text.append(f"| {result.case.name} | {_cell(result.case.shows)} | {verdict(result)} | {took} |")
    for result in results:
        if result.rows:
            text += [f"\n## {result.case.name}\n", "| | | |\n|---|---|---|"]
            text += [f"| {_cell(what)} | {_WORD[ok]} | {_cell(figures)} |" for what, ok, figures in folded(result.rows)]
    return "\n".join(text) + "\n"


_WORD = {True: "ok", False: "**FAIL**", None: "not run"}


def verdict(result: Result) -> str:
    """ok, FAIL or not run: the worst of a case's rows."""
    states = [ok for _, ok, _ in result.rows]
    return _WORD[False if False in states else True if True in states and None not in states else None]


def folded(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows, with those that only say that bits are the same in one."""
    same = [row for row in rows if row[1] and row[2] == SAME]
    if same:
        yield f"{len(same)} combinations of formats and options", True, SAME
    yield from (row for row in rows if row not in same)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def machine() -> str:
    """The GPUs and the versions, in words."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = [
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "triton", "bitsandbytes", "transformers", "deepspeed")
        if importlib.util.find_spec(name)
    ]
    gpus = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return f"{gpus} (CUDA {torch.version.cuda}, {', '.join(versions)})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"some of {', '.join(c.name for c in CASES)}; all by default")
    parser.add_argument("--minutes", type=float, default=10.0, help="of all cases together (default 10)")
    parser.add_argument("--out", type=Path, help="the page to write")
    parser.add_argument("--unmeasured", action="store_true", help="run nothing: the page says so")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.case:
        return run_case(given.case, given.rows)
    if unknown := sorted(set(given.cases) - {case.name for case in CASES}):
        parser.error(f"no case is called {unknown[0]!r}; there are {', '.join(c.name for c in CASES)}")
    if given.unmeasured:
        text, status = page([], "", 0.0), 0
    elif not torch.cuda.is_available():
        print("gpu_check: there is no CUDA device here, so nothing was checked", file=sys.stderr)
        return 1
    else:
        text, status = measured(
            [c for c in CASES if not given.cases or c.name in given.cases], given.minutes, given.out
        )
    if given.out:
        given.out.write_text(text)
    else:
        print(text)
    return status


def measured(cases: Sequence[Case], minutes: float, out: Path | None) -> tuple[str, int]:
    """The page, and the exit status; the page of what has been measured so far is in `out` all the while."""
    began, results = time.monotonic(), []
    for result in check(cases, minutes):
        results.append(result)
        took = f" ({result.seconds:.0f} s)" if result.seconds is not None else ""
        print(f"{result.case.name}: {verdict(result)}{took}", flush=True)
        for what, ok, figures in folded(result.rows):
            print(f"  {'ok  ' if ok else '--  ' if ok is None else 'FAIL'} {what:50} {figures}", flush=True)
        if out:
            out.write_text(page(results, machine(), time.monotonic() - began))
    failed = any(ok is False for result in results for _, ok, _ in result.rows)
    return page(results, machine(), time.monotonic() - began), int(failed)


if __name__ == "__main__":
    sys.exit(main())
