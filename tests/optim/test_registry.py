"""Names, checks at start-up, parameter groups, and whether "elementwise" is true of each name."""

from __future__ import annotations

import copy
import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardopt.errors import InputError
from shardopt.optim import registry
from shardopt.pretrain.record import read_metrics
from tests.distributed.pool import on_ranks
from tests.pretrain import tiny

ELEMENTWISE = [
    "adadelta",
    "adam",
    "adamw",
    "ademamix",
    "amsgrad",
    "rmsprop",
    "sgd",
    "simplified_ademamix",
    "yogi",
]
# torch's fused Adam rounds the end of a tensor, which does not fill a vector register, in another way.
EXACT = {"fused": False}


def _spec(name: str, **kwargs: Any) -> registry.OptimizerSpec:
    chosen = registry.spec(name, **kwargs)
    return registry.spec(name, **kwargs, **EXACT) if chosen.kwargs.get("fused") else chosen


@pytest.fixture
def added() -> Iterator[None]:
    before = dict(registry._known)
    yield
    registry._known.clear()
    registry._known.update(before)


def test_the_names_that_configurations_may_use() -> None:
    assert sorted([*ELEMENTWISE, "adafactor", "muon"]) == list(registry.names())
    for name in registry.names():
        spec = registry.spec(name)
        assert spec.elementwise == (name in ELEMENTWISE)
        assert ("whole" in spec.reason) != spec.elementwise


def test_ours_is_ours_and_presets_give_way_to_the_user() -> None:
    assert registry.spec("ademamix").cls is importlib.import_module("shardopt").AdEMAMix
    assert registry.spec("amsgrad").kwargs == {"fused": True, "amsgrad": True}
    assert registry.spec("adamw", lr=0.1, betas=[0.9, 0.95], fused=False).kwargs == {
        "lr": 0.1,
        "betas": (0.9, 0.95),
        "fused": False,
    }


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("admw", {}, r"unknown optimizer 'admw'; known: .*sgd.*; did you mean adamw\?"),
        (
            "adamw",
            {"weight_decy": 0.1},
            r"optimizer adamw has no 'weight_decy'; it has: lr, .*; did you mean weight_decay\?",
        ),
        ("adamw", {"params": []}, "optimizer adamw has no 'params'"),
        ("ademamix", {"alpha_warm_up": 10}, r"optimizer ademamix has no .*; did you mean alpha_warmup\?"),
        ("adamw", {"lr": -1.0}, "optimizer adamw: Invalid learning rate: -1.0"),
        ("adamw", {"lr": "1e-3"}, "optimizer adamw: lr must be a number, got the text '1e-3'"),
        ("sgd", {"nesterov": True}, "optimizer sgd: Nesterov momentum requires a momentum"),
        ("yogi", {"betas": [0.9, 1.5]}, "optimizer yogi: beta2 must be a finite number >= 0 and < 1, got 1.5"),
        ("adam", {"fused": True, "foreach": True}, "optimizer adam: .*fused.*foreach"),
    ],
)
def test_mistakes_are_named_at_start_up(name: str, kwargs: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        registry.spec(name, **kwargs)


def test_registering(added: None) -> None:
    registry.register("nadam", torch.optim.NAdam)
    assert registry.spec("nadam", lr=0.1).cls is torch.optim.NAdam
    with pytest.raises(ValueError, match="'nadam' is already registered"):
        registry.register("nadam", torch.optim.NAdam)
    with pytest.raises(ValueError, match="say in `reason`"):
        registry.register("lbfgs", torch.optim.LBFGS, elementwise=False)


def _model() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    model[2].weight.requires_grad_(False)
    return model


def test_norms_and_biases_do_not_decay_and_frozen_ones_are_left_out() -> None:
    model = _model()
    decayed, exempt = registry.spec("ademamix", weight_decay=0.1).groups(model.named_parameters())
    assert [name for name, _ in decayed["params"]] == ["0.weight"]
    assert decayed["weight_decay"] == 0.1
    assert [name for name, _ in exempt["params"]] == ["0.bias", "1.weight", "1.bias", "2.bias"]
    assert exempt["weight_decay"] == 0.0
    assert decayed["params"][0][1] is model[0].weight


def test_one_group_where_nothing_decays_and_no_empty_ones() -> None:
    named = list(_model().named_parameters())
    (only,) = registry.spec("sgd").groups(named)
    assert [name for name, _ in only["params"]] == [name for name, p in named if p.requires_grad]
    assert len(registry.spec("adamw").groups(named)) == 2  # the class decays by default
    (bias,) = registry.spec("adamw").groups([named[1]])
    assert bias["weight_decay"] == 0.0
    assert registry.spec("adamw").groups([]) == []


def test_build_uses_canonical_names_and_the_hyper_parameters() -> None:
    model = torch.compile(_model())
    optimizer = registry.spec("adamw", lr=0.5, weight_decay=0.1).build(model)
    assert [g["param_names"][0] for g in optimizer.param_groups] == ["0.weight", "0.bias"]
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.1), (0.5, 0.0)]
    with pytest.raises(InputError, match="no trainable parameter"):
        registry.spec("sgd").build(_model().requires_grad_(False))
    with pytest.raises(InputError, match=r"Muon.*2D"):
        registry.OptimizerSpec(torch.optim.Muon, {}).build(_model())


def _train(spec: registry.OptimizerSpec, cuts: list[int]) -> torch.Tensor:
    """Weights after five steps of a 61 × 83 matrix held as the pieces that start at `cuts`."""
    generator = torch.Generator().manual_seed(3)
    weight, *gradients = (torch.randn(61 * 83, generator=generator) for _ in range(6))
    ends = [*cuts[1:], weight.numel()]
    pieces = [nn.Parameter(weight[a:b].clone()) for a, b in zip(cuts, ends, strict=True)]
    if len(pieces) == 1:
        pieces = [nn.Parameter(weight.clone().view(61, 83))]
    optimizer = spec.cls([(f"piece{i}", p) for i, p in enumerate(pieces)], **spec.kwargs)
    for gradient in gradients:
        for p, a, b in zip(pieces, cuts, ends, strict=True):
            p.grad = gradient[a:b].clone().view_as(p)
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in pieces])


CUTS = [0, 1, 4, 4, 1003, 2500, 4999]  # odd lengths, and one piece without elements


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_ones_give_the_same_bits_however_cut(name: str) -> None:
    spec = _spec(name, lr=0.1, weight_decay=0.1)
    assert torch.equal(_train(spec, [0]), _train(spec, CUTS))


@pytest.mark.parametrize("name", ["adamw", "adam", "amsgrad"])
def test_fused_adam_differs_in_the_last_bits_only(name: str) -> None:
    spec = registry.spec(name, lr=0.1, weight_decay=0.1)
    assert spec.kwargs["fused"]
    torch.testing.assert_close(_train(spec, [0]), _train(spec, CUTS), rtol=1e-6, atol=1e-6)


def test_adafactor_is_not_elementwise() -> None:
    spec = registry.spec("adafactor", lr=0.1)
    assert not torch.allclose(_train(spec, [0]), _train(spec, [0, 1003]), rtol=1e-3, atol=1e-3)


def test_adafactor_trains_and_resumes_on_one_process(tmp_path: Path) -> None:
    """Its state is not one value per element: row and column averages are saved as tensors of their own."""
    tiny.corpus(tmp_path / "text")
    changes = {
        "engine": "{name: single}",
        "optimizer": "{name: adafactor, lr: 0.01}",
        "schedule": "{name: constant, warmup: 1}",
        "train__steps": 6,
        "checkpoint__every": 3,
    }
    losses = []
    for _ in range(2):
        tiny.run(0, 1, tmp_path, run__name="run", **changes)
        losses.append([row["loss"] for row in read_metrics(tmp_path / "runs" / "run" / "metrics.jsonl")])
        shutil.rmtree(tmp_path / "runs" / "run" / "checkpoints" / "step-00000006")
    assert len(losses[0]) == 6
    assert losses[1] == losses[0]


def _sharded(rank: int, world_size: int, name: str, partly: bool) -> tuple[int, float]:
    """Number of groups, and the largest difference of FSDP2's weights from the same run on whole tensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    whole = copy.deepcopy(model)
    fully_shard(model[0] if partly else model, mesh=init_device_mesh("cpu", (world_size,)))
    spec = registry.spec(name, lr=0.1, weight_decay=0.1)
    optimizers = [spec.build(m) for m in (model, whole)]
    for _ in range(3):
        x = torch.randn(4, 5)
        for m, optimizer in zip((model, whole), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    differences = [
        ((a.full_tensor() if isinstance(a, DTensor) else a) - b).abs().max().item()
        for a, b in zip(model.parameters(), whole.parameters(), strict=True)
    ]
    return len(optimizers[0].param_groups), max(differences)


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("partly", [False, True])
def test_defaults_work_on_dtensors_and_on_mixes_with_whole_tensors(name: str, partly: bool) -> None:
    for groups, difference in on_ranks(2, _sharded, name, partly):
        assert groups == (4 if partly else 2)
        assert difference < 1e-6
