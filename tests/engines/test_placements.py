"""FSDP2 over tensor parallelism as torchtitan puts them together: steps, norms and checkpoints of any mesh."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardopt import AdEMAMix, checkpoint
from shardopt.distributed import Ranks
from shardopt.engines.state import ModuleState
from shardopt.errors import InputError
from shardopt.slices import layout_of, local_tensor
from tests.distributed.pool import on_ranks

VOCABULARY, WIDTH = 12, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(VOCABULARY, WIDTH), Block()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embed(tokens))))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def parallel(shape: tuple[int, int], *, fsdp: bool = True) -> Net:
    """The model on a mesh of data parallel by tensor parallel ranks, with sequence parallelism between the layers."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh, model = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")), net()
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "block.norm": SequenceParallel(),
        "block.up": ColwiseParallel(input_layouts=Shard(1)),
        "block.down": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh["tp"], plan)
    if fsdp:
        fully_shard(model.block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return model


def optimizer_of(model: nn.Module, options: dict[str, Any]) -> AdEMAMix:
    return AdEMAMix(model.named_parameters(), lr=0.05, weight_decay=0.1, alpha_warmup=4, **options)


def backward(model: nn.Module, step: int, part: int, parts: int) -> None:
    """Of this part of a step's batch."""
    tokens = torch.randint(0, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(step)).chunk(parts)[part]
    logits = model(tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()


def full(tensor: Tensor) -> Tensor:
    """The whole tensor; a collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined,no-any-return]


def whole_state(state: ModuleState) -> dict[tuple[str, str], Tensor]:
    """Every weight and state tensor, whole, in fp32: from all ranks' slices. A collective."""
    from shardopt.optim import states

    found: dict[tuple[str, str], Tensor] = {}
    held = [(s.name, s.kind, s.layout, states.read_slice(s)) for s in state.slices()]
    for slices in state.ranks.gather(held):
        for name, kind, layout, values in slices:
            target = found.setdefault((name, kind), torch.full((layout.numel,), math.nan))
            done = 0
            for r in layout.ranges:
                r.of_whole(target).copy_(r._replace(local_start=0).of_local(values[done : done + r.length]))
                done += r.length
    return found


def compare(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> list[Any]:
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key].view(-1), other[key].view(-1))]


def steps_as_one_process(shape: tuple[int, int], options: dict[str, Any]) -> ModuleState:
    """Two clipped steps on a mesh, with the bits of one process that is given the same gradients."""
    model, single = parallel(shape), net()
    state = ModuleState(optimizer_of(model, options), model)
    reference = ModuleState(optimizer_of(single, options), single, Ranks(0, 1, 0, torch.device("cpu"), False))
    for step in range(2):
        backward(model, step, state.ranks.rank // shape[1], shape[0])
        before = [full(p.grad).clone() for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(g.double().square().sum().item() for g in before))
        assert state.clip_grad_norm(0.5 * norm) == pytest.approx(norm, rel=1e-6)
        for grad, ours, theirs in zip(before, model.parameters(), single.parameters(), strict=True):
            assert ours.grad is not None
            theirs.grad = full(ours.grad)
            torch.testing.assert_close(theirs.grad, 0.5 * grad)
        if shape[0] == 1:  # where no data parallelism divides it the loss is that of one process
            reference_grad = net_gradients(single, step)
            for ours, theirs in zip(single.parameters(), reference_grad, strict=True):
                torch.testing.assert_close(ours.grad, 0.5 * theirs, rtol=1e-3, atol=1e-6)
        state.optimizer.step()
        reference.optimizer.step()
        state.optimizer.zero_grad()
    assert state.statistics() == pytest.approx(reference.statistics(), rel=1e-6)
    found = whole_state(state)
    assert compare(found, whole_state(reference)) == []
    assert not any(tensor.isnan().any() for tensor in found.values())
    for name, tensor in state.full_parameters():
        assert (tensor is not None) == state.ranks.is_main
        assert tensor is None or torch.equal(tensor.view(-1), found[name, "weight"])
    return state


def net_gradients(model: nn.Module, step: int) -> list[Tensor]:
    """Of one process with these weights."""
    twin = net()
    twin.load_state_dict(model.state_dict())
    backward(twin, step, 0, 1)
    return [p.grad for p in twin.parameters() if p.grad is not None]


MESHES = [(2, 2), (1, 4), (4, 1)]
FORMATS = {"m1": "bf16", "nu": "bf16"}


def _steps_and_moves(rank: int, world_size: int, options: dict[str, Any], folder: Path) -> dict[Any, Tensor]:
    alone = torch.load(folder / "alone.pt")
    trained = [steps_as_one_process(shape, options) for shape in MESHES]
    saved = whole_state(trained[0])
    checkpoint.save(folder / "mesh", trained[0])
    for state, (source, expected) in zip(trained, (("alone", alone), ("mesh", saved), ("mesh", saved)), strict=True):
        assert compare(whole_state(state), expected), "nothing to load"
        checkpoint.load(folder / source, state)
        assert compare(whole_state(state), expected) == [], source
        assert {entry["step"] for entry in state.step_counts().values()} == {2 if source == "mesh" else 1}
    return saved


def test_every_mesh_steps_as_one_process_and_loads_what_any_other_saved(tmp_path: Path) -> None:
    options = {"state_dtype": FORMATS, "weight_ema": 0.9}
    alone = Ranks(0, 1, 0, torch.device("cpu"), False)
    single = net()
    state = ModuleState(optimizer_of(single, options), single, alone)
    backward(single, 0, 0, 1)
    state.optimizer.step()
    checkpoint.save(tmp_path / "alone", state)
    torch.save(whole_state(state), tmp_path / "alone.pt")
    saved = on_ranks(4, _steps_and_moves, options, tmp_path)
    assert all(compare(saved[0], other) == [] for other in saved[1:])
    checkpoint.load(tmp_path / "mesh", state)
    assert compare(whole_state(state), saved[0]) == []


def _blocks(rank: int, world_size: int, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    options = {"state_dtype": "block8"}
    model = parallel((2, 2))
    state = ModuleState(optimizer_of(model, options), model)
    backward(model, 0, rank // 2, 2)
    state.optimizer.step()
    checkpoint.save(folder / "ours", state)
    saved = whole_state(state)
    twin = parallel((2, 2))
    copy = optimizer_of(twin, options)
    dcp.save({"optimizer": get_optimizer_state_dict(model, state.optimizer)}, checkpoint_id=folder / "dcp")
    read = {"optimizer": get_optimizer_state_dict(twin, copy)}
    dcp.load(read, checkpoint_id=folder / "dcp")
    set_optimizer_state_dict(twin, copy, read["optimizer"])
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        for key, value in state.optimizer.state[ours].items():
            held = copy.state[theirs][key]
            assert held == value if key == "step" else torch.equal(held.to_local(), value.to_local()), key
    for shape in MESHES:
        model = parallel(shape)
        other = ModuleState(optimizer_of(model, options), model)
        checkpoint.load(folder / "ours", other)
        for key, values in whole_state(other).items():
            if shape == (2, 2) or key[1] == "weight":
                assert torch.equal(values, saved[key]), key
            else:  # rounded anew, under scales of other blocks
                largest = saved[key].abs().max().item()
                torch.testing.assert_close(values, saved[key], rtol=0, atol=largest / 100)


def test_blocks_are_exact_on_the_mesh_that_saved_them_and_rounded_anew_on_another(tmp_path: Path) -> None:
    on_ranks(4, _blocks, tmp_path)


def _sequence_parallel_alone(rank: int, world_size: int) -> None:
    from torch.distributed.tensor import DTensor, Shard

    model = parallel((1, 4), fsdp=False)
    state = ModuleState(optimizer_of(model, {"state_dtype": "bf16"}), model)
    backward(model, 0, 0, 1)
    placed = {name: str(p.grad.placements) for name, p in model.named_parameters() if isinstance(p.grad, DTensor)}
    assert "Partial" in placed["block.norm.weight"]
    with pytest.raises(InputError, match=r"of embed\.weight is placed as .*Replicate.* as .*Shard.*: redistribute"):
        state.optimizer.step()
    assert state.optimizer.state == {} or not any(entry["step"] for entry in state.optimizer.state.values())
    expected = net_gradients(net(), 0)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in expected))
    grad = model.block.up.weight.grad
    assert isinstance(grad, DTensor)
    model.block.up.weight.grad = grad.redistribute(placements=[Shard(1)])
    assert state.clip_grad_norm(None) == pytest.approx(norm, rel=1e-6)
    for param, whole in zip(model.parameters(), expected, strict=True):
        assert param.grad is not None
        torch.testing.assert_close(full(param.grad), whole)
    state.optimizer.step()
    assert {entry["step"] for entry in state.step_counts().values()} == {1}


def test_gradients_placed_otherwise_are_placed_by_clipping_and_refused_by_the_step() -> None:
    on_ranks(4, _sequence_parallel_alone)


def _uneven(rank: int, world_size: int) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for shape in MESHES:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        for size in (1, 5, 9):
            model = nn.Sequential(nn.Linear(4, size), nn.Linear(size, 5))
            whole = {name: torch.arange(float(p.numel())).view(p.shape) for name, p in model.named_parameters()}
            model.load_state_dict(whole)
            parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
            fully_shard(model, mesh=mesh["dp"])
            for name, param in model.named_parameters():
                layout, local = layout_of(param, name), local_tensor(param.detach())
                mine = torch.full((layout.local_numel,), -1.0)
                layout.copy_from_whole(mine, whole[name])
                assert torch.equal(mine, local.reshape(-1)), (shape, size, name)


def test_layouts_of_sizes_that_a_mesh_does_not_divide_are_what_torch_holds() -> None:
    on_ranks(4, _uneven)
