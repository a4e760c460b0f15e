"""The Triton kernel: its arithmetic in the interpreter, its instructions from the compiler, and both on a GPU.

TRITON_INTERPRET is read when triton is imported, so that tests of the interpreter live in a process of their own.
"""

import importlib.util
import multiprocessing
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import shardopt
from shardopt.errors import InputError
from shardopt.optim import kernels
from shardopt.slices import Layout, Range
from tests.optim.test_kernels import (
    COLUMNS,
    STATES,
    WEIGHTS,
    assert_same,
    nonfinite_values,
    run,
    small_beta_run,
    stays_finite,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: scripts/gpu_check.py runs these")
SIZES = (1, 130, 400)  # one element, a partial block of a scale, a whole program and a part


def start_worker() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    # numpy's, where a branch that is not taken divides by zero: Triton's where() computes both
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")


@pytest.fixture(scope="module")
def interpreted():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start_worker) as pool:
        yield lambda body, *args, **options: pool.submit(body, *args, **options).result(timeout=200)


# -- in the interpreter -----------------------------------------------------------------------------------------


def same_as_torch(**options):
    options.setdefault("sizes", SIZES)
    ours = run("triton", **options)
    assert_same(ours, run("torch", **options))
    return ours


@pytest.mark.parametrize(("weight", "master"), WEIGHTS)
@pytest.mark.parametrize("state", STATES)
def test_every_format_has_the_bits_of_torch(interpreted, state, weight, master):
    interpreted(same_as_torch, state_dtype=state, master_weights=master, weight=weight)


@pytest.mark.parametrize(
    "options",
    [
        {"betas": (0.0, 0.99, 0.9999), "state_dtype": "bf16"},
        {"betas": (0.0, 0.99, 0.9999), "second_moment": "yogi", "beta3_warmup": 5},
        {"second_moment": "yogi", "state_dtype": "bf16", "maximize": True},
        {"maximize": True, "alpha_warmup": 7, "beta3_warmup": 9, "eps_root": 1e-3, "eps": 0.0},
        {"weight_ema": 0.99, "state_dtype": {"m2": "bf16", "weight_ema": "bf16"}},
        {"weight_ema": 0.99, "state_dtype": "block8"},
        {"lr": 0.0, "state_dtype": "bf16", "weight_ema": 0.9},
        {"lr": 0.0, "weight": torch.bfloat16, "master_weights": "split"},
        {"grad": torch.bfloat16, "state_dtype": "bf16"},
        {"grad": torch.float16},
        {"grad": torch.float32, "weight": torch.bfloat16, "state_dtype": "block16"},
        {"state_dtype": {"nu": "bf16", "m1": "block8", "m2": "block16"}},
    ],
    ids=str,
)
def test_every_option_has_the_bits_of_torch(interpreted, options):
    interpreted(same_as_torch, **options)


@pytest.mark.parametrize("before", [601, 600])
@pytest.mark.parametrize("state", ["bf16", "block8"])
def test_indices_beyond_32_bits(interpreted, state, before):
    # The keys change in the middle of a program, from odd and even indices; and a row does not begin on 16 bytes.
    layout = Layout("p0", (3 << 32,), (Range((1 << 33) - before, 1, 1300),))
    interpreted(same_as_torch, sizes=(1301,), layouts=[layout], state_dtype=state, weight=torch.bfloat16)


@pytest.mark.parametrize("state", ["bf16", "block8"])
@pytest.mark.parametrize("layout", [COLUMNS[4], COLUMNS[5]], ids=("short rows", "beyond 2^33"))
def test_columns(interpreted, state, layout):
    options = {"sizes": (layout.local_numel,), "layouts": [layout], "state_dtype": state, "weight": torch.bfloat16}
    interpreted(same_as_torch, **options)


def extremes(state):
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1e-30, 1e-20, 1.0, -1e19, 1e25, 3e38, -3e38, 65504.0]).repeat(20)
    outcomes = []
    for kernel in ("triton", "torch"):
        param = torch.nn.Parameter(values.clone())
        optimizer = shardopt.AdEMAMix([("p", param)], kernel=kernel, state_dtype=state, lr=1e-3)
        for _ in range(2):
            param.grad = values.flip(0).clone()
            optimizer.step()
        outcomes.append([{"weight": param.detach(), **{k: optimizer.state[param][k] for k in ("m1", "m2", "nu")}}])
    assert_same(*outcomes)


@pytest.mark.parametrize("state", STATES)
def test_extreme_values(interpreted, state):
    interpreted(extremes, state)


def edges():
    """NaN, infinities, values next to them, and betas below a half."""
    for state in STATES:
        ours, plain = (nonfinite_values(kernel, state) for kernel in ("triton", "torch"))
        if state.startswith("block"):
            assert_same(*([{k: v for k, v in found[0].items() if k != "step"}] for found in (ours, plain)))
        for key in ours[1]:
            number = plain[1][key].isfinite()
            assert torch.equal(ours[1][key].isfinite(), number), f"{state} {key}"
            assert torch.equal(ours[1][key][number], plain[1][key][number]), f"{state} {key}"
        stays_finite("triton", state)
    for betas in ((0.9, 0.0, 0.999), (0.0, 0.0, 0.0), (0.3, 1e-9, 0.2)):
        ours, plain = (small_beta_run(kernel, betas) for kernel in ("triton", "torch"))
        assert torch.equal(ours[0], plain[0])
        assert torch.equal(ours[1], plain[1])


def test_edges_of_the_formats_and_small_betas(interpreted):
    interpreted(edges)


def many_tensors():
    """14 tensors of one kind, of which some have no gradient in the second step, and one of another kind."""
    from shardopt.optim.kernels import triton as kernel

    launches, tables = [], []
    step_kernel, fill = kernel._step_kernel, kernel._fill

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid[0])
            return step_kernel[grid]

    def seen(out, raw, table):
        tables.append((table, table.cache["triton_launches"]))
        fill(out, raw, table)

    kernel._step_kernel, kernel._fill = Counted(), seen
    try:
        outcomes = []
        for name in ("triton", "torch"):
            torch.manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(1 + 120 * i)) for i in range(14)]
            params.append(torch.nn.Parameter(torch.randn(50).bfloat16()))
            optimizer = shardopt.AdEMAMix([(str(i), p) for i, p in enumerate(params)], kernel=name, state_dtype="bf16")
            for step in range(3):
                for i, param in enumerate(params):
                    param.grad = None if step == 1 and i % 3 == 0 else torch.randn(param.shape).to(param.dtype)
                optimizer.step()
            outcomes.append([{"weight": p.detach(), "m2": optimizer.state[p]["m2"]} for p in params])
            assert [int(optimizer.state[p]["step"]) for p in params[:2]] == [2, 3]
    finally:
        kernel._step_kernel, kernel._fill = step_kernel, fill
    assert_same(*outcomes)
    assert launches == [sum(-(-(1 + 120 * i) // kernel._BLOCK) for i in range(14)), 1] * 3
    assert all(table is tables[0][0] and made is tables[0][1] for table, made in tables), "the map was built again"


def test_one_launch_for_all_tensors_of_a_kind_and_a_map_that_is_built_once(interpreted):
    interpreted(many_tensors)


def far(state):
    """Elements that lie beyond 2^31 of a row: its pointers set back, its blocks counted from there."""
    from shardopt.optim.kernels import triton as kernel

    offset, made = (1 << 31) + 4096, kernel._launches

    def shifted(table, raw, capturing):
        launches = made(table, raw, capturing)
        rows = table.rows
        size = {"fp32": 4, "bf16": 2, "block8": 1}[state]
        for field, step in [("weight", 4), ("grad", 4), ("m1", size), ("m2", size), ("nu", size)]:
            rows[field] -= np.uint64(offset * step)
        if state == "block8":
            for field in ("m1_scale", "m2_scale", "nu_scale"):
                rows[field] -= np.uint64(offset // 128 * 4)
        rows["length"] += offset
        rows["start"] -= offset
        table.cache["triton_first"] = np.full(len(rows), -offset // kernel._BLOCK)
        return launches

    layout = Layout.contiguous("p0", (1 << 34,), (1 << 33) + 1, 1300)
    options = {"sizes": (1300,), "layouts": [layout], "state_dtype": state}
    plain = run("torch", steps=1, **options)
    kernel._launches = shifted
    try:
        assert_same(run("triton", steps=1, **options), plain)
    finally:
        kernel._launches = made


@pytest.mark.parametrize("state", ["fp32", "bf16", "block8"])
def test_elements_beyond_two_to_the_31(interpreted, state):
    interpreted(far, state)


STALE = ("lr", "beta3", "alpha", "m1_factor", "m2_factor", "eps", "eps_root", "decay", "step")


def captured(start, options):
    """One step as a replayed graph takes it: scalars from the device's counts, while those of the host are wrong."""
    from shardopt.optim.kernels.triton import TritonKernel

    outcomes = []
    run_kernel = TritonKernel.run
    for on_device in (True, False):
        torch.manual_seed(0)
        lr = torch.tensor(0.02)
        params = [torch.nn.Parameter(torch.randn(n)) for n in (3, 200)]
        groups = [
            {"params": [("a", params[0])]},
            {"params": [("b", params[1])], "lr": 0.01, "weight_ema": None, "alpha_warmup": None},
        ]
        optimizer = shardopt.AdEMAMix(groups, lr=lr, kernel="triton", capturable=True, **options)
        optimizer.init_state()
        for state in optimizer.state.values():
            state["step"].fill_(start)
        if start:
            optimizer.state[params[0]]["schedule_step"] = torch.tensor(start - 3)

        def stale(self, table, optimizer=optimizer, options=options):
            table.capturable = True
            table.describe_schedules(optimizer.param_groups)
            table.rows["lr"][0] = 7.0
            for field in STALE[1:]:
                table.rows[field] = 3
            table.rows["weight_ema_rate"] = 1.0 - options.get("weight_ema", 1.0)
            run_kernel(self, table)

        TritonKernel.run = stale if on_device else run_kernel
        try:
            for step in range(6):
                lr.fill_(0.02 / (step + 1))
                for param in params:
                    param.grad = torch.randn(param.shape)
                optimizer.step()
        finally:
            TritonKernel.run = run_kernel
        kept = [{k: v for k, v in optimizer.state[p].items() if "step" not in k} for p in params]
        outcomes.append([{"weight": p.detach(), **state} for p, state in zip(params, kept, strict=True)])
    assert_same(*outcomes)


@pytest.mark.parametrize("start", [0, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {"alpha_warmup": 4, "beta3_warmup": 5, "state_dtype": "bf16", "weight_ema": 0.9},
        {"betas": (0.0, 0.9999, 0.99999), "beta3_warmup": 1005, "alpha_warmup": 1003},
        {"betas": (0.9, 0.0, 0.0), "state_dtype": {"m2": "bf16"}},
        {"betas": (0.9, 0.99, 0.3)},  # only beta3 is small, for good or at first
        {"betas": (0.0, 0.99, 0.9), "beta3_warmup": 20},
    ],
    ids=str,
)
def test_captured_steps_take_their_scalars_from_the_device(interpreted, start, options):
    interpreted(captured, start, options)


# -- by the compiler, for GPUs that need not be there ----------------------------------------------------------------


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """scripts/compile_kernels.py, without what an earlier run has compiled."""
    import triton

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    return script("compile_kernels")


def script(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "scripts" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def found_wrong(compiler, kind, sm):
    """Inexact or contracted arithmetic, narrow loads, spilled registers of a kind compiled for a GPU."""
    built = compiler.compile_step(kind, sm) if kind else compiler.compile_scalars(sm)
    assert built.cubin_bytes > 1000
    return list(compiler.faults(built, kind))


def test_compiles_to_wide_loads_and_exact_arithmetic(compiler):
    alike = {"m1": "bf16", "m2": "bf16", "nu": "bf16"}
    assert found_wrong(compiler, compiler.Kind(), 80) == []
    assert found_wrong(compiler, compiler.Kind(**alike), 90) == []
    assert found_wrong(compiler, compiler.Kind(nu="block8"), 100) == []
    assert found_wrong(compiler, None, 100) == []


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90, 100])
def test_every_kind_compiles_to_wide_loads_and_exact_arithmetic(compiler, sm):
    wrong = {str(kind): found_wrong(compiler, kind, sm) for kind in compiler.kinds()}
    assert {name: text for name, text in wrong.items() if text} == {}
    assert found_wrong(compiler, None, sm) == []


def test_what_the_compiler_may_not_do_is_found(compiler):
    """A narrow load, a contracted multiply-add, subnormals as zeros, and registers in memory."""
    lines = ["ld.global.v4.b32 { %r1 }, [ %rd1 ];"] * 2 + ["@%p1 ld.global.v4.b32 { %r1 }, [ %rd1 ];"]
    lines += ["st.global.b8 [ %rd1 ], { %rs1 };", "@%p1 st.global.b8 [ %rd1 ], { %rs1 };"]
    lines += ["div.rn.f32 %f1, %f2, %f3;", "sqrt.rn.f32 %f1, %f2;"] * 16
    lines += ["fma.rn.f32 %f1, %f2, %f3, %f4;", "mul.ftz.f32 %f1, %f2, %f3;"]
    built = compiler.Compiled("made up", 90, "\n".join(lines), 1, registers=255, spilled=64, shared=0)
    assert list(compiler.faults(built, compiler.Kind())) == [
        "64 bytes of registers are spilled",
        "inexact arithmetic: mul.ftz.f32",
        "a contracted multiply-add",
        "1 loads and stores of less than 4 bytes",
        "wide loads and stores move 8 bytes per element, the formats 36",
    ]


def test_compiled_kinds_have_the_bytes_that_the_documentation_counts(compiler):
    moved = {str(kind): kind.bytes_moved() for kind in compiler.kinds()}
    assert moved["fp32, state fp32"] == 36
    assert moved["fp32, state bf16"] == 24
    assert moved["bf16, state bf16"] == 18
    assert moved["bf16, state bf16, master split"] == 22
    assert moved["fp32, state block8"] == 18


def refusals():
    with pytest.raises(InputError, match="the Triton kernel is for cuda tensors, the parameter is on cpu"):
        kernels.choose("triton", torch.ones(3))


def test_refuses_what_it_cannot_take(interpreted):
    refusals()
    interpreted(refuses_doubles)


def refuses_doubles():
    with pytest.raises(InputError, match=r"the Triton kernel takes fp32, bf16 and fp16 weights, not torch\.float64"):
        kernels.choose("triton", torch.ones(3).double())


# -- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_kernels():
    return script("gpu_kernels")


@pytest.mark.cuda
@needs_gpu
def test_the_compiled_kernel_has_the_bits_of_torch(gpu_kernels):
    assert [row for row in gpu_kernels.formats() if not row[1]] == []


@pytest.mark.cuda
@needs_gpu
def test_replay_n_equals_eager_step_n(gpu_kernels):
    assert [row for row in gpu_kernels.graphs() if not row[1]] == []


@pytest.mark.cuda
@needs_gpu
def test_five_hundred_tensors_cost_one_launch(gpu_kernels):
    assert [row for row in gpu_kernels.launches() if not row[1]] == []
