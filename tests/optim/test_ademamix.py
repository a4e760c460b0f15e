"""AdEMAMix as a torch optimizer: groups, state_dict, schedulers, from_adamw."""

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import shardopt
from shardopt.errors import InputError
from shardopt.optim import states
from shardopt.slices import Layout


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))


INPUT = torch.linspace(-1, 1, 24).view(4, 6)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        optimizer.zero_grad()
        (net(INPUT + step) ** 2).mean().backward()
        optimizer.step()


def assert_equal_runs(a: nn.Module, b: nn.Module) -> None:
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)


OPTIONS = [
    {},
    {"state_dtype": "bf16", "seed": 3},
    {"state_dtype": "block16", "weight_ema": 0.9},
    {"state_dtype": "block8", "alpha_warmup": 5, "beta3_warmup": 5},
    {"betas": (0.0, 0.99, 0.999), "capturable": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_continues_bit_for_bit(options, dtype):
    if dtype == torch.bfloat16:
        options = {**options, "master_weights": "split"}
    net = model().to(dtype)
    twin = copy.deepcopy(net)

    def build(m, **other):
        return shardopt.AdEMAMix(m.named_parameters(), lr=1e-2, **{**options, **other})

    global INPUT
    INPUT, kept = INPUT.to(dtype), INPUT
    try:
        optimizer = build(net)
        train(net, optimizer, 4)
        saved = copy.deepcopy(optimizer.state_dict())
        dtypes = [{k: getattr(v, "dtype", None) for k, v in s.items()} for s in saved["state"].values()]
        twin.load_state_dict(net.state_dict())
        other = build(twin, seed=77)  # the saved seed wins
        before = other.state_dict()["state"]
        assert before != saved["state"]
        other.load_state_dict(saved)
        loaded = other.state_dict()["state"].values()
        assert [{k: getattr(v, "dtype", None) for k, v in s.items()} for s in loaded] == dtypes
        train(net, optimizer, 3, start=4)
        train(twin, other, 3, start=4)
        assert_equal_runs(net, twin)
        # loading copied: the first optimizer's state did not become the second's
        assert all(
            optimizer.state[p]["m2"].data_ptr() != other.state[q]["m2"].data_ptr()
            for p, q in zip(net.parameters(), twin.parameters(), strict=True)
        )
    finally:
        INPUT = kept


def test_loading_through_torch_save_with_weights_only(tmp_path):
    net = model()
    optimizer = shardopt.AdEMAMix(net.named_parameters(), state_dtype={"m2": "bf16"})
    train(net, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    other = shardopt.AdEMAMix(net.named_parameters())
    other.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    for param in net.parameters():
        assert other.state[param]["m2"].dtype == torch.bfloat16
        assert torch.equal(other.state[param]["m2"], optimizer.state[param]["m2"])
    assert other.param_groups[0]["state_dtype"] == {"m2": "bf16"}


def test_loading_matches_names_and_refuses_a_mismatch():
    net = model()
    optimizer = shardopt.AdEMAMix(net.named_parameters())
    train(net, optimizer, 2)
    saved = optimizer.state_dict()
    reordered = shardopt.AdEMAMix(reversed([(f"module.{n}", p) for n, p in net.named_parameters()]))
    reordered.load_state_dict(saved)
    for param in net.parameters():
        assert torch.equal(reordered.state[param]["nu"], optimizer.state[param]["nu"])
    renamed = shardopt.AdEMAMix([(n.replace("2.", "3."), p) for n, p in net.named_parameters()])
    with pytest.raises(InputError, match=r"lacks \['3.bias', '3.weight'\] and has \['2.bias', '2.weight'\] besides"):
        renamed.load_state_dict(saved)
    wider = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    with pytest.raises(InputError, match=r"saved m1 of parameter 0.weight is .* shape .9, 6.; here it is .* .10, 6."):
        shardopt.AdEMAMix(wider.named_parameters()).load_state_dict(saved)
    adamw = torch.optim.AdamW(net.named_parameters())
    train(net, adamw, 1)
    with pytest.raises(InputError, match=r"another optimizer's; AdEMAMix.from_adamw takes over"):
        optimizer.load_state_dict(adamw.state_dict())
    # an older state dict without a key of ours keeps what this optimizer was built with
    partial = copy.deepcopy(saved)
    del partial["param_groups"][0]["weight_ema"]
    optimizer.load_state_dict(partial)
    assert optimizer.param_groups[0]["weight_ema"] is None


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_pickle_and_deepcopy(clone):
    net = model()
    optimizer = shardopt.AdEMAMix(net.named_parameters(), kernel="torch", state_dtype="bf16")
    optimizer.set_layout(net[0].bias, Layout.contiguous("0.bias", (100,), 7, 9))
    train(net, optimizer, 2)
    both = clone((net, optimizer))
    train(net, optimizer, 2, start=2)
    train(*both, 2, start=2)
    assert_equal_runs(net, both[0])
    assert both[1].kernel == "torch"


def test_closure_hooks_and_returned_loss():
    net = model()
    optimizer = shardopt.AdEMAMix(net.parameters(), lr=0.003)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = (net(INPUT) ** 2).mean()
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert calls == ["before", "after"] * 5


@pytest.mark.parametrize("kernel", ["c", "torch"])
def test_maximize_is_descent_on_the_negative(kernel):
    up, down = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    ascend = shardopt.AdEMAMix([up], maximize=True, kernel=kernel)
    descend = shardopt.AdEMAMix([down], kernel=kernel)
    for t in range(3):
        up.grad = torch.arange(5.0) - t
        down.grad = -up.grad
        ascend.step()
        descend.step()
    assert torch.equal(up, down)


@pytest.mark.parametrize("capturable", [False, True])
def test_tensor_lr_and_capturable_equal_the_plain_run(capturable):
    nets = [model() for _ in range(2)]
    lr = torch.tensor(0.01, dtype=torch.float64)
    tensor = shardopt.AdEMAMix(nets[0].named_parameters(), lr=lr, capturable=capturable, alpha_warmup=5)
    plain = shardopt.AdEMAMix(nets[1].named_parameters(), lr=0.01, alpha_warmup=5)
    for step in range(4):
        lr.fill_(0.01 / (step + 1))
        plain.param_groups[0]["lr"] = 0.01 / (step + 1)
        train(nets[0], tensor, 1, start=step)
        train(nets[1], plain, 1, start=step)
    assert_equal_runs(*nets)
    step = tensor.state[nets[0][0].weight]["step"]
    assert isinstance(step, torch.Tensor) == capturable
    assert int(step) == 4


def test_lr_scheduler_and_group_options():
    net = model()
    groups = [
        {"params": [("0.weight", net[0].weight)], "alpha": 0.0, "state_dtype": "bf16"},
        {"params": [("2.weight", net[2].weight)], "betas": (0.5, 0.9, 0.99), "lr": 0.5, "seed": 4},
    ]
    optimizer = shardopt.AdEMAMix(groups, lr=0.1, alpha_warmup=10)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2)
    train(net, optimizer, 1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.25]
    scheduler.step()
    optimizer.add_param_group({"params": [("0.bias", net[0].bias)], "weight_decay": 0.3})
    train(net, optimizer, 2, start=1)
    assert optimizer.state[net[0].weight]["m1"].dtype == torch.bfloat16
    assert optimizer.state[net[2].weight]["m1"].dtype == torch.float32
    assert optimizer.state[net[0].bias]["step"] == 2
    assert optimizer.state[net[0].weight]["step"] == 3
    assert net[2].bias not in optimizer.state
    assert optimizer.schedule_values() == {"alpha": 0.0, "beta3": 0.9999}
    assert optimizer.state_dict()["param_groups"][1]["initial_lr"] == 0.5


def test_steps_are_counted_per_parameter_and_gradientless_ones_rest():
    net = model()
    optimizer = shardopt.AdEMAMix(net.named_parameters(), lr=0.1, weight_decay=0.5)
    net[0].bias.requires_grad_(False)
    frozen, idle = net[0].bias.clone(), net[2].bias.clone()
    for _ in range(2):
        for name, param in net.named_parameters():
            param.grad = None if name in ("0.bias", "2.bias") else torch.ones_like(param)
        optimizer.step()
    assert torch.equal(net[0].bias, frozen)
    assert torch.equal(net[2].bias, idle)
    net[2].bias.grad = torch.ones(3)
    optimizer.step()
    counts = {name: counts["step"] for name, counts in states.step_counts(optimizer).items()}
    assert counts == {"0.weight": 3, "2.weight": 3, "2.bias": 1}
    # its bias correction starts at 1: a first step of size lr (1 + alpha (1 - beta3) / ...) plus decay
    g, m2 = 1.0, 1e-4
    expected = idle - 0.1 * ((g + 5.0 * m2) / (1.0 + 1e-8) + 0.5 * idle)
    torch.testing.assert_close(net[2].bias.detach(), expected, rtol=1e-6, atol=1e-7)


def test_tied_weights_step_once():
    net = model()
    alone = copy.deepcopy(net)
    optimizer = shardopt.AdEMAMix(alone.named_parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about the duplicate
        tied = shardopt.AdEMAMix([*net.parameters(), net[0].weight], lr=0.1)
    train(net, tied, 2)
    train(alone, optimizer, 2)
    assert_equal_runs(net, alone)
    assert tied.state[net[0].weight]["step"] == 2


def test_compiled_model_keeps_its_names():
    net = model()
    compiled = torch.compile(net, backend="eager")
    optimizer = shardopt.AdEMAMix(compiled.named_parameters(), state_dtype="bf16")
    plain_net = model()
    plain = shardopt.AdEMAMix(plain_net.named_parameters(), state_dtype="bf16")
    train(compiled, optimizer, 2)
    train(plain_net, plain, 2)
    assert list(states.step_counts(optimizer)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert_equal_runs(net, plain_net)  # and so do the random bits


def test_grad_scaler_skips_and_unscales():
    net = model()
    optimizer = shardopt.AdEMAMix(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.clone() for p in net.parameters()]
    for bad in (True, False):
        optimizer.zero_grad()
        scaler.scale((net(INPUT) ** 2).mean()).backward()
        if bad:
            net[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        moved = not torch.equal(net[0].weight, before[0])
        assert moved == (not bad)
    assert optimizer.state[net[0].weight]["step"] == 1


def test_refusals_move_nothing():
    complex_parameter = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(InputError, match=r"parameter w is complex: optimise torch.view_as_real"):
        shardopt.AdEMAMix([("w", complex_parameter)])
    sparse, dense = nn.Embedding(4, 2, sparse=True), nn.Parameter(torch.ones(2))
    optimizer = shardopt.AdEMAMix([("dense", dense), ("e.weight", sparse.weight)])
    dense.grad = torch.ones(2)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"does not support sparse gradients: the gradient of e.weight is sparse"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(2))
    assert optimizer.state[dense]["step"] == 0
    half = nn.Parameter(torch.ones(2, dtype=torch.float16))
    half.grad = torch.ones_like(half)
    with pytest.raises(InputError, match=r"float16 weights .* master_weights='fp32'"):
        shardopt.AdEMAMix([half]).step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number >= 0, got -1.0"),
        ({"lr": math.nan}, "lr must be a finite number >= 0, got nan"),
        ({"lr": torch.ones(2)}, r"lr must be a number or a tensor of one element, got shape \(2,\)"),
        ({"lr": torch.tensor(-0.5)}, "lr must be a finite number >= 0, got -0.5"),
        ({"betas": (0.9, 0.999)}, "betas must be 3 numbers .beta1, beta2, beta3."),
        ({"betas": (1.0, 0.9, 0.9)}, "beta1 must be a finite number >= 0 and < 1, got 1.0"),
        ({"betas": (0.9, -0.1, 0.9)}, "beta2 must be a finite number >= 0 and < 1, got -0.1"),
        ({"betas": (0.9, 0.9, 1.5)}, "beta3 must be a finite number >= 0 and < 1, got 1.5"),
        ({"betas": (0.9, 0.9, 0.0), "beta3_warmup": 5}, "beta3 must be > 0 and < 1 when beta3_warmup is given"),
        ({"alpha": -1}, "alpha must be a finite number >= 0, got -1"),
        ({"alpha": "5"}, "alpha must be a finite number >= 0, got '5'"),
        ({"eps": math.inf}, "eps must be a finite number >= 0, got inf"),
        ({"eps_root": -1e-8}, "eps_root must be a finite number >= 0, got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number >= 0, got -0.1"),
        ({"alpha_warmup": 0}, "alpha_warmup must be None or a whole number of steps >= 1, got 0"),
        ({"beta3_warmup": 2.5}, "beta3_warmup must be None or a whole number of steps >= 1, got 2.5"),
        ({"second_moment": "adamax"}, "second_moment must be 'adam' or 'yogi', got 'adamax'"),
        ({"maximize": 1}, "maximize must be True or False, got 1"),
        ({"state_dtype": ["bf16"]}, r"state_dtype must be one of fp32, bf16, .* got \['bf16'\]"),
        ({"state_dtype": "fp8"}, "state_dtype must be one of fp32, bf16, block16, block8 .* got 'fp8'"),
        (
            {"state_dtype": {"exp_avg": "bf16"}},
            "state_dtype names 'exp_avg': the state tensors are m1, m2, nu, weight_ema",
        ),
        ({"master_weights": "bf16"}, "master_weights must be None, 'fp32' or 'split', got 'bf16'"),
        ({"weight_ema": 1.0}, "weight_ema must be None, or a finite number >= 0 and < 1, got 1.0"),
        ({"seed": -1}, r"seed must be a whole number >= 0 and < 2\^64, got -1"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_hyper_parameters_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        shardopt.AdEMAMix([nn.Parameter(torch.ones(2))], **options)
    with pytest.raises(InputError, match=message):  # the same for a group
        shardopt.AdEMAMix([{"params": [nn.Parameter(torch.ones(2))], **options}])


def test_whole_numbers_of_numpy_are_taken():
    params, five = [nn.Parameter(torch.ones(2))], np.int64(5)
    (group,) = shardopt.AdEMAMix(params, alpha_warmup=five, beta3_warmup=five, seed=five).param_groups
    assert [type(group[key]) for key in ("alpha_warmup", "beta3_warmup", "seed")] == [int] * 3


def test_a_first_step_without_any_gradient_is_told():
    net = nn.Linear(2, 2)
    optimizer = shardopt.AdEMAMix(net.named_parameters())
    net.weight, net.bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))  # as fully_shard does
    net(torch.ones(1, 2)).sum().backward()
    with pytest.warns(UserWarning, match="no parameter of the optimizer has a gradient.*after fully_shard") as told:
        optimizer.step()
    assert told[0].filename == __file__
    optimizer = shardopt.AdEMAMix(net.named_parameters())
    with warnings.catch_warnings(action="error"):
        optimizer.step()
        net.zero_grad()
        optimizer.step()


def test_a_refused_group_is_not_added():
    optimizer = shardopt.AdEMAMix([nn.Parameter(torch.ones(2))])
    with pytest.raises(InputError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "alpha": -1.0})
    assert len(optimizer.param_groups) == 1


def test_init_state_counts_nothing_and_is_idempotent():
    net = model()
    net[0].bias.requires_grad_(False)
    optimizer = shardopt.AdEMAMix(net.named_parameters(), state_dtype="bf16", weight_ema=0.99)
    before = [p.clone() for p in net.parameters()]
    optimizer.init_state()
    assert net[0].bias not in optimizer.state
    assert optimizer.state[net[0].weight]["step"] == 0
    m1 = optimizer.state[net[0].weight]["m1"]
    optimizer.init_state()
    assert optimizer.state[net[0].weight]["m1"] is m1
    assert_equal_runs(net, type("N", (), {"parameters": lambda self: before})())
    net[0].bias.requires_grad_(True)
    twin = model()
    other = shardopt.AdEMAMix(twin.named_parameters(), state_dtype="bf16", weight_ema=0.99)
    train(net, optimizer, 2)
    train(twin, other, 2)
    assert_equal_runs(net, twin)


def test_dcp_creates_state_without_counting():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    net = model()
    optimizer = shardopt.AdEMAMix(net.parameters(), state_dtype="bf16", weight_decay=0.1, lr=0.1)
    before = copy.deepcopy(net)
    saved = get_optimizer_state_dict(net, optimizer)
    assert_equal_runs(net, before)
    assert {s["step"] for s in optimizer.state.values()} == {0}
    assert saved["state"]["0.weight"]["m1"].dtype == torch.bfloat16
    train(net, optimizer, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    twin = copy.deepcopy(net)
    other = shardopt.AdEMAMix(twin.parameters(), state_dtype="bf16", weight_decay=0.1, lr=0.1)
    set_optimizer_state_dict(twin, other, saved)
    assert other.state[twin[0].weight]["step"] == 3
    train(net, optimizer, 2, start=3)
    train(twin, other, 2, start=3)
    assert_equal_runs(net, twin)


def test_a_first_step_with_lr_zero_counts_where_there_is_a_gradient():
    net = model()
    optimizer = shardopt.AdEMAMix(net.parameters(), lr=0.0)
    train(net, optimizer, 1)
    assert optimizer.state[net[0].weight]["step"] == 1
    # zero gradients count too, once there is state
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert optimizer.state[net[0].weight]["step"] == 2


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "block8", "block16"])
def test_from_adamw_goes_on_where_adamw_was(state_dtype):
    net = model()
    adamw = torch.optim.AdamW(net.named_parameters(), lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)
    train(net, adamw, 5)
    twin = copy.deepcopy(net)
    kept = torch.optim.AdamW(twin.named_parameters(), lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)
    kept.load_state_dict(copy.deepcopy(adamw.state_dict()))
    expected = {p: adamw.state[p]["exp_avg"].clone() for p in net.parameters()}
    optimizer = shardopt.AdEMAMix.from_adamw(
        adamw, alpha=3.0, alpha_warmup=10, beta3_warmup=10, state_dtype=state_dtype
    )
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-2, (0.8, 0.95, 0.9999), 0.1)
    for piece in states.state_slices(optimizer):
        if piece.kind == "m1":
            param = dict(net.named_parameters())[piece.name]
            from shardopt.optim.states import read_slice

            tolerance = {"fp32": 0.0, "bf16": 2**-7, "block16": 2**-10, "block8": 2**-6}[state_dtype]
            error = (read_slice(piece) - expected[param].view(-1)).abs().max() / expected[param].abs().max()
            assert error <= tolerance
    state = optimizer.state[net[0].weight]
    assert (state["step"], state["schedule_step"]) == (5, 0)
    assert not state["m2"].any()
    train(net, optimizer, 1, start=5)
    assert (state["step"], state["schedule_step"]) == (6, 1)
    assert optimizer.schedule_values()["alpha"] == pytest.approx(0.3)
    if state_dtype == "fp32":
        # with alpha = 0 the switch is invisible: the bias corrections went on from AdamW's count
        plain = shardopt.AdEMAMix.from_adamw(kept, alpha=0.0)
        again = copy.deepcopy(twin)
        reference = torch.optim.AdamW(again.named_parameters(), lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)
        reference.load_state_dict(copy.deepcopy(kept.state_dict()))
        train(twin, plain, 4, start=5)
        train(again, reference, 4, start=5)
        for a, b in zip(twin.parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        # both counts survive saving
        other = shardopt.AdEMAMix(net.named_parameters())
        other.load_state_dict(optimizer.state_dict())
        assert (other.state[net[0].weight]["step"], other.state[net[0].weight]["schedule_step"]) == (6, 1)


def test_from_adamw_refuses_what_it_cannot_continue():
    net = model()
    with pytest.raises(InputError, match="amsgrad"):
        shardopt.AdEMAMix.from_adamw(torch.optim.AdamW(net.parameters(), amsgrad=True))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for steps in (0, 1):  # without state, and with it
        train(net, sgd, steps)
        with pytest.raises(InputError, match=r"takes a torch.optim.AdamW, got SGD"):
            shardopt.AdEMAMix.from_adamw(sgd)
    with pytest.raises(InputError, match="L2 weight decay"):
        shardopt.AdEMAMix.from_adamw(torch.optim.Adam(net.parameters(), weight_decay=0.5))
    adamw = torch.optim.AdamW(net.parameters())
    with pytest.raises(InputError, match="takes lr from the AdamW"):
        shardopt.AdEMAMix.from_adamw(adamw, lr=5.0)
    with pytest.raises(InputError, match=r"betas must be 3 numbers .* got \(0.9, 0.99\)"):
        shardopt.AdEMAMix.from_adamw(adamw, betas=(0.9, 0.99))
    with pytest.raises(InputError, match=r"whose betas are \(0.9, 0.999\): give betas=\(0.9, 0.999, 0.99\)"):
        shardopt.AdEMAMix.from_adamw(adamw, betas=(0.8, 0.999, 0.99))
    assert shardopt.AdEMAMix.from_adamw(adamw, betas=(0.9, 0.999, 0.99)).param_groups[0]["betas"][2] == 0.99


@pytest.mark.parametrize("fmt", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averaged_weights(fmt, dtype):
    net = nn.Linear(40, 30).to(dtype)
    unused = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = shardopt.AdEMAMix(
        [*net.named_parameters(), ("unused", unused)], lr=0.05, weight_ema=0.9, state_dtype={"weight_ema": fmt},
        master_weights="fp32",
    )  # fmt: skip
    average = None
    for step in range(30):
        for param in net.parameters():
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.step()
        state = optimizer.state[net.weight]
        weight = state.get("master", net.weight).detach().double()
        average = weight if average is None else 0.9 * average + 0.1 * weight
    inside = net.weight.detach().clone()
    with optimizer.use_weight_ema():
        tolerance = 2e-2 if fmt == "bf16" or dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(net.weight.detach().double(), average, rtol=tolerance, atol=tolerance)
        assert torch.equal(unused, torch.ones(2, dtype=dtype))
        with pytest.raises(InputError, match=r"step\(\) inside use_weight_ema"):
            optimizer.step()
        with pytest.raises(InputError, match=r"use_weight_ema\(\) inside use_weight_ema"), optimizer.use_weight_ema():
            pass
    assert torch.equal(net.weight, inside)
    with pytest.raises(RuntimeError, match="boom"), optimizer.use_weight_ema():
        raise RuntimeError("boom")
    assert torch.equal(net.weight, inside)
    with pytest.raises(InputError, match="weight_ema"), shardopt.AdEMAMix([unused]).use_weight_ema():
        pass
    assert any(piece.kind == "weight_ema" for piece in states.state_slices(optimizer))


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "block16"])
def test_statistics_are_those_of_the_state(state_dtype):
    net = model()
    optimizer = shardopt.AdEMAMix(net.parameters(), lr=0.0, eps=1e-6, alpha=2.0, state_dtype=state_dtype)
    train(net, optimizer, 3)
    from shardopt.optim.states import read_slice

    values: dict[str, list[torch.Tensor]] = {"m1": [], "m2": [], "nu": []}
    for piece in states.state_slices(optimizer):
        values[piece.kind].append(read_slice(piece).double())
    m1, m2, nu = (torch.cat(values[key]) for key in ("m1", "m2", "nu"))
    u = (m1 / (1 - 0.9**3) + 2.0 * m2) / ((nu / (1 - 0.999**3)).sqrt() + 1e-6)
    found = optimizer.statistics()
    for key, value in (("m1", m1), ("m2", m2), ("update", u)):
        assert found[key].dtype == torch.float64
        assert found[key].item() == pytest.approx(value.square().sum().item(), rel=1e-5)


def test_a_rank_may_hold_nothing_at_all():
    empty = nn.Parameter(torch.empty(0, 4))
    optimizer = shardopt.AdEMAMix([("a", empty)], state_dtype="bf16")
    for _ in range(2):
        empty.grad = torch.empty(0, 4)
        optimizer.step()
    assert optimizer.state[empty]["step"] == 2


def test_empty_parameters_are_fine():
    empty, full = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.ones(2))
    optimizer = shardopt.AdEMAMix([("a", empty), ("b", full)], state_dtype="block8")
    empty.grad, full.grad = torch.empty(0, 4), torch.ones(2)
    optimizer.step()
    assert optimizer.state[empty]["step"] == 1
    assert {p.name for p in states.state_slices(optimizer)} == {"a", "b"}


def test_parameters_swapped_before_the_first_step():
    """accelerate puts a dummy and then a DTensor in the place of each parameter, and round-trips the state_dict."""
    net = model()
    optimizer = shardopt.AdEMAMix(net.named_parameters(), state_dtype="bf16")
    optimizer.load_state_dict(optimizer.state_dict())
    other = model()
    for group in optimizer.param_groups:
        group["params"] = list(other.parameters())
    train(other, optimizer, 2)
    plain_net = model()
    plain = shardopt.AdEMAMix(plain_net.named_parameters(), state_dtype="bf16")
    train(plain_net, plain, 2)
    assert_equal_runs(other, plain_net)


def test_a_step_needs_no_temporary_of_a_parameters_size(monkeypatch):
    """Memory of the second step, counted by torch's allocator through the profiler, and that of numpy's tables."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # each has a tile
    param = nn.Parameter(torch.zeros(4_000_000))
    for kernel in ("c", "torch"):
        optimizer = shardopt.AdEMAMix([param], kernel=kernel, state_dtype="bf16")
        param.grad = torch.ones_like(param)
        optimizer.step()
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        sizes = [e.self_cpu_memory_usage for e in profile.events()]
        assert max(sizes, default=0) < 0.05 * param.numel() * 4


def test_a_layout_that_does_not_fit_is_refused():
    param = nn.Parameter(torch.ones(5))
    optimizer = shardopt.AdEMAMix([("w", param)])
    optimizer.set_layout(param, Layout.contiguous("w", (20,), 4, 9))
    param.grad = torch.ones(5)
    with pytest.raises(InputError, match="layout of w ends at element 9, the local tensor has 5"):
        optimizer.step()


def test_capturable_is_refused_where_only_the_torch_kernel_is():
    param = torch.nn.Parameter(torch.empty(3, device="meta"))  # stands for any device without a kernel of its own
    optimizer = shardopt.AdEMAMix([("w", param)], capturable=True)
    param.grad = torch.empty_like(param)
    with pytest.raises(InputError, match="capturable=True on meta needs the triton kernel"):
        optimizer.step()
