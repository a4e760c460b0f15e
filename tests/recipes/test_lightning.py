"""docs/recipes/lightning.md: DDP, FSDP2 and ZeRO on 2 gloo ranks, held against a plain loop, and resumed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardopt import AdEMAMix, checkpoint
from shardopt.engines.state import ModuleState
from shardopt.errors import InputError
from tests.distributed.pool import on_ranks
from tests.recipes.page import names_of

if not all(map(importlib.util.find_spec, ("lightning", "torchdata"))):
    pytest.skip("lightning, and torchdata with torchtitan, are in the dev extra", allow_module_level=True)

STEPS, BATCH = 6, 4
ROWS = [torch.randn(8, generator=torch.Generator().manual_seed(i)) for i in range(32)]  # an epoch is 4 steps of 2 ranks


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


def loader() -> Any:
    """A loader that knows where it is, which is what Lightning needs to go on in mid-epoch."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    sampler = torch.utils.data.DistributedSampler(ROWS, shuffle=False)
    return StatefulDataLoader(ROWS, batch_size=BATCH, sampler=sampler)


def fit(
    name: str, folder: Path, *, resume: str | None = None, keep: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    page = names_of("lightning")
    kind, strategy = page["STRATEGIES"][name]
    losses: list[float] = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            losses.append(outputs["loss"].item())

    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, **(keep or {"save_top_k": -1}))
    settings = {"max_steps": STEPS, "gradient_clip_val": 0.3, "precision": "32-true"} | options
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy(),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saves, Losses()],
        **settings,
    )
    module = kind(net(), STEPS, options.get("state_dtype", "fp32"))
    trainer.fit(module, loader(), ckpt_path=resume)
    optimizer = trainer.optimizers[0]
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in module.named_parameters()}
    return {
        "losses": losses,
        "weights": {n: p.detach().float().clone() for n, p in whole.items()},
        "m2": sum(s["m2"].numel() for s in _local(optimizer)),
        "steps": {int(s["step"]) for s in _local(optimizer)},
        "sum": sum(s["m2"].double().abs().sum().item() for s in _local(optimizer)),
        "class": type(optimizer).__name__,
    }


def _local(optimizer: Any) -> list[dict[str, torch.Tensor]]:
    states = optimizer.state.values()
    return [{k: v.to_local() if hasattr(v, "to_local") else torch.as_tensor(v) for k, v in s.items()} for s in states]


def plain(rank: int) -> dict[str, torch.Tensor]:
    """The same in a loop of one's own, with DDP."""
    model = net()
    ddp = nn.parallel.DistributedDataParallel(model)
    warmups = {"alpha_warmup": STEPS, "beta3_warmup": STEPS}
    optimizer = AdEMAMix(model.named_parameters(), lr=1e-2, alpha=8.0, weight_decay=0.1, **warmups)
    for step in range(STEPS):
        own = ROWS[rank::2][BATCH * (step % 4) :][:BATCH]
        batch = torch.stack(own)
        (ddp(batch) - batch).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        optimizer.step()
        optimizer.zero_grad()
    return {f"net.{n}": p.detach() for n, p in model.named_parameters()}


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a)


def _strategies(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    expected = plain(rank)
    told: dict[str, Any] = {}
    for name in ("ddp", "fsdp2", "zero"):
        straight = fit(name, folder / name)
        resumed = fit(name, folder / f"{name}-again", resume=str(folder / name / "step=3.ckpt"))
        told[name] = {key: straight[key] for key in ("losses", "m2", "class")} | {
            "from plain": apart(straight["weights"], expected),
            "resumed": apart(straight["weights"], resumed["weights"]),
            "losses again": resumed["losses"],
            "state again": (resumed["steps"], resumed["sum"] == straight["sum"]),
        }
        half: dict[str, Any] = {"precision": "bf16-mixed", "accumulate_grad_batches": 2}
        newest = {"save_top_k": 1, "monitor": "step", "mode": "max", "save_last": "link"}
        bf16 = fit(name, folder / f"{name}-bf16", keep=newest, **half)
        told[name]["bf16"] = bf16["losses"]
        if name == "zero":
            told["newest"] = sorted(path.name for path in (folder / f"{name}-bf16").iterdir())
            half["max_steps"] = STEPS + 1
            told["from last"] = fit(name, folder / "l", resume=str(folder / f"{name}-bf16" / "last.ckpt"), **half)[
                "steps"
            ]
    told["files"] = sorted(path.name for path in (folder / "zero").iterdir())
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("lightning")
    return folder, on_ranks(2, _strategies, folder)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero"])
def test_a_strategy_trains_as_a_plain_loop_and_resumes_exactly(name: str, told: Any) -> None:
    for rank in told[1]:
        run = rank[name]
        assert run["from plain"] == 0.0 if name == "ddp" else run["from plain"] < 1e-6
        assert run["losses"][4] < run["losses"][0]  # of the same rows, an epoch later
        assert run["resumed"] == 0.0
        assert run["losses again"] == run["losses"][3:]
        assert run["state again"] == ({STEPS}, True)
        assert len(run["bf16"]) == 2 * STEPS
        assert run["bf16"][4] < run["bf16"][0]


def test_zero_and_fsdp_hold_half_of_the_state_and_zeros_slices_lie_beside_the_file(told: Any) -> None:
    folder, ranks = told
    whole = ranks[0]["ddp"]["m2"]
    for name in ("fsdp2", "zero"):
        assert sum(rank[name]["m2"] for rank in ranks) == whole
        assert max(rank[name]["m2"] for rank in ranks) < 0.6 * whole
    assert ranks[0]["files"] == ["step=3.ckpt", "step=3.ckpt.shardopt", "step=6.ckpt", "step=6.ckpt.shardopt"]
    assert ranks[0]["newest"] == ["last.ckpt", "step=6.ckpt", "step=6.ckpt.shardopt"]
    assert ranks[0]["from last"] == {STEPS + 1}
    document = checkpoint.read_document(folder / "zero" / "step=3.ckpt.shardopt")
    assert (document["host"], document["step"]) == ("lightning", 3)


def _refusals(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins import MixedPrecision
    from lightning.pytorch.strategies import DDPStrategy

    page = names_of("lightning")
    told = {}
    page["ZeroModule"].configure_gradient_clipping = pl.LightningModule.configure_gradient_clipping
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    cases = {
        "clipping": ({"gradient_clip_val": 1.0}, page["ZeroDDPStrategy"], None),
        "resumed without slices": ({}, DDPStrategy, folder / "zero" / "step=3.ckpt"),
        "scaler": ({"plugins": [half]}, page["ZeroDDPStrategy"], None),
        "another's file": ({}, page["ZeroDDPStrategy"], folder / "ddp" / "step=3.ckpt"),
    }
    for name, (options, strategy, resume) in cases.items():
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy=strategy(), max_steps=STEPS, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **options,
        )  # fmt: skip
        with pytest.raises(InputError) as error:
            trainer.fit(page["ZeroModule"](net(), STEPS), loader(), ckpt_path=resume and str(resume))
        told[name] = str(error.value)
    from torch.distributed.fsdp import FullyShardedDataParallel

    older = FullyShardedDataParallel(net(), use_orig_params=True, device_id=torch.device("cpu"))  # Lightning's "fsdp"
    with pytest.raises(InputError) as error:
        ModuleState(AdEMAMix(older.named_parameters(), lr=1e-2), older)
    return told | {"fsdp1": str(error.value)}


def test_what_cannot_be_right_is_refused_by_what_to_change(told: Any) -> None:
    for refused in on_ranks(2, _refusals, told[0]):
        assert "override configure_gradient_clipping" in refused["clipping"]
        assert "has not been loaded" in refused["resumed without slices"]
        assert "GradScaler does not work" in refused["scaler"]
        assert "fully_shard (FSDP2)" in refused["fsdp1"].replace("torch.distributed.fsdp.", "")
        assert "step=3.ckpt.shardopt" in refused["another's file"]
