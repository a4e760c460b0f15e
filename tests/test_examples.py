"""The examples learn as much as they say; one of them is run as a person would run it."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def _path(name: str) -> str:
    return str(ROOT / "scripts" / "examples" / f"{name}.py")


def _run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> int:
    """Run an example in this process, which has torch already; its exit status."""
    monkeypatch.setattr(sys, "argv", [_path(name), *arguments])
    monkeypatch.syspath_prepend(ROOT / "scripts" / "examples")
    with torch.random.fork_rng(), pytest.raises(SystemExit) as done:
        runpy.run_path(_path(name), run_name="__main__")
    return int(done.value.code or 0)


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
    name: str,
    at_first: tuple[float, float],
    in_the_end: tuple[float, float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _run(monkeypatch, name) == 0
    before, after = _metric(capsys.readouterr().out)
    assert at_first[0] <= before <= at_first[1]
    assert in_the_end[0] <= after <= in_the_end[1]


def test_another_optimizer_by_name_and_a_run_too_short_to_learn() -> None:
    command = [sys.executable, _path("regression"), "--optimizer", "adamw", "--steps", "1"]
    # One thread: OpenMP's waiting threads make it twenty times slower on a busy machine.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 1, run.stderr
    assert "did not learn" in run.stdout


def test_an_unknown_optimizer_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status = _run(monkeypatch, "regression", "--optimizer", "admw")
    assert status == 2
    assert "invalid choice: 'admw'" in capsys.readouterr().err
