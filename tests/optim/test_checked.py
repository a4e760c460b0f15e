"""Settings and loaded state: what does not fit is refused by name, always, and changes nothing."""

import copy
import doctest
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import shardopt
from shardopt.errors import InputError
from shardopt.optim import ademamix, precision, states
from shardopt.optim.baselines import SimplifiedAdEMAMix, Yogi

OURS = [shardopt.AdEMAMix, SimplifiedAdEMAMix, Yogi]
INPUT = torch.linspace(-1, 1, 24).view(4, 6)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        (net(INPUT + step) ** 2).mean().backward()
        optimizer.step()


def trained(cls=shardopt.AdEMAMix, steps=2, **options):
    net = model()
    optimizer = cls(net.named_parameters(), lr=0.01, **options)
    train(net, optimizer, steps)
    return net, optimizer


def snapshot(net, optimizer):
    """Everything that a refusal must leave as it was."""
    return copy.deepcopy((net.state_dict(), optimizer.state_dict()))


def assert_unchanged(net, optimizer, before):
    weights, (state, groups) = before[0], (before[1]["state"], before[1]["param_groups"])
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())
    now = optimizer.state_dict()
    assert now["param_groups"] == groups
    assert now["state"].keys() == state.keys()
    for index, entry in state.items():
        for key, value in entry.items():
            other = now["state"][index][key]
            assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value


# -- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", OURS)
@pytest.mark.parametrize(("key", "value"), [("betas", (0.9,)), ("eps", -1.0), ("lr", -1.0), ("weight_decay", "0.1")])
def test_setting_changed_in_a_group_is_checked_at_every_step(cls, key, value):
    net, optimizer = trained(cls)
    good = optimizer.param_groups[0][key]
    optimizer.param_groups[0][key] = value
    before = [p.clone() for p in net.parameters()]
    for _ in range(2):  # refused again, not once
        with pytest.raises(InputError, match=key if key != "betas" else "betas must be"):
            optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert int(optimizer.state[net[0].weight]["step"]) == 2
    optimizer.param_groups[0][key] = good
    optimizer.step()


def test_unchanged_settings_are_not_checked_again():
    net, optimizer = trained()
    checks = []
    check = optimizer._check_settings
    optimizer._check_settings = lambda group: (checks.append(1), check(group))
    train(net, optimizer, 3)
    assert not checks
    optimizer.param_groups[0]["alpha"] = 1.0
    train(net, optimizer, 3)
    assert len(checks) == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("betas", (0.0, 0.99, 0.999), r"state of 0.weight has \['m1'\] besides.*whether beta1 is 0"),
        ("state_dtype", "bf16", r"state 'm1' of 0.weight is torch.float32 .* needs torch.bfloat16"),
        ("weight_ema", 0.9, r"state of 0.weight lacks \['weight_ema'\]"),
    ],
)
def test_settings_that_decide_the_state_must_not_change_once_there_is_state(key, value, message):
    net, optimizer = trained()
    before = [p.clone() for p in net.parameters()]
    optimizer.param_groups[0][key] = value
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_beta1_set_above_zero_later_is_refused_as_there_is_no_m1():
    _, optimizer = trained(betas=(0.0, 0.99, 0.999))
    optimizer.param_groups[0]["betas"] = (0.9, 0.99, 0.999)
    with pytest.raises(InputError, match=r"state of 0.weight lacks \['m1'\]"):
        optimizer.step()


@pytest.mark.parametrize("cls", OURS)
def test_numpy_numbers_are_taken_as_python_numbers(cls, tmp_path):
    net = model()
    optimizer = cls(net.named_parameters(), lr=np.float32(0.5), weight_decay=np.float64(0.25))
    assert type(optimizer.param_groups[0]["lr"]) is float
    optimizer.param_groups[0]["lr"] = np.float32(0.125)
    optimizer.param_groups[0]["betas"] = np.array(optimizer.param_groups[0]["betas"])
    train(net, optimizer, 1)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    saved = torch.load(tmp_path / "o.pt", weights_only=True)["param_groups"][0]
    assert (saved["lr"], saved["weight_decay"]) == (0.125, 0.25)


@pytest.mark.parametrize("when", ["before the first step", "later", "in a group"])
def test_key_of_a_group_that_is_nearly_a_settings_is_refused(when):
    net, optimizer = trained() if when == "later" else (net := model(), shardopt.AdEMAMix(net.named_parameters()))
    for key, meant in {"weigth_decay": "weight_decay", "learning_rate": "lr", "beta": "betas"}.items():
        refused = partial(shardopt.AdEMAMix, [{"params": list(net.parameters()), key: 0.1}])
        if when != "in a group":
            refused, optimizer.param_groups[0][key] = optimizer.step, 0.1
        with pytest.raises(InputError, match=f"a parameter group has no setting '{key}'; did you mean {meant}"):
            refused()
        optimizer.param_groups[0].pop(key, None)
    optimizer.param_groups[0]["initial_lr"] = 0.1  # a scheduler's
    train(net, optimizer, 1)


def test_parameter_moved_to_another_group_follows_its_settings():
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    groups = [{"params": [("a", params[0]), ("b", params[1])]}, {"params": [("c", params[2])], "lr": 0.0}]
    optimizer = shardopt.AdEMAMix(groups, lr=0.1)
    for moved in (False, True):
        if moved:
            for key in ("params", "param_names"):
                optimizer.param_groups[1][key].insert(0, optimizer.param_groups[0][key].pop())
        kept = params[1].clone()
        for param in params:
            param.grad = torch.ones(2)
        optimizer.step()
        assert torch.equal(kept, params[1]) == moved
    assert list(states.step_counts(optimizer)) == ["a", "b", "c"]
    optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"].pop(0))
    with pytest.raises(InputError, match="moved between parameter groups: move their entries of 'param_names' along"):
        optimizer.step()


def test_parameters_exchanged_between_groups_do_not_swap_their_names():
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = shardopt.AdEMAMix([{"params": [("a", params[0])]}, {"params": [("b", params[1])], "lr": 0.0}])
    first, second = optimizer.param_groups
    first["params"], second["params"] = second["params"], first["params"]
    for param in params:
        param.grad = torch.ones(2)
    for refused in (optimizer.step, lambda: states.step_counts(optimizer)):
        with pytest.raises(InputError, match="moved between parameter groups: move their entries of 'param_names'"):
            refused()
    first["param_names"], second["param_names"] = second["param_names"], first["param_names"]
    optimizer.step()
    assert torch.equal(params[0], torch.ones(2))
    assert not torch.equal(params[1], torch.ones(2))


@pytest.mark.parametrize(("key", "value"), [("x", 1), (None, 1)])
def test_state_entries_that_belong_to_no_parameter_are_refused(key, value):
    net, optimizer = trained()
    optimizer.state[net[0].weight if key is None else key] = value
    for _ in range(2):
        with pytest.raises(InputError, match=rf"optimizer.state\['{key or '0.weight'}'\] is 1, no parameter's"):
            optimizer.step()


@pytest.mark.parametrize("cls", [*OURS, torch.optim.AdamW])
def test_two_parameters_of_one_canonical_name_are_refused(cls):
    pair = [("weight", nn.Parameter(torch.ones(2))), ("module.weight", nn.Parameter(torch.ones(2)))]
    with pytest.raises(InputError, match="two parameters are named 'weight'"):
        states.step_counts(cls(pair))


# -- loading ------------------------------------------------------------------------------------------------------


def without(key):
    return lambda state: state.pop(key)


def cast(key, dtype):
    return lambda state: state.update({key: state[key].to(dtype)})


REFUSED = {
    "m2": (without("m2"), r"state of parameter 0.weight lacks \['m2'\]: it is"),
    "m1": (without("m1"), r"lacks \['m1'\]"),
    "step": (without("step"), r"lacks \['step'\]"),
    "extra": (lambda s: s.update(exp_avg=s["m1"]), r" has \['exp_avg'\] besides"),
    "fp16": (cast("m2", torch.float16), "saved m2 of parameter 0.weight is torch.float16 .*; here it is torch.float32"),
    "fp64": (cast("nu", torch.float64), "saved nu of parameter 0.weight is torch.float64 .*; here it is torch.float32"),
    "transposed": (lambda s: s.update(m1=s["m1"].t()), r"saved m1 of .* shape .6, 9.; here .* shape .9, 6."),
    "negative step": (lambda s: s.update(step=-1), "saved step of parameter 0.weight must be a count, got -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_loading_refuses_state_that_does_not_fit_and_changes_nothing(case):
    _net, optimizer = trained(steps=3)
    saved = copy.deepcopy(optimizer.state_dict())
    spoil, message = REFUSED[case]
    spoil(saved["state"][0])
    other = trained(steps=1)
    before = snapshot(*other)
    with pytest.raises(InputError, match=message):
        other[1].load_state_dict(saved)
    assert_unchanged(*other, before)


@pytest.mark.parametrize("case", ["last parameter", "setting", "unknown entry"])
def test_refused_load_leaves_what_was_there(case):
    _, optimizer = trained(steps=3, weight_ema=0.9)
    saved = copy.deepcopy(optimizer.state_dict())
    if case == "last parameter":
        saved["state"][3]["m2"] = saved["state"][3]["m2"].half()
    elif case == "setting":
        saved["param_groups"][0]["alpha"] = -1
    else:
        saved["state"]["x"] = 1
    other = trained(steps=1, weight_ema=0.9)
    before = snapshot(*other)
    held = {key: value for key, value in other[1].state[other[0][0].weight].items() if key != "step"}
    with pytest.raises(InputError):
        other[1].load_state_dict(saved)
    assert_unchanged(*other, before)
    assert all(other[1].state[other[0][0].weight][key] is value for key, value in held.items())
    train(*other, 1)


@pytest.mark.parametrize("cls", OURS)
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("theirs", [torch.optim.AdamW, torch.optim.SGD])
def test_loading_refuses_another_optimizers_state_even_when_empty(cls, steps, theirs):
    net = model()
    other = theirs(net.named_parameters(), lr=0.5)
    train(net, other, steps)
    optimizer = cls(net.named_parameters(), lr=0.01)
    hint = "; AdEMAMix.from_adamw takes over an AdamW" if cls is shardopt.AdEMAMix else ""
    with pytest.raises(InputError, match=f"another optimizer's{hint}"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize(
    ("cls", "key", "value"),
    [(Yogi, "initial_accumulator", 0.5), (SimplifiedAdEMAMix, "min_beta1", 0.5), (shardopt.AdEMAMix, "eps_root", 0.5)],
)
def test_a_setting_that_an_older_state_dict_lacks_stays(cls, key, value):
    net, optimizer = trained(cls)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0][key]
    other = cls(net.named_parameters(), **{key: value})
    other.load_state_dict(saved)
    assert other.param_groups[0][key] == value
    assert other.param_groups[0]["lr"] == 0.01
    train(net, other, 1)


def test_loaded_state_shares_no_memory_with_the_state_dict():
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    source, target = (shardopt.AdEMAMix([("w", param)]) for param in (first, second))
    first.grad = second.grad = torch.ones(3)
    source.step()
    before = source.state[first]["m1"].clone()
    target.load_state_dict(source.state_dict())
    target.step()
    assert torch.equal(source.state[first]["m1"], before)
    assert not torch.equal(target.state[second]["m1"], before)


@pytest.mark.parametrize("cls", [Yogi, SimplifiedAdEMAMix])
def test_baselines_refuse_state_that_does_not_fit(cls):
    net, optimizer = trained(cls)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["nu"]
    before = snapshot(net, optimizer)
    with pytest.raises(InputError, match=r"parameter 0.weight lacks \['nu'\]"):
        optimizer.load_state_dict(saved)
    assert_unchanged(net, optimizer, before)


def test_block_format_state_of_a_whole_does_not_load_with_other_blocks():
    _net, optimizer = trained(state_dtype="block8")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["m1_scale"] = torch.ones(7)
    with pytest.raises(InputError, match=r"saved m1_scale of parameter 0.weight is .* shape .7,.; here .* shape .1,."):
        optimizer.load_state_dict(saved)


# -- unnamed parameters ---------------------------------------------------------------------------------------------


def rounded(optimizer):
    (param,) = optimizer.param_groups[0]["params"]
    for _ in range(3):
        param.grad = torch.linspace(0.1, 1.0, 4096)
        optimizer.step()
    return optimizer.state[param]["m2"]


def unnamed():
    return shardopt.AdEMAMix([nn.Parameter(torch.zeros(4096))], state_dtype="bf16")


def test_one_optimizer_per_unnamed_parameter_each_rounds_with_bits_of_its_own():
    a, b = unnamed(), unnamed()
    assert not torch.equal(rounded(a), rounded(b))
    named = [shardopt.AdEMAMix([("w", nn.Parameter(torch.zeros(4096)))], state_dtype="bf16") for _ in range(2)]
    assert torch.equal(rounded(named[0]), rounded(named[1]))


def test_the_bits_of_unnamed_parameters_come_along_in_state_dict_and_copies():
    first = unnamed()
    saved, twin = copy.deepcopy(first.state_dict()), copy.deepcopy(first)
    other = unnamed()
    other.load_state_dict(saved)
    later = unnamed()
    expected = rounded(first)
    assert torch.equal(rounded(other), expected)
    assert torch.equal(rounded(twin), expected)
    assert not torch.equal(rounded(later), expected)
    first.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert first.param_groups[1]["stream"] == first.param_groups[0]["stream"]


# -- the averaged weights -------------------------------------------------------------------------------------------


def test_inside_use_weight_ema_nothing_takes_the_averaged_weights_for_the_trained_ones():
    net, optimizer = trained(weight_ema=0.5)
    saved = optimizer.state_dict()
    trained_weight = net[0].weight.detach().clone()
    for what, call in {
        r"step\(\)": optimizer.step,
        r"state_dict\(\)": optimizer.state_dict,
        r"load_state_dict\(\)": lambda: optimizer.load_state_dict(saved),
        "a checkpoint": lambda: states.state_slices(optimizer),
    }.items():
        with pytest.raises(InputError, match=f"{what}.* inside use_weight_ema"), optimizer.use_weight_ema():
            call()
        assert torch.equal(net[0].weight, trained_weight)  # left by an exception
    train(net, optimizer, 1)


def test_weights_come_back_where_the_host_swapped_the_storage_inside_use_weight_ema():
    net, optimizer = trained(weight_ema=0.5)
    before = net[0].weight.detach().clone()
    with optimizer.use_weight_ema():
        net[0].weight.data = net[0].weight.data.clone()
    assert torch.equal(net[0].weight, before)


@pytest.mark.parametrize("fmt", list(precision.FORMATS))
def test_from_adamw_starts_the_average_of_the_weights_at_the_weights(fmt):
    net = model()
    adamw = torch.optim.AdamW(net.named_parameters(), lr=0.01)
    train(net, adamw, 3)
    optimizer = shardopt.AdEMAMix.from_adamw(adamw, weight_ema=0.9, state_dtype={"weight_ema": fmt})
    at_switch = {name: p.detach().clone() for name, p in net.named_parameters()}
    train(net, optimizer, 1)
    after = {name: p.detach().clone() for name, p in net.named_parameters()}
    with optimizer.use_weight_ema():
        for name, param in net.named_parameters():
            expected = 0.9 * at_switch[name] + 0.1 * after[name]
            torch.testing.assert_close(param.detach(), expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("theirs", [torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax])
@pytest.mark.parametrize("steps", [0, 1])
def test_from_adamw_refuses_relatives_with_another_update(theirs, steps):
    net = model()
    other = theirs(net.named_parameters())
    train(net, other, steps)
    with pytest.raises(InputError, match=f"takes a torch.optim.AdamW, got {theirs.__name__}"):
        shardopt.AdEMAMix.from_adamw(other)


# -- costs ------------------------------------------------------------------------------------------------------------


def test_names_are_computed_once_for_all_parameters(monkeypatch):
    calls = []
    monkeypatch.setattr(states, "canonical_name", lambda name: (calls.append(name), name)[1])
    params = [(f"layer{i}.weight", nn.Parameter(torch.ones(3))) for i in range(40)]
    optimizer = shardopt.AdEMAMix(params, state_dtype="block8")
    optimizer.init_state()
    for _, param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    adamw = torch.optim.AdamW(params)
    adamw.step()
    shardopt.AdEMAMix.from_adamw(adamw, state_dtype="block8").step()
    assert 40 <= len(calls) <= 6 * 40


# -- torch's helpers ----------------------------------------------------------------------------------------------


def test_grad_scaler_unscales_and_a_scheduler_sets_lr():
    net, optimizer = trained(steps=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    twin, plain = trained(steps=0)
    other = torch.optim.lr_scheduler.OneCycleLR(plain, max_lr=0.1, total_steps=20)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale((net(INPUT + step) ** 2).mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        plain.zero_grad()
        (twin(INPUT + step) ** 2).mean().backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        plain.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    assert optimizer.param_groups[0]["betas"][0] != 0.9  # the schedule moves beta1 too


def test_examples_of_the_docstring_run():
    results = doctest.testmod(ademamix)
    assert results.attempted >= 7
    assert not results.failed


@pytest.mark.parametrize("load", ["weights", "data"])
def test_weights_loaded_inside_use_weight_ema_are_refused_on_leaving(load):
    net, optimizer = trained(weight_ema=0.5)
    before = net[0].weight.detach().clone()

    def block():
        with optimizer.use_weight_ema():
            if load == "weights":
                net.load_state_dict({key: torch.ones_like(value) for key, value in net.state_dict().items()})
            else:
                net[0].weight.data = torch.ones_like(net[0].weight)

    with pytest.raises(InputError, match=r"0\.weight was changed inside use_weight_ema\(\)"):
        block()
    assert torch.equal(net[0].weight, before)
    optimizer.state_dict()  # the block has been left


# -- misspelt names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["weigth_decay", "LR", "beta", "alpha_warm_up"])
def test_misspelt_key_of_a_parameter_group_is_refused_with_the_nearest(key):
    near = {"weigth_decay": "weight_decay", "LR": "lr", "beta": "betas", "alpha_warm_up": "alpha_warmup"}[key]
    optimizer = shardopt.AdEMAMix([("v", nn.Parameter(torch.ones(2)))])
    for build in (shardopt.AdEMAMix, lambda groups: optimizer.add_param_group(groups[0])):
        with pytest.raises(InputError, match=rf"no setting '{key}'; did you mean {near}\?"):
            build([{"params": [("w", nn.Parameter(torch.ones(2)))], key: 0.0}])
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("cls", [shardopt.AdEMAMix, Yogi, SimplifiedAdEMAMix])
def test_keys_that_schedulers_and_hosts_give_a_group_are_taken(cls):
    keys = "initial_lr max_lr min_lr base_lr max_momentum base_momentum swa_lr foreach fused differentiable momentum "
    keys += (
        "lr_scale lr_mult wd_mult lr_multiplier weight_decay_mult name tag is_expert decoupled_weight_decay amsgrad "
    )
    keys += "bias_correction step group_name use_muon layer_decay moe base_weight_decay cur_lr"
    optimizer = cls([{"params": [("w", nn.Parameter(torch.ones(2)))], **dict.fromkeys(keys.split(), 0.5)}])
    assert optimizer.param_groups[0]["lr_scale"] == 0.5


@pytest.mark.parametrize(
    ("key", "hint"),
    [("compile", ""), ("beta3", "betas"), ("T_alpha", "alpha_warmup"), ("T_beta3", "beta3_warmup"), ("sede", "seed")],
)
def test_unknown_argument_is_refused_with_the_class_and_the_nearest(key, hint):
    message = f"AdEMAMix: got an unexpected keyword argument '{key}'" + (rf"; did you mean {hint}\?" if hint else "$")
    with pytest.raises(TypeError, match=message):
        shardopt.AdEMAMix([nn.Parameter(torch.ones(2))], **{key: 1})


def test_groups_of_two_submodules_are_told_how_to_get_names_of_their_own():
    nets = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"two parameters are named 'weight'.* named_parameters\(prefix=\.\.\.\)"):
        shardopt.AdEMAMix([{"params": net.named_parameters()} for net in nets])
