"""Any cut to any cut, any number of ranks to any other; what does not fit is refused untouched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardopt import AdEMAMix, checkpoint
from shardopt.checkpoint import folders, manifest
from shardopt.checkpoint.index import read_index
from shardopt.engines.state import ModuleState
from shardopt.errors import InputError
from shardopt.optim import precision, states
from shardopt.slices import Layout, Range, Slice, layout_of
from tests.checkpoint import made
from tests.distributed.pool import on_ranks


@pytest.mark.parametrize(
    ("writers", "written", "readers", "read"),
    [
        (3, made.rows, 2, made.flat),
        (3, made.flat, 2, made.strided),
        (2, made.strided, 3, made.rows),
        (2, made.whole, 3, made.flat),
        (3, made.hybrid, 2, made.rows),
        (3, made.strided, 1, made.whole),
        (1, made.whole, 3, made.hybrid),
        (1, made.whole, 1, made.whole),
    ],
)
def test_any_cut_is_read_as_any_other(
    tmp_path: Path, writers: int, written: made.Cut, readers: int, read: made.Cut
) -> None:
    folder = tmp_path / "step-00000003"
    if writers == 1:  # no process group at all
        made.save(0, 1, folder, written, {"step": 3})
    else:
        on_ranks(writers, made.save, folder, written, {"step": 3})
    documents = on_ranks(readers, made.load, folder, read) if readers > 1 else [made.load(0, 1, folder, read)]
    for document in documents:
        assert document["step"] == 3
        assert document["checkpoint"]["world_size"] == writers
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_the_document_says_what_was_written(tmp_path: Path) -> None:
    on_ranks(2, made.save, tmp_path / "a", made.rows, {"step": 5, "config": {"lr": 1e-3}})
    document = checkpoint.read_document(tmp_path / "a")
    assert document["config"] == {"lr": 1e-3}
    written = document["checkpoint"]
    assert (written["format"], written["torch"]) == (6, torch.__version__)
    assert {name: tuple(p["shape"]) for name, p in written["parameters"].items()} == made.SHAPES
    kinds = written["parameters"]["norm.weight"]["kinds"]
    assert kinds == {
        "weight": {"dtypes": ["float32"]}, "m1": {"dtypes": ["bfloat16"]}, "m2": {"dtypes": ["float32"]}
    }  # fmt: skip


def test_replicas_are_written_once_and_by_turns(tmp_path: Path) -> None:
    on_ranks(2, made.save, tmp_path / "a", made.whole)
    index = read_index(tmp_path / "a", checkpoint.read_document(tmp_path / "a"))
    assert all(len(t.chunks) == 1 for t in index.tensors.values())
    assert {t.chunks[0, 2] for t in index.tensors.values()} == {0, 1}


def _save_fsdp(rank: int, world_size: int, folder: Path) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    given = [Slice(n, "weight", layout_of(p, n), (p,)) for n, p in model.named_parameters()]
    checkpoint.save(folder, made.State(given, made.ranks_here(rank, world_size)), allow_nonfinite=True)
    return {n: p.full_tensor().detach() for n, p in model.named_parameters()}  # type: ignore[attr-defined]


def test_fsdp2_parameters_are_read_by_a_single_process(tmp_path: Path) -> None:
    expected = on_ranks(3, _save_fsdp, tmp_path / "a")[0]
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))
    given = [Slice(n, "weight", Layout.whole(n, p.shape), (p,)) for n, p in model.named_parameters()]
    assert not any(torch.equal(p, expected[n]) for n, p in model.named_parameters())
    checkpoint.load(tmp_path / "a", made.State(given, made.ranks_here()))
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())


def _save_own(rank: int, world_size: int, folder: Path) -> None:
    """As under DeepSpeed: each rank has some of the parameters and says nothing of the others."""
    given = [s for i, s in enumerate(made.slices(made.whole)) if i // len(made.KINDS) % world_size == rank]
    here = made.ranks_here(rank, world_size)
    counts = [{"a": {"step": 3}, "b": {"step": 2}}, {"b": {"step": 2}, "c": {"step": 1}}][rank]
    checkpoint.save(folder / "a", made.State(given, here, counts), allow_nonfinite=True)
    with pytest.raises(ValueError, match="b: ranks disagree"):
        checkpoint.save(folder / "b", made.State(given, here, {"b": {"step": rank}}), allow_nonfinite=True)


def test_ranks_that_know_only_their_parameters_make_one_checkpoint(tmp_path: Path) -> None:
    on_ranks(2, _save_own, tmp_path)
    document = made.load(0, 1, tmp_path / "a", made.whole)
    assert document["checkpoint"]["step_counts"] == {"a": {"step": 3}, "b": {"step": 2}, "c": {"step": 1}}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def _save_rng(rank: int, world_size: int, folder: Path) -> None:
    extras = {f"rng/rank-{rank:05d}": torch.tensor([rank, 9], dtype=torch.uint8), "both": torch.tensor(True)}
    state = made.State(made.slices(made.rows, rank, world_size), made.ranks_here(rank, world_size))
    checkpoint.save(folder, state, extras=extras, allow_nonfinite=True)


def test_extras_are_read_by_key_and_absent_ones_left_out(tmp_path: Path) -> None:
    on_ranks(2, _save_rng, tmp_path / "a")
    found = checkpoint.load_extras(tmp_path / "a", ["rng/rank-00001", "rng/rank-00002", "both"])
    assert {key: (t.dtype, t.tolist()) for key, t in found.items()} == {
        "rng/rank-00001": (torch.uint8, [1, 9]),
        "both": (torch.bool, True),
    }
    extras = checkpoint.read_document(tmp_path / "a")["checkpoint"]["extras"]
    assert list(extras) == ["both", "rng/rank-00000", "rng/rank-00001"]
    assert extras["both"] == {"shape": [], "dtypes": ["bool"]}


def test_a_parameter_without_elements_is_kept(tmp_path: Path) -> None:
    given = [Slice("empty", "weight", Layout.whole("empty", (0, 3)), (torch.empty(0, 3),))]
    checkpoint.save(tmp_path / "a", made.State(given, made.ranks_here()))
    checkpoint.load(tmp_path / "a", made.State(given, made.ranks_here()))


def _refused(rank: int, world_size: int, folder: Path, cut: made.Cut, skip_rank: int, reason: str) -> None:
    """A save in which `skip_rank` keeps its elements to itself must fail on every rank."""
    given = made.slices(cut, rank, world_size)
    if rank == skip_rank:
        given = [replace(s, layout=replace(s.layout, ranges=())) for s in given]
    with pytest.raises(ValueError, match=reason):
        checkpoint.save(folder, made.State(given, made.ranks_here(rank, world_size)), allow_nonfinite=True)


def test_a_gap_is_not_saved(tmp_path: Path) -> None:
    on_ranks(3, _refused, tmp_path / "a", made.flat, 1, "elements .* are held by no rank")
    # Alone, too.
    layout = Layout.contiguous("w", (10,), 0, 9)
    with pytest.raises(ValueError, match="w/m1: elements 9 to 10 of 10 are held by no rank"):
        checkpoint.save(tmp_path / "a", made.State([Slice("w", "m1", layout, (torch.ones(9),))], made.ranks_here()))
    assert list(tmp_path.iterdir()) == []


def _save_bounds(rank: int, world_size: int, folder: Path, bounds: list[tuple[int, int]]) -> None:
    layout = Layout.contiguous("w", (10,), *bounds[rank])
    given = [Slice("w", "m1", layout, (torch.ones(bounds[rank][1]),))]
    with pytest.raises(ValueError, match="elements 4 to 6 of 10 are held in two ranges"):
        checkpoint.save(folder, made.State(given, made.ranks_here(rank, world_size)), allow_nonfinite=True)


def test_replicas_with_other_bounds_are_not_saved(tmp_path: Path) -> None:
    on_ranks(2, _save_bounds, tmp_path / "a", [(0, 6), (4, 6)])


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"loss": float("nan")}, "JSON"),
        ({"config": Path("x")}, "not JSON serializable"),
        ({"loss": torch.ones(())}, r"document\['loss'\]: .* Tensor is not JSON serializable"),
        ({"checkpoint": 1}, "which is ours"),
    ],
)
def test_a_document_that_json_cannot_hold_is_refused(tmp_path: Path, document: dict[str, Any], reason: str) -> None:
    with pytest.raises((ValueError, TypeError), match=reason):
        made.save(0, 1, tmp_path / "a", made.whole, document)
    assert list(tmp_path.iterdir()) == []


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'embed.weight/weight' is given twice"):
        checkpoint.save(tmp_path / "a", made.State(made.slices(made.whole) * 2, made.ranks_here()))


class _Negated(type(precision.FORMATS["block16"])):
    """Has the dtypes of block16 and other codes."""

    def decode(self, codes: Tensor, scale: Tensor | None) -> Tensor:
        return -super().decode(codes, scale)

    def encode(self, values: Tensor, *args: Any) -> None:
        super().encode(-values, *args)


def test_two_formats_of_the_same_dtypes_are_told_apart_by_name(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(precision.FORMATS, "negated", _Negated("negated", 9))
    model = torch.nn.Linear(40, 13, bias=False)
    negated, plain = (
        ModuleState(AdEMAMix(model.named_parameters(), state_dtype={"m2": fmt}), model)
        for fmt in ("negated", "block16")
    )
    for state in (negated, plain):
        state.init()
    there, here = (next(s for s in state.slices() if s.kind == "m2") for state in (negated, plain))
    assert (there.format, here.format) == ("negated", "block16")
    codes, scales = there.tensors
    precision.FORMATS["negated"].encode(NUMBERS.view(-1), None, codes.view(-1), scales)
    checkpoint.save(tmp_path / "a", negated)
    with pytest.raises(InputError, match=r"m2 is negated there and block16 here"):
        checkpoint.load(tmp_path / "a", plain)
    checkpoint.load(tmp_path / "a", plain, convert=True)
    torch.testing.assert_close(states.read_slice(here), NUMBERS.view(-1), rtol=2**-10, atol=2**-18)
    assert here.tensors[0].any()

    monkeypatch.delitem(precision.FORMATS, "negated")
    with pytest.raises(InputError, match=r"weight/m2 is not in a known format, but in 'negated'"):
        checkpoint.load(tmp_path / "a", plain, convert=True)


def _live(case: str) -> list[Slice]:
    given = made.slices(made.whole, filled=False)
    if case == "names":
        return [replace(s, name=s.name.replace("mlp", "ffn")) for s in given]
    if case == "shape":
        turned = Layout.whole("layers.0.mlp.weight", (3, 7))
        return [replace(s, layout=turned) if s.name == turned.name else s for s in given]
    if case == "kind too many":
        return [*given, replace(given[0], kind="nu")]
    if case == "kind too few":
        return [s for s in given if s.kind != "m1"]
    assert case == "dtype"
    return [replace(s, tensors=(s.tensors[0].to(torch.bfloat16),)) if s.kind == "m2" else s for s in given]


MISMATCHES = {
    "names": r"has no layers.0.ffn.weight; the model has no layers.0.mlp.weight; .* by another model",
    "shape": r"shapes differ: layers.0.mlp.weight \(\(7, 3\) there, \(3, 7\) here\); set model",
    "kind too many": r"has no embed.weight/nu; set optimizer",
    "kind too few": r"nothing here takes its embed.weight/m1, layers.0.bias/m1, .*/m1; set optimizer",
    "dtype": r"m2 is float32 there and bfloat16 here, in embed.weight.*set the optimizer's state_dtype \(of m2\)",
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_what_does_not_fit_is_refused_before_anything_is_touched(tmp_path: Path, case: str) -> None:
    made.save(0, 1, tmp_path / "a", made.whole)
    live = _live(case)
    with pytest.raises(InputError, match=MISMATCHES[case]):
        checkpoint.load(tmp_path / "a", made.State(live, made.ranks_here()))
    assert all((s.tensors[0] == 7).all() for s in live)


def _load_unlike(rank: int, world_size: int, folder: Path) -> None:
    given = made.slices(made.rows, rank, world_size, filled=False)
    if rank == 1:
        given = [replace(s, name="other") if s.name == "norm.weight" else s for s in given]
    with pytest.raises(InputError, match=r"the checkpoint has no other"):
        checkpoint.load(folder, made.State(given, made.ranks_here(rank, world_size)))
    assert all((s.tensors[0] == 7).all() for s in given)


def test_a_mismatch_on_one_rank_is_refused_on_all(tmp_path: Path) -> None:
    made.save(0, 1, tmp_path / "a", made.whole)
    on_ranks(2, _load_unlike, tmp_path / "a")


def test_a_long_list_of_names_is_cut(tmp_path: Path) -> None:
    given = [Slice(f"w{i:02d}", "weight", Layout.whole(f"w{i:02d}", (1,)), (torch.ones(1),)) for i in range(20)]
    checkpoint.save(tmp_path / "a", made.State(given, made.ranks_here()))
    with pytest.raises(InputError, match=r"the model has no w00, w01, w02, w03, w04 and 15 more;"):
        checkpoint.load(tmp_path / "a", made.State([], made.ranks_here()))


def test_not_strict_takes_what_there_is(tmp_path: Path) -> None:
    made.save(0, 1, tmp_path / "a", made.whole)
    live = [
        *_live("kind too few"),
        *(replace(s, name="new") for s in made.slices(made.whole, filled=False)[:1]),
    ]
    document = checkpoint.load(tmp_path / "a", made.State(live, made.ranks_here()), strict=False)
    assert made.wrong(live[:-1]) == []
    assert (live[-1].tensors[0] == 7).all()
    assert document["checkpoint"]["not_loaded"] == ["new/weight"]


def test_convert_changes_the_dtype(tmp_path: Path) -> None:
    made.save(0, 1, tmp_path / "a", made.whole)
    live = _live("dtype")
    checkpoint.load(tmp_path / "a", made.State(live, made.ranks_here()), convert=True)
    for s in live:
        torch.testing.assert_close(
            s.tensors[0].view(s.layout.shape), made.value(s.name, s.kind).to(s.tensors[0].dtype),
            rtol=0, atol=0, equal_nan=True,
        )  # fmt: skip


def test_a_stored_gap_is_found_before_anything_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.contiguous("w", (10,), 0, 6)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "uncovered", lambda *_: "")
        checkpoint.save(tmp_path / "a", made.State([Slice("w", "m1", layout, (torch.ones(6),))], made.ranks_here()))
    assert folders.is_complete(tmp_path / "a")
    live = torch.full((10,), 7.0)
    given = [Slice("w", "m1", Layout.whole("w", (10,)), (live,))]
    with pytest.raises(InputError, match="w/m1: elements 6 to 10 of 10 are held by no rank"):
        checkpoint.load(tmp_path / "a", made.State(given, made.ranks_here()))
    assert (live == 7).all()


# A block is 128 elements, so that some are full and some are not, and ranges cut through them.
NUMBERS = torch.linspace(-1, 1, 13 * 40).view(13, 40)
FORMATS = ("block16", "block8")


def _blocks(fmt: str, layout: Layout, *, filled: bool) -> Slice:
    end = max((r.local_start + r.length for r in layout.ranges), default=0)
    codes = torch.zeros(end, dtype=precision.FORMATS[fmt].dtype(torch.float32))
    scales = torch.zeros(sum(precision.blocks(r.length) for r in layout.ranges))
    live = Slice("w", "m2", layout, (codes, scales), fmt)
    if filled:
        flat = NUMBERS.view(-1)
        parts = [flat[r.global_start : r.global_start + r.length] for r in layout.ranges]
        states.write_slice(live, torch.cat(parts) if parts else torch.empty(0))
    return live


def _cut(rank: int, world_size: int, pieces: int) -> Layout:
    """`pieces` ranges a rank, dealt in turn; their bounds are nobody's block bounds."""
    bounds = [NUMBERS.numel() * i // (pieces * world_size) for i in range(pieces * world_size + 1)]
    ranges, at = [], 0
    for i in range(rank, pieces * world_size, world_size):
        ranges.append(Range(bounds[i], at, bounds[i + 1] - bounds[i]))
        at += bounds[i + 1] - bounds[i]
    return Layout("w", tuple(NUMBERS.shape), tuple(ranges))


def _save_blocks(rank: int, world_size: int, folder: Path, fmt: str, pieces: int) -> None:
    live = _blocks(fmt, _cut(rank, world_size, pieces), filled=True)
    checkpoint.save(folder, made.State([live], made.ranks_here(rank, world_size)))


def _load_blocks(rank: int, world_size: int, folder: Path, fmt: str, pieces: int, exactly: bool) -> None:
    layout = _cut(rank, world_size, pieces)
    live, expected = _blocks(fmt, layout, filled=False), _blocks(fmt, layout, filled=True)
    assert not torch.equal(live.tensors[0], expected.tensors[0])
    checkpoint.load(folder, made.State([live], made.ranks_here(rank, world_size)))
    if exactly:
        for there, here in zip(expected.tensors, live.tensors, strict=True):
            assert torch.equal(there, here)
    # Rounded at most twice, by half a step each time.
    step = {"block16": 2.0**-14, "block8": 1.0 / 32}[fmt]
    torch.testing.assert_close(states.read_slice(live), states.read_slice(expected), rtol=0, atol=step)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_block_format_is_exact_on_its_layout(tmp_path: Path, fmt: str, pieces: int) -> None:
    on_ranks(2, _save_blocks, tmp_path / "a", fmt, pieces)
    on_ranks(2, _load_blocks, tmp_path / "a", fmt, pieces, True)


def _replicas_in_blocks(rank: int, world_size: int, folder: Path, fmt: str) -> list[int]:
    layout, here = Layout.whole("w", tuple(NUMBERS.shape)), made.ranks_here(rank, world_size)
    live, expected = _blocks(fmt, layout, filled=False), _blocks(fmt, layout, filled=True)
    checkpoint.save(folder, made.State([expected], here))
    checkpoint.load(folder, made.State([live], here))
    assert all(torch.equal(a, b) for a, b in zip(live.tensors, expected.tensors, strict=True))
    index = read_index(folder, checkpoint.read_document(folder))
    return index.tensors["w", "m2"].chunks[:, 2].tolist()


@pytest.mark.parametrize("fmt", FORMATS)
def test_replicas_of_a_block_format_are_shared_out_and_exact(tmp_path: Path, fmt: str) -> None:
    assert on_ranks(3, _replicas_in_blocks, tmp_path / "a", fmt)[0] == [0, 1, 2]


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_block_format_goes_through_fp32_to_another_layout(tmp_path: Path, fmt: str) -> None:
    on_ranks(3, _save_blocks, tmp_path / "a", fmt, 2)
    on_ranks(2, _load_blocks, tmp_path / "a", fmt, 2, False)  # whose bounds are within chunks, too


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_format_changes_only_on_demand(tmp_path: Path, fmt: str) -> None:
    _save_blocks(0, 1, tmp_path / "blocks", fmt, 1)
    layout = Layout.whole("w", tuple(NUMBERS.shape))
    plain = Slice("w", "m2", layout, (torch.zeros_like(NUMBERS),))
    here = made.ranks_here()
    with pytest.raises(InputError, match=rf"m2 is {fmt} there and float32 here.*the optimizer's state_dtype"):
        checkpoint.load(tmp_path / "blocks", made.State([plain], here))
    assert not plain.tensors[0].any()
    checkpoint.load(tmp_path / "blocks", made.State([plain], here), convert=True)
    assert torch.equal(plain.tensors[0].view(-1), states.read_slice(_blocks(fmt, layout, filled=True)))

    checkpoint.save(tmp_path / "fp32", made.State([replace(plain, tensors=(NUMBERS,))], here))
    live, expected = (_blocks(fmt, layout, filled=f) for f in (False, True))
    checkpoint.load(tmp_path / "fp32", made.State([live], here), convert=True)
    assert torch.equal(live.tensors[0], expected.tensors[0])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_gpu_tensor_is_staged(tmp_path: Path, asynchronous: bool) -> None:
    layout, here = Layout.whole("w", (1 << 20,)), made.ranks_here()
    source = torch.randn(1 << 20, device="cuda")
    expected, target = source.clone(), torch.zeros_like(source)
    saver = checkpoint.Saver(tmp_path, 1, ranks=here, asynchronous=asynchronous)
    saver.save(1, made.State([Slice("w", "m1", layout, (source,))], saver.ranks))
    source.zero_()
    saver.close()
    checkpoint.load(tmp_path / "step-00000001", made.State([Slice("w", "m1", layout, (target,))], here))
    assert torch.equal(target, expected)


def test_tensors_on_the_meta_device_are_neither_saved_nor_loaded(tmp_path: Path) -> None:
    given = made.slices(made.whole)
    checkpoint.save(tmp_path / "a", made.State(given, made.ranks_here()), allow_nonfinite=True)
    empty = [replace(s, tensors=tuple(t.to("meta") for t in s.tensors)) for s in given]
    with pytest.raises(InputError, match="is on the meta device: give the model its memory first"):
        checkpoint.load(tmp_path / "a", made.State(empty, made.ranks_here()))
    with pytest.raises(InputError, match="is on the meta device"):
        checkpoint.save(tmp_path / "b", made.State(empty, made.ranks_here()))
