"""Every kernel against the reference: the same bits, whatever is stored how."""

import ctypes
import itertools
import os
import shlex
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import shardopt
from shardopt.errors import InputError
from shardopt.optim import kernels, schema, states
from shardopt.optim.kernels import cpu
from shardopt.slices import Layout, Range

# Not multiples of a tile, a vector or a block; one below them all.
SIZES = (1, 127, 40_001)


def run(kernel: str, *, weight=torch.float32, grad=None, steps=2, sizes=SIZES, layouts=None, lr=1e-2, **options):
    """Weights and state after some steps on fixed data."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(weight)) for n in sizes]
    optimizer = shardopt.AdEMAMix(
        [(f"p{i}", p) for i, p in enumerate(params)], lr=lr, weight_decay=0.1, kernel=kernel, **options
    )
    for param, layout in zip(params, layouts or (), strict=False):
        optimizer.set_layout(param, layout)
    for _ in range(steps):
        for param in params:
            scale = torch.randn(param.shape, generator=generator).exp()
            value = (torch.randn(param.shape, generator=generator) * scale).to(grad or weight)
            if grad is None or grad == weight:
                param.grad = value
            else:
                param.grad_dtype = grad
                param.grad = value
        optimizer.step()
    assert optimizer.kernel == kernel
    return [{"weight": p.detach()} | {k: v for k, v in optimizer.state[p].items() if k != "step"} for p in params]


def same_bits(a, b) -> bool:
    if not isinstance(a, torch.Tensor):
        return a == b
    return a.dtype == b.dtype and np.array_equal(*(t.contiguous().view(-1).view(torch.uint8).numpy() for t in (a, b)))


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert same_bits(a[key], b[key]), f"{key}: {(a[key] != b[key]).sum()} of {a[key].numel()} differ"


STATES = ("fp32", "bf16", "block16", "block8")
WEIGHTS = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.bfloat16, "fp32"),
    (torch.bfloat16, "split"),
    (torch.float16, "fp32"),
]


@pytest.mark.parametrize(("weight", "master"), WEIGHTS)
@pytest.mark.parametrize("state", STATES)
def test_c_equals_torch_in_every_format(state, weight, master):
    options = {"state_dtype": state, "master_weights": master, "weight": weight}
    assert_same(run("c", **options), run("torch", **options))


@pytest.mark.parametrize(
    "options",
    [
        {"betas": (0.0, 0.99, 0.9999), "state_dtype": "bf16"},
        {"second_moment": "yogi"},
        {"second_moment": "yogi", "state_dtype": "bf16", "maximize": True},
        {"maximize": True, "alpha_warmup": 7, "beta3_warmup": 9},
        {"weight_ema": 0.99, "state_dtype": {"m2": "bf16", "weight_ema": "bf16"}},
        {"weight_ema": 0.99, "state_dtype": "block8"},
        {"weight_ema": 0.99, "state_dtype": "bf16"},
        {"weight_ema": 0.99},
        {"eps_root": 1e-3, "eps": 0.0, "alpha": 0.0},
        {"lr": 0.0, "state_dtype": "bf16", "weight_ema": 0.9},
        {"grad": torch.bfloat16, "state_dtype": "bf16"},
        {"grad": torch.float16},
        {"grad": torch.float32, "weight": torch.bfloat16, "state_dtype": "block16"},
        {"state_dtype": {"nu": "bf16", "m1": "block8", "m2": "block16"}},
    ],
    ids=str,
)
def test_c_equals_torch_with_every_option(options):
    assert_same(run("c", **options), run("torch", **options))


def test_extreme_values_keep_their_bits():
    # Subnormals, huge values whose square overflows, signed zeros: each kernel does the same with them.
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1e-30, 1e-20, 1.0, -1e19, 1e25, 3e38, -3e38, 65504.0]).repeat(30)
    outcomes = []
    for kernel, state in itertools.product(("c", "torch"), ("fp32", "bf16", "block16")):
        param = torch.nn.Parameter(values.clone())
        optimizer = shardopt.AdEMAMix([("p", param)], kernel=kernel, state_dtype=state, lr=1e-3)
        for _ in range(3):
            param.grad = values.flip(0).clone()
            optimizer.step()
        outcomes.append(
            [{"weight": param.detach(), **{k: v for k, v in optimizer.state[param].items() if k != "step"}}]
        )
    for c, plain in zip(outcomes[:3], outcomes[3:], strict=True):
        assert_same(c, plain)
    for outcome in outcomes:  # a square beyond fp32 is held below infinity
        assert outcome[0]["weight"].isfinite().all()


@pytest.mark.parametrize("kernel", ["c", "torch"])
@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_any_cut_of_a_parameter_gives_the_bits_of_the_whole(kernel, state):
    size = 9001
    whole = run(kernel, sizes=(size,), state_dtype=state, weight=torch.bfloat16, steps=1)[0]
    generator = torch.Generator().manual_seed(0)
    weight, grad = torch.randn(size, generator=generator).bfloat16(), None
    scale = torch.randn(size, generator=generator).exp()
    grad = (torch.randn(size, generator=generator) * scale).bfloat16()
    # Two cuts that two ranks may hold, and a flat partition that holds the pieces in another order with padding.
    for cuts in ([(0, 4500), (4500, size)], [(0, 1), (1, 129), (129, 7000), (7000, size)]):
        for first, last in cuts:
            param = torch.nn.Parameter(weight[first:last].clone())
            optimizer = shardopt.AdEMAMix([("p0", param)], lr=1e-2, weight_decay=0.1, kernel=kernel, state_dtype=state)
            optimizer.set_layout(param, Layout.contiguous("p0", (size,), first, last - first))
            param.grad = grad[first:last].clone()
            optimizer.step()
            assert same_bits(param.detach(), whole["weight"][first:last])
            assert same_bits(optimizer.state[param]["nu"], whole["nu"][first:last])
    flat = torch.nn.Parameter(torch.cat([weight[6000:], weight[:1000], torch.ones(7).bfloat16()]))
    optimizer = shardopt.AdEMAMix([flat], lr=1e-2, weight_decay=0.1, kernel=kernel, state_dtype=state)
    parts = [Layout("p0", (size,), (Range(6000, 0, 3001),)), Layout("p0", (size,), (Range(0, 3001, 1000),))]
    optimizer.set_layout(flat, parts)
    flat.grad = torch.cat([grad[6000:], grad[:1000], torch.ones(7).bfloat16()])
    optimizer.step()
    assert same_bits(flat.detach()[:3001], whole["weight"][6000:])
    assert same_bits(optimizer.state[flat]["m2"][3001:4001], whole["m2"][:1000])
    assert torch.equal(flat.detach()[4001:], torch.ones(7).bfloat16())  # padding is left alone


@pytest.mark.parametrize("state", ["block16", "block8"])
def test_c_equals_torch_where_a_tensor_holds_several_ranges_in_blocks(state):
    """Each range's blocks and scales begin where those of the range before end."""
    layout = Layout("p0", (9001,), (Range(0, 0, 1000), Range(5000, 1000, 300)))
    both = [run(kernel, sizes=(1300,), layouts=[layout], state_dtype=state) for kernel in ("c", "torch")]
    assert_same(*both)


# Columns of a weight of rows of these lengths: whole blocks, odd ones, of an odd stride, and where the keys change.
COLUMNS = [
    Layout("p0", (40, 3 * 512), (Range(512, 0, 40 * 512, 512, 3 * 512),)),
    Layout("p0", (400, 3 * 128 + 1), (Range(128, 0, 400 * 128, 128, 3 * 128 + 1),)),
    Layout("p0", (4000, 77), (Range(13, 0, 4000 * 21, 21, 77),)),  # more than a tile and a thread's part
    Layout("p0", (9000, 2), (Range(1, 0, 9000, 1, 2),)),
    Layout("p0", (6, 40, 50), tuple(Range(2000 * i + 8, 40 * i, 40, 2, 50) for i in range(6))),
    Layout("p0", (3 << 16, 1 << 16), (Range((1 << 33) - (1 << 17) + 384, 0, 4 * 384, 384, 1 << 16),)),
]


@pytest.mark.parametrize("layout", COLUMNS, ids=lambda layout: f"{layout.ranges[0].row} of {layout.shape[-1]}")
@pytest.mark.parametrize("state", STATES)
def test_columns_have_the_bits_of_torch_and_of_the_whole(state, layout):
    options = {"sizes": (layout.local_numel,), "weight": torch.bfloat16, "state_dtype": state, "steps": 2}
    ours = run("c", layouts=[layout], **options)
    assert_same(ours, run("torch", layouts=[layout], **options))
    if state.startswith("block"):
        return
    rows = [row for r in layout.ranges for row in r.rows()]
    assert_same(ours, run("c", layouts=[Layout("p0", layout.shape, tuple(rows))], **options))


def test_indices_beyond_32_bits_have_bits_of_their_own():
    # A shard in the middle of a parameter of 3 * 2^32 elements, across 2^32 words, where keys change; of odd ends.
    start, length = (1 << 33) - 3001, 6001
    layout = Layout.contiguous("p0", (3 << 32,), start, length)
    both = [
        run(k, sizes=(length,), layouts=[layout], state_dtype="bf16", weight=w, steps=2)
        for w in (torch.float32, torch.bfloat16)
        for k in ("c", "torch")
    ]
    assert_same(both[0], both[1])
    assert_same(both[2], both[3])
    tiled = [run(k, sizes=(length,), layouts=[layout], state_dtype="block8", steps=2) for k in ("c", "torch")]
    assert_same(*tiled)
    even = Layout.contiguous("p0", (3 << 32,), start + 1, length)  # words begin with the first element
    assert_same(*(run(k, sizes=(length,), layouts=[even], state_dtype="bf16", steps=1) for k in ("c", "torch")))
    low = Layout.contiguous("p0", (3 << 32,), start - (1 << 32), length)
    other = run("c", sizes=(length,), layouts=[low], state_dtype="bf16", steps=2)
    assert not same_bits(other[0]["m2"], both[0][0]["m2"])


@pytest.mark.parametrize("kernel", ["c", "torch"])
@pytest.mark.parametrize("state", ["fp32", "bf16", "block8"])
def test_strided_weights_and_gradients(kernel, state):
    """Transposed and channels-last weights get the numbers of their contiguous twins."""
    torch.manual_seed(0)
    outcomes = []
    weight, grad = torch.randn(40, 33, 5, 5), torch.randn(40, 33, 5, 5)
    for weight_format, grad_format in itertools.product((torch.contiguous_format, torch.channels_last), repeat=2):
        param = torch.nn.Parameter(weight.clone(memory_format=weight_format))
        optimizer = shardopt.AdEMAMix([("p", param)], kernel=kernel, state_dtype=state, weight_ema=0.9)
        for _ in range(2):
            param.grad = grad.clone(memory_format=grad_format)
            optimizer.step()
        assert param.stride() == weight.clone(memory_format=weight_format).stride()
        assert optimizer.state[param]["m2"].is_contiguous()
        outcomes.append([{"weight": param.detach(), "m2": optimizer.state[param]["m2"]}])
    for other in outcomes[1:]:
        assert_same(outcomes[0], other)


def test_strided_weights_are_copied_in_parts(monkeypatch):
    monkeypatch.setattr("shardopt.optim.plan._TILE", 500)
    outcomes = []
    torch.manual_seed(0)
    weight, grad = torch.randn(70, 90), torch.randn(70, 90)
    for transposed in (False, True):
        param = torch.nn.Parameter(weight.t().contiguous().t() if transposed else weight.clone())
        optimizer = shardopt.AdEMAMix([("p", param)], state_dtype="bf16", kernel="torch")
        param.grad = grad.clone()
        optimizer.step()
        outcomes.append([{"weight": param.detach(), "nu": optimizer.state[param]["nu"]}])
    assert_same(*outcomes)


LAID_OUT = {
    "in order": lambda x: x.clone(),
    "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "permuted": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "with gaps": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "rows with gaps": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
}


@pytest.mark.parametrize(
    ("weight", "master"), [(torch.float32, None), (torch.bfloat16, "split"), (torch.float16, "fp32")]
)
@pytest.mark.parametrize("state", ["bf16", "block8"])
def test_any_strides_in_one_table_give_the_numbers_of_contiguous_tensors(state, weight, master):
    """The layout of a gradient is another at each step, and a range does not begin with the tensor."""
    torch.manual_seed(0)
    shape = (7, 6, 33)
    values, grads = torch.randn(shape).to(weight), torch.randn(3, *shape).to(weight)
    layout = Layout("p", (9001,), (Range(40, 5, 700), Range(2001, 900, 301)))
    pairs = list(itertools.product(LAID_OUT, repeat=2))
    params = [torch.nn.Parameter(LAID_OUT[of_weight](values)) for of_weight, _ in pairs]
    optimizer = shardopt.AdEMAMix(
        [{"params": [(str(i), p)]} for i, p in enumerate(params)], state_dtype=state, master_weights=master
    )
    for param in params:
        optimizer.set_layout(param, layout)
    for step in range(3):
        for param, (_, of_grad) in zip(params, pairs, strict=True):
            laid_out = [*LAID_OUT][([*LAID_OUT].index(of_grad) + min(step, 1)) % len(LAID_OUT)]
            if step == 2:  # the same tensors are strided as before, but otherwise
                laid_out = {"transposed": "permuted", "permuted": "transposed"}.get(laid_out, laid_out)
            param.grad = LAID_OUT[laid_out](grads[step])
        optimizer.step()
    assert len(optimizer._plan._tables) == 1
    for param in params[1:]:
        assert_same(
            [{"weight": params[0].detach(), **optimizer.state[params[0]]}],
            [{"weight": param.detach(), **optimizer.state[param]}],
        )


def test_storage_that_moves_between_steps_is_noticed():
    param, twin = (torch.nn.Parameter(torch.ones(100)) for _ in range(2))
    moved, still = (shardopt.AdEMAMix([("p", p)], lr=0.1) for p in (param, twin))
    for step in range(3):
        if step == 1:
            param.data = param.data.clone()  # what gathering into a flat buffer does
            moved.state[param]["m2"].data = moved.state[param]["m2"].clone()
        if step == 2:
            moved.state[param]["nu"] = moved.state[param]["nu"].clone()
        for p, optimizer in ((param, moved), (twin, still)):
            p.grad = torch.full((100,), 0.5)
            optimizer.step()
    assert same_bits(param.detach(), twin.detach())
    assert same_bits(moved.state[param]["nu"], still.state[twin]["nu"])


def test_kernel_is_visible_and_can_be_forced(monkeypatch):
    param = torch.nn.Parameter(torch.ones(3))
    assert shardopt.AdEMAMix([param]).kernel == "c"
    assert shardopt.AdEMAMix([param], kernel="torch").kernel == "torch"
    assert shardopt.AdEMAMix([torch.nn.Parameter(torch.ones(3).double())]).kernel == "torch"
    with pytest.raises(InputError, match="kernel must be one of auto, c, triton, torch, got 'cuda'"):
        shardopt.AdEMAMix([param], kernel="cuda")
    with pytest.raises(InputError, match="kernel='c' cannot be used: the C kernel takes fp32, bf16 and fp16"):
        _ = shardopt.AdEMAMix([torch.nn.Parameter(torch.ones(3).double())], kernel="c").kernel


@pytest.fixture
def fresh_kernels():
    kernels._load.cache_clear()
    kernels._warn_once.cache_clear()
    yield
    kernels._load.cache_clear()
    kernels._warn_once.cache_clear()


@pytest.fixture
def quick_build(monkeypatch, tmp_path_factory):
    """A compiler that hands out this machine's library, where its code is not looked at: no seconds of compiling."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("cc", "gcc"):
        script = folder / name
        script.write_text(
            "#!/bin/sh\n"
            'case "$*" in *--version) echo "quick 1"; exit;; esac\n'
            'cat > /dev/null; while [ "$1" != -o ]; do shift; done\n'
            f'cp {shlex.quote(str(cpu.build()))} "$2"\n'
        )
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_without_a_compiler_torch_takes_over_with_one_warning(fresh_kernels, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    param = torch.nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="c kernel is not available, using plain torch: no C compiler"):
        assert shardopt.AdEMAMix([param]).kernel == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert shardopt.AdEMAMix([param]).kernel == "torch"
    with pytest.raises(InputError, match="no C compiler found"):
        _ = shardopt.AdEMAMix([param], kernel="c").kernel


def test_a_compiler_that_fails_is_named(fresh_kernels, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(InputError, match="the C compiler 'false' does not run"):
        cpu.build()


def test_the_build_is_cached_and_only_ours_is_loaded(quick_build, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = cpu.build()
    assert library.parent == tmp_path / "shardopt"
    assert library.parent.stat().st_mode & 0o777 == 0o700
    written = library.stat().st_mtime_ns
    assert cpu.build() == library
    assert library.stat().st_mtime_ns == written
    assert list(library.parent.iterdir()) == [library]  # nothing half-built is left
    library.chmod(0o722)
    with pytest.raises(InputError, match="not a file that only this user can write"):
        cpu.build()
    library.unlink()
    with ThreadPoolExecutor(4) as ranks:  # as many build at once as there are ranks on a machine
        assert set(ranks.map(lambda _: cpu.build(), range(4))) == {library}
    assert list(library.parent.iterdir()) == [library]
    library.parent.chmod(0o777)
    with pytest.raises(InputError, match=r"other users can write to .* chmod go-w"):
        cpu.build()
    library.parent.chmod(0o700)
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with pytest.raises(InputError, match="not a folder of this user"):
        cpu.build()


def test_source_machine_and_compiler_choose_the_file(quick_build, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = cpu.build()
    monkeypatch.setattr(cpu, "_processor", lambda: "another machine")
    assert cpu.build() != first


def test_formats_agree_on_their_numbers():
    formats = schema.formats_of("bf16")
    assert {key: fmt.name for key, fmt in formats.items()} == dict.fromkeys(("m1", "m2", "nu", "weight_ema"), "bf16")
    assert schema.formats_of({"m2": "block8"})["nu"].name == "fp32"


def test_fp16_without_float16_in_the_compiler(fresh_kernels, monkeypatch, tmp_path):
    """gcc before 12 on x86 has none: fp16 was read from uninitialised memory there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "gcc -U__FLT16_MAX__")
    options = {"weight": torch.float16, "master_weights": "fp32", "sizes": (1000,)}
    assert_same(run("c", **options), run("torch", **options))
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)  # as gradients: all of fp16
    moments = []
    for kernel in ("c", "torch"):
        param = torch.nn.Parameter(torch.zeros(1 << 16))
        param.grad_dtype = torch.float16
        param.grad = every.clone()
        optimizer = shardopt.AdEMAMix([("p", param)], kernel=kernel)
        optimizer.step()
        moments.append(optimizer.state[param]["m1"])
    number = ~every.isnan()
    assert same_bits(moments[0][number], moments[1][number])
    assert moments[0][~number].isnan().all()


@pytest.mark.parametrize("narrower", ["-U__AVX512BW__", "-U__AVX512BW__ -U__AVX2__"])
def test_narrower_vectors_have_the_bits_of_torch(narrower, fresh_kernels, monkeypatch, tmp_path):
    """As the source is compiled for processors without these instructions."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", f"gcc {narrower}")
    for state, (weight, master) in itertools.product(STATES, WEIGHTS):
        options = {
            "state_dtype": state,
            "master_weights": master,
            "weight": weight,
            "sizes": (1, 700),
            "weight_ema": 0.9,
        }
        assert_same(run("c", **options), run("torch", **options))
    layout = Layout.contiguous("p0", (3 << 32,), (1 << 33) - 301, 601)  # the keys change among these
    options = {"sizes": (601,), "layouts": [layout], "state_dtype": {"m2": "bf16", "nu": "block8"}}
    assert_same(run("c", **options), run("torch", **options))


def test_compiler_flags_choose_the_library(quick_build, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "gcc")
    plain = cpu.build()
    monkeypatch.setenv("CC", "gcc -DSOMETHING=1")
    assert cpu.build() != plain


def one_warning(match):
    """The C kernel is in use all the same, and said once why it is not the cached one."""
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = shardopt.AdEMAMix([param], kernel="c")
    with pytest.warns(UserWarning, match=match) as said:
        optimizer.step()
    assert len([w for w in said if "shardopt" in str(w.message)]) == 1
    assert param.detach().lt(1.0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_damaged_library_is_left_alone_with_one_warning(fresh_kernels, quick_build, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = cpu.build()
    cut = library.read_bytes()[:5000]  # the linker may crash on such a one
    library.write_bytes(cut)
    one_warning("is damaged: remove it")
    assert library.read_bytes() == cut


def test_cache_folder_that_cannot_be_used_falls_back_with_one_warning(
    fresh_kernels, quick_build, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self")
    one_warning("cannot make the cache folder")
    kernels._load.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    link, load = os.link, ctypes.CDLL

    def denied(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", denied)  # as some network file systems have it
    one_warning(r"cannot write to the cache folder .* \(Operation not permitted\)")
    kernels._load.cache_clear()
    monkeypatch.setattr(os, "link", link)

    def noexec(path, *args):
        if str(path).startswith(str(tmp_path)):
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path, *args)

    monkeypatch.setattr(ctypes, "CDLL", noexec)
    one_warning("failed to map segment")


def test_publishing_keeps_the_library_that_another_machine_has_mapped(quick_build, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = cpu.build()
    code = first.read_bytes()
    first.unlink()
    compile_it = subprocess.run

    def slowly(command, **options):  # another machine is done first
        done = compile_it(command, **options)
        if "-o" in command and not first.exists():
            first.touch(mode=0o700)
            first.write_bytes(code)
        return done

    monkeypatch.setattr(subprocess, "run", slowly)
    compiled = cpu.build()
    inode = compiled.stat().st_ino
    with compiled.open("rb") as mapped:
        assert os.fstat(mapped.fileno()).st_ino == inode
        assert os.fstat(mapped.fileno()).st_nlink == 1  # not replaced by a link to ours
    assert list(first.parent.iterdir()) == [first]
    assert compiled.read_bytes() == code


# -- values at the edges of the formats -------------------------------------------------------------------------------


def nonfinite_values(kernel, state):
    """State after a step with a NaN and an infinity in blocks of their own."""
    param = torch.nn.Parameter(torch.ones(500))
    optimizer = shardopt.AdEMAMix([("p", param)], kernel=kernel, state_dtype=state, lr=1e-3)
    param.grad = torch.linspace(-1, 1, 500)
    param.grad[5], param.grad[300] = torch.nan, torch.inf
    optimizer.step()
    return optimizer.state[param], {piece.kind: states.read_slice(piece) for piece in states.state_slices(optimizer)}


@pytest.mark.parametrize("kernel", ["c", "torch"])
@pytest.mark.parametrize("state", STATES)
def test_nonfinite_gradient_makes_nonfinite_state(kernel, state):
    """A NaN in block16 became 1.7e38, and training went on."""
    stored, values = nonfinite_values(kernel, state)
    assert values["m1"][5].isnan()
    assert values["nu"][5].isnan()
    assert not values["m2"][300].isfinite()
    for value in values.values():  # the blocks beside are as they were
        assert value[128:256].isfinite().all()
        assert value[384:].isfinite().all()
    if state.startswith("block"):
        for key, tensor in nonfinite_values("torch", state)[0].items():
            assert key == "step" or same_bits(stored[key], tensor), key


@pytest.mark.parametrize("kernel", ["c", "torch"])
@pytest.mark.parametrize("state", STATES)
def test_finite_values_stay_finite_in_every_format(kernel, state):
    """Rounding up past the largest bf16 made an infinity of a finite m1."""
    stays_finite(kernel, state)


def stays_finite(kernel, state):
    for dtype in (torch.float32, torch.bfloat16):
        param = torch.nn.Parameter(torch.zeros(300, dtype=dtype))
        optimizer = shardopt.AdEMAMix([("p", param)], kernel=kernel, state_dtype=state, betas=(0.5, 0.5, 0.5), lr=1e-3)
        for _ in range(12):
            param.grad = torch.full((300,), torch.finfo(dtype).max, dtype=dtype)
            optimizer.step()
        for piece in states.state_slices(optimizer):
            assert states.read_slice(piece).isfinite().all(), piece.kind


def small_beta_run(kernel, betas, dtype=torch.float32, **options):
    """Weights and nu, first with large and then with small gradients."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(200, dtype=dtype))
    optimizer = shardopt.AdEMAMix([("p", param)], kernel=kernel, betas=betas, lr=1e-3, alpha=0.0, **options)
    for scale in (1e3, 1e3, 1e-3, 1e-3):
        param.grad = (torch.randn(200, generator=generator) * scale).to(dtype)
        optimizer.step()
    return param.detach().double(), optimizer.state[param]["nu"].double()


@pytest.mark.parametrize("betas", [(0.9, 0.0, 0.999), (0.0, 0.0, 0.0), (0.3, 1e-9, 0.2), (0.4, 0.1, 0.0)])
def test_small_betas_follow_float64(betas):
    """With beta2 = 0, nu + (g^2 - nu) left 0 of a small square under a large nu: 1,000 times the update, and more."""
    weight, nu = small_beta_run("torch", betas, torch.float64)
    runs = [small_beta_run(kernel, betas) for kernel in ("c", "torch")]
    for found in runs:
        torch.testing.assert_close(found[1], nu, rtol=1e-5, atol=0)
        torch.testing.assert_close(found[0], weight, rtol=1e-5, atol=1e-7)
    assert torch.equal(runs[0][0], runs[1][0])
