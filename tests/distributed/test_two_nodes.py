"""Two torchrun agents, as on two nodes, of two ranks each, that meet by a c10d rendezvous over loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from shardopt import cli
from tests.distributed.forked import Command
from tests.pretrain import tiny


def node(arguments: list[str], folder: Path) -> None:
    """An agent; its ranks are forked, and leave in `folder` their process ids and how often the node was restarted."""
    from scripts import forked
    from shardopt.engines import fsdp  # noqa: F401  for the ranks, as is loop
    from shardopt.pretrain import loop  # noqa: F401

    def rank(command: list[str]) -> int:
        attempt = len(list(folder.glob(f"{os.environ['RANK']}.*")))
        note = f"{os.getpid()} {os.environ['TORCHELASTIC_RESTART_COUNT']}"
        (folder / f"{os.environ['RANK']}.{attempt}").write_text(note)
        try:
            return cli.main(command[command.index("pretrain") :])
        except RuntimeError:
            # So that the agent of the first node sees the second come back before its own ranks have ended: it does not
            # count the restart then.
            if os.environ["GROUP_RANK"] == "0":
                time.sleep(20)
            raise

    forked.torchrun(arguments, rank)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_a_rank_that_dies_is_restarted_on_both_nodes_from_the_newest_checkpoint(tmp_path: Path) -> None:
    tiny.corpus(tmp_path / "text")
    changes = {"train__steps": 16, "checkpoint__every": 4, "train__micro_batch": 1, "run__timeout_minutes": 0.5}
    tiny.run(0, 1, tmp_path, run__name="whole", engine="{name: single}", **changes)
    config, ranks = tmp_path / "nodes.yaml", tmp_path / "ranks"
    config.write_text(json.dumps(tiny.tree(tmp_path, run__name="nodes", **changes)))
    ranks.mkdir()
    meeting = f"--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{free_port()} --rdzv-id job --local-addr 127.0.0.1"
    arguments = f"--nnodes 2 --nproc-per-node 2 --max-restarts 1 {meeting} pretrain {config}".split()
    nodes = [Command(node, arguments, ranks, output=tmp_path / f"node-{n}.log") for n in range(2)]
    saved = tmp_path / "runs" / "nodes" / "checkpoints" / "step-00000004"
    deadline = time.monotonic() + 120
    while not saved.exists():
        assert all(node.poll() is None for node in nodes), [node.output.read_text() for node in nodes]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(int((ranks / "3.0").read_text().split()[0]), signal.SIGKILL)
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    counts = {path.name: path.read_text().split()[1] for path in ranks.iterdir()}
    again = {"0.1": "0", "1.1": "0", "2.1": "1", "3.1": "1"}  # counted where the rank was alone
    assert counts == {f"{rank}.0": "0" for rank in range(4)} | again
    assert re.search(r"resumed at step (4|8|12)\b", "".join(said)), said
    rows, whole = ([(row["step"], row["loss"]) for row in tiny.metrics(tmp_path, name)] for name in ("nodes", "whole"))
    assert [step for step, _ in rows] == list(range(1, 17))
    assert [loss for _, loss in rows] == pytest.approx([loss for _, loss in whole], rel=1e-4)
