"""Ranks killed at random moments and restarted by torchrun; `scripts/kill_runs.py` does it as often as one likes."""

import json
import subprocess
import sys


def test_ranks_that_are_killed_under_max_restarts_end_as_if_they_had_not_been() -> None:
    command = [sys.executable, "scripts/kill_runs.py", "--kills", "2", "--engines", "zero"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["engine"], report["kills"], report["faults"]) == ("zero", 2, [])
