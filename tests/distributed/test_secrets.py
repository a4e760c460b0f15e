"""Keys in the environment stay there: not in a file of the run, on its console, or in a process's title."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.pretrain import tiny

SECRETS = {"WANDB_API_KEY": "5ec2e7" + "ab1e" * 8 + "77", "HF_TOKEN": "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"}


def titles(job: psutil.Process) -> list[str]:
    found = []
    for process in [job, *job.children(recursive=True)]:
        try:
            found += [" ".join(process.cmdline()), process.name()]
        except psutil.Error:
            continue
    return found


def holding(folder: Path, secret: bytes) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]


def test_planted_keys_reach_no_file_console_or_process_title(tmp_path):
    tiny.corpus(tmp_path / "text")
    config = tmp_path / "config.yaml"
    changes = {"checkpoint__every": 3, "checkpoint__export": "true"}
    tree = tiny.tree(tmp_path, **changes, tracking__wandb__mode="offline")
    config.write_text(json.dumps(tree))
    environment = os.environ | SECRETS | {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "shardopt", "pretrain", "--nproc-per-node", "2", str(config)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    seen: set[str] = set()
    while process.poll() is None:
        seen.update(titles(psutil.Process(process.pid)))
        time.sleep(0.2)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert sum("shardopt pretrain" in title for title in seen) >= 2  # the command and its ranks
    assert any("wandb" in title for title in seen)
    here = tmp_path / "runs" / "tiny"
    assert list(here.glob("wandb/offline-run-*/*.wandb"))
    for name, secret in SECRETS.items():
        assert secret not in output, name
        assert not [title for title in seen if secret in title], name
        assert holding(tmp_path, secret.encode()) == [], name
    # And a search that finds what is there.
    assert here / "config.yaml" in holding(tmp_path, b"hidden_size")
