"""Yogi and Simplified AdEMAMix against optax and pytorch-optimizer in float64, and on DTensors."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from shardopt.errors import InputError
from shardopt.optim.baselines import SimplifiedAdEMAMix, Yogi
from tests.distributed.pool import on_ranks

STEPS = 30


def _gradients(shape: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    """Not functions of the weights, so that two optimizers see the same; scales from 1e-3 to 1."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (-3 * torch.rand(shape, generator=generator, dtype=torch.float64))
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def _weight(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def _path(optimizer: torch.optim.Optimizer, param: nn.Parameter, gradients: list[torch.Tensor]) -> torch.Tensor:
    """The weights after each step, stacked."""
    path = []
    for gradient in gradients:
        param.grad = gradient.clone().to(param.dtype)
        optimizer.step()
        path.append(param.detach().clone())
    return torch.stack(path)


@pytest.mark.parametrize("accumulator", [0.0, 1e-6, 0.01])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
def test_yogi_equals_optax(betas: tuple[float, float], accumulator: float) -> None:
    """Known difference: optax starts the first moment, too, at the accumulator's value; ours at 0."""
    import jax
    import optax

    shape, lr, eps = (5, 3), 0.02, 1e-3
    param, gradients = _weight(shape), _gradients(shape)
    with jax.enable_x64(True):
        theirs = optax.chain(
            optax.scale_by_yogi(*betas, eps=eps, initial_accumulator_value=accumulator), optax.scale(-lr)
        )
        weight = jax.numpy.asarray(param.detach().numpy())
        state, expected = theirs.init(weight), []
        for gradient in gradients:
            update, state = theirs.update(jax.numpy.asarray(gradient.numpy()), state, weight)
            weight = optax.apply_updates(weight, update)
            expected.append(np.asarray(weight))
    ours = Yogi([param], lr=lr, betas=betas, eps=eps, initial_accumulator=accumulator)
    ours.init_state()
    assert (ours.state[param]["m1"] == 0).all()
    ours.state[param]["m1"].fill_(accumulator)
    np.testing.assert_allclose(_path(ours, param, gradients).numpy(), np.stack(expected), rtol=1e-12)


def test_yogi_equals_pytorch_optimizer_with_weight_decay() -> None:
    """Known difference: theirs starts the first moment at the accumulator's value, so it is 0 here."""
    from pytorch_optimizer import Yogi as Theirs

    param, gradients = _weight((7, 2)), _gradients((7, 2))
    other = nn.Parameter(param.detach().clone())
    settings = {
        "lr": 0.02,
        "betas": (0.9, 0.99),
        "eps": 1e-4,
        "weight_decay": 0.1,
        "initial_accumulator": 0.0,
    }
    ours = _path(Yogi([param], **settings), param, gradients)
    theirs = _path(Theirs([other], **settings, weight_decouple=True), other, gradients)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_yogi_leaves_a_large_second_moment_slowly() -> None:
    """The point of Yogi: nu falls by (1 − β2) g² a step where Adam's falls by (1 − β2) (nu − g²)."""
    param = _weight((4,))
    yogi = Yogi([param], betas=(0.9, 0.9), initial_accumulator=1.0)
    param.grad = torch.full_like(param, 0.1)
    for _ in range(10):
        yogi.step()
    torch.testing.assert_close(yogi.state[param]["nu"], torch.full_like(param, 1.0 - 10 * 0.1 * 0.01))


@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_simplified_ademamix_equals_pytorch_optimizer(alpha: float) -> None:
    """Known differences of pytorch-optimizer 4, both undone here step by step: its momentum is an average (a
    sum in the paper), and it divides by the root of 1 − β2^t where the paper's own code multiplies by it."""
    from pytorch_optimizer import SimplifiedAdEMAMix as Theirs

    lr, (beta1, beta2), param, gradients = 1e-3, (0.95, 0.9), _weight((6, 3)), _gradients((6, 3))
    other = nn.Parameter(param.detach().clone())
    ours = SimplifiedAdEMAMix([param], lr=lr, betas=(beta1, beta2), alpha=alpha)
    theirs = Theirs([other], lr=lr / (1 - beta1), betas=(beta1, beta2), alpha=alpha * (1 - beta1), foreach=False)
    start = param.detach().clone()[None]
    moves = torch.cat([start, _path(ours, param, gradients)]).diff(dim=0)
    expected = torch.cat([start, _path(theirs, other, gradients)]).diff(dim=0)
    correction = 1 - beta2 ** torch.arange(1, STEPS + 1, dtype=torch.float64)
    torch.testing.assert_close(moves, expected * correction[:, None, None], rtol=1e-9, atol=1e-15)


def test_simplified_ademamix_follows_the_paper() -> None:
    """Every argument, written out in numpy: the sum, the warm-up linear in the half-life, decay, ascent."""
    lr, beta1, beta2, alpha, eps, decay, warmup, start = 1e-2, 0.99, 0.95, 2.0, 1e-6, 0.1, 20, 0.8
    param, gradients = _weight((5,)), _gradients((5,))
    weight, m1, nu, expected = param.detach().numpy().copy(), 0.0, 0.0, []
    for t, gradient in enumerate(gradients, 1):
        g, share = -gradient.numpy(), min(t / warmup, 1)
        half_life = (1 - share) * math.log(0.5) / math.log(start) + share * math.log(0.5) / math.log(beta1)
        m1 = 0.5 ** (1 / half_life) * m1 + g
        nu = beta2 * nu + (1 - beta2) * g**2
        u = (alpha * g + m1) / (np.sqrt(nu / (1 - beta2**t)) + eps)
        weight = weight - lr * (u + decay * weight)
        expected.append(weight)
    ours = SimplifiedAdEMAMix(
        [param],
        lr=lr,
        betas=(beta1, beta2),
        alpha=alpha,
        eps=eps,
        weight_decay=decay,
        beta1_warmup=warmup,
        min_beta1=start,
        maximize=True,
    )
    np.testing.assert_allclose(_path(ours, param, gradients).numpy(), np.stack(expected), rtol=1e-11)


BASELINES = [Yogi, SimplifiedAdEMAMix]


@pytest.mark.parametrize("cls", BASELINES)
def test_fp32_follows_float64(cls: type) -> None:
    double, gradients = _weight((64,)), _gradients((64,))
    single = nn.Parameter(double.detach().float())
    path = _path(cls([single], lr=0.01, weight_decay=0.1), single, gradients)
    torch.testing.assert_close(
        path.double(),
        _path(cls([double], lr=0.01, weight_decay=0.1), double, gradients),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("cls", BASELINES)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number >= 0, got -1.0"),
        ({"lr": math.nan}, "lr must be"),
        ({"lr": "1e-3"}, "lr must be a finite number >= 0, got '1e-3'"),
        ({"betas": (1.0, 0.9)}, "beta1 must be a finite number >= 0 and < 1, got 1.0"),
        ({"betas": (0.9, -0.1)}, "beta2 must be a finite number >= 0 and < 1, got -0.1"),
        ({"betas": (0.9, 0.99, 0.999)}, "betas must be 2 numbers"),
        ({"eps": -1e-8}, "eps must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
    ],
)
def test_refuses_values_out_of_range(cls: type, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cls([_weight((2,))], **settings)
    with pytest.raises(InputError, match=message):
        cls([{"params": [_weight((2,))], **settings}])


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (Yogi, {"initial_accumulator": -1.0}, "initial_accumulator must be a finite number >= 0, got -1.0"),
        (SimplifiedAdEMAMix, {"alpha": -1.0}, "alpha must be"),
        (SimplifiedAdEMAMix, {"beta1_warmup": 0}, "beta1_warmup must be"),
        (
            SimplifiedAdEMAMix,
            {"beta1_warmup": 9, "betas": (0.5, 0.9)},
            r"min_beta1 must be in .*0.5.*got 0.9",
        ),
    ],
)
def test_refuses_its_own_values_out_of_range(cls: type, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cls([_weight((2,))], **settings)


@pytest.mark.parametrize("cls", BASELINES)
def test_refuses_narrow_and_complex_parameters_and_sparse_gradients(cls: type) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.complex64):
        with pytest.raises(InputError, match="must be float32 or float64"):
            cls([nn.Parameter(torch.zeros(2, dtype=dtype))])
    embedding = nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=f"{cls.__name__} does not support sparse gradients"):
        cls(embedding.parameters()).step()


@pytest.mark.parametrize("cls", BASELINES)
def test_what_a_torch_optimizer_is_expected_to_do(cls: type) -> None:
    idle, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    param = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = cls([param, idle, frozen], lr=torch.tensor(0.1))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 13
    assert param.square().sum() < 13
    assert set(optimizer.state) == {param}

    again = pickle.loads(pickle.dumps(optimizer))
    twin = again.param_groups[0]["params"][0]
    restored = nn.Parameter(param.detach().clone())
    loaded = cls([restored, nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))])
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for other, weight in ((again, twin), (loaded, restored), (optimizer, param)):
        weight.grad = torch.tensor([0.5, 0.25])
        other.step()
        assert int(other.state[weight]["step"]) == 2
    assert torch.equal(twin, param)
    assert torch.equal(restored, param)


@pytest.mark.parametrize("cls", BASELINES)
def test_lr_zero_moves_no_weight_and_making_state_is_no_step(cls: type) -> None:
    param = nn.Parameter(torch.tensor([-0.0, math.inf, 1.0]))
    before = param.detach().clone()
    optimizer = cls([param], lr=0.0, weight_decay=0.1)
    holder = nn.Module()
    holder.weight = param
    get_optimizer_state_dict(holder, optimizer)  # makes state by a step with zero gradients
    assert int(optimizer.state[param]["step"]) == 0
    param.grad = torch.ones(3)
    optimizer.step()
    assert int(optimizer.state[param]["step"]) == 1
    assert (optimizer.state[param]["m1"] != 0).all()
    assert torch.equal(param.detach().view(torch.int32), before.view(torch.int32))


def _sharded(rank: int, world_size: int, cls: type) -> list[list[float]]:
    """FSDP2's weights minus the same run's on whole tensors, and each state's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 1))  # rows: uneven, and one shard empty
    whole = copy.deepcopy(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    optimizers = [cls(m.parameters(), lr=0.1, weight_decay=0.1) for m in (model, whole)]
    for _ in range(5):
        x = torch.randn(4, 5)
        for m, optimizer in zip((model, whole), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    differences = []
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert isinstance(a, DTensor)
        differences.append((a.full_tensor() - b).abs().max().item())
        for key in ("m1", "nu"):
            held = optimizers[0].state[a][key]
            assert held.placements == a.placements
            differences.append((held.full_tensor() - optimizers[1].state[b][key]).abs().max().item())
    return differences


@pytest.mark.parametrize("cls", BASELINES)
def test_uneven_and_empty_dtensor_shards_equal_whole_tensors(cls: type) -> None:
    for differences in on_ranks(2, _sharded, cls):
        assert len(differences) == 18
        assert max(differences) == 0.0
