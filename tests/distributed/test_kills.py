"""Ranks killed and restarted; `scripts/kill_runs.py` does it, and more, as often as one likes."""

import json

import pytest

from tests.distributed.forked import Command


def kill_runs(arguments):
    from scripts import kill_runs

    return kill_runs.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        # In the middle of a backward, and before the rename that makes a checkpoint complete.
        (["phases", "--engines", "{name: zero, stage: 2}", "--phases", "backward", "publish"], 2),
        pytest.param(["random", "--kills", "2", "--engines", "fsdp"], 2, marks=pytest.mark.slow),
        pytest.param(["phases", "--by-hand", "--engines", "ddp"], 15, marks=pytest.mark.slow),
    ],
)
def test_ranks_that_are_killed_and_restarted_end_as_if_they_had_not_been(tmp_path, arguments, count) -> None:
    process = Command(kill_runs, [*arguments, "--keep", str(tmp_path / "runs")], output=tmp_path / "output")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    report = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert (report["count"], report["faults"]) == (count, [])
