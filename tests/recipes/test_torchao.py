"""docs/recipes/torchao.md: float8 linear layers, emulated, in one process, under ZeRO and under FSDP2 on 2 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchao", reason="torchao is in the dev extra")
from shardopt import AdEMAMix, ZeroOptimizer, checkpoint
from shardopt.engines.state import ModuleState
from shardopt.errors import InputError
from tests.distributed.pool import on_ranks
from tests.recipes.page import names_of


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))


def train(model: nn.Module, optimizer: Any, step: Any = None) -> list[float]:
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))  # the same on every rank
    losses = []
    for _ in range(5):
        loss = (model(x) - x).square().mean()
        loss.backward()
        losses.append(loss.item())
        if step is None:
            optimizer.step()
            optimizer.zero_grad()
        else:
            step(model, optimizer)
    return losses


def whole(weights: Any) -> dict[str, torch.Tensor]:
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in weights}


def _float8(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    page = names_of("torchao")
    model, optimizer = page["in_float8"](net())
    told: dict[str, Any] = {"alone": train(model, optimizer), "kinds": {type(layer).__name__ for layer in model}}
    alone = whole(model.named_parameters())
    in_fp32 = net()
    told["fp32"] = train(in_fp32, page["make_optimizer"](in_fp32))

    model, _ = page["in_float8"](net())
    optimizer = ZeroOptimizer(model, AdEMAMix, lr=1e-2, alpha=8.0, weight_decay=0.1, state_dtype="bf16")
    told["zero"] = train(model, optimizer)
    optimizer.close()

    for name, step in (("fsdp", page["step"]), ("scales when needed", None)):
        model, optimizer = page["sharded_in_float8"](net())
        told[name] = train(model, optimizer, step)
        weights = whole(model.named_parameters())
        told[f"{name} weights"] = all(torch.equal(weights[n], alone[n]) for n in alone)
        told["gathered as"] = type(model[0].weight._local_tensor).__name__
    checkpoint.save(folder / "step-5", ModuleState(optimizer, model), {"step": 5})
    plain = net()
    loaded = page["make_optimizer"](plain)
    checkpoint.load(folder / "step-5", ModuleState(loaded, plain))
    told["loaded"] = all(torch.equal(p, alone[n]) for n, p in plain.named_parameters())
    told["m2"] = loaded.state[plain[0].weight]["m2"].abs().sum().item()

    gathered = net()
    config = Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
    convert_to_float8_training(gathered, config=config)
    with pytest.raises(InputError) as error:
        ZeroOptimizer(gathered, AdEMAMix, lr=1e-2)
    told["zero refuses"] = str(error.value)
    return told


def test_float8_layers_train_alike_in_one_process_under_zero_and_under_fsdp(tmp_path: Path) -> None:
    for told in on_ranks(2, _float8, tmp_path):
        assert told["kinds"] == {"Float8Linear", "Tanh"}
        assert told["gathered as"] == "WeightWithDynamicFloat8CastTensor"
        assert told["alone"][-1] < 0.8 * told["alone"][0]
        assert told["alone"] != told["fp32"]
        assert told["alone"] == pytest.approx(told["fp32"], rel=0.02)
        assert told["zero"] == told["fsdp"] == told["scales when needed"] == told["alone"]
        assert told["fsdp weights"]
        assert told["scales when needed weights"]
        assert told["loaded"]
        assert told["m2"] > 0
        assert "WeightWithDynamicFloat8CastTensor" in told["zero refuses"]


class Packed(torch.Tensor):
    """A weight of codes and a scale, as torchao's quantized ones are made."""

    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, requires_grad=True)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *outer: Any) -> Packed:
        return Packed(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        return cls(args[0].codes, args[0].scale) if func is torch.ops.aten.detach.default else NotImplemented


def test_a_weight_of_codes_is_refused_by_name() -> None:
    weight = Packed(torch.ones(4, 2, dtype=torch.int8), torch.ones(()))
    with pytest.raises(InputError, match=r"parameter head\.weight is a Packed, whose elements no step can write"):
        AdEMAMix([("head.weight", weight)], lr=0.1)


@pytest.mark.slow
def test_torchaos_own_quantized_weights_are_refused_by_name() -> None:
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for config in (Int8WeightOnlyConfig(), int8_weight_only_quantized_training()):
        model = net()
        quantize_(model, config)
        with pytest.raises(InputError, match=r"parameter 0\.weight is a \w*Int8\w*, whose elements no step can write"):
            AdEMAMix(model.named_parameters(), lr=0.1)
        for layer in (model[0], model[2]):
            layer.weight.requires_grad_(False)
        trained = AdEMAMix([("0.bias", model[0].bias), ("2.bias", model[2].bias)], lr=0.1)
        with pytest.raises(InputError, match=r"0\.weight is a \w*Int8\w*, whose elements no checkpoint"):
            ModuleState(trained, model)
        kept = [s.name for s in ModuleState(trained, model, trained_only=True).weight_slices()]
        assert kept == ["0.bias", "2.bias"]
