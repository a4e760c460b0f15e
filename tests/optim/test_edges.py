"""Values at the edge of what a formula or a format takes, each planted as a fault that no other test noticed."""

import pytest
import torch

import shardopt
from shardopt.optim import states
from shardopt.optim.reference import scalars_at, update
from shardopt.optim.schedules import beta3_at
from shardopt.optim.schema import DEFAULTS
from shardopt.slices import Layout, Slice


def test_reference_leaves_the_bits_of_a_weight_with_lr_zero():
    scalars = scalars_at(DEFAULTS | {"lr": 0.0, "weight_decay": 0.1}, 1)
    weight, grad = torch.tensor([-0.0, 0.0, 1.0]), torch.tensor([-1.0, 1.0, torch.inf])
    moved, _ = update(weight, grad, {key: torch.zeros(3) for key in ("m1", "m2", "nu")}, scalars)
    assert torch.equal(moved.view(torch.int32), weight.view(torch.int32))


@pytest.mark.parametrize("kind", ["m1", "m2", "nu"])
def test_block16_rounds_up_to_its_largest_number_and_not_beyond(kind):
    """Rounding up the largest of a block would carry into the sign (or, for nu, out of the code)."""
    below_two = torch.nextafter(torch.tensor(2.0), torch.tensor(0.0))
    values = torch.full((128,), below_two.item())
    piece = Slice(
        "w", kind, Layout.whole("w", (128,)), (torch.zeros(128, dtype=torch.int16), torch.zeros(1)), "block16"
    )
    states.write_slice(piece, values)
    torch.testing.assert_close(states.read_slice(piece), values, rtol=2**-11, atol=0.0)


def test_weight_ema_begins_at_the_weights_of_the_first_step():
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = shardopt.AdEMAMix([("w", param)], lr=0.1, weight_ema=0.75)
    seen = []
    for _ in range(3):
        param.grad = torch.tensor([1.0, 0.5])
        optimizer.step()
        seen.append(param.detach().clone())
    expected = seen[0]
    for weight in seen[1:]:
        expected = 0.75 * expected + 0.25 * weight
    torch.testing.assert_close(optimizer.state[param]["weight_ema"], expected)


@pytest.mark.parametrize("kernel", ["c", "torch"])
def test_nan_with_every_bit_set_stays_nan_in_bf16_state(kernel):
    """Random bits added to it would carry into the sign and leave -0.0."""
    param = torch.nn.Parameter(torch.zeros(1000))
    optimizer = shardopt.AdEMAMix([("w", param)], lr=0.1, state_dtype="bf16", kernel=kernel)
    param.grad = torch.full((1000,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    optimizer.step()
    for key in ("m1", "m2"):
        assert optimizer.state[param][key].isnan().all(), key


@pytest.mark.parametrize("state_dtype", ["fp32", "block8"])
def test_beta1_of_zero_keeps_no_m1(state_dtype):
    param = torch.nn.Parameter(torch.zeros(1000))
    optimizer = shardopt.AdEMAMix([("w", param)], betas=(0.0, 0.999, 0.9999), state_dtype=state_dtype)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert not [key for key in optimizer.state[param] if key.startswith("m1")]
    assert {piece.kind for piece in states.state_slices(optimizer)} == {"m2", "nu"}


@pytest.mark.parametrize("kernel", ["c", "torch"])
def test_parameter_without_a_gradient_keeps_weight_state_and_count(kernel):
    with_gradient, without = (torch.nn.Parameter(torch.ones(300)) for _ in range(2))
    optimizer = shardopt.AdEMAMix([("a", with_gradient), ("b", without)], lr=0.1, kernel=kernel)
    for param in (with_gradient, without):
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = {"weight": without.detach().clone()} | {
        k: torch.as_tensor(v).clone() for k, v in optimizer.state[without].items()
    }
    without.grad = None
    optimizer.step()
    after = {"weight": without.detach()} | {k: torch.as_tensor(v) for k, v in optimizer.state[without].items()}
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert optimizer.state[with_gradient]["step"] == 2


def test_warm_ups_count_from_the_switch_from_adamw():
    param = torch.nn.Parameter(torch.ones(3))
    adamw = torch.optim.AdamW([("w", param)], betas=(0.8, 0.95))
    param.grad = torch.ones(3)
    for _ in range(5):
        adamw.step()
    optimizer = shardopt.AdEMAMix.from_adamw(adamw, alpha=3.0, alpha_warmup=10, beta3_warmup=10)
    optimizer.step()
    expected = 1 - beta3_at(1, 0.9999, 0.8, 10)
    torch.testing.assert_close(optimizer.state[param]["m2"], torch.full((3,), expected))
