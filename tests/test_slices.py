import math
import random
import subprocess
import sys

import pytest
import torch
from torch import nn

from shardopt import slices
from shardopt.slices import (
    Layout,
    PlacementError,
    Range,
    Slice,
    canonical_name,
    layout_of,
    local_tensor,
    name_key,
    named_parameters,
)
from tests.distributed.pool import on_ranks


def test_importing_the_optimizer_needs_torch_alone():
    extras = [
        "transformers",
        "datasets",
        "pydantic",
        "accelerate",
        "wandb",
        "deepspeed",
        "rich",
        "yaml",
        "matplotlib",
    ]
    code = (
        "import sys\n"
        f"for name in {extras}: sys.modules[name] = None\n"  # importing one of them would raise
        "import shardopt, torch\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "shardopt.AdEMAMix([p], lr=0.1).step()\n"
        "assert p[0].item() < 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("module.layers.0.weight", "layers.0.weight"),
        ("module._orig_mod.module.a", "a"),
        ("layers.0._checkpoint_wrapped_module.mlp.weight", "layers.0.mlp.weight"),
        ("a._orig_mod._fsdp_wrapped_module.b", "a.b"),
        ("submodule.weight", "submodule.weight"),
    ],
)
def test_canonical_name_strips_what_wrappers_add(wrapped, plain):
    assert canonical_name(wrapped) == plain


def test_the_key_of_a_name_is_stable_across_machines():
    # BLAKE2b with an 8-byte digest, little-endian; written down from hashlib once, so that it never changes.
    assert name_key("model.embed_tokens.weight") == 0xF64261A496B5D16A


def test_tied_weights_are_named_once_and_by_their_first_name():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    assert [n for n, _ in named_parameters(model)] == ["embed.weight"]


def test_layout_refuses_ranges_that_cannot_be():
    for ranges in [
        (Range(0, 0, 0),),
        (Range(0, 0, 4), Range(3, 4, 2)),
        (Range(0, 0, 4), Range(4, 3, 2)),  # overlaps in the local tensor alone
        (Range(5, 0, 3),),
        (Range(2, 0, 1), Range(0, 1, 1)),
        (Range(0, 0, 4, 2, 2),),  # rows without a gap between them
        (Range(0, 0, 3, 2, 3),),  # a row and a half
        (Range(2, 0, 4, 2, 3),),
        (Range(0, 0, 4, 2, 3), Range(2, 4, 1)),  # between the rows of the one before
    ]:
        with pytest.raises(ValueError, match="w:"):
            Layout("w", (2, 3), ranges)


def test_copying_from_and_to_the_whole_touches_just_the_ranges():
    layout = Layout("w", (2, 5), (Range(1, 0, 2), Range(6, 3, 3)))
    whole = torch.arange(10.0).view(2, 5)
    local = torch.full((6,), -1.0)
    layout.copy_from_whole(local, whole)
    assert local.tolist() == [1, 2, -1, 6, 7, 8]
    back = torch.zeros(2, 5)
    layout.copy_to_whole(local, back)
    assert back.view(-1).tolist() == [0, 1, 2, 0, 0, 0, 6, 7, 8, 0]
    assert (layout.local_numel, layout.numel, layout.is_whole) == (5, 10, False)


def test_an_empty_layout_holds_nothing():
    layout = Layout.contiguous("w", (3, 2), 6, 0)
    assert layout.ranges == ()
    assert layout.local_numel == 0
    layout.copy_from_whole(torch.empty(0), torch.ones(3, 2))


def test_slice_bytes_count_every_storage_tensor():
    s = Slice("w", "m1", Layout.whole("w", (4,)), (torch.zeros(4, dtype=torch.int8), torch.zeros(1)), "block8")
    assert s.nbytes == 8


def _row_shards(rank, world_size, rows):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    whole = torch.arange(rows * 3.0).view(rows, 3)
    shard = distribute_tensor(whole, mesh, [Shard(0)])
    layout = layout_of(shard, "w")
    mine = torch.full((layout.local_numel,), -1.0)
    layout.copy_from_whole(mine, whole)
    assert torch.equal(mine, local_tensor(shard).reshape(-1))
    return [tuple(r)[:3] for r in layout.ranges]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7])
def test_row_shards_are_found_by_arithmetic_uneven_and_empty_ones_too(rows):
    ranges = on_ranks(3, _row_shards, rows)
    covered = [r for rank in ranges for r in rank]
    assert sum(length for _, _, length in covered) == rows * 3
    assert [start for start, _, _ in covered] == sorted(start for start, _, _ in covered)


def test_the_layout_of_any_cuts_holds_what_torch_leaves():
    """Of random shapes, cut and cut again over any dimensions, with and without pieces."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    draw = random.Random(0)
    for _ in range(600):
        shape = tuple(draw.choice([0, 1, 2, 3, 4, 5, 6, 6]) for _ in range(draw.randint(0, 4)))
        whole = torch.arange(math.prod(shape)).view(shape)
        left, cuts = whole, []
        for _ in range(draw.randint(0, 3) if shape else 0):
            dim, parts, pieces = draw.randrange(len(shape)), draw.randint(1, 3), draw.choice([1, 1, 2, 3])
            cuts.append((dim, parts, draw.randrange(parts), pieces))
            placement = Shard(dim) if pieces == 1 else _StridedShard(dim, split_factor=pieces)
            left = placement._split_tensor(left, parts, with_padding=False)[0][cuts[-1][2]]
        layout = Layout("w", shape, slices._cut(shape, tuple(cuts)))
        mine = torch.full((layout.local_numel,), -1)
        layout.copy_from_whole(mine, whole)
        assert torch.equal(mine, left.reshape(-1)), (shape, cuts)
        rows = [row for r in layout.ranges for row in r.rows()]
        assert [row.global_start + i for row in rows for i in range(row.length)] == mine.tolist()
        back = torch.full(shape, -1)
        layout.copy_to_whole(mine, back)
        assert torch.equal(back[back >= 0], mine.sort().values), (shape, cuts)


def test_columns_are_one_range_however_many_rows_there_are():
    for shape, cuts in [
        ((4096, 4096), ((1, 8, 3, 1),)),
        ((4096, 4096), ((0, 2, 1, 1), (1, 8, 3, 1))),
        ((16, 64, 3, 3), ((1, 4, 1, 1),)),
        ((16, 64, 48), ((2, 4, 1, 1),)),
    ]:
        (r,) = slices._cut(shape, cuts)
        assert r.length == math.prod(shape) // math.prod(parts for _, parts, *_ in cuts)


def test_a_part_of_a_range_is_of_one_row_or_of_whole_rows():
    r = Range(10, 5, 12, 4, 7)
    assert r.part(1, 3) == Range(11, 6, 3)
    assert r.part(4, 4) == Range(17, 9, 4)
    assert r.part(4, 8) == Range(17, 9, 8, 4, 7)
    for begin, length in ((3, 2), (0, 6), (2, 8)):
        with pytest.raises(ValueError, match="no whole rows"):
            r.part(begin, length)


def _placements(rank, world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2, 2))
    whole = torch.arange(24.0).view(4, 6)
    for placements in (
        [Replicate(), Shard(0)], [Replicate(), Replicate()], [Shard(1), Replicate()], [Shard(0), Shard(1)],
        [Shard(0), Shard(0)], [_StridedShard(0, split_factor=2), Shard(0)],
        [_StridedShard(1, split_factor=3), Shard(0)],
    ):  # fmt: skip
        param = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        layout = layout_of(param, "w")
        mine = torch.full((layout.local_numel,), -1.0)
        layout.copy_from_whole(mine, whole)
        assert torch.equal(mine, local_tensor(param).reshape(-1)), placements
    with pytest.raises(PlacementError, match=r"w has placements .*Partial.*: a partial sum must be"):
        layout_of(DTensor.from_local(whole, mesh, [Partial(), Replicate()], run_check=False), "w")
    wrong = DTensor.from_local(whole, mesh, [Shard(0), Replicate()], run_check=False, shape=whole.shape, stride=(6, 1))
    with pytest.raises(PlacementError, match=r"w of shape \(4, 6\) .* holds 24 elements here, where these say 12"):
        layout_of(wrong, "w")
    hybrid = layout_of(distribute_tensor(whole, mesh, [Replicate(), Shard(0)], src_data_rank=None), "w")
    return hybrid.ranges[0].global_start


def test_layouts_of_dtensors_on_a_mesh_and_those_that_say_nothing_are_refused_by_name():
    assert on_ranks(4, _placements) == [0, 12, 0, 12]
