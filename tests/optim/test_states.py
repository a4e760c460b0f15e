"""The state of any torch optimizer as slices and numbers."""

import copy

import pytest
import torch
from torch import nn

import shardopt
from shardopt.errors import InputError
from shardopt.optim import registry, states
from shardopt.slices import Layout, Range

NAMES = [name for name in registry.names() if registry.spec(name).elementwise]


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    net[0].weight.data[0, 0] = -0.0
    net.scale = nn.Parameter(torch.tensor(1.5))  # a 0-d parameter: its state tensors look like counts
    return net


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        ((net(torch.linspace(-1, 1, 24).view(4, 6) + step) * net.scale) ** 2).mean().backward()
        optimizer.step()


def build(name: str, net: nn.Module) -> torch.optim.Optimizer:
    extra = {"momentum": 0.9} if name in ("sgd", "rmsprop") else {}
    chosen = registry.spec(name, lr=0.01, **extra)
    return chosen.cls(net.named_parameters(), **chosen.kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_init_state_moves_and_counts_nothing(name):
    net = model()
    net[2].bias.requires_grad_(False)
    optimizer = build(name, net)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    before = [p.detach().clone() for p in net.parameters()]
    states.init_state(optimizer)
    states.init_state(optimizer)
    assert not calls
    for param, kept in zip(net.parameters(), before, strict=True):
        assert torch.equal(param.detach().view(-1).view(torch.int32), kept.view(-1).view(torch.int32))
        assert param.grad is None
    assert not optimizer.state.get(net[2].bias)
    assert all(not any(counts.values()) for counts in states.step_counts(optimizer).values())
    # a run that began with init_state is the run that did not
    twin = model()
    twin[2].bias.requires_grad_(False)
    plain = build(name, twin)
    train(net, optimizer, 3)
    train(twin, plain, 3)
    for param, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(param, other)


TORCHS = {
    "Adadelta": {},
    "Adagrad": {"initial_accumulator_value": 0.1},
    "Adafactor": {},
    "Adamax": {},
    "ASGD": {"t0": 1.0, "lambd": 0.1},
    "NAdam": {},
    "RAdam": {},
    "Rprop": {},
    "SGD": {"momentum": 0.9, "nesterov": True},
}


@pytest.mark.parametrize("name", TORCHS)
@pytest.mark.parametrize("foreach", [False, True])
def test_run_after_init_state_is_the_run_without_it(name, foreach):
    nets, cls = (model(), model()), getattr(torch.optim, name)
    optimizer, plain = (cls(net.named_parameters(), lr=0.05, foreach=foreach, **TORCHS[name]) for net in nets)
    states.init_state(optimizer)
    assert all(optimizer.state[param] for param in nets[0].parameters())
    assert "_init_group" not in vars(optimizer)
    train(nets[0], optimizer, 4)
    train(nets[1], plain, 4)
    assert states.step_counts(optimizer) == states.step_counts(plain)
    for param, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(param, other)


def test_init_state_refuses_sgd_with_dampening():
    net = model()
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    with pytest.raises(InputError, match=r"SGD with dampening begins its momentum .* Set dampening=0"):
        states.init_state(optimizer)
    assert not optimizer.state


@pytest.mark.parametrize("name", NAMES)
def test_slices_and_scalars_carry_a_run_over(name):
    net = model()
    optimizer = build(name, net)
    train(net, optimizer, 3)
    pieces = states.state_slices(optimizer)
    scalars = states.step_counts(optimizer)
    if pieces:
        assert all(piece.layout.is_whole for piece in pieces)
        assert ("scale", ()) in {(piece.name, piece.layout.shape) for piece in pieces}
    twin = copy.deepcopy(net)
    other = build(name, twin)
    states.init_state(other)
    for target, source in zip(states.state_slices(other), pieces, strict=True):
        assert (target.name, target.kind, target.layout) == (source.name, source.kind, source.layout)
        target.tensors[0].copy_(source.tensors[0])
    states.load_step_counts(other, scalars)
    assert states.step_counts(other) == scalars
    train(net, optimizer, 2)
    train(twin, other, 2)
    for param, copied in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(param, copied)


def test_adamw_counts_are_found_and_missing_ones_named():
    net = model()
    optimizer = build("adamw", net)
    train(net, optimizer, 2)
    assert states.step_counts(optimizer)["scale"] == {"step": 2}
    with pytest.raises(InputError, match=r"no step for parameter '0.bias'"):
        states.load_step_counts(optimizer, {"0.weight": {"step": 1}, "scale": {"step": 1}})


def test_a_switch_from_adamw_keeps_both_counts():
    net = model()
    adamw = build("adamw", net)
    train(net, adamw, 4)
    optimizer = shardopt.AdEMAMix.from_adamw(adamw)
    train(net, optimizer, 1)
    saved = states.step_counts(optimizer)
    assert saved["0.weight"] == {"step": 5, "schedule_step": 1}
    for capturable in (False, True):
        other = shardopt.AdEMAMix(net.named_parameters(), capturable=capturable)
        other.init_state()
        states.load_step_counts(other, saved)
        assert states.step_counts(other) == saved
        assert isinstance(other.state[net[0].weight]["schedule_step"], torch.Tensor) == capturable
    # and one that did not switch has no second count
    optimizer_scalars = {name: {"step": 5} for name in saved}
    states.load_step_counts(optimizer, optimizer_scalars)
    assert "schedule_step" not in optimizer.state[net[0].weight]


def test_a_flat_partition_is_several_slices():
    flat = nn.Parameter(torch.arange(10.0))
    optimizer = shardopt.AdEMAMix([flat], lr=0.0)
    parts = [Layout("a", (2, 4), (Range(5, 0, 3),)), Layout("b", (9,), (Range(0, 3, 4),))]  # three of padding
    optimizer.set_layout(flat, parts)
    flat.grad = torch.arange(10.0)
    optimizer.step()
    found = {(piece.name, piece.kind): piece for piece in states.state_slices(optimizer)}
    assert set(found) == {(n, k) for n in "ab" for k in ("m1", "m2", "nu")}
    piece = found["b", "m1"]
    assert piece.layout.ranges == (Range(0, 0, 4),)
    torch.testing.assert_close(piece.tensors[0], 0.1 * torch.arange(3.0, 7.0))
    assert found["a", "nu"].nbytes == 12
    assert states.step_counts(optimizer) == {"a": {"step": 1}, "b": {"step": 1}}
    piece.tensors[0].fill_(7.0)  # the live state itself
    assert optimizer.state[flat]["m1"][3:7].tolist() == [7.0] * 4
    assert optimizer.state[flat]["m1"][7:].tolist() == [0.0] * 3
    # the same for an optimizer that knows nothing of layouts
    adamw = torch.optim.AdamW([flat])
    adamw.step()
    assert {p.name for p in states.state_slices(adamw, {flat: parts})} == {"a", "b"}


def test_canonical_name_strips_wrapper_prefixes_and_positions_stand_in():
    net = model()
    wrapped = [(f"module._orig_mod.{name}", param) for name, param in net.named_parameters()]
    assert list(states.parameter_names(torch.optim.SGD(wrapped, lr=1)).values())[:2] == ["scale", "0.weight"]
    unnamed = torch.optim.SGD([{"params": [net.scale]}, {"params": [net[0].weight, net[0].bias]}], lr=1)
    assert list(states.parameter_names(unnamed).values()) == ["0", "1", "2"]
    # a host that put one flat partition in the place of named parameters
    named = torch.optim.SGD(net.named_parameters(), lr=1)
    named.param_groups[0]["params"] = [nn.Parameter(torch.zeros(30))]
    assert list(states.parameter_names(named).values()) == ["0"]


def test_state_that_is_not_elementwise_is_sliced_whole_and_refused_on_a_shard():
    net = nn.Linear(4, 3)
    optimizer = torch.optim.Adafactor(net.named_parameters())
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    found = {(piece.name, piece.kind): piece for piece in states.state_slices(optimizer)}
    assert set(found) == {("weight.row_var", "row_var"), ("weight.col_var", "col_var"), ("bias", "variance")}
    for (name, kind), piece in found.items():
        state = optimizer.state[getattr(net, name.split(".")[0])][kind]
        assert piece.layout == Layout.whole(name, state.shape)
        assert piece.tensors[0].data_ptr() == state.data_ptr()
    part = {param: Layout.contiguous(name, (9, 4), 0, param.numel()) for name, param in net.named_parameters()}
    with pytest.raises(InputError, match="Adafactor keeps state 'row_var' of weight that is not one value per element"):
        states.state_slices(optimizer, part)
