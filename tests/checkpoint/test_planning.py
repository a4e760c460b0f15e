"""Who writes what: evenly, once, and planned again only when something has changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts import simulate_checkpoint
from shardopt import checkpoint
from shardopt.checkpoint import Saver, manifest, planning
from shardopt.checkpoint.index import read_index
from shardopt.checkpoint.ranges import part
from shardopt.errors import InputError
from shardopt.slices import Layout, Range, Slice
from tests.checkpoint import made
from tests.distributed.pool import on_ranks


def _whole(name: str, numel: int, dtype: torch.dtype = torch.float32) -> Slice:
    return Slice(name, "m1", Layout.whole(name, (numel,)), (torch.arange(numel).to(dtype),))


def _written(held: list[list[Slice]]) -> list[list[Slice]]:
    """What each rank writes of what it holds."""
    described = [manifest.describe(slices) for slices in held]
    _, shares = planning.make_plan([description for description, _ in described])
    return [
        chunks if share is None else [part(chunks[i], begin, n) for i, begin, n in share.tolist()]
        for (_, chunks), share in zip(described, shares, strict=True)
    ]


def _nbytes(slices: list[Slice]) -> int:
    return sum(s.nbytes for s in slices)


def test_replicas_are_cut_into_equal_shares_that_cover_them_once() -> None:
    sizes = {"a": 1, "b": 100_000, "c": 3, "d": 5000, "e": 77_777}
    held = [[_whole(name, n, torch.bfloat16 if name == "d" else torch.float32) for name, n in sizes.items()]] * 5
    written = _written(held)
    mean = _nbytes(held[0]) / 5
    for slices in written:
        assert _nbytes(slices) == pytest.approx(mean, abs=3 * 128 * 4)
        for s in slices:  # and each piece has its own elements
            (r,) = s.layout.ranges
            start = torch.arange(r.global_start, r.global_start + r.length)
            assert torch.equal(s.tensors[0], start.to(s.tensors[0].dtype))
    for name, n in sizes.items():
        ranges = sorted(r for slices in written for s in slices if s.name == name for r in s.layout.ranges)
        assert sum(r.length for r in ranges) == n
        assert ranges[0].global_start == 0


def test_each_set_of_replicas_shares_its_own_elements() -> None:
    def rank(half: int, *own: Slice) -> list[Slice]:
        layout = Layout.contiguous("w", (200_000,), 100_000 * half, 100_000)
        return [Slice("w", "m1", layout, (torch.zeros(100_000),)), *own]

    # As HSDP has it: ranks 0 and 2 hold one half, 1 and 3 the other; rank 3 has something of its own too.
    written = _written([rank(0), rank(1), rank(0), rank(1, _whole("own", 1000))])
    assert [_nbytes(s) for s in written] == pytest.approx([200_000, 200_000, 200_000, 204_000], abs=512)
    for i, slices in enumerate(written):
        assert all(r.global_start // 100_000 == i % 2 for s in slices if s.name == "w" for r in s.layout.ranges)


@pytest.mark.parametrize("width", [300, 512])
def test_columns_that_several_ranks_hold_are_shared_out_in_whole_rows_and_blocks(width: int) -> None:
    """As on a mesh of 2 x 2 whose first dimension replicates: ranks 0 and 2 hold the left half, 1 and 3 the right."""

    def rank(half: int) -> list[Slice]:
        layout = Layout("w", (1000, 2 * width), (Range(width * half, 0, 1000 * width, width, 2 * width),))
        codes, scales = torch.zeros(1000 * width, dtype=torch.int8), torch.zeros(-(-1000 * width // 128))
        return [
            Slice("w", "m1", layout, (codes, scales), "block8"),
            Slice("w", "m2", layout, (torch.zeros(1000 * width),)),
        ]

    written = _written([rank(0), rank(1), rank(0), rank(1)])
    for own in written:
        assert _nbytes(own) == pytest.approx(_nbytes(rank(0)) / 2, rel=0.05)
    pieces = [r for slices in written for s in slices if s.kind == "m2" for r in s.layout.ranges]
    whole = torch.zeros(2000 * width)
    for r in pieces:
        r.of_whole(whole).add_(1)
        assert r.length == 1000 * width or r.length % 128 == 0 or r.global_end >= 1999 * width
    assert (whole == 1).all()


def test_ranks_without_replicas_write_what_they_hold_and_are_told_nothing() -> None:
    layouts = [Layout.contiguous("w", (300,), 100 * rank, 100) for rank in range(3)]
    described = [manifest.describe([Slice("w", "m1", layout, (torch.zeros(100),))]) for layout in layouts]
    plan, shares = planning.make_plan([description for description, _ in described])
    assert shares == [None] * 3
    assert plan.replicas is None
    assert plan.table.tolist() == [[0, 100 * rank, 100, rank, 128] for rank in range(3)]


@pytest.mark.parametrize(
    "other",
    [
        Slice("w", "m1", Layout.whole("w", (4, 3)), (torch.zeros(12),)),
        Slice("w", "m1", Layout.whole("w", (12,)), (torch.zeros(12, dtype=torch.bfloat16),)),
        Slice("w", "m1", Layout.whole("w", (12,)), (torch.zeros(12, dtype=torch.int16), torch.zeros(1)), "block16"),
        Slice("w", "m2", Layout.whole("w", (11,)), (torch.zeros(11),)),
    ],
    ids=["shape", "dtype", "format", "shape of another kind"],
)
def test_ranks_that_disagree_about_a_tensor_are_refused(other: Slice) -> None:
    mine = Slice("w", "m1", Layout.whole("w", (12,)), (torch.zeros(12),))
    with pytest.raises(InputError, match=r"w/m.: ranks disagree, \[12\] in float32 on one and"):
        _written([[mine], [other]])


def _state(scale: int, extra: int) -> tuple[list[Slice], dict[str, torch.Tensor]]:
    return [_whole("w", 4096 * scale)], {"rng": torch.ones(extra)}


def _saves(rank: int, world_size: int, root: Path) -> tuple[list[int], list[int], list[int]]:
    """Save states of several sizes: how often rank 0 has planned, where the copy was, and how large."""
    saver = Saver(root, 9, ranks=made.ranks_here(rank, world_size), asynchronous=True)
    calls, places, sizes = [0], [], []
    with pytest.MonkeyPatch.context() as patch:

        def counted(*arguments: Any, make: Any = planning.make_plan) -> Any:
            calls[0] += 1
            return make(*arguments)

        patch.setattr(planning, "make_plan", counted)
        planned = []
        for step, sized in enumerate([(1, 3), (1, 3), (1, 5), (1, 5), (2, 5)]):
            held, extras = _state(*sized)
            counts = {"w": {"step": step}}
            saver.save(step, made.State(held, saver.ranks, counts), {}, extras if rank else {})
            saver.wait()
            planned.append(calls[0])
            places.append(saver._kept.staging._buffer.data_ptr())
            sizes.append(saver._kept.staging._buffer.numel())
    saver.close()
    return planned, places, sizes


def test_a_plan_and_the_memory_of_the_copy_are_kept_until_something_changes(tmp_path: Path) -> None:
    first, second = on_ranks(2, _saves, tmp_path)
    # On rank 1 alone the extra has changed.
    assert first[0] == [1, 1, 2, 2, 3]
    assert second[0] == [0] * 5
    for _, places, sizes in (first, second):
        assert places[0] == places[1]
        assert places[2] == places[3]
        # Half of what it holds, and no more: what this rank writes.
        assert sizes == pytest.approx([8192, 8192, 8192, 8192, 16384], abs=600)
    for step, sized in enumerate([(1, 3), (1, 3), (1, 5), (1, 5), (2, 5)]):
        held, extras = _state(*sized)
        live = [replace(held[0], tensors=(torch.zeros_like(held[0].tensors[0]),))]
        state = made.State(live, made.ranks_here())
        checkpoint.load(tmp_path / f"step-{step:08d}", state)
        assert state.counts == {"w": {"step": step}}
        assert torch.equal(live[0].tensors[0], held[0].tensors[0])
        found = checkpoint.load_extras(tmp_path / f"step-{step:08d}", ["rng"])
        assert torch.equal(found["rng"], extras["rng"])


def test_a_save_in_the_background_writes_the_same_bytes(tmp_path: Path) -> None:
    """Between the tensors, too, where another plan, of as many bytes, had elements before."""
    before, held = ([_whole("w", 1000), _whole("v", n, torch.bfloat16)] for n in (20, 3))
    for asynchronous in (True, False):
        saver = Saver(tmp_path / str(asynchronous), 1, ranks=made.ranks_here(), asynchronous=asynchronous)
        for step, state in enumerate((before, held)):
            saver.save(step, made.State(state, saver.ranks))
        saver.close()
    one, other = (tmp_path / name / "step-00000001" / "rank-00000.data" for name in ("True", "False"))
    # But for the header, which has the save's id.
    assert one.read_bytes()[128:] == other.read_bytes()[128:]
    assert one.stat().st_size == 128 + 64 + 4000


@pytest.mark.parametrize("engine", list(simulate_checkpoint.ENGINES))
def test_simulated_ranks_exchange_few_bytes(tmp_path: Path, engine: str) -> None:
    row = simulate_checkpoint.simulate("tiny", engine, 16, tmp_path)
    tensors = 4 * len(simulate_checkpoint.shapes_of("tiny"))
    if engine == "FSDP2":
        assert row.chunks == 16 * tensors
    else:
        assert tensors <= row.chunks < tensors + 4 * 16 * 3
    assert row.gathered < 16 * 1500
    assert row.scattered < (16 * 1500 if engine == "DDP" else 16 * 10)
    assert row.counts_gathered < 16 * (700 if engine == "DDP" else 400)
    assert row.broadcast < 40 * row.chunks + 40_000
    assert row.most < 1.02
    document = checkpoint.read_document(tmp_path)
    chunks = np.concatenate([t.chunks for t in read_index(tmp_path, document).tensors.values()])
    numel = sum(int(np.prod(shape)) for shape in simulate_checkpoint.shapes_of("tiny").values())
    assert chunks[:, 1].sum() == 4 * numel
