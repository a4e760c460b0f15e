"""A plan checks what it points at: a tensor that does not fit is refused, every time, and nothing moves or counts."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor

import shardopt
from shardopt.errors import InputError
from shardopt.optim import plan, precision
from shardopt.optim.kernels import facts
from shardopt.slices import Layout
from tests.optim.test_kernels import same_bits

KERNELS = ("c", "torch")


@pytest.fixture(params=["shim", "Python"], autouse=True)
def asked(request, monkeypatch):
    """How tensors are asked about: by torch's C shim, and in Python where there is no compiler or shim."""
    if request.param == "Python":
        monkeypatch.setattr(facts, "_shim", lambda: None)
    return request.param


def stepped(shape=(3, 2), *, dtype=torch.float32, **options):
    """A parameter and its optimizer after one step, and another parameter that always fits."""
    torch.manual_seed(0)
    param, other = nn.Parameter(torch.randn(shape, dtype=dtype)), nn.Parameter(torch.ones(5, dtype=dtype))
    optimizer = shardopt.AdEMAMix([("w", param), ("other", other)], lr=0.1, **options)
    for p in (param, other):
        p.grad = torch.ones_like(p)
    optimizer.step()
    return param, other, optimizer


def refuses(optimizer, message, error=InputError):
    """Each of three steps raises; every count and every readable tensor stays as it was."""

    def everything():
        found = {}
        for i, param in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            for key, value in {"weight": param.detach(), **optimizer.state[param]}.items():
                readable = not isinstance(value, torch.Tensor) or (value.device.type != "meta" and value.data_ptr())
                found[i, key] = copy.deepcopy(value) if readable else None
        return found

    before = everything()
    for _ in range(3):
        with pytest.raises(error, match=message):
            optimizer.step()
    after = everything()
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert same_bits(value, after[key]), key
        else:
            assert value == after[key], key


# -- weights and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("rows", "strided"), [(10, False), (30, False), (10, True)])
def test_step_refuses_weight_replaced_by_tensor_of_another_size(kernel, rows, strided):
    """The smaller one had 60 elements written past its end, the larger one's new rows were never trained."""
    param, _, optimizer = stepped((20, 6), kernel=kernel)
    memory = torch.zeros(6 * rows + 60)
    data = memory[: 6 * rows].view(rows, 6)
    param.data = data.view(6, rows).t() if strided else data
    param.grad = torch.ones(rows, 6)
    refuses(optimizer, rf"the weight w has {6 * rows} elements, the optimizer's state 120")
    assert not memory.any()


def test_step_refuses_gradient_of_another_size():
    param, _, optimizer = stepped()
    param.grad.data = torch.ones(2, 2)
    refuses(optimizer, "the gradient of w has 4 elements, the optimizer's state 6")


@pytest.mark.parametrize("what", ["weight", "gradient", "m2", "part of a flat gradient"])
@pytest.mark.parametrize("strided", [False, True])
def test_step_refuses_freed_storage(what, strided):
    param, _, optimizer = stepped((8, 4))
    if strided:
        param.data = torch.ones(4, 8).t()
    flat = torch.ones(40)
    tensor = {"weight": param, "gradient": param.grad, "m2": optimizer.state[param]["m2"]}.get(what, flat)
    if tensor is flat:  # its address is not null, as it does not begin at the start of what was freed
        param.grad = flat[8:].view(8, 4)
    tensor.untyped_storage().resize_(0)
    refuses(optimizer, "has no storage behind it")


def test_step_refuses_sparse_gradient_as_torch_does():
    param, _, optimizer = stepped()
    param.grad = torch.ones(3, 2).to_sparse()
    refuses(optimizer, "does not support sparse gradients: the gradient of w is sparse", RuntimeError)


def test_step_refuses_strided_gradient_that_was_freed_in_part():
    """Its storage has room for as many elements as it has, but not for the last one's place."""
    param, _, optimizer = stepped((4, 4))
    wide = torch.ones(4, 8)
    param.grad = wide[:, :4]
    optimizer.step()
    wide.untyped_storage().resize_(20 * 4)
    refuses(optimizer, "the gradient of w reaches beyond the end of its storage")


def test_step_waits_for_gradient_on_its_way():
    param, other, optimizer = stepped()
    twin, other_twin, plain = stepped()
    param.grad = AsyncCollectiveTensor(torch.full((3, 2), 0.5))
    twin.grad = torch.full((3, 2), 0.5)
    optimizer.step()
    plain.step()
    assert same_bits(param.detach(), twin.detach())
    assert same_bits(other.detach(), other_twin.detach())


@pytest.mark.parametrize("moved", ["nothing", "other"])
def test_backward_through_stepped_weights_raises(moved):
    """As after a step of torch's own optimizers: the gradient would be that of other weights."""
    param, other, optimizer = stepped()
    loss = (param.square() * other[:2].square()).sum()
    if moved == "other":
        param.grad = None
    version = param._version
    optimizer.step()
    assert param._version == version + (moved == "nothing")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- facts about tensors, by handles ----------------------------------------------------------------------------------


def some_tensors():
    base = torch.arange(24.0)
    freed, part = torch.ones(4), torch.ones(9)[3:]
    for tensor in (freed, part):
        tensor.untyped_storage().resize_(0)
    return [
        *(base, base[3:], base.view(4, 6).t(), base[:1].expand(6), freed, part, torch.ones(0), None),
        *(torch.ones(24, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int8)),
        *(nn.Parameter(base[5:7]), torch.ones(3, 2).to_sparse(), torch.ones(24, device="meta")),
    ]


@pytest.mark.parametrize("asked", ["shim"], indirect=True)  # once: it asks Python itself
def test_shim_and_python_tell_the_same_facts(monkeypatch):
    assert facts._shim() is not None
    tensors = some_tensors()
    kept = [tensor for tensor in tensors if tensor is not None]
    weights = [torch.ones(n) for n in range(len(tensors))]
    found = facts.Facts(kept, weights).read(weights, tensors)
    monkeypatch.setattr(facts, "_shim", lambda: None)
    expected = facts.Facts(kept, weights).read(weights, tensors)
    dense = [i for i, t in enumerate([*kept, *weights, *tensors]) if t is None or t.layout is torch.strided]
    assert (found[0, dense] == expected[0, dense]).all()
    assert (found[1] == expected[1]).all()
    alike, expected_alike = (kinds[:, None] == kinds for kinds in (found[2], expected[2]))
    assert (alike == expected_alike).all()


@pytest.mark.parametrize("asked", ["shim"], indirect=True)  # Python is asked where the shim cannot tell
def test_gradients_that_the_shim_looks_up_are_those_of_the_parameters():
    state, params = torch.ones(3), [nn.Parameter(torch.ones(n)) for n in range(5)]
    told = facts.Facts([state], params)

    def same():
        own = told.read_own().copy()
        assert (own == told.read(params, [param.grad for param in params])).all()
        assert (own[0, -5:] != 0).tolist() == [p.grad is not None and p.grad.numel() > 0 for p in params]

    same()
    sum(param.sum() for param in params).backward()
    same()
    params[1].grad, params[2].grad.data = None, torch.ones(2, dtype=torch.bfloat16)
    params[3].data, params[3].grad = torch.ones(2, 4).t(), torch.ones(4, 2)
    torch.utils.swap_tensors(params[4], nn.Parameter(torch.ones(7)))
    same()
    params[3].grad = torch.ones(4, 2).to_sparse()
    assert told.read_own() is None


def test_facts_follow_data_and_none(asked):
    tensor, other = torch.ones(4), torch.ones(5)
    told = facts.Facts([tensor], [tensor])
    tensor.data = other
    found = told.read([tensor], [None])
    assert found[:2, :2].tolist() == [[other.data_ptr()] * 2, [5] * 2]
    assert found[:, 2].tolist() == [0, 0, 0]


def test_facts_keep_their_tensors_and_let_go_of_them():
    tensor = torch.ones(4)
    alive, told = weakref.ref(tensor), facts.Facts([tensor], [])
    address = tensor.data_ptr()
    del tensor
    assert told.read([], [])[0].tolist() == [address]
    del told
    assert alive() is None


def test_step_takes_parameter_whose_tensor_was_swapped():
    """As module.to() does under torch.__future__.set_swap_module_params_on_conversion."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.ones(6))
    optimizer = shardopt.AdEMAMix([param], lr=0.1)
    param.grad = torch.ones(6)
    optimizer.step()
    torch.utils.swap_tensors(param, nn.Parameter(torch.full((6,), 5.0)))
    param.grad = torch.ones(6)
    optimizer.step()
    assert (param != 5.0).all()
    assert (param > 4.0).all()


def move(tensor):
    tensor.data = tensor.detach().clone()


def leave_group(other, optimizer):
    group = optimizer.param_groups[0]
    group["params"].pop(), group["param_names"].pop()
    other.grad.fill_(5.0)


CHANGES = {
    "nothing": lambda param, other, optimizer: None,
    "all counts": lambda param, other, optimizer: [s.update(step=700) for s in optimizer.state.values()],
    "one count": lambda param, other, optimizer: optimizer.state[other].update(step=700),
    "weight's data": lambda param, other, optimizer: move(param),
    "gradient's data": lambda param, other, optimizer: move(other.grad),
    "state's data": lambda param, other, optimizer: move(optimizer.state[param]["m2"]),
    "gradient": lambda param, other, optimizer: setattr(param, "grad", torch.full_like(param, 3.0)),
    "no gradient": lambda param, other, optimizer: setattr(param, "grad", None),
    "state tensor": lambda param, other, optimizer: optimizer.state[param].update(nu=torch.ones(40).bfloat16()),
    "order of keys": lambda param, other, optimizer: optimizer.state[param].update(m1=optimizer.state[param].pop("m1")),
    "state": lambda param, other, optimizer: optimizer.state.update({param: dict(optimizer.state[param])}),
    "members": lambda param, other, optimizer: leave_group(other, optimizer),
    "list": lambda param, other, optimizer: optimizer.param_groups[0].update(params=[param, other]),
    "setting": lambda param, other, optimizer: optimizer.param_groups[0].update(alpha=1.0, lr=0.3),
    "seed": lambda param, other, optimizer: optimizer.param_groups[0].update(seed=5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_repeated_step_is_that_of_a_new_plan(change):
    """What somebody else has changed since the last step is seen, and seen again after it."""
    both = [stepped((40,), state_dtype="bf16") for _ in range(2)]
    for new, (param, other, optimizer) in enumerate(both):
        for at in range(4):
            if at == 2:
                CHANGES[change](param, other, optimizer)
            if new:
                optimizer._plan = None
            optimizer.step()
    for a, b in zip(*((param, other) for param, other, _ in both), strict=True):
        assert same_bits(a.detach(), b.detach())
    for a, b in zip(*(optimizer.state.values() for _, _, optimizer in both), strict=True):
        assert a["step"] == b["step"]
        assert all(same_bits(a[key], b[key]) for key in ("m1", "m2", "nu"))
    if change == "all counts":
        assert both[0][2].state[both[0][0]]["step"] == 702


@pytest.mark.parametrize("asked", ["shim"], indirect=True)
def test_steps_are_repeated_without_a_look_in_python(monkeypatch):
    param, _, optimizer = stepped()
    optimizer.step()
    monkeypatch.setattr(plan.Plan, "step", None)
    monkeypatch.setattr(plan.Plan, "_counts_alike", None)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.zero_grad()
    param.square().sum().backward()
    with pytest.raises(TypeError):  # the other has no gradient
        optimizer.step()


# -- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_step_refuses_state_of_a_dtype_that_is_not_its_format(dtype):
    param, _, optimizer = stepped()
    optimizer.state[param]["m1"] = optimizer.state[param]["m1"].to(dtype)
    refuses(optimizer, rf"state 'm1' of w is {dtype} of shape \(3, 2\) on cpu, its torch.float32 weight needs")


def test_step_refuses_state_whose_data_changed_dtype():
    param, _, optimizer = stepped()
    optimizer.state[param]["nu"].data = torch.ones(3, 2, dtype=torch.float64)
    refuses(optimizer, "state 'nu' of w")


def test_step_refuses_state_that_became_a_part_of_itself():
    """Its address is the same, and the kernel would write past its end."""
    param, _, optimizer = stepped((8,))
    state = optimizer.state[param]["m2"]
    state.data = state.data[:3]
    refuses(optimizer, r"state 'm2' of w is torch.float32 of shape \(3,\)")


@pytest.mark.parametrize("key", ["m1", "m2", "nu", "step"])
def test_step_refuses_state_that_lacks_a_tensor(key):
    param, _, optimizer = stepped()
    del optimizer.state[param][key]
    refuses(optimizer, rf"the state of w lacks \['{key}'\]")


def test_step_refuses_state_of_another_shape():
    param, _, optimizer = stepped()
    optimizer.state[param]["m2"] = torch.zeros(2, 3)
    refuses(optimizer, r"state 'm2' of w is torch.float32 of shape \(2, 3\) .* needs torch.float32 of shape \(3, 2\)")


def test_step_refuses_scales_of_another_length():
    param, _, optimizer = stepped((300,), state_dtype="block8")
    optimizer.state[param]["m2_scale"] = torch.zeros(2)
    refuses(optimizer, r"state 'm2_scale' of w is .* shape \(2,\)")


def test_step_refuses_weights_cast_after_state_was_made():
    """module.float() after module.double()."""
    net = nn.Linear(3, 2).double()
    optimizer = shardopt.AdEMAMix(net.named_parameters())
    net(torch.ones(3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    net.float()
    optimizer.zero_grad()
    net(torch.ones(3)).sum().backward()
    refuses(optimizer, "state 'm1' of weight is torch.float64 .* its torch.float32 weight needs")


def test_step_refuses_state_on_another_device():
    param, _, optimizer = stepped()
    optimizer.state[param]["nu"] = optimizer.state[param]["nu"].to("meta")
    refuses(optimizer, "state 'nu' of w is .* on meta, .* on cpu")


def test_step_refuses_layout_that_no_longer_fits_the_scales():
    param, _, optimizer = stepped((300,), state_dtype="block16")
    optimizer.set_layout(param, Layout.contiguous("w", (300,), 0, 100))
    refuses(optimizer, "m1_scale")


# -- settings, counts and captured steps ------------------------------------------------------------------------------


def test_changed_seed_changes_the_random_bits():
    results = []
    for seed in (0, 7):
        param, _, optimizer = stepped((500,), state_dtype="bf16")
        for group in optimizer.param_groups:
            group["seed"] = seed
        optimizer.step()
        results.append(optimizer.state[param]["m2"])
    assert not same_bits(*results)


@pytest.mark.parametrize("kernel", KERNELS)
def test_capturable_counts_steps_beyond_two_to_the_24(kernel):
    """An fp32 counter stops there, and the same random bits come again at every step."""
    results = []
    for capturable in (False, True):
        param, _, optimizer = stepped((500,), state_dtype="bf16", capturable=capturable, kernel=kernel)
        for state in optimizer.state.values():
            state["step"] = 1 << 24 if not capturable else state["step"].fill_(1 << 24)
        for _ in range(3):
            optimizer.step()
        assert int(optimizer.state[param]["step"]) == (1 << 24) + 3
        results.append(optimizer.state[param])
    for key in ("m1", "m2", "nu"):
        assert same_bits(results[0][key], results[1][key])


def test_refused_capture_refuses_every_time():
    param = nn.Parameter(torch.ones(3, device="meta"))
    optimizer = shardopt.AdEMAMix([("w", param)], capturable=True)
    optimizer.init_state()
    param.grad = torch.ones(3, device="meta")
    refuses(optimizer, "capturable=True on meta needs the triton kernel")


def test_captured_step_refuses_strided_tensors_and_lr_elsewhere(monkeypatch):
    """On a GPU: here the CPU is taken for one."""
    param, _, optimizer = stepped((8, 4), capturable=True)
    monkeypatch.setattr(plan, "is_captured", lambda group, device: True)
    monkeypatch.setattr("shardopt.optim.kernels.cpu.CpuKernel.name", "triton")
    optimizer._plan = None
    param.grad = torch.ones(4, 8).t()
    refuses(optimizer, "the weight or gradient of w is not contiguous: capturable=True")
    param.grad = torch.ones(8, 4)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
    refuses(optimizer, "lr is on meta, w on cpu: with capturable=True")
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, dtype=torch.float64)
    refuses(optimizer, "must be float32")
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    optimizer.state[param]["step"] = 1
    refuses(optimizer, "'step' of w must be an int64 tensor|no longer fit the step")


def test_loading_keeps_what_a_captured_step_reads():
    param, _, optimizer = stepped(capturable=True)
    saved = copy.deepcopy(optimizer.state_dict())
    held = dict(optimizer.state[param])
    optimizer.step()
    optimizer.load_state_dict(saved)
    assert int(held["step"]) == 1
    for key, tensor in held.items():
        assert optimizer.state[param][key] is tensor, key
    optimizer.step()
    optimizer._plan._tables[0].captured = True  # as if a CUDA graph held that step
    optimizer.load_state_dict(saved)
    optimizer.step()
    optimizer._plan._tables[0].captured = True
    saved["param_groups"][0]["seed"] = 5
    with pytest.raises(InputError, match=r"a CUDA graph holds .* seed"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["seed"] == 0


# -- masters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("set_weight", ["copy_", "data", "first step", "without a gradient"])
def test_fp32_master_follows_elements_that_somebody_else_has_set(kernel, set_weight):
    options = {"dtype": torch.bfloat16, "master_weights": "fp32", "kernel": kernel}
    (param, _, optimizer), (twin, _, expected) = stepped((300,), **options), stepped((300,), **options)
    given = param.detach().clone()
    given[:100] = 3.0
    if set_weight == "data":
        param.data = given
    else:
        with torch.no_grad():
            param.copy_(given)
    if set_weight == "first step":  # of a plan: nothing is known of the weight yet
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if set_weight == "without a gradient":
        grad, param.grad = param.grad, None
        optimizer.step()
        assert torch.equal(param, given)
        param.grad = grad
    with torch.no_grad():
        twin[:100] = 3.0
    expected.state[twin]["master"][:100] = 3.0
    optimizer.step()
    expected.step()
    assert (param[:100] > 2.5).all()
    assert torch.equal(param, twin)
    assert torch.equal(optimizer.state[param]["master"], expected.state[twin]["master"])


def test_master_between_two_bf16_numbers_is_kept_where_its_weight_is_written_anew():
    """The kernels round ties away from zero, torch to even: neither is a weight that somebody else has set."""
    tie = (torch.tensor([0x3F808000, 0x3F818000, -0x407F8000]).int()).view(torch.float32)
    for weight in (precision.round_to_weight(tie, torch.bfloat16), tie.bfloat16()):
        master = tie.clone()
        precision.follow_weight(master, weight)
        assert torch.equal(master, tie)


def test_weights_without_masters_are_not_compared(monkeypatch):
    _, _, optimizer = stepped()
    monkeypatch.delattr(plan, "follow_weight")
    optimizer.step()


def test_masters_of_untouched_weights_are_not_compared(monkeypatch):
    param, _, optimizer = stepped(dtype=torch.bfloat16, master_weights="fp32")
    monkeypatch.delattr(plan, "follow_weight")
    optimizer.step()
    with torch.no_grad():
        param.zero_()
    with pytest.raises(NameError, match="follow_weight"):
        optimizer.step()


def test_step_refuses_expanded_weight_in_words_that_fit():
    param = nn.Parameter(torch.zeros(1, 4).expand(3, 4))
    optimizer = shardopt.AdEMAMix([("w", param)])
    param.grad = torch.ones(3, 4)
    with pytest.raises(InputError, match=r"the weight w has no storage .* for every element.* expanded view"):
        optimizer.step()


@pytest.mark.parametrize("state_dtype", ["bf16", "block16", "block8"])
def test_float64_weights_take_rounded_state(state_dtype):
    param, _, optimizer = stepped((300,), dtype=torch.float64, state_dtype=state_dtype, weight_ema=0.9)
    twin, _, plain = stepped((300,), dtype=torch.float64)
    optimizer.step()
    plain.step()
    torch.testing.assert_close(param, twin, rtol=0.0, atol=5e-3)
    assert optimizer.state[param]["step"] == 2
