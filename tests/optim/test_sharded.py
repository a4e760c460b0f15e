"""DTensor shards: the same bits as unsharded, and state that torch.distributed.checkpoint treats like any other."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardopt
from shardopt.errors import InputError
from shardopt.optim import states
from shardopt.optim.baselines import Yogi
from shardopt.slices import layout_of
from tests.distributed.pool import on_ranks

# Uneven on 2 and 3 ranks; one row leaves shards empty; a vector.
SHAPES = {"a.weight": (7, 5), "b.weight": (1, 300), "c.weight": (13,), "d.weight": (4, 3, 2)}


def whole(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def optimize(named, options, steps, place, start=0):
    optimizer = shardopt.AdEMAMix(named.items(), lr=0.1, weight_decay=0.1, alpha_warmup=4, seed=5, **options)
    for step in range(start, start + steps):
        for name, grad in whole(100 + step, next(iter(named.values())).dtype).items():
            named[name].grad = place(grad)
        optimizer.step()
    return optimizer


def shard(rank, size):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (size,))
    return lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)])


def compare_with_unsharded(rank, size, options, dtype):
    place = shard(rank, size)
    ours = {name: nn.Parameter(place(value)) for name, value in whole(0, dtype).items()}
    optimizer = optimize(ours, options, 3, place)
    full = {name: nn.Parameter(value) for name, value in whole(0, dtype).items()}
    expected = optimize(full, options, 3, lambda grad: grad)
    for name, param in ours.items():
        assert torch.equal(param.full_tensor(), full[name]), name
        for key, value in optimizer.state[param].items():
            other = expected.state[full[name]][key]
            if not isinstance(value, torch.Tensor) or key == "step":
                assert value == other
                continue
            assert type(value) is type(param.detach()), key
            assert (value.dtype, value.shape) == (other.dtype, other.shape)
            piece = torch.empty_like(value.to_local())  # not full_tensor(): no backend gathers int16
            layout_of(param, name).copy_from_whole(piece, other)
            assert torch.equal(value.to_local(), piece), (name, key)
    # slices say where each local piece belongs
    held = {(p.name, p.kind): p for p in states.state_slices(optimizer)}
    mine = held["a.weight", "m2"]
    target = torch.full((35,), float("nan"), dtype=mine.tensors[0].dtype)
    mine.layout.copy_to_whole(mine.tensors[0], target)
    there = ~target.isnan()
    assert torch.equal(target[there], expected.state[full["a.weight"]]["m2"].view(-1)[there])
    sums = torch.stack([optimizer.statistics()[key] for key in ("m1", "m2", "update")])
    dist.all_reduce(sums)
    reference = torch.stack([expected.statistics()[key] for key in ("m1", "m2", "update")])
    torch.testing.assert_close(sums, reference)
    return int(sum(t.to_local().numel() for t in ours.values()))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"state_dtype": "bf16"}, torch.float32),
        ({"state_dtype": "bf16", "weight_ema": 0.9, "kernel": "torch"}, torch.bfloat16),
        ({"master_weights": "split"}, torch.bfloat16),
        ({"capturable": True, "state_dtype": {"nu": "bf16"}}, torch.float32),
    ],
    ids=str,
)
def test_shards_have_the_bits_of_the_whole(size, options, dtype):
    options = {**options}
    assert sum(on_ranks(size, compare_with_unsharded, options, dtype)) == 35 + 300 + 13 + 24


def fully_sharded_round_trip(rank, size):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, init_device_mesh

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    inputs = torch.linspace(-1, 1, 20).view(4, 5)

    def train(net, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            net(inputs).square().mean().backward()
            optimizer.step()

    def build():
        net = copy.deepcopy(base)
        fully_shard(net, mesh=init_device_mesh("cpu", (size,)))
        return net, shardopt.AdEMAMix(net.named_parameters(), lr=0.05, state_dtype="bf16")

    net, optimizer = build()
    before = [p.full_tensor().clone() for p in net.parameters()]
    get_optimizer_state_dict(net, optimizer)  # creates the state
    assert {s["step"] for s in optimizer.state.values()} == {0}
    assert all(torch.equal(p.full_tensor(), b) for p, b in zip(net.parameters(), before, strict=True))
    train(net, optimizer, 3)
    for full in (False, True):
        options = StateDictOptions(full_state_dict=full)
        saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
        twin, other = build()
        twin.load_state_dict(net.state_dict())
        set_optimizer_state_dict(twin, other, saved, options=options)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert isinstance(other.state[q]["m2"], DTensor)
            assert other.state[q]["m2"].dtype == torch.bfloat16
            assert torch.equal(other.state[q]["m2"].to_local(), optimizer.state[p]["m2"].to_local())
            assert other.state[q]["step"] == 3
    continued = [train(net, optimizer, 2), train(twin, other, 2)]
    assert all(
        torch.equal(p.to_local(), q.to_local()) for p, q in zip(net.parameters(), twin.parameters(), strict=True)
    )
    # an unsharded state dict is cut to the shard
    plain = copy.deepcopy(base)
    single = shardopt.AdEMAMix(plain.named_parameters(), lr=0.05, state_dtype="bf16")
    train(plain, single, 2)
    other.load_state_dict(single.state_dict())
    for p, q in zip(plain.parameters(), twin.parameters(), strict=True):
        assert torch.equal(other.state[q]["nu"].full_tensor(), single.state[p]["nu"])
    return len(continued)


def test_fsdp2_and_distributed_checkpoint():
    assert on_ranks(2, fully_sharded_round_trip) == [2, 2]


def take_over_adamw(rank, size):
    place = shard(rank, size)
    params = {name: nn.Parameter(place(value)) for name, value in whole(0, torch.float32).items()}
    full = {name: nn.Parameter(value) for name, value in whole(0, torch.float32).items()}
    switched = []
    for named, put in ((params, place), (full, lambda grad: grad)):
        adamw = torch.optim.AdamW(named.items(), lr=0.1)
        for name, grad in whole(1, torch.float32).items():
            named[name].grad = put(grad)
        adamw.step()
        optimizer = shardopt.AdEMAMix.from_adamw(adamw, state_dtype="bf16", alpha_warmup=3)
        for name, grad in whole(2, torch.float32).items():
            named[name].grad = put(grad)
        optimizer.step()
        switched.append(optimizer)
    for name, param in params.items():
        assert torch.equal(param.full_tensor(), full[name])
        assert torch.equal(switched[0].state[param]["nu"].full_tensor(), switched[1].state[full[name]]["nu"])
        assert switched[0].state[param]["schedule_step"] == 1
    return True


def test_from_adamw_on_shards():
    assert on_ranks(2, take_over_adamw) == [True, True]


def refuse_partial_sums(rank, size):
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (size,))
    param = nn.Parameter(DTensor.from_local(torch.ones(4, 6), mesh, [Partial()], run_check=False))
    param.grad = DTensor.from_local(torch.ones(4, 6), mesh, [Partial()], run_check=False)
    rounded = shardopt.AdEMAMix([("w", param)], state_dtype="bf16")
    with pytest.raises(InputError, match=r"stochastic rounding cannot place w: .* use state_dtype='fp32'"):
        rounded.step()
    exact = shardopt.AdEMAMix([("w", param)])
    exact.step()  # nothing is rounded: where the elements belong does not matter
    assert exact.state[param]["m1"].placements == (Partial(),)
    param = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)]))
    misplaced = shardopt.AdEMAMix([("w", param)], state_dtype="bf16")
    for grad in (
        distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)]),
        DTensor.from_local(torch.ones(4, 6), mesh, [Partial()], run_check=False),
    ):
        param.grad = grad
        with pytest.raises(InputError, match=r"of w is placed as .*, its parameter as .*dim=1.*: redis"):
            misplaced.step()
    param.grad = param.grad.redistribute(placements=param.placements)
    misplaced.step()
    assert misplaced.state[param]["step"] == 1
    return True


def test_placements_that_say_nothing_are_refused_where_it_matters():
    assert on_ranks(2, refuse_partial_sums) == [True, True]


# Columns in rows of whole blocks (of 1,024 on four ranks and on two), of other lengths, and of an odd stride.
WIDE = {"wide": (4, 1024), "even": (8, 20), "odd": (12, 9), "deep": (4, 4, 6), "vector": (40,)}


def placements_of(mesh, dims):
    """All combinations of placements on a 2-D mesh that torch can distribute to."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    single = [Replicate(), *(Shard(dim) for dim in range(dims))]
    strided = [(_StridedShard(dim, split_factor=mesh.size(1)), Shard(dim)) for dim in range(dims)]
    return [*itertools.product(single, single), *strided]


def train_wide(named, grads, place, options, layouts=None):
    """An optimizer after two steps; names alone key the random bits, so that each placement has one of its own."""
    optimizer = shardopt.AdEMAMix(named.items(), lr=0.1, weight_decay=0.1, seed=5, **options)
    for name, layout in (layouts or {}).items():
        optimizer.set_layout(named[name], layout)
    for step in range(2):
        for name, param in named.items():
            param.grad = place(grads[name][step], name)
        optimizer.step()
    return optimizer


def compare_every_placement(rank, size, options, dtype):
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    generator = torch.Generator().manual_seed(0)
    (weights, *grads) = ({n: torch.randn(s, generator=generator).to(dtype) for n, s in WIDE.items()} for _ in range(3))
    grads = {name: [grad[name] for grad in grads] for name in WIDE}
    full = {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}
    whole = train_wide(full, grads, lambda grad, name: grad.clone(), options)
    count = 0
    for shape in ((1, 4), (2, 2), (4, 1)):
        mesh = init_device_mesh("cpu", shape)
        every = {name: placements_of(mesh, len(size)) for name, size in WIDE.items()}
        for number in range(max(map(len, every.values()))):
            chosen = {name: found[number % len(found)] for name, found in every.items()}

            def place(tensor, name, chosen=chosen, mesh=mesh):
                return distribute_tensor(tensor.clone(), mesh, chosen[name], src_data_rank=None)

            def local(tensor, name, place=place):
                return place(tensor, name).to_local().clone()

            ours = {name: nn.Parameter(place(weight, name)) for name, weight in weights.items()}
            state = train_wide(ours, grads, place, options).state
            if options.get("state_dtype") == "block8":  # blocks are along the shard: the same for one layout
                plain = {name: nn.Parameter(local(weight, name)) for name, weight in weights.items()}
                layouts = {name: layout_of(param, name) for name, param in ours.items()}
                expected = train_wide(plain, grads, local, options, layouts).state
                cut = {name: {"weight": plain[name].detach(), **expected[plain[name]]} for name in WIDE}
            else:
                held = {name: {"weight": full[name].detach(), **whole.state[full[name]]} for name in WIDE}
                cut = {n: {k: v if k == "step" else local(v, n) for k, v in of.items()} for n, of in held.items()}
            for name, param in ours.items():
                for key, value in {"weight": param.detach(), **state[param]}.items():
                    if key == "step":
                        continue
                    values = value.to_local().view(-1)[: cut[name][key].numel()]  # a smaller shard leaves scales unused
                    assert torch.equal(values, cut[name][key].view(-1)), (shape, chosen[name], name, key)
                count += 1
    return count


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"state_dtype": {"m2": "bf16", "nu": "bf16"}, "weight_ema": 0.9}, torch.float32),
        ({"state_dtype": "bf16"}, torch.bfloat16),
        ({"state_dtype": "bf16", "kernel": "torch"}, torch.bfloat16),
        ({"master_weights": "split"}, torch.bfloat16),
        ({"state_dtype": "block8"}, torch.float32),
    ],
    ids=str,
)
def test_every_placement_on_every_mesh_has_the_bits_of_the_whole(options, dtype):
    assert on_ranks(4, compare_every_placement, {**options}, dtype) == [3 * 19 * len(WIDE)] * 4


def block_state_through_dcp(rank, size, folder, save):
    """Save with torch.distributed.checkpoint after two steps, or load and compare with the run that saved."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (size,))

    def build():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(300, 5), nn.Tanh(), nn.Linear(5, 1))  # uneven rows, and a rank with none
        fully_shard(net, mesh=mesh)
        formats = {"m1": "block16", "m2": "block8", "nu": "block8"}
        return net, shardopt.AdEMAMix(net.named_parameters(), lr=0.05, state_dtype=formats, weight_ema=0.9)

    def train(net, optimizer, start):
        for step in range(start, start + 2):
            optimizer.zero_grad()
            net(torch.linspace(-1, 1, 600).view(2, 300) * (1 + rank + step)).square().mean().backward()
            optimizer.step()

    net, optimizer = build()
    if save:
        train(net, optimizer, 0)
        dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=folder)
        twin, other = build()
        twin.load_state_dict(net.state_dict())
        read = {"optimizer": get_optimizer_state_dict(twin, other)}
        dcp.load(read, checkpoint_id=folder)
        set_optimizer_state_dict(twin, other, read["optimizer"])
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert set(optimizer.state[p]) == set(other.state[q])
            for key, value in optimizer.state[p].items():
                held = other.state[q][key]
                same = torch.equal(held.to_local(), value.to_local()) if key != "step" else held == value
                assert same, key
        train(net, optimizer, 2)
        train(twin, other, 2)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.to_local(), q.to_local())
        return float(sum(optimizer.statistics().values()))
    with pytest.raises(CheckpointException, match=r"Size mismatch .* for optimizer.state.0.weight.m1_scale"):
        dcp.load({"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=folder)
    return True


def test_block_formats_go_through_torch_distributed_checkpoint(tmp_path):
    assert len(set(on_ranks(2, block_state_through_dcp, tmp_path, True))) == 2
    # blocks of another world size end elsewhere
    assert on_ranks(3, block_state_through_dcp, tmp_path, False) == [True] * 3


def count_steps_with_empty_shards(rank, size):
    """Steps counted on this rank, whose first has lr = 0, and a gradient in row 0 alone."""
    place = shard(rank, size)
    counts = []
    for cls in (shardopt.AdEMAMix, Yogi):
        params = [(name, nn.Parameter(place(torch.ones(rows, 3)))) for name, rows in (("one", 1), ("four", 4))]
        optimizer = cls(params, lr=0.0)
        for _ in range(2):
            for _, param in params:
                grad = torch.zeros(param.shape)
                grad[0] = 1.0
                param.grad = place(grad)
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.1
        counts.append(states.step_counts(optimizer))
    return counts


def test_ranks_with_empty_shards_count_steps_as_the_others_do():
    assert on_ranks(3, count_steps_with_empty_shards) == [[{"one": {"step": 2}, "four": {"step": 2}}] * 2] * 3
