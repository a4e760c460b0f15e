"""Checkpoints of other codes, written by them, read, written back and taken by them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from shardopt import AdEMAMix, checkpoint, cli
from shardopt.checkpoint import convert as formats
from shardopt.checkpoint.convert import convert
from shardopt.checkpoint.stored import Stored
from shardopt.commands.checkpoint import _TARGETS
from shardopt.engines.state import ModuleState
from shardopt.errors import InputError
from tests.checkpoint import made
from tests.distributed.pool import on_ranks

SETTINGS = {"lr": 1e-2, "alpha": 3.0, "alpha_warmup": 10, "beta3_warmup": 10, "weight_decay": 0.1}


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.Linear(7, 3)
    )  # a bias before a norm gets noise


def step(net: nn.Module, optimizer: torch.optim.Optimizer, count: int = 1) -> None:
    """Steps whose gradients depend on the weights and the buffers."""
    generator = torch.Generator().manual_seed(9)
    for _ in range(count):
        optimizer.zero_grad()
        net(torch.randn(4, 5, generator=generator)).square().mean().backward()
        optimizer.step()


def groups_of(net: nn.Module) -> list[dict[str, Any]]:
    matrices = [(n, p) for n, p in net.named_parameters() if p.ndim > 1]
    return [{"params": matrices}, {"params": [(n, p) for n, p in net.named_parameters() if p.ndim < 2], "lr": 3e-3}]


def trained(cls: Any, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = model()
    optimizer = cls(groups_of(net), **settings)
    step(net, optimizer, 3)
    return net, optimizer


def bits(value: Any) -> Any:
    """What can be compared for equal bits, of nested state dicts."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {key: bits(v) for key, v in value.items()}
    return [bits(v) for v in value] if isinstance(value, list | tuple) else value


def continued(net: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    step(net, optimizer, 2)
    return bits(net.state_dict())


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (torch.optim.AdamW, {"lr": 1e-2, "betas": (0.8, 0.99)}),
        (AdEMAMix, SETTINGS | {"state_dtype": {"m1": "bf16"}, "weight_ema": 0.9}),
        (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    ],
)
def test_a_state_dict_comes_back_bit_for_bit_and_its_checkpoint_loads(tmp_path, cls, settings):
    net, optimizer = trained(cls, **settings)
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "theirs.pt")
    convert(tmp_path / "theirs.pt", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again.pt", "torch")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert bits(again["model"]) == bits(dict(saved["model"]))
    assert bits(again["optimizer"]["state"]) == bits(saved["optimizer"]["state"])
    assert bits(again["optimizer"]["param_groups"]) == bits(saved["optimizer"]["param_groups"])

    fresh = model()
    state = ModuleState(cls(groups_of(fresh), **settings), fresh)
    checkpoint.load(tmp_path / "ours", state)
    other = model()
    reloaded = cls(groups_of(other), **settings)
    other.load_state_dict(again["model"])
    reloaded.load_state_dict(again["optimizer"])
    expected = continued(net, optimizer)
    assert continued(fresh, state.optimizer) == expected
    assert continued(other, reloaded) == expected


def test_adamw_becomes_ademamix_as_from_adamw_makes_it_and_back(tmp_path):
    net, adamw = trained(torch.optim.AdamW, lr=1e-2)
    torch.save({"model": net.state_dict(), "optimizer": adamw.state_dict()}, tmp_path / "adamw.pt")
    convert(tmp_path / "adamw.pt", tmp_path / "step-00000003", optimizer="ademamix")
    assert checkpoint.latest_intact(tmp_path, made.ranks_here()) == tmp_path / "step-00000003"
    (tmp_path / "step-00000003").rename(tmp_path / "ours")
    fresh = model()
    state = ModuleState(AdEMAMix(groups_of(fresh), lr=1e-2, alpha=3.0, alpha_warmup=10, weight_decay=1e-2), fresh)
    checkpoint.load(tmp_path / "ours", state)
    convert(tmp_path / "ours", tmp_path / "back.pt", "torch", optimizer="adamw")
    back, there = torch.load(tmp_path / "back.pt", weights_only=True)["optimizer"], adamw.state_dict()
    assert bits(back["state"]) == bits(there["state"])
    assert [g["betas"] for g in back["param_groups"]] == [g["betas"] for g in there["param_groups"]]
    taken = AdEMAMix.from_adamw(adamw, alpha=3.0, alpha_warmup=10)
    assert [bits(s) for s in state.optimizer.state.values()] == [bits(s) for s in taken.state.values()]
    assert continued(fresh, state.optimizer) == continued(net, taken)


class PaperAdEMAMix(torch.optim.Optimizer):
    """State and arithmetic of the paper's authors' own code, without warm-ups."""

    def __init__(self, params: Any, lr: float, betas: Any = (0.9, 0.999, 0.9999), alpha: float = 2.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-8, "alpha": alpha, "weight_decay": 0.0,
                                  "beta3_warmup": None, "alpha_warmup": None})  # fmt: skip

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta1, beta2, beta3 = group["betas"]
            for p in group["params"]:
                state, grad = self.state[p], p.grad
                if not state:
                    state["step"] = 0
                    state["exp_avg_fast"] = torch.zeros_like(p) if beta1 else None
                    state["exp_avg_slow"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                fast = state["exp_avg_fast"].mul_(beta1).add_(grad, alpha=1 - beta1) if beta1 else grad
                slow = state["exp_avg_slow"].mul_(beta3).add_(grad, alpha=1 - beta3)
                square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                denom = (square.sqrt() / math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
                p.add_(-group["lr"] * (fast.div(1 - beta1 ** state["step"]) + group["alpha"] * slow) / denom)


@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_the_papers_names_come_back_bit_for_bit_and_go_on_the_same(tmp_path, beta1):
    net, optimizer = trained(PaperAdEMAMix, lr=1e-2, betas=(beta1, 0.99, 0.999))
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "theirs.pt")
    convert(tmp_path / "theirs.pt", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again.pt", "paper")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert bits(again["optimizer"]["state"]) == bits(saved["optimizer"]["state"])
    assert bits(again["optimizer"]["param_groups"]) == bits(saved["optimizer"]["param_groups"])
    fresh = model()
    state = ModuleState(AdEMAMix(groups_of(fresh), lr=1e-2, betas=(beta1, 0.99, 0.999), alpha=2.0), fresh)
    checkpoint.load(tmp_path / "ours", state)
    step(net, optimizer, 2)
    step(fresh, state.optimizer, 2)
    for a, b in zip(net.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_bitsandbytes_state_comes_back_bit_for_bit(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    net, optimizer = trained(bnb.optim.AdEMAMix, lr=1e-2, t_alpha=10, t_beta3=10)
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "theirs.pt")
    convert(tmp_path / "theirs.pt", tmp_path / "ours")
    stored = Stored(tmp_path / "ours")
    stacked = optimizer.state[net[0].weight]["state1"]
    assert bits(stored.read("0.weight", "m1")) == bits(stacked[0])
    assert bits(stored.read("0.weight", "m2")) == bits(stacked[1])
    assert bits(stored.read("0.weight", "nu")) == bits(optimizer.state[net[0].weight]["state2"])
    assert stored.document["checkpoint"]["groups"][1]["alpha_warmup"] == 10
    convert(tmp_path / "ours", tmp_path / "again.pt", "bitsandbytes")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert bits(again["optimizer"]["state"]) == bits(saved["optimizer"]["state"])
    assert bits(again["optimizer"]["param_groups"]) == bits(saved["optimizer"]["param_groups"])
    fresh = model()
    reloaded = bnb.optim.AdEMAMix(groups_of(fresh), lr=1.0)
    fresh.load_state_dict(again["model"])
    reloaded.load_state_dict(again["optimizer"])
    assert continued(fresh, reloaded) == continued(net, optimizer)


def test_bitsandbytes_8_bit_state_is_read_as_it_decodes_it(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    net = nn.Linear(71, 64, bias=False)
    optimizer = bnb.optim.AdEMAMix8bit(net.named_parameters())
    for _ in range(2):
        net.weight.grad = torch.randn_like(net.weight)
        optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "theirs.pt")
    convert(tmp_path / "theirs.pt", tmp_path / "ours")
    stored, held = Stored(tmp_path / "ours"), optimizer.state[net.weight]
    assert held["state1"].dtype == torch.uint8
    for kind, codes, absmax, table in (
        ("m1", held["state1"][0], held["absmax1"][0], held["qmap1"]),
        ("m2", held["state1"][1], held["absmax1"][1], held["qmap1"]),
        ("nu", held["state2"], held["absmax2"], held["qmap2"]),
    ):
        decoded = bnb.functional.dequantize_blockwise(codes, absmax=absmax, code=table, blocksize=256)
        assert bits(stored.read("weight", kind)) == bits(decoded), kind


# ---------------------------------------------------------------------------------------------- torchtitan, DCP


class Container:
    """What torchtitan's OptimizersContainer gives DCP: flat, by parameter name."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for group in self.optimizer.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                flat |= {f"state.{name}.{key}": value for key, value in self.optimizer.state[param].items()}
                flat |= {f"param_groups.{name}.{k}": v for k, v in group.items() if k not in ("params", "param_names")}
        return flat

    def load_state_dict(self, flat: dict[str, Any]) -> None:
        for group in self.optimizer.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                self.optimizer.state[param] = {key: flat[f"state.{name}.{key}"] for key in self.optimizer.state[param]}
            for key in group.keys() - {"params", "param_names"}:
                group[key] = flat[f"param_groups.{group['param_names'][0]}.{key}"]


def _titan(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {**net.state_dict(), "optimizer": Container(optimizer), "train_state": {"step": 3, "ntokens_seen": 12}}


def _titan_trained(rank: int, world_size: int, folder: Path) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    fully_shard(net, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = torch.optim.AdamW(groups_of(net), lr=1e-2)
    step(net, optimizer, 3)
    dcp.save(_titan(net, optimizer), checkpoint_id=folder)
    state = [
        {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in s.items()} for s in optimizer.state.values()
    ]
    return bits([state, [p.full_tensor().detach() for p in net.parameters()]])


def _titan_loaded(rank: int, world_size: int, folder: Path) -> Any:
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(groups_of(net), lr=1.0)
    net(torch.zeros(1, 5)).sum().backward()
    optimizer.step()
    state = _titan(net, optimizer)
    dcp.load(state, checkpoint_id=folder)
    net.load_state_dict({name: state[name] for name in net.state_dict()})
    assert state["train_state"]["step"] == 3
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 3e-3]
    return bits([list(optimizer.state.values()), [p.detach() for p in net.parameters()]])


def test_a_checkpoint_of_torchtitan_comes_back_bit_for_bit(tmp_path):
    expected, _ = on_ranks(2, _titan_trained, tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    document = checkpoint.read_document(tmp_path / "ours")
    assert (document["step"], document["host"]) == (3, "torchtitan")
    assert document["checkpoint"]["parameters"].keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    convert(tmp_path / "ours", tmp_path / "again", "torchtitan")
    for loaded in on_ranks(2, _titan_loaded, tmp_path / "again"):
        assert loaded == expected


def test_an_index_that_names_other_code_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    import pickle

    (tmp_path / "titan").mkdir()
    (tmp_path / "titan/.metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match=r"\.metadata is refused: it names (posix|os)\.mkdir"):
        convert(tmp_path / "titan", tmp_path / "ours")
    torch.save({"model": {"w": torch.ones(2)}, "optimizer": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"evil\.pt holds pickled objects \((posix|os)\.mkdir\)"):
        convert(tmp_path / "evil.pt", tmp_path / "ours")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pt", "titan"]


# ---------------------------------------------------------------------------------------------- mistakes


def test_a_checkpoint_for_trainer_says_where_the_models_config_goes(tmp_path):
    net, optimizer = trained(AdEMAMix, **SETTINGS)
    checkpoint.save(tmp_path / "ours", ModuleState(optimizer, net))
    with pytest.raises(InputError, match=r"config\.json, in DIR/model where the source is DIR/checkpoints/NAME"):
        convert(tmp_path / "ours", tmp_path / "out", "trainer")


def test_what_a_format_has_no_place_for_is_named_and_left_out_on_request(tmp_path):
    net, optimizer = trained(AdEMAMix, weight_ema=0.9, **SETTINGS)
    checkpoint.save(tmp_path / "ours", ModuleState(optimizer, net))
    for to, name in (("paper", "a.pt"), ("bitsandbytes", "b.pt"), ("deepspeed", "c")):
        if to != "deepspeed":
            with pytest.raises(InputError, match=f"{to} has no place for weight_ema: .* add --drop weight_ema"):
                convert(tmp_path / "ours", tmp_path / name, to)
        convert(tmp_path / "ours", tmp_path / name, to, drop=["weight_ema"])
        assert "weight_ema" not in {kind for _, kind in formats.read(tmp_path / name).tensors}
    with pytest.raises(InputError, match="--drop m3: there is buffer, m1, m2, nu, step and 1 more to drop"):
        convert(tmp_path / "ours", tmp_path / "d.pt", "paper", drop=["m3"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.pt", "c", "ours"]


def test_mistakes_are_refused_and_leave_nothing(tmp_path, monkeypatch):
    net, optimizer = trained(torch.optim.AdamW, lr=1e-2)
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "a.pt")
    for group in saved["optimizer"]["param_groups"]:
        del group["param_names"]
    torch.save(saved, tmp_path / "unnamed.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    large, optimizer = trained(torch.optim.AdamW, lr=1e-2)
    large = {name: value.double() * 1e200 for name, value in large.state_dict().items()}
    torch.save({"model": large, "optimizer": optimizer.state_dict()}, tmp_path / "large.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:900])
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    for source, to, message in (
        ("nowhere", "shardopt", "nowhere is not there"),
        ("folder", "shardopt", "is none of: a checkpoint or run of shardopt"),
        ("other.pt", "shardopt", "is no dict with the model's state_dict"),
        ("cut.pt", "shardopt", "cannot read .*cut.pt as tensors and plain data"),
        ("unnamed.pt", "shardopt", "numbers its parameters and does not name them"),
        ("a.pt", "paper", "out: paper is a file, so name it .pt"),
        ("large.pt", "deepspeed", "beyond the range of torch.float32"),
        ("a.pt", "trainer", "needs the model's config.json"),
    ):
        with pytest.raises(InputError, match=message):
            convert(tmp_path / source, tmp_path / "out", to)
    with pytest.raises(InputError, match=r"out\.pt: shardopt is a folder; for a file give --to torch"):
        convert(tmp_path / "a.pt", tmp_path / "out.pt")
    with pytest.raises(InputError, match="folder exists already: name another place"):
        convert(tmp_path / "a.pt", tmp_path / "folder")
    with pytest.raises(InputError, match="paper has AdEMAMix alone, the state is of adamw: add --optimizer ademamix"):
        convert(tmp_path / "a.pt", tmp_path / "out.pt", "paper")
    monkeypatch.setattr(formats.shutil, "disk_usage", lambda _: os.terminal_size((0, 0)) and type("U", (), {"free": 9}))
    with pytest.raises(InputError, match=r"has 9 B of free space, .*out takes \d"):
        convert(tmp_path / "a.pt", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_unnamed_parameters_of_one_group_follow_the_models_order_if_the_shapes_fit(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "a")
    assert bits(Stored(tmp_path / "a").read("1.bias", "exp_avg")) == bits(optimizer.state[net[1].bias]["exp_avg"])
    saved["model"] = dict(reversed(saved["model"].items()))
    torch.save(saved, tmp_path / "b.pt")
    with pytest.raises(InputError, match=r"1\.bias: its state exp_avg is \(3, 3\), its weight \(2,\)"):
        convert(tmp_path / "b.pt", tmp_path / "b")


def test_the_command_says_what_was_converted(tmp_path, capsys):
    net, optimizer = trained(torch.optim.AdamW, lr=1e-2)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    words = ["checkpoint", "convert", str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "--to", "bitsandbytes"]
    assert cli.main(words) == 2
    assert "bitsandbytes has AdEMAMix alone" in capsys.readouterr().err
    assert cli.main([*words, "--optimizer", "ademamix", "--drop", "schedule_step"]) == 0
    assert capsys.readouterr().out.endswith("b.pt (bitsandbytes): weight, buffer, m1, m2, nu\n")
    assert (
        json.dumps(torch.load(tmp_path / "b.pt", weights_only=True)["optimizer"]["param_groups"][0]["alpha"]) == "5.0"
    )


def test_the_command_offers_the_formats_that_there_are(tmp_path):
    assert tuple(formats.TARGETS) == _TARGETS
    (tmp_path / "a.pt").touch()
    with pytest.raises(InputError, match="there is no format 'torchtitn'; did you mean torchtitan"):
        convert(tmp_path / "a.pt", tmp_path / "b", "torchtitn")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"amsgrad": True}, "amsgrad"),
        ({"weight_decay": 0.1, "decoupled_weight_decay": False}, "Adam's L2 weight decay"),
    ],
)
def test_what_has_no_counterpart_in_ademamix_is_refused(tmp_path, settings, message):
    net, adam = trained(torch.optim.Adam, lr=1e-2, **settings)
    torch.save({"model": net.state_dict(), "optimizer": adam.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "a.pt", tmp_path / "b", optimizer="ademamix")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
