"""The Triton kernel: its arithmetic in the interpreter, its instructions from the compiler, and both on a GPU.

TRITON_INTERPRET is read when triton is imported, so that the two kinds of test live in processes of their own.
"""

import importlib.util
import multiprocessing
import os
import re
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import shardopt
from shardopt.errors import InputError
from shardopt.optim import kernels
from shardopt.optim.schema import FLAG_BITS
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
SIZES = (1, 130, 1300)  # one element, a partial block of a scale, a whole program and a part


def start_worker(interpret: str) -> None:
    os.environ["TRITON_INTERPRET"] = interpret
    torch.set_num_threads(1)
    # numpy's, where a branch that is not taken divides by zero: Triton's where() computes both
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")


def worker(interpret: bool) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, start_worker, ("1" if interpret else "0",))


@pytest.fixture(scope="module")
def interpreted():
    with worker(interpret=True) as pool:
        yield lambda body, *args, **options: pool.submit(body, *args, **options).result(timeout=200)


@pytest.fixture(scope="module")
def compiled():
    with worker(interpret=False) as pool:
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


@pytest.mark.parametrize("state", ["bf16", "block8"])
def test_indices_beyond_32_bits(interpreted, state):
    # The keys change in the middle of a program; and a row that does not begin on 16 bytes.
    layout = Layout("p0", (3 << 32,), (Range((1 << 33) - 601, 1, 1300),))
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
    """40 tensors of one kind, of which some have no gradient in the second step, and one of another kind."""
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
            params = [torch.nn.Parameter(torch.randn(1 + 40 * i)) for i in range(40)]
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
    assert launches == [sum(-(-(1 + 40 * i) // 1024) for i in range(40)), 1] * 3
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
        table.cache["triton_first"] = np.full(len(rows), -offset // 1024)
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
    ],
    ids=str,
)
def test_captured_steps_take_their_scalars_from_the_device(interpreted, start, options):
    interpreted(captured, start, options)


# -- by the compiler, for GPUs that need not be there ----------------------------------------------------------------


ALIGNED = 1 << 6


def instructions(capability, cache, **codes):
    """PTX instructions of a step, counted."""
    os.environ["TRITON_CACHE_DIR"] = cache
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from shardopt.optim.kernels.triton import _OPTIONS, _step_kernel, kind_of

    constants = {"KIND": kind_of(**codes), "BLOCK": 1024}
    names = _step_kernel.arg_names
    signature = {name: {"table": "*i64", "owners": "*i32"}.get(name, "constexpr") for name in names}
    source = ASTSource(
        _step_kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]},
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=_OPTIONS)
    return Counter(re.findall(r"^\s*(?:@\S+\s+)?([a-z][\w.:]*)\s", built.asm["ptx"], re.MULTILINE))


PLAIN = {"weight_type": 1, "grad_type": 1, "m1_format": 1, "m2_format": 1, "nu_format": 1, "flags": ALIGNED}
BF16 = PLAIN | {"m1_format": 2, "m2_format": 2, "nu_format": 2}
MIXED = PLAIN | {"weight_type": 2, "grad_type": 5, "m1_format": 4, "m2_format": 3, "nu_format": 4}
MIXED |= {"weight_ema_format": 4, "master_kind": 2, "flags": ALIGNED | FLAG_BITS["yogi"]}


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_to_wide_loads_and_exact_arithmetic(compiled, tmp_path, capability):
    for codes in (PLAIN, BF16, MIXED):
        found = compiled(instructions, capability, str(tmp_path), **codes)
        inexact = [name for name in found if ".ftz" in name or ".approx" in name or ".full" in name]
        assert not inexact, inexact
        assert not [name for name in found if name.startswith(("fma.", "mad.f", "mad.rn"))], "a contracted multiply-add"
        # eight elements a thread in each of the two branches
        assert found["div.rn.f32"] >= 16
        assert found["sqrt.rn.f32"] >= 16
        wide = sum(count for name, count in found.items() if re.match(r"(ld|st)\.global.*\.v4\.b32", name))
        expected = {id(PLAIN): 5 * 2 + 4 * 2, id(BF16): 2 * 2 + 3 + 2 + 3}
        assert wide >= expected.get(id(codes), 1)


def refusals():
    with pytest.raises(InputError, match="the Triton kernel is for cuda tensors, the parameter is on cpu"):
        kernels.choose("triton", torch.ones(3))


def test_refuses_what_it_cannot_take(compiled, interpreted):
    compiled(refusals)
    interpreted(refuses_doubles)


def refuses_doubles():
    with pytest.raises(InputError, match=r"the Triton kernel takes fp32, bf16 and fp16 weights, not torch\.float64"):
        kernels.choose("triton", torch.ones(3).double())


# -- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_check():
    path = Path(__file__).parents[2] / "scripts" / "gpu_check.py"
    spec = importlib.util.spec_from_file_location("gpu_check", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.cuda
@needs_gpu
def test_the_compiled_kernel_has_the_bits_of_torch(gpu_check):
    assert [row for row in gpu_check.formats() if not row[1]] == []


@pytest.mark.cuda
@needs_gpu
def test_replay_n_equals_eager_step_n(gpu_check):
    assert [row for row in gpu_check.graphs() if not row[1]] == []


@pytest.mark.cuda
@needs_gpu
def test_five_hundred_tensors_cost_one_launch(gpu_check):
    assert [row for row in gpu_check.launches() if not row[1]] == []


def test_gpu_check_says_that_there_is_no_gpu(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main() == 1
    assert "no CUDA device" in capsys.readouterr().err
