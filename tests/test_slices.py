import subprocess
import sys

import pytest
import torch
from torch import nn

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
    return [tuple(r) for r in layout.ranges]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7])
def test_row_shards_are_found_by_arithmetic_uneven_and_empty_ones_too(rows):
    ranges = on_ranks(3, _row_shards, rows)
    covered = [r for rank in ranges for r in rank]
    assert sum(length for _, _, length in covered) == rows * 3
    assert [start for start, _, _ in covered] == sorted(start for start, _, _ in covered)


def _placements(rank, world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2, 2))
    whole = torch.arange(24.0).view(6, 4)
    hybrid = layout_of(distribute_tensor(whole, mesh, [Replicate(), Shard(0)]), "w")
    replicated = layout_of(distribute_tensor(whole, mesh, [Replicate(), Replicate()]), "w")
    for placement in ([_StridedShard(0, split_factor=2), Replicate()], [Partial(), Replicate()]):
        with pytest.raises(PlacementError, match="w has placements"):
            layout_of(DTensor.from_local(whole, mesh, placement, run_check=False), "w")
    for placement in ([Shard(1), Replicate()], [Shard(0), Shard(0)]):
        with pytest.raises(PlacementError, match="w has placements"):
            layout_of(distribute_tensor(whole, mesh, placement), "w")
    return hybrid.ranges[0].global_start, replicated.is_whole


def test_replicated_dimensions_do_not_matter_and_other_placements_are_refused_by_name():
    assert on_ranks(4, _placements) == [(0, True), (12, True), (0, True), (12, True)]
