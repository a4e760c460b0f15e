"""The examples run as a person would run them, and learn as much as they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # One thread: OpenMP's waiting threads make these twenty times slower on a busy machine.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "examples" / f"{name}.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def _metric(output: str) -> tuple[float, float]:
    found = re.search(r": (\d+\.\d+) -> (\d+\.\d+) \(", output)
    assert found, output
    return float(found[1]), float(found[2])


@pytest.mark.parametrize(
    ("name", "at_first", "in_the_end"),
    [
        ("regression", (0.9, 2.0), (0.0, 0.2)),
        ("classifier", (0.0, 0.3), (0.95, 1.0)),
        ("policy_gradient", (5.0, 40.0), (80.0, 100.0)),
        ("autoencoder", (0.9, 2.0), (0.0, 0.05)),
    ],
)
def test_example_ends_with_a_better_score_than_it_begins_with(
    name: str, at_first: tuple[float, float], in_the_end: tuple[float, float]
) -> None:
    run = _run(name)
    assert run.returncode == 0, run.stderr
    before, after = _metric(run.stdout)
    assert at_first[0] <= before <= at_first[1]
    assert in_the_end[0] <= after <= in_the_end[1]


def test_another_optimizer_by_name_and_a_run_too_short_to_learn() -> None:
    run = _run("regression", "--optimizer", "adamw", "--steps", "1")
    assert run.returncode == 1, run.stderr
    assert "did not learn" in run.stdout


def test_an_unknown_optimizer_is_refused() -> None:
    run = _run("regression", "--optimizer", "admw")
    assert run.returncode == 2
    assert "invalid choice: 'admw'" in run.stderr
