"""The reference against other people's AdEMAMix, and against what it must reduce to."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest
import torch

import shardopt
from shardopt.optim import reference, schema
from shardopt.optim.schedules import alpha_at, beta3_at

jax.config.update("jax_enable_x64", True)  # jax would otherwise compute in fp32


def cases(count: int):
    """Random shapes and hyper-parameters; the same ones every time."""
    generator = torch.Generator().manual_seed(1)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

    for number in range(count):
        shape = [(), (1,), (7,), (3, 5), (2, 3, 4)][number % 5]
        yield {
            "shape": shape,
            "lr": 10 ** uniform(-4, -1),
            "betas": (uniform(0.0, 0.95), uniform(0.9, 0.9999), uniform(0.99, 0.99999)),
            "alpha": uniform(0.0, 10.0),
            "eps": 10 ** uniform(-10, -4),
            "eps_root": 10 ** uniform(-12, -6) if number % 2 else 0.0,
            "weight_decay": uniform(0.0, 0.3) if number % 3 else 0.0,
            "generator": generator,
        }


def reference_run(case, grads, weight, *, alpha=None, beta3=None):
    """Weights after each step in float64; `alpha` and `beta3` may be functions of the step from 1."""
    state = {key: torch.zeros_like(weight) for key in ("m1", "m2", "nu")}
    group = schema.DEFAULTS | {k: case[k] for k in ("lr", "betas", "alpha", "eps", "eps_root", "weight_decay")}
    trajectory = []
    for t, grad in enumerate(grads, 1):
        s = reference.scalars_at(group | ({"alpha": alpha(t)} if alpha else {}), t)
        s = s._replace(beta3=beta3(t) if beta3 else s.beta3)
        weight, state = reference.update(weight, grad, state, s)
        trajectory.append(weight)
    return trajectory


def data(case, steps):
    generator = case["generator"]
    weight = torch.randn(case["shape"], generator=generator, dtype=torch.float64)
    grads = [torch.randn(case["shape"], generator=generator, dtype=torch.float64) for _ in range(steps)]
    return weight, grads


def optax_run(transform, weight, grads):
    params = {"w": jnp.asarray(weight.numpy())}
    state = transform.init(params)
    trajectory = []
    for grad in grads:
        updates, state = transform.update({"w": jnp.asarray(grad.numpy())}, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(torch.tensor(jax.device_get(params["w"])))
    return trajectory


@pytest.mark.parametrize("case", list(cases(10)), ids=lambda c: f"{c['shape']}")
def test_update_equals_optax_in_float64(case):
    weight, grads = data(case, 12)
    b1, b2, b3 = case["betas"]
    theirs = optax_run(
        optax.contrib.ademamix(
            case["lr"], b1=b1, b2=b2, b3=b3, alpha=case["alpha"], eps=case["eps"], eps_root=case["eps_root"],
            weight_decay=case["weight_decay"],
        ),
        weight,
        grads,
    )  # fmt: skip
    for a, b in zip(reference_run(case, grads, weight), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_optax_with_scheduled_alpha_and_beta3():
    # optax reads its schedules before its count goes up: its first step is ours with t = 1 only if told so.
    case = next(iter(cases(1)))
    case["betas"] = (0.9, 0.999, 0.9999)
    weight, grads = data(case, 15)
    warmup = 10

    def alpha(t):
        return alpha_at(t, 5.0, warmup)

    def beta3(t):
        return beta3_at(t, 0.9999, 0.9, warmup)

    tables = [jnp.array([f(t + 1) for t in range(15)]) for f in (alpha, beta3)]
    theirs = optax_run(
        optax.contrib.ademamix(
            case["lr"], b1=0.9, b2=0.999, b3=lambda c: tables[1][c], alpha=lambda c: tables[0][c],
            eps=case["eps"], weight_decay=case["weight_decay"],
        ),
        weight,
        grads,
    )  # fmt: skip
    case["eps_root"] = 0.0
    for a, b in zip(reference_run(case, grads, weight, alpha=alpha, beta3=beta3), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    # and through the class, whose warm-ups are these
    param = torch.nn.Parameter(weight.clone())
    optimizer = shardopt.AdEMAMix(
        [param], lr=case["lr"], alpha=5.0, eps=case["eps"], weight_decay=case["weight_decay"], alpha_warmup=warmup,
        beta3_warmup=warmup,
    )  # fmt: skip
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(param.detach(), theirs[-1], rtol=1e-11, atol=1e-13)


def test_optax_mask_is_a_parameter_group_and_mu_dtype_a_state_dtype():
    weights, grads = [torch.randn(4, 3), torch.randn(3)], [torch.randn(4, 3), torch.randn(3)]
    params = {"w": jnp.asarray(weights[0].numpy()), "b": jnp.asarray(weights[1].numpy())}
    transform = optax.contrib.ademamix(1e-2, weight_decay=0.1, mask={"w": True, "b": False}, mu_dtype=jnp.bfloat16)
    state = transform.init(params)
    # at init their averages are bf16, ours as well; at the first update theirs turn into fp32
    assert state[0].m1["w"].dtype == jnp.bfloat16
    updates, state = transform.update(
        {"w": jnp.asarray(grads[0].numpy()), "b": jnp.asarray(grads[1].numpy())}, state, params
    )
    assert state[0].m1["w"].dtype == jnp.float32
    theirs = optax.apply_updates(params, updates)
    ours = [torch.nn.Parameter(w.clone()) for w in weights]
    groups = [{"params": ours[:1], "weight_decay": 0.1}, {"params": ours[1:], "weight_decay": 0.0}]
    optimizer = shardopt.AdEMAMix(groups, lr=1e-2, state_dtype={"m1": "bf16", "m2": "bf16"})
    for param, grad in zip(ours, grads, strict=True):
        param.grad = grad.clone()
    for _ in range(2):
        optimizer.step()
        assert optimizer.state[ours[0]]["m1"].dtype == torch.bfloat16
    updates, state = transform.update(
        {"w": jnp.asarray(grads[0].numpy()), "b": jnp.asarray(grads[1].numpy())}, state, theirs
    )
    theirs = optax.apply_updates(theirs, updates)
    for param, key in zip(ours, ("w", "b"), strict=True):
        # m1 and m2 are rounded once in ours: 2^-8 of an update of about lr
        torch.testing.assert_close(
            param.detach(), torch.tensor(jax.device_get(theirs[key])), rtol=0, atol=1e-2 * 2**-8 * 2
        )


@pytest.mark.parametrize("case", list(cases(5)), ids=lambda c: f"{c['shape']}")
def test_pytorch_optimizer(case):
    # theirs has no eps_root, and couples the decay unless told otherwise
    from pytorch_optimizer import AdEMAMix

    case["eps_root"] = 0.0
    weight, grads = data(case, 12)
    param = torch.nn.Parameter(weight.clone())
    theirs = AdEMAMix(
        [param], lr=case["lr"], betas=case["betas"], alpha=case["alpha"], eps=case["eps"],
        weight_decay=case["weight_decay"], weight_decouple=True,
    )  # fmt: skip
    for grad, ours in zip(grads, reference_run(case, grads, weight), strict=True):
        param.grad = grad.clone()
        theirs.step()
        torch.testing.assert_close(param.detach(), ours, rtol=1e-12, atol=1e-13)


def test_bitsandbytes():
    # fp32 state only; decay first, then the update: the same thing up to rounding
    from bitsandbytes.optim import AdEMAMix

    torch.manual_seed(0)
    param, ours = (torch.nn.Parameter(torch.linspace(-2, 2, 300)) for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "eps": 1e-8, "weight_decay": 0.1}
    warmups = {"beta3_warmup": 8, "alpha_warmup": 8}
    theirs = AdEMAMix([param], t_alpha=8, t_beta3=8, **options)
    optimizer = shardopt.AdEMAMix([ours], **options, **warmups)
    for _ in range(12):
        grad = torch.randn(300)
        param.grad, ours.grad = grad.clone(), grad.clone()
        theirs.step()
        optimizer.step()
    torch.testing.assert_close(param.detach(), ours.detach(), rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_alpha_zero_is_adamw(dtype):
    torch.manual_seed(0)
    param, ours = (torch.nn.Parameter(torch.linspace(-2, 2, 500, dtype=dtype)) for _ in range(2))
    options = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}
    adamw = torch.optim.AdamW([param], betas=(0.9, 0.999), **options)
    optimizer = shardopt.AdEMAMix([ours], alpha=0.0, **options)
    for _ in range(50):
        grad = torch.randn(500, dtype=dtype) * 0.1
        param.grad, ours.grad = grad.clone(), grad.clone()
        adamw.step()
        optimizer.step()
        tolerance = 1e-13 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(ours.detach(), param.detach(), rtol=tolerance, atol=tolerance)


def test_beta3_equal_to_beta1_has_a_closed_form():
    # m1 and m2 are then one average m, and u = m (1 / (1 - beta1^t) + alpha) / (sqrt(nu-hat) + eps)
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.ones(50, dtype=torch.float64))
    optimizer = shardopt.AdEMAMix([param], lr=1e-2, betas=(0.9, 0.999, 0.9), alpha=3.0, eps=1e-8)
    weight, m, nu = torch.ones(50, dtype=torch.float64), 0.0, 0.0
    for t in range(1, 30):
        grad = torch.randn(50, dtype=torch.float64)
        param.grad = grad.clone()
        optimizer.step()
        m, nu = 0.9 * m + 0.1 * grad, 0.999 * nu + 0.001 * grad**2
        weight = weight - 1e-2 * m * (1 / (1 - 0.9**t) + 3.0) / ((nu / (1 - 0.999**t)).sqrt() + 1e-8)
        torch.testing.assert_close(param.detach(), weight, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kernel", ["c", "torch"])
def test_beta1_zero_stores_no_m1_and_follows_the_closed_form(kernel):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.ones(50))
    optimizer = shardopt.AdEMAMix(
        [param], lr=1e-2, betas=(0.0, 0.99, 0.999), alpha=4.0, alpha_warmup=20, beta3_warmup=20, kernel=kernel
    )
    weight, m2, nu = torch.ones(50, dtype=torch.float64), 0.0, 0.0
    for t in range(1, 30):
        grad = torch.randn(50)
        param.grad = grad.clone()
        optimizer.step()
        g = grad.double()
        beta3 = 0.999 ** (20 / t) if t < 20 else 0.999
        m2, nu = beta3 * m2 + (1 - beta3) * g, 0.99 * nu + 0.01 * g * g
        weight = weight - 1e-2 * (g + 4.0 * min(t / 20, 1) * m2) / ((nu / (1 - 0.99**t)).sqrt() + 1e-8)
        torch.testing.assert_close(param.detach().double(), weight, rtol=2e-6, atol=2e-6)
    assert set(optimizer.state[param]) == {"step", "m2", "nu"}


def test_the_authors_rule_agrees_at_constant_beta3_and_differs_in_a_warm_up():
    """Their beta3 takes ln(beta + 1e-8): with beta1 = 0 that is far from the limit of the closed form."""

    def theirs(step, end, start, warmup):
        def ln(beta):
            return math.log(beta + 1e-8)

        if step >= warmup:
            return end
        a = step / warmup
        return min(math.exp(ln(start) * ln(end) / ((1 - a) * ln(end) + a * ln(start))), end)

    assert theirs(100, 0.9999, 0.9, 100) == beta3_at(100, 0.9999, 0.9, 100) == 0.9999
    for beta, tolerance in ((0.9999, 2e-4), (0.999999, 2e-2)):
        mine, other = beta3_at(50, beta, 0.9, 100), theirs(50, beta, 0.9, 100)
        assert 0 < abs((1 - mine) / (1 - other) - 1) < tolerance
    assert abs((1 - beta3_at(1, 0.999, 0.0, 50)) / (1 - theirs(1, 0.999, 0.0, 50)) - 1) > 1e-3


def test_schedules():
    assert alpha_at(1, 5.0, None) == 5.0
    assert [alpha_at(t, 5.0, 4) for t in (1, 2, 4, 9)] == [1.25, 2.5, 5.0, 5.0]
    assert beta3_at(7, 0.9999, 0.9, None) == 0.9999
    values = [beta3_at(t, 0.9999, 0.9, 1000) for t in range(1, 1002)]
    assert values == sorted(values)
    assert values[999] == values[1000] == 0.9999
    # the half-life grows linearly: halfway it is the mean of both ends
    half_lives = [math.log(0.5) / math.log(b) for b in (0.9, values[499], 0.9999)]
    assert half_lives[1] == pytest.approx((half_lives[0] + half_lives[2]) / 2)
    assert beta3_at(5, 0.999, 0.0, 10) == pytest.approx(0.999**2)
    assert beta3_at(5, 0.999, 1e-300, 10) == pytest.approx(0.999**2, rel=1e-4)  # the limit is one


@pytest.mark.parametrize("kernel", ["c", "torch"])
def test_a_slow_average_in_fp32_decays_at_its_own_rate(kernel):
    """fp32(0.99999) in the place of 0.99999 would be 2.6e-5 off after these steps, and ever more later."""
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(20_000))
    optimizer = shardopt.AdEMAMix([param], lr=0.0, betas=(0.9, 0.99999, 0.99999), kernel=kernel)
    optimizer.init_state()
    state = optimizer.state[param]
    for key in ("m2", "nu"):
        state[key].uniform_(1.0, 2.0)
    before = {key: state[key].double() for key in ("m2", "nu")}
    param.grad = torch.zeros(20_000)
    for _ in range(2000):
        optimizer.step()
    for key in ("m2", "nu"):
        ratio = (state[key].double() / before[key]).mean().item()
        assert ratio == pytest.approx(0.99999**2000, rel=4e-6)


def test_yogi_second_moment():
    group = {"lr": 0.1, "betas": (0.9, 0.9, 0.99), "alpha": 1.0, "eps": 0.0, "second_moment": "yogi"}
    s = reference.scalars_at(schema.DEFAULTS | group, 1)
    nu = torch.tensor([4.0, 1.0, 9.0], dtype=torch.float64)
    g = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    new = reference.update(zero, g, {"m1": zero, "m2": zero, "nu": nu}, s)[1]["nu"]
    torch.testing.assert_close(new, torch.tensor([4.0 - 0.1, 1.0 + 0.4, 9.0], dtype=torch.float64))


@pytest.mark.parametrize("kernel", ["c", "torch"])
@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_lr_zero_moves_no_bit_and_counts(kernel, state):
    values = torch.tensor([-0.0, 0.0, 1.0, float("inf"), -float("inf"), 1e-45, float("nan")])
    param = torch.nn.Parameter(values.clone())
    optimizer = shardopt.AdEMAMix([param], lr=0.0, weight_decay=0.1, kernel=kernel, state_dtype=state)
    optimizer.init_state()
    optimizer.state[param]["m2"].fill_(float("inf"))
    optimizer.state[param]["nu"].fill_(float("inf"))
    for _ in range(2):
        param.grad = torch.ones(7)
        optimizer.step()
    assert torch.equal(param.detach().view(torch.int32), values.view(torch.int32))
    assert optimizer.state[param]["step"] == 2
    assert optimizer.state[param]["m1"][0].item() == pytest.approx(0.19, rel=1e-2)
