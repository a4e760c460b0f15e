"""Modules that `import shardopt` loads, and the place that it loads them from."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from shardopt import cli

ROOT = Path(__file__).parents[1]
_LOADED = """
import contextlib, io, json, sys
from shardopt import cli, commands
for argv in (["--help"], ["--version"], ["pretrain", "--help"], *([name, "--help"] for name in commands.COMMANDS)):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        cli.main(argv)
print(json.dumps(sorted(sys.modules)))
with contextlib.redirect_stdout(io.StringIO()):
    cli.main(["runs", "shardopt"])
print(json.dumps(sorted(sys.modules)))
import shardopt.pretrain.page.write
print(json.dumps(sorted(sys.modules)))
for name in [name for name in sys.modules if name.startswith(("shardopt.pretrain", "shardopt.rows"))]:
    del sys.modules[name]
import torch, numpy
before = set(sys.modules) - {name for name in sys.modules if name.startswith("shardopt")}
import shardopt
shardopt.AdEMAMix
print(json.dumps(sorted(set(sys.modules) - before)))
import shardopt.pretrain.config
print(json.dumps(sorted(sys.modules)))
"""


@pytest.fixture(scope="module")
def modules():
    """Those that are there after the help of every command, after a list of runs, after what writes
    the page of runs, those that shardopt.AdEMAMix loads
    beside torch and numpy, and all that are there after the config's."""
    ran = subprocess.run([sys.executable, "-c", _LOADED], cwd=ROOT, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_help_imports_neither_torch_nor_any_other_package(modules):
    assert "shardopt.commands.export" in modules[0]
    packages = {name.split(".")[0] for name in modules[0]}
    assert not packages & {"torch", "numpy", "pydantic", "yaml", "rich", "transformers", "matplotlib", "wandb"}


def test_runs_are_listed_without_torch(modules):
    assert "shardopt.pretrain.runs" in modules[1]
    packages = {name.split(".")[0] for name in modules[1]}
    assert not packages & {"torch", "numpy", "pydantic", "transformers", "matplotlib", "wandb"}


def test_the_page_of_runs_is_written_without_torch(modules):
    assert "shardopt.pretrain.page.write" in modules[2]
    packages = {name.split(".")[0] for name in modules[2]}
    assert not packages & {"torch", "numpy", "pydantic", "transformers", "matplotlib", "wandb"}


def test_import_loads_the_optimizer_and_nothing_heavy_beside_torch_and_numpy(modules):
    loaded = [name for name in modules[3] if not name.startswith(("shardopt.commands", "shardopt.cli"))]
    assert "shardopt.optim.ademamix" in loaded
    ours = {name for name in loaded if name.split(".")[0] == "shardopt"}
    assert {name.split(".")[0] for name in set(loaded) - ours} <= sys.stdlib_module_names
    floors = {name.split(".")[1] for name in ours if "." in name}
    assert floors <= {"optim", "slices", "errors"}


def test_a_config_is_read_without_what_only_its_run_needs(modules):
    """Models of transformers bring torch's compiler with them: a mistake in a config was told seconds later."""
    heavy = {"transformers.modeling_utils", "torch._dynamo", "accelerate", "datasets", "matplotlib", "wandb"}
    assert "shardopt.pretrain.config" in modules[4]
    assert not heavy & set(modules[4])


def test_imports_are_without_collections_which_go_on_after_them():
    before = gc.get_freeze_count()
    with cli._importing():
        assert not gc.isenabled()
        kept = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)


def test_editable_install_is_found_from_the_folder_above_the_clone(tmp_path):
    """There a clone named shardopt is itself a folder that Python takes for a namespace package."""
    pytest.importorskip("setuptools", minversion="77")
    clone = tmp_path / "shardopt"
    shutil.copytree(ROOT / "shardopt", clone / "shardopt", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    build = "from setuptools import build_meta; build_meta.build_editable('..')"
    subprocess.run([sys.executable, "-c", build], cwd=clone, capture_output=True, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        lines = [line for name in wheel.namelist() if name.endswith(".pth") for line in wheel.read(name).split(b"\n")]
    installed = [line.decode() for line in lines if line and not line.startswith(b"import ")]
    found = PathFinder.find_spec("shardopt", [str(tmp_path), *installed])
    assert found is not None
    assert found.origin == str(clone / "shardopt" / "__init__.py")
