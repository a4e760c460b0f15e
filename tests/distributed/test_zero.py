"""ZeRO-1 and ZeRO-2 against DistributedDataParallel with the same, unsharded, optimizer."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shardopt import AdEMAMix, ZeroOptimizer
from tests.distributed.pool import on_ranks

ADEMAMIX = {"lr": 3e-3, "alpha": 4.0, "alpha_warmup": 30, "beta3_warmup": 30, "weight_decay": 0.1}
SMALL_BUCKETS = 0.01  # MiB: several buckets, and parameters that straddle ranks


class Model(nn.Module):
    """Tied weights, a parameter used twice, biases, norms, sizes that do not divide, a frozen and an unused one."""

    def __init__(self, width: int = 36, vocabulary: int = 53, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))
            for _ in range(depth)
        )
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + self.scale * block(x) / 4 + self.scale.square()
        return self.head(self.frozen(x))


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(seed)
    return Model().to(dtype)


def batch(step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step * 10_000 + micro * 100 + rank)
    tokens = torch.randint(53, (4, 9), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(module: nn.Module, step: int, micro: int, rank: int) -> Tensor:
    tokens, target = batch(step, micro, rank)
    return nn.functional.cross_entropy(module(tokens).flatten(0, 1).float(), target.flatten())


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def train_ddp(rank, optimizer_class, kwargs, steps, micros, clip=None):
    module = model()
    ddp = DistributedDataParallel(module, find_unused_parameters=True)
    optimizer = optimizer_class(list(module.named_parameters()), **kwargs)
    for step in range(steps):
        for micro in range(micros):
            with nullcontext() if micro == micros - 1 else ddp.no_sync():
                loss_of(ddp, step, micro, rank).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return weights(module)


def train_zero(rank, optimizer_class, kwargs, steps, micros, clip=None, **zero):
    module = model(seed=rank)  # rank 0's weights must win
    optimizer = ZeroOptimizer(module, optimizer_class, **({"bucket_mb": SMALL_BUCKETS} | zero), **kwargs)
    for step in range(steps):
        for micro in range(micros):
            with optimizer.accumulate(last=micro == micros - 1):
                loss_of(module, step, micro, rank).backward()
        if clip is not None:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    return weights(module)


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, float]:
    """Largest relative difference, and how far training went from the start."""
    start = weights(model())
    moved = max((theirs[n] - start[n]).abs().max().item() for n in theirs)
    difference = max(((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-30)).item() for n in theirs)
    return difference, moved


def _against_ddp(rank, world_size, optimizer_class, kwargs, steps, micros, clip, zero):
    theirs = train_ddp(rank, optimizer_class, kwargs, steps, micros, clip)
    ours = train_zero(rank, optimizer_class, kwargs, steps, micros, clip, **zero)
    return *compare(ours, theirs), all(torch.equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize("state", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_equal_to_ddp_bit_for_bit(stage, state):
    kwargs = ADEMAMIX | {"state_dtype": state}
    for _, moved, equal in on_ranks(2, _against_ddp, AdEMAMix, kwargs, 50, 1, None, {"stage": stage}):
        assert moved > 0.05
        assert equal
