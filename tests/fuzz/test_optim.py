"""The C kernel: any cut, format, gradient and bits of values, against plain torch; and under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shardopt
from shardopt.errors import InputError
from shardopt.slices import Layout, Range
from tests.fuzz import budget
from tests.optim.test_kernels import STATES, WEIGHTS


@st.composite
def layouts(draw):
    """Ranges behind each other, contiguous or of rows, with padding between them; and elements of the local tensor."""
    at, local, held = draw(st.sampled_from([0, 1, 2**32 - 65])), 0, []
    for _ in range(draw(st.integers(1, 3))):
        at, local = at + draw(st.integers(0, 9)), local + draw(st.sampled_from([0, 0, 1, 64]))
        row, rows = draw(st.sampled_from([1, 3, 16, 127, 128, 300])), draw(st.sampled_from([1, 1, 2, 5, 33]))
        gap = draw(st.integers(1, 7))
        r = Range(at, local, row * rows, row, row + gap) if rows > 1 else Range(at, local, row)
        held.append(r)
        at, local = r.global_end, local + r.length
    return Layout("p", (at + draw(st.integers(0, 3)),), tuple(held)), local + draw(st.sampled_from([0, 5]))


OPTIONS = st.fixed_dictionaries(
    {"state_dtype": st.sampled_from(STATES)},
    optional={
        "betas": st.sampled_from([(0.0, 0.99, 0.9999), (0.9, 0.5, 0.99)]),
        "second_moment": st.just("yogi"),
        "maximize": st.just(True),
        "alpha_warmup": st.just(7),
        "weight_ema": st.just(0.9),
        "eps_root": st.just(1e-3),
        "lr": st.sampled_from([0.0, 1.0]),
    },
)
GRADIENTS = st.sampled_from(["usual", "usual", "any bits", "denormal", "huge", "zero"])


def gradient(kind: str, numel: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "any bits":  # of which one in 128 is infinite or NaN
        return torch.randint(-(2**31), 2**31, (numel,), generator=generator).int().view(torch.float32)
    return torch.randn(numel, generator=generator) * {"usual": 1.0, "denormal": 1e-42, "huge": 1e38, "zero": 0.0}[kind]


def stepped(kernel, layout, numel, weight, master, grad, options, kinds):
    """Weights and state after a step for each kind of gradient; of a gap nothing is known but the weight."""
    param = torch.nn.Parameter(gradient("usual", numel, 0).to(weight))
    optimizer = shardopt.AdEMAMix([("p", param)], kernel=kernel, master_weights=master, weight_decay=0.1, **options)
    optimizer.set_layout(param, layout)
    if grad != weight:
        param.grad_dtype = grad
    for step, kind in enumerate(kinds):
        param.grad = gradient(kind, numel, step + 1).to(grad)
        optimizer.step()
    return {"weight": param.detach()} | {k: v for k, v in optimizer.state[param].items() if torch.is_tensor(v)}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits; of NaN, that both are one."""
    if a.is_floating_point():
        there = ~a.isnan()
        if not torch.equal(there, ~b.isnan()):
            return False
        a, b = a[there], b[there]
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@budget(60)
@given(layouts(), st.sampled_from(WEIGHTS), st.booleans(), OPTIONS, st.lists(GRADIENTS, min_size=1, max_size=3))
def test_c_equals_torch_for_any_cut_and_values(cut, weights, narrow, options, kinds):
    layout, numel = cut
    weight, master = weights
    grad = torch.bfloat16 if narrow else weight
    both = []
    for kernel in ("c", "torch"):
        try:
            both.append(stepped(kernel, layout, numel, weight, master, grad, options, kinds))
        except InputError as error:
            both.append({"refusal": str(error).replace(kernel, "?")})
    ours, theirs = both
    assert ours.keys() == theirs.keys()
    if "refusal" in ours:
        return
    not_numbers = {k: ours[k].isnan() for k in ours if k.endswith("_scale")}
    for key in ours:
        # Of a block without a scale the codes mean nothing.
        if f"{key}_scale" in not_numbers and not_numbers[f"{key}_scale"].any():
            continue
        assert same(ours[key], theirs[key]), f"{key}: {(ours[key] != theirs[key]).sum()} of {numel} differ"


_BEYOND = """
import torch, shardopt
from shardopt.optim.kernels import cpu
run = cpu.CpuKernel.run
def beyond(self, table):
    table.rows["length"] += 64
    run(self, table)
cpu.CpuKernel.run = beyond
param = torch.nn.Parameter(torch.zeros(5))
optimizer = shardopt.AdEMAMix([param], kernel="c")
param.grad = torch.zeros(5)
optimizer.step()
print("went on")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="needs gcc's sanitizers on Linux")
def test_c_kernel_under_sanitizers(tmp_path: Path) -> None:
    """The property above in a process in which gcc watches each access and each undefined operation."""
    library = subprocess.check_output(["gcc", "-print-file-name=libasan.so"], text=True).strip()
    environment = os.environ | {
        "CC": "gcc -g -fsanitize=address,undefined -fno-sanitize-recover=all",
        "XDG_CACHE_HOME": str(tmp_path),
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "2",
    }

    def watched(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=250)

    planted = watched("-c", _BEYOND)
    assert "AddressSanitizer: heap-buffer-overflow" in planted.stderr, planted.stderr
    assert "went on" not in planted.stdout
    found = watched("-m", "pytest", "-q", "-x", f"{__file__}::{test_c_equals_torch_for_any_cut_and_values.__name__}")
    assert found.returncode == 0, found.stdout + found.stderr
