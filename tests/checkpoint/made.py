"""Made-up parameters, cut in the ways that engines cut them, with values that depend on their names alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardopt import checkpoint
from shardopt.distributed import Ranks
from shardopt.engines.state import ShardedState
from shardopt.slices import Layout, Range, Slice, name_key

SHAPES = {"embed.weight": (13, 4), "layers.0.mlp.weight": (7, 3), "norm.weight": (1,), "layers.0.bias": (5,)}
KINDS = {"weight": torch.float32, "m1": torch.bfloat16, "m2": torch.float32}


def ranks_here(rank: int = 0, world_size: int = 1) -> Ranks:
    return Ranks(rank, world_size, rank, torch.device("cpu"), distributed=dist.is_initialized())


class State(ShardedState):
    """Slices that are given, and step counts beside them.

    Args:
        held: what this rank holds.
        ranks: the processes.
        counts: by parameter name.
        gradients: bytes of them.
    """

    def __init__(
        self, held: list[Slice], ranks: Ranks, counts: dict[str, Any] | None = None, gradients: int = 0
    ) -> None:
        super().__init__(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), ranks)
        self.held, self.counts, self.gradients, self.refreshed = held, counts or {}, gradients, 0

    def init(self) -> None:
        pass

    def slices(self) -> list[Slice]:
        return self.held

    def weight_slices(self) -> list[Slice]:
        return [s for s in self.held if s.kind == "weight"]

    def step_counts(self) -> dict[str, Any]:
        return self.counts

    def load_step_counts(self, counts: Any) -> None:
        self.counts = dict(counts)

    def refresh(self) -> None:
        self.refreshed += 1

    def clip_grad_norm(self, max_norm: float | None) -> float:
        return 0.0

    def gradient_bytes(self) -> int:
        return self.gradients

    @property
    def replicas(self) -> int:
        return 1

    def full_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        return iter(())


def rows(name: str, rank: int, world_size: int) -> Layout:
    """As FSDP2 cuts: ceil(rows / N) each, the last ones smaller or empty."""
    shape = SHAPES[name]
    width, chunk = shape[1] if len(shape) > 1 else 1, -(-shape[0] // world_size)
    first, last = min(rank * chunk, shape[0]), min((rank + 1) * chunk, shape[0])
    return Layout.contiguous(name, shape, first * width, (last - first) * width)


def flat(name: str, rank: int, world_size: int) -> Layout:
    """As a flat bucket is cut: at elements; in unequal parts, of which some are empty."""
    numel = Layout.whole(name, SHAPES[name]).numel
    bounds = [0, *(numel * (i + 1) // (world_size + 2) for i in range(world_size - 1)), numel]
    return Layout.contiguous(name, SHAPES[name], bounds[rank], bounds[rank + 1] - bounds[rank])


def strided(name: str, rank: int, world_size: int) -> Layout:
    """Several ranges: every world_size-th run of three elements, with gaps in the local tensor."""
    numel = Layout.whole(name, SHAPES[name]).numel
    starts = range(3 * rank, numel, 3 * world_size)
    return Layout(name, SHAPES[name], tuple(Range(s, 4 * i, min(3, numel - s)) for i, s in enumerate(starts)))


def whole(name: str, rank: int, world_size: int) -> Layout:
    """Replicas, as under DDP."""
    return Layout.whole(name, SHAPES[name])


def hybrid(name: str, rank: int, world_size: int) -> Layout:
    """As HSDP with two shards: ranks 0 and 2 hold the same."""
    return rows(name, rank % 2, 2)


Cut = Callable[[str, int, int], Layout]


def value(name: str, kind: str) -> Tensor:
    """The whole tensor; among its bits a NaN with a payload and a negative zero, where there is room."""
    generator = torch.Generator().manual_seed(name_key(f"{name}/{kind}") % 2**60)
    tensor = torch.randn(SHAPES[name], generator=generator)
    if tensor.numel() > 2:
        tensor.view(-1)[:2] = torch.tensor([0x7FC10000, -0x80000000]).int().view(torch.float32)
    return tensor.to(KINDS[kind])


def slices(cut: Cut, rank: int = 0, world_size: int = 1, *, filled: bool = True) -> list[Slice]:
    """A rank's slices, with the right values or with 7 everywhere."""
    made = []
    for name, shape in SHAPES.items():
        layout = cut(name, rank, world_size)
        end = layout.ranges[-1].local_start + layout.ranges[-1].length if layout.ranges else 0
        for kind, dtype in KINDS.items():
            local = torch.full((end,), 7, dtype=dtype)
            if filled:
                layout.copy_from_whole(local, value(name, kind))
            # A row-sharded local tensor keeps its rows.
            if cut is rows and len(shape) > 1:
                local = local.view(-1, shape[1])
            made.append(Slice(name, kind, layout, (local,)))
    return made


def wrong(given: list[Slice]) -> list[str]:
    """The keys of the slices with any held bit that is not `value`'s, or any touched between the ranges."""
    keys = []
    for s in given:
        local = s.tensors[0].reshape(-1)
        expected = torch.full_like(local, 7)
        s.layout.copy_from_whole(expected, value(s.name, s.kind))
        if not torch.equal(local.view(torch.uint8), expected.view(torch.uint8)):
            keys.append(f"{s.name}/{s.kind}")
    return keys


def save(rank: int, world_size: int, folder: Path, cut: Cut, document: dict[str, Any] | None = None) -> None:
    given = slices(cut, rank, world_size)
    # Among the values is a NaN, of which every bit must come back.
    checkpoint.save(folder, State(given, ranks_here(rank, world_size)), document or {}, allow_nonfinite=True)


def load(rank: int, world_size: int, folder: Path, cut: Cut) -> dict[str, Any]:
    """Load into slices that are wrong before, and must be right after."""
    given = slices(cut, rank, world_size, filled=False)
    held = {f"{s.name}/{s.kind}" for s in given if s.layout.ranges}
    assert set(wrong(given)) == held
    document = checkpoint.load(folder, State(given, ranks_here(rank, world_size)))
    assert wrong(given) == []
    return document
