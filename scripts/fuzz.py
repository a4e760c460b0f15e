"""Run the property tests (tests/fuzz) for as long as asked, each with new examples, and say how many there were.

    PYTHONPATH=. python scripts/fuzz.py --minutes 60               # an hour, shared out among the properties
    PYTHONPATH=. python scripts/fuzz.py --minutes 5 -k checkpoint  # those of one file

The C kernel's run under gcc's address and undefined-behaviour sanitizers where there is gcc. A property that fails is
told with the command that finds the same example again, and left for the rest of the time; the status is 1 then.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "tests/fuzz"
_COUNTS = re.compile(r"(\d+) passing, (\d+) failing,? and (\d+) invalid")


def properties(keyword: str) -> list[str]:
    """The tests that hypothesis makes examples for."""
    command = [*_pytest(), "--collect-only", "-q", "-m", "not slow", "-k", keyword, FOLDER]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if "::" in line]
    if not found:
        raise SystemExit(done.stdout + done.stderr)
    return found


def sanitizers(cache: str) -> dict[str, str]:
    """The environment in which the C kernel is built with sanitizers; empty without gcc."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        return {}
    library = subprocess.check_output(["gcc", "-print-file-name=libasan.so"], text=True).strip()
    return {
        "CC": "gcc -g -fsanitize=address,undefined -fno-sanitize-recover=all",
        "XDG_CACHE_HOME": cache,
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",
    }


def _pytest() -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]


def run(test: str, factor: int, seed: int, environment: dict[str, str]) -> tuple[Counter[str], str]:
    """Counts of examples, and what was printed if the test failed."""
    command = [*_pytest(), "-q", "--timeout", "3600", "--hypothesis-show-statistics", f"--hypothesis-seed={seed}", test]
    whole = os.environ | environment | {"SHARDOPT_FUZZ": str(factor)}
    done = subprocess.run(command, cwd=ROOT, env=whole, capture_output=True, text=True)
    counts: Counter[str] = Counter()
    for passing, failing, invalid in _COUNTS.findall(done.stdout):
        counts += Counter(passing=int(passing), failing=int(failing), invalid=int(invalid))
    return counts, "" if done.returncode == 0 else done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="of wall time, all properties together")
    parser.add_argument("--factor", type=int, default=20, help="times as many examples as in CI, in one round")
    parser.add_argument("--seed", type=int, default=1, help="of the first round; each round adds one")
    parser.add_argument("-k", default="", metavar="WORDS", help="as pytest's: which properties")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    failures: list[str] = []
    total = 0
    left = properties(asked.k)
    end = time.monotonic() + 60 * asked.minutes
    with tempfile.TemporaryDirectory(prefix="shardopt-fuzz-") as cache:
        for number, test in enumerate(left):
            until = time.monotonic() + (end - time.monotonic()) / (len(left) - number)
            watched = sanitizers(cache) if "test_optim" in test else {}
            counts: Counter[str] = Counter()
            began, seed, output = time.monotonic(), asked.seed, ""
            while not output and (seed == asked.seed or time.monotonic() < until):
                found, output = run(test, asked.factor, seed, watched)
                counts += found
                seed += 1
                if not found:  # a test without examples
                    break
            total += counts["passing"]
            named = test.removeprefix(f"{FOLDER}/")
            print(
                f"{counts['passing']:>9,} examples {time.monotonic() - began:6.0f} s  {named}"
                f"{' (under sanitizers)' if watched else ''}{'  FAILED' if output else ''}",
                flush=True,
            )
            if output:
                setting = " ".join(f"{key}='{value}'" for key, value in watched.items() if key != "XDG_CACHE_HOME")
                again = f"SHARDOPT_FUZZ={asked.factor} python -m pytest --hypothesis-seed={seed - 1} {test}"
                failures.append(f"{output}\n-- again: {setting} PYTHONPATH=. {again}".replace("again:  ", "again: "))
    print(f"{total:>9,} examples in all, {len(left)} properties, {len(failures)} failed")
    for failure in failures:
        print(f"\n{failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
