"""Ranks killed and restarted; `scripts/kill_runs.py` does it, and more, as often as one likes."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "count"),
    [
        (["random", "--kills", "2", "--engines", "zero"], 2),
        # In the middle of a backward.
        pytest.param(
            ["phases", "--engines", "{name: zero, stage: 2}", "--phases", "backward"], 1, marks=pytest.mark.slow
        ),
        # Before the rename that makes a checkpoint complete.
        (["phases", "--engines", "fsdp", "--phases", "publish"], 1),
    ],
)
def test_ranks_that_are_killed_under_max_restarts_end_as_if_they_had_not_been(case, count) -> None:
    done = subprocess.run([sys.executable, "scripts/kill_runs.py", *case], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[0])
    assert (report["count"], report["faults"]) == (count, [])
