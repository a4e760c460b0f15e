"""Plant one fault at a time in a copy of the tree and see whether the tests notice.

    python scripts/plant_faults.py              # every fault of scripts/faults.yaml
    python scripts/plant_faults.py -k schedule  # those whose file or name holds the word
    python scripts/plant_faults.py --every 20   # a sample: each twentieth, in the list's order

faults.yaml is a list of groups: a file, the tests that should notice (paths and -k expressions, as pytest takes
them), and the faults in it. A fault is a name, the exact text that is there once, and what stands there instead; it
may have a file and tests of its own.

    - file: shardopt/pretrain/schedule.py
      tests: tests/pretrain/test_config.py -k schedule
      faults:
        - {name: warm-up starts at zero, old: return step / config.warmup, new: return (step - 1) / config.warmup}

The tests of a group run without a fault first. A fault is caught when a test fails, crashes or does not end; it is
stale when its text has changed. The last line counts caught, missed and stale faults, and those whose tests did not
run; the status is 1 unless all are caught.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
SECONDS = 300  # that tests may take without a fault; with one, a minute more than twice what they took
# A server that has imported what is large, so that a fault costs its tests and not their imports.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pytest", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama"])


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    old: str
    new: str
    tests: str


def read_faults(path: Path, word: str) -> list[Fault]:
    groups = yaml.safe_load(path.read_text())
    faults = [
        Fault(
            given["name"],
            given.get("file", group["file"]),
            given["old"],
            given["new"],
            given.get("tests", group["tests"]),
        )
        for group in groups
        for given in group["faults"]
    ]
    return [fault for fault in faults if word in fault.file or word in fault.name]


def copy_tree(target: Path) -> None:
    """Copy what git tracks or would track, as it lies in the working tree."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.check_output(command, text=True).split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def _pytest(tree: Path, tests: str, log: Path) -> None:
    """In a process of its own: run `tests` in `tree`, with everything that is printed into `log`."""
    os.setsid()  # so that it ends with all that it has started
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import pytest

    status = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *shlex.split(tests)])
    os._exit(status)  # multiprocessing would wait for rank processes that nobody ends any more


def run_tests(tree: Path, tests: str, seconds: float) -> str:
    """`passed`, `failed` (or crashed, or did not end), or the last words where no test was run."""
    log = tree / "planted.log"
    process = _context.Process(target=_pytest, args=(tree, tests, log))
    process.start()
    process.join(seconds)
    ended = process.exitcode
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    if ended is None or ended in (0, 1) or ended < 0:  # did not end, or crashed
        return "passed" if ended == 0 else "failed"
    return log.read_text(errors="replace").strip()[-300:]


def judge(tree: Path, fault: Fault, seconds: float) -> str:
    """`caught`, `missed`, or why the fault could not be tried."""
    path = tree / fault.file
    whole = path.read_text()
    if (count := whole.count(fault.old)) != 1:
        return f"stale: its text stands {count} times in {fault.file}"
    planted = whole.replace(fault.old, fault.new)
    if path.suffix == ".py":
        try:
            ast.parse(planted)
        except SyntaxError as error:  # which every test would notice
            return f"stale: with it {fault.file} is no Python: {error}"
    path.write_text(planted)
    try:
        outcome = run_tests(tree, fault.tests, seconds)
    finally:
        path.write_text(whole)
    return {"failed": "caught", "passed": "missed"}.get(outcome, f"no test ran: {outcome}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", dest="word", default="", help="only faults whose file or name holds this word")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th of them")
    parser.add_argument("--faults", type=Path, default=Path(__file__).with_name("faults.yaml"))
    options = parser.parse_args()
    known = read_faults(options.faults, options.word)
    faults = known[:: options.every]
    verdicts: dict[Fault, str] = {}
    sound: dict[str, tuple[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        for fault in faults:
            began = time.monotonic()
            if fault.tests not in sound:
                sound[fault.tests] = run_tests(tree, fault.tests, SECONDS), 60 + 2 * (time.monotonic() - began)
            outcome, seconds = sound[fault.tests]
            good = outcome == "passed"
            verdicts[fault] = judge(tree, fault, seconds) if good else f"without a fault: {outcome}"
            print(
                f"{verdicts[fault]:8} {fault.file}: {fault.name} ({time.monotonic() - began:.0f} s)",
                file=sys.stderr,
                flush=True,
            )
    print(f"{'file':40} {'caught':>6} {'of':>4}")
    for file in dict.fromkeys(fault.file for fault in faults):
        own = [verdict for fault, verdict in verdicts.items() if fault.file == file]
        print(f"{file:40} {own.count('caught'):6} {len(own):4}")
    counts = Counter(verdict.split(":")[0] for verdict in verdicts.values())
    caught, missed, stale = counts["caught"], counts["missed"], counts["stale"]
    print(f"{'all':40} {caught:6} {len(faults):4}  {100 * caught / max(1, len(faults)):.0f} %")
    if len(faults) < len(known):
        print(f"a sample: each {options.every}th of {len(known)} faults")
    print(f"{caught} caught, {missed} missed, {stale} stale, {len(faults) - caught - missed - stale} not tried")
    return caught < len(faults)


if __name__ == "__main__":
    sys.exit(main())
