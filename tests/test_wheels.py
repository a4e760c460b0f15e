"""What scripts/build_wheels.py builds, and the wheel where nothing but torch is installed and no compiler is."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import shardopt
from shardopt.errors import InputError
from shardopt.optim.kernels import cpu

ROOT = Path(__file__).parent.parent
TRAINS = """
import hashlib, shardopt, torch
torch.manual_seed(0)
model = torch.nn.Linear(700, 3)
optimizer = shardopt.AdEMAMix(model.named_parameters(), lr=1e-2, state_dtype="bf16")
for _ in range(3):
    optimizer.zero_grad()
    model(torch.ones(2, 700)).square().sum().backward()
    optimizer.step()
print(shardopt.__version__, optimizer.kernel, shardopt.__file__)
print(hashlib.sha256(model.weight.detach().numpy().tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "build_wheels.py", "--out", out],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {re.sub(r"^.*-|_.*|\..*$", "", path.name.replace(".tar.gz", "-sdist.")): path for path in out.iterdir()}


def test_what_is_built(wheels):
    assert set(wheels) == {"any", "manylinux2014", "sdist"}
    with zipfile.ZipFile(wheels["any"]) as pure, zipfile.ZipFile(wheels["manylinux2014"]) as compiled:
        sources, libraries = set(pure.namelist()), {n for n in compiled.namelist() if n.endswith(".so")}
        tags = compiled.read(f"shardopt-{shardopt.__version__}.dist-info/WHEEL").decode()
    files = ("py.typed", "configs/llama-124m.yaml", "optim/kernels/cpu.c", "pretrain/loop.py")
    assert {f"shardopt/{name}" for name in files} <= sources
    assert not any(name.startswith(("tests", "scripts")) or name.endswith(".so") for name in sources)
    levels = [re.fullmatch(r"shardopt/optim/kernels/shipped/(.*)-\w+\.so", name)[1] for name in libraries]
    assert sorted(levels) == ["x86-64", "x86-64-v3", "x86-64-v4"]
    assert "Root-Is-Purelib: false" in tags
    with tarfile.open(wheels["sdist"]) as sdist:
        names = sdist.getnames()
    assert f"shardopt-{shardopt.__version__}/shardopt/optim/kernels/cpu.c" in names
    assert not any("/tests" in name for name in names)  # a part of them, which cannot run without the rest


def _needed_by(*packages):
    """These packages and all that they need, by the names of their folders and files in site-packages."""
    todo, found = list(packages), {}
    while todo:
        name = todo.pop()
        if name in found:
            continue
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        found[name] = {path.parts[0] for path in package.files or () if path.parts[0] not in ("..", "__pycache__")}
        wanted = [re.split(r"[^\w.-]", need)[0] for need in package.requires or () if "extra ==" not in need]
        todo += wanted
    return set().union(*found.values())


def test_wheel_trains_with_torch_alone_and_without_a_compiler(wheels, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    packages = Path(f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages")
    for name in _needed_by("torch", "numpy", "packaging", "xxhash"):
        (tmp_path / "env" / packages / name).symlink_to(Path(sys.prefix) / packages / name)
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"]
    empty = tmp_path / "home"
    empty.mkdir()
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*install, wheels["manylinux2014"]], env=alone, cwd=empty, check=True)
    there = {"PATH": str(empty), "HOME": str(empty), "OMP_NUM_THREADS": "2"}
    said = subprocess.run([python, "-I", "-c", TRAINS], env=there, capture_output=True, text=True)
    here = subprocess.run([sys.executable, "-c", TRAINS], capture_output=True, text=True, check=True, cwd=ROOT)
    first, digest = said.stdout.splitlines() or [said.stderr, ""]
    assert first.startswith(f"{shardopt.__version__} c {tmp_path / 'env'}")
    assert said.stderr == ""
    assert digest == here.stdout.splitlines()[1]
    assert list(empty.iterdir()) == []  # nothing was compiled


@pytest.fixture
def shipped(wheels, tmp_path, monkeypatch):
    """The folder of the wheel's libraries, in the place of the package's own."""
    with zipfile.ZipFile(wheels["manylinux2014"]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".so")]
        wheel.extractall(tmp_path, names)
    folder = (tmp_path / names[0]).parent
    monkeypatch.setattr(cpu, "_SHIPPED", folder)
    monkeypatch.delenv("CC", raising=False)
    return folder


def test_shipped_library_is_of_this_source_and_processor(shipped, monkeypatch):
    assert cpu.shipped() in shipped.iterdir()
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert cpu.shipped().name.startswith("x86-64-v3-")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "SOMETHING NEW")
    assert cpu.shipped().name.startswith("x86-64-")
    monkeypatch.setenv("PATH", "")
    assert cpu._load().shardopt_step
    monkeypatch.setattr(cpu, "c_header", lambda: "/* edited */")
    assert cpu.shipped() is None


@pytest.mark.usefixtures("shipped")
def test_compiler_that_is_named_goes_before_what_was_shipped_where_it_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ]\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(InputError, match="cannot build the kernel"):
        cpu._load()
    monkeypatch.setenv("CC", "false")
    with pytest.warns(UserWarning, match="the C compiler 'false' does not run.*came with the package is taken"):
        assert cpu._load().shardopt_step


@pytest.mark.usefixtures("shipped")
def test_shipped_library_that_cannot_be_loaded_is_told_where_there_is_no_compiler(monkeypatch):
    cpu.shipped().write_bytes(b"of another system")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"no C compiler found .*nor can the package's own library"):
        cpu._load()
