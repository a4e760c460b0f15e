"""Set-up on a machine that lacks something: one line, and an exit status."""

import os
import shutil
import subprocess
from pathlib import Path

TOOLS = ("bash", "cat", "cmp", "dirname", "env", "grep", "mkdir", "tr")


def prepare(folder: Path, *also: str, python: str | None = None) -> subprocess.CompletedProcess:
    """`prepare pretrain` in a copy of the set-up, with no commands but TOOLS and `also` on the PATH."""
    (folder / "scripts").mkdir(parents=True)
    (folder / "bin").mkdir()
    for file in ("scripts/env.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(file, folder / file)
    for tool in (*TOOLS, *also):
        (folder / "bin" / tool).symlink_to(str(shutil.which(tool)))
    if python is not None:
        fake = folder / ".venv" / "bin" / "python"
        fake.parent.mkdir(parents=True)
        fake.write_text(f"#!/bin/bash\n{python}\n")
        fake.chmod(0o755)
    return subprocess.run(
        ["bash", "-c", "source scripts/env.sh && prepare pretrain && echo prepared"],
        cwd=folder,
        env={"PATH": str(folder / "bin"), "HOME": os.environ["HOME"]},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_missing_python_is_said(tmp_path):
    done = prepare(tmp_path, "gcc")
    assert done.returncode == 1
    assert done.stderr == "shardopt: no python3 here: install Python 3.11 or newer (or set PYTHON)\n"


def test_a_missing_compiler_is_said(tmp_path):
    done = prepare(tmp_path, python="exit 0")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "no C compiler here: install gcc or clang" in done.stderr


def test_a_failed_download_is_said_and_nothing_counts_as_installed(tmp_path):
    python = 'echo "WARNING: retrying"; echo "ERROR: Could not find a version that satisfies torch==2.13.0"; exit 1'
    done = prepare(tmp_path, "gcc", python=python)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "ERROR: Could not find a version that satisfies torch==2.13.0",
        "shardopt: installing failed; pip's whole output is in .venv/install.log",
    ]
    assert not list((tmp_path / ".venv").glob("installed-*"))


def test_an_environment_that_is_there_is_used_again(tmp_path):
    first = prepare(tmp_path / "a", "gcc", python="exit 0")
    assert first.stdout.splitlines() == ["Installing shardopt[pretrain] into .venv", "prepared"]
    again = subprocess.run(
        ["bash", "-c", "source scripts/env.sh && prepare pretrain && echo prepared"],
        cwd=tmp_path / "a",
        env={"PATH": str(tmp_path / "a" / "bin"), "HOME": os.environ["HOME"]},
        capture_output=True,
        text=True,
    )
    assert again.stdout.splitlines() == ["prepared"]
