"""A rank that is stopped, or hangs, while the others wait for it: named in time, with every rank's stack."""

from __future__ import annotations

import json
import os
import signal
import socket
import time

import pytest

from tests.distributed.forked import Command
from tests.pretrain import tiny


def elsewhere():
    time.sleep(60)


def _rank(rank: int, port: int, config: str, where: str, what: str) -> int:
    """Rank 1 does something else than the others, in the step or in the background save that begins after step 3."""
    from shardopt.checkpoint import blocks
    from shardopt.cli import main
    from shardopt.pretrain import step

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    act = {"stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP), "elsewhere": elsewhere}[what]
    loss, write = step.losses, blocks.write_file
    steps = []

    def in_step(*arguments):
        steps.append(1)
        if len(steps) == 6:
            act()
        return loss(*arguments)

    def in_save(*arguments):
        act()
        return write(*arguments)

    if rank == 1 and where == "step":
        step.losses = in_step
    elif rank == 1:
        blocks.write_file = in_save
    return main(["pretrain", config])


@pytest.mark.parametrize(
    ("engine", "where", "what"),
    [
        ("{name: ddp}", "step", "elsewhere"),
        pytest.param("{name: fsdp}", "save", "stopped", marks=pytest.mark.slow),
        pytest.param("{name: zero, stage: 1}", "step", "stopped", marks=pytest.mark.slow),
    ],
)
def test_rank_that_does_not_answer_is_named_in_time_with_all_stacks(tmp_path, engine, where, what):
    tiny.corpus(tmp_path / "text")
    config = tmp_path / "config.yaml"
    changes = {"run__timeout_minutes": 0.1, "train__steps": 5000, "checkpoint__every": 3, "engine": engine}
    config.write_text(json.dumps(tiny.tree(tmp_path, **changes)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        Command(_rank, rank, port, str(config), where, what, output=tmp_path / f"rank-{rank}.log") for rank in range(2)
    ]
    try:
        output, _ = ranks[0].communicate(timeout=120)
    finally:
        ranks[1].kill()
    theirs, _ = ranks[1].communicate()
    assert ranks[0].returncode == 1, output
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
