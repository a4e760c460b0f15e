"""A rank that is stopped, or hangs, while the others wait for it: named in time, with every rank's stack."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.pretrain import tiny

# Rank 1 does something else than the others, in the step or in the background save that begins after step 3.
HANGS = """
import os, signal, sys, time
from shardopt.checkpoint import blocks
from shardopt.pretrain import step

def elsewhere():
    time.sleep(60)

what = {"stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP), "elsewhere": elsewhere}[sys.argv.pop()]
where = sys.argv.pop()
if os.environ["RANK"] == "1":
    loss, write = step.token_loss_sum, blocks.write_file
    steps = []

    def in_step(*arguments):
        steps.append(1)
        if where == "step" and len(steps) == 6:
            what()
        return loss(*arguments)

    def in_save(*arguments):
        what()
        return write(*arguments)

    step.token_loss_sum = in_step
    if where == "save":
        blocks.write_file = in_save
from shardopt.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("engine", "where", "what"),
    [
        pytest.param("{name: fsdp}", "save", "stopped", marks=pytest.mark.slow),
        ("{name: ddp}", "step", "elsewhere"),
        pytest.param("{name: zero, stage: 1}", "step", "stopped", marks=pytest.mark.slow),
    ],
)
def test_rank_that_does_not_answer_is_named_in_time_with_all_stacks(tmp_path, engine, where, what):
    tiny.corpus(tmp_path / "text")
    script, config = tmp_path / "hangs.py", tmp_path / "config.yaml"
    script.write_text(HANGS)
    changes = {"run__timeout_minutes": 0.1, "train__steps": 5000, "checkpoint__every": 3, "engine": engine}
    config.write_text(json.dumps(tiny.tree(tmp_path, **changes)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(2):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(script), "pretrain", str(config), where, what],
                env=os.environ | environment,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    try:
        output, _ = ranks[0].communicate(timeout=120)
    finally:
        ranks[1].kill()
    print(output)
    theirs, _ = ranks[1].communicate()
    assert ranks[0].returncode == 1
    # The first error comes before anything is closed, then who keeps it waiting.
    first = next(line for line in output.splitlines() if line.startswith("shardopt: rank 0: "))
    assert output.index(first) < output.index("Traceback (most recent call last)")
    assert "shardopt: stacks of rank 0" in output
    if what == "stopped":
        assert "rank 1: no answer, stopped or gone; the others wait for it" in output
    else:
        assert "rank 1: elsewhere (" in output
        assert "shardopt: stacks of rank 1" in theirs
        assert "in elsewhere" in theirs.split("stacks of rank 1")[1]
    assert "rank 0: " in output.split("rank 1: ")[1]
