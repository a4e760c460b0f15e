"""`shardopt doctor`: what is found, told in 80 columns, and the exit status."""

from __future__ import annotations

import json
import os
import re
from importlib import metadata
from unittest import mock

import pytest
import torch

from shardopt import cli
from shardopt.engines.zero.transports import shared_memory
from shardopt.optim.kernels import bytes_alone, cpu
from shardopt.pretrain import machine, versions


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(machine, "_ELEMENTS", 1 << 16)
    monkeypatch.setattr(machine, "_TURNS_SECONDS", 0)
    monkeypatch.setattr(machine, "_CHECKSUM_BYTES", 1 << 16)


def say(capsys, *arguments):
    capsys.readouterr()
    status = cli.main(["doctor", *map(str, arguments)])
    return status, capsys.readouterr().out


def found(capsys, *arguments):
    status, text = say(capsys, "--json", *arguments)
    what = json.loads(text)
    assert what["can_start"] == (status == 0)
    return status, what["findings"]


def test_text_has_80_columns_and_json_the_figures(tmp_path, capsys):
    status, text = say(capsys, "--dir", tmp_path)
    assert status == 0
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "a run can start"
    assert any(line.startswith(f"ok   torch        {torch.__version__}") for line in lines)
    status, findings = found(capsys, "--dir", tmp_path / "not" / "there")
    assert findings["torch"]["version"] == torch.__version__
    assert findings["pretrain"]["packages"]["transformers"] == metadata.version("transformers")
    assert findings["kernel"]["bytes_per_second"] > 0
    assert findings["disk"]["folder"] == str(tmp_path)
    assert findings["limits"]["cores"] == len(os.sched_getaffinity(0))


def test_kernel_is_compared_with_a_loop_over_the_same_bytes(tmp_path, capsys):
    with mock.patch.object(machine, "bytes_alone", wraps=machine.bytes_alone) as loop:
        kernel = found(capsys, "--dir", tmp_path)[1]["kernel"]
    loop.assert_called_once_with(4, [4] * 4)  # the gradient read; weight, m1, m2 and nu changed
    assert kernel["kernel"] == "c"
    assert kernel["of_bytes_alone"] > 0


def test_a_missing_package_of_the_launcher_fails_and_another_extras_is_noted(tmp_path, capsys):
    version = metadata.version

    def without(*names):
        def ask(package):
            if package in names:
                raise metadata.PackageNotFoundError(package)
            return version(package)

        return mock.patch.object(metadata, "version", ask)

    with without("deepspeed"):
        status, findings = found(capsys, "--dir", tmp_path)
    assert (status, findings["deepspeed"]["verdict"]) == (0, "note")
    assert findings["deepspeed"]["remedy"] == "pip install 'shardopt[deepspeed]'"
    with without("transformers"):
        status, findings = found(capsys, "--dir", tmp_path)
    assert (status, findings["pretrain"]["verdict"]) == (1, "fail")
    assert findings["pretrain"]["text"].startswith("missing: transformers; ")


@pytest.fixture
def old(monkeypatch):
    """Versions of packages, in the place of those that are installed."""
    there, ask = {}, metadata.version
    monkeypatch.setattr(metadata, "version", lambda package: there.get(package) or ask(package))
    return there


def test_versions_that_are_too_old_are_told_with_those_that_are_needed(tmp_path, capsys, old):
    old |= {"transformers": "4.57.6", "deepspeed": "0.19.0rc1", "torch": "2.4.0+cpu"}
    status, findings = found(capsys, "--dir", tmp_path)
    assert status == 1
    verdicts = {name: findings[name]["verdict"] for name in ("shardopt", "torch", "pretrain", "wandb", "deepspeed")}
    assert verdicts == {"shardopt": "fail", "torch": "ok", "pretrain": "fail", "wandb": "ok", "deepspeed": "note"}
    needed = {package.name: package.needed for package in versions.declared()}
    assert findings["shardopt"]["text"].endswith(f"; torch 2.4.0+cpu (needs {needed['torch']})")
    assert findings["pretrain"]["text"].startswith(f"too old: transformers 4.57.6 (needs {needed['transformers']}); ")
    assert findings["pretrain"]["remedy"] == "pip install 'shardopt[pretrain]'"
    assert findings["pretrain"]["packages"]["transformers"] == "4.57.6"


def test_a_run_is_refused_by_versions_that_are_too_old(capsys, old):
    config = ["pretrain", "configs/quickstart.yaml", "--print-config"]
    old |= {"transformers": "4.57.6", "torch": "2.4.0+cpu", "deepspeed": "0.1"}
    assert cli.main(config) == 2
    assert re.fullmatch(
        r"shardopt: too old: torch 2\.4\.0\+cpu \(needs >=[\d.]+\), transformers 4\.57\.6 \(needs >=[\d.]+\): "
        r"pip install 'torch>=[\d.]+' 'transformers>=[\d.]+'\n",
        capsys.readouterr().err,
    )
    del old["transformers"], old["torch"]
    versions.check(["pretrain"])  # and never by those of an engine that is not used
    assert cli.main([*config, "engine.name=deepspeed"]) == 2
    assert "too old: deepspeed 0.1 (needs" in capsys.readouterr().err


def test_nothing_is_asked_of_a_package_that_is_not_installed_but_on_the_path(tmp_path, capsys, monkeypatch):
    def not_there(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", not_there)
    status, findings = found(capsys, "--dir", tmp_path)
    assert (status, findings["extras"]["text"]) == (0, "shardopt itself is not installed")
    versions.check(["pretrain"])


def test_without_a_compiler_the_kernel_is_torchs_and_the_way_out_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    monkeypatch.setattr(machine.AdEMAMix, "kernel", property(lambda self: "torch"))
    status, findings = found(capsys, "--dir", tmp_path)
    assert status == 0
    assert findings["compiler"]["verdict"] == findings["kernel"]["verdict"] == "note"
    assert "apt install gcc" in findings["compiler"]["remedy"]
    assert "not compared with its bytes alone" in findings["kernel"]["text"]


@pytest.mark.skipif(shared_memory._process_vm_readv() is None, reason="needs Linux on x86-64")
def test_transport_is_sockets_where_processes_may_not_read_each_other(tmp_path, capsys):
    assert found(capsys, "--dir", tmp_path)[1]["transport"]["transport"] == "memory"

    def forbidden(*_):
        raise shared_memory.PeerError("Operation not permitted")

    yama = tmp_path / "ptrace_scope"
    yama.write_text("1\n")
    with mock.patch.object(shared_memory._Process, "read", forbidden), mock.patch.object(shared_memory, "_YAMA", yama):
        transport = found(capsys, "--dir", tmp_path)[1]["transport"]
    assert (transport["transport"], transport["verdict"]) == ("sockets", "note")
    assert "kernel.yama.ptrace_scope is 1" in transport["text"]


def test_a_folder_that_cannot_be_written_to_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    status, findings = found(capsys, "--dir", tmp_path)
    assert (status, findings["disk"]["verdict"]) == (1, "fail")
    assert "no run can start" in say(capsys, "--dir", tmp_path)[1]


def test_bytes_alone_reads_and_changes_every_element():
    loop = bytes_alone.bytes_alone(4, [1, 2, 4])
    made = []
    with mock.patch.object(torch, "zeros", lambda *a, **k: made.append(torch.ones(*a, **k)) or made[-1]):
        run = loop(40_000)
    run()
    read, *changed = made
    assert torch.equal(read, torch.ones_like(read))
    for tensor, dtype in zip(changed, (torch.uint8, torch.int16, torch.int32), strict=True):
        values = tensor.view(dtype)
        one = torch.ones(4, dtype=torch.uint8).view(torch.int32).item()
        before = torch.ones(values.element_size(), dtype=torch.uint8).view(dtype).item()
        assert (values == torch.tensor(before + one).to(dtype)).all()
    assert cpu.Compiler().name
