"""Save on every engine at every number of ranks, load on every other, compare all bits and train on.

    PYTHONPATH=. OMP_NUM_THREADS=1 python scripts/move_checkpoints.py              # all of it, one line per source
    PYTHONPATH=. OMP_NUM_THREADS=1 python scripts/move_checkpoints.py -k "fsdp x3" # sources whose name has this in it
    PYTHONPATH=. OMP_NUM_THREADS=1 python scripts/move_checkpoints.py --formats bf16 block8 --ranks 2 5

Rank processes live for the whole run, a set for each world size, with the real engines in them. For each format
every engine trains a few steps and saves; then each of these checkpoints is loaded into all engines, one after the
other. After a load

- every element held is the one that was saved, bit for bit: weights (frozen and tied ones too), buffers, state and step
  counts. Block formats keep codes and scales where the layout is the same, and elsewhere are what fp32 in between makes
  of them;
- no element is missing;
- training goes on: the next losses are those of one process that never stopped, to 1e-5 (in block8, with so few bits,
  to 5e-4).

Before the load they must differ. The model has odd sizes: one element, three, primes. Its loss is an ordinary one
in fp32. With bf16 weights or computations, whose gradients would be rounded differently for each number of ranks, it is
linear in them, with eighths of small integers as gradients, which have no rounding. The last line counts; the status
is 1 unless all is right.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shardopt import checkpoint, engines
from shardopt.distributed import Ranks
from shardopt.engines import DdpConfig, DeepspeedConfig, FsdpConfig, SingleConfig, ZeroConfig
from shardopt.engines.base import Engine, EngineInputs
from shardopt.optim import registry, states
from shardopt.slices import Range, Slice
from tests.distributed.pool import RankError, on_ranks

BEFORE, AFTER, ROWS = 3, 2, 7  # steps before the save, steps after a load, rows of a global batch
OPTIMIZER = {"lr": 1e-2, "alpha": 4.0, "alpha_warmup": 8, "beta3_warmup": 8, "weight_decay": 0.1, "seed": 7}
GROUPS = {2: 2, 3: 3, 4: 2, 5: 5}  # replicas by number of ranks, where there are any
ENGINES = ("single", "ddp", "zero-1", "zero-2", "zero-replicated", "fsdp", "hsdp", "deepspeed-1", "deepspeed-2",
           "deepspeed-3")  # fmt: skip
BLOCKS = {"m1": "block16", "m2": "bf16", "nu": "block8"}


@dataclass(frozen=True)
class Format:
    """The optimizer's arguments, the weights' dtype and that of forward and backward."""

    arguments: dict[str, Any]
    weights: torch.dtype = torch.float32
    compute: Literal["fp32", "bf16"] = "fp32"

    @property
    def exact(self) -> bool:
        """True where gradients are bf16, and so must have no rounding."""
        return self.weights == torch.bfloat16 or self.compute == "bf16"


FORMATS = {
    "fp32": Format({}),
    "bf16": Format({"state_dtype": "bf16"}),
    "mixed": Format({"state_dtype": {"m2": "bf16"}, "weight_ema": 0.9}),
    "block16": Format({"state_dtype": "block16"}),
    "block8": Format({"state_dtype": "block8"}),
    "mixed-blocks": Format({"state_dtype": BLOCKS}),
    "masters": Format({"master_weights": "fp32"}, torch.bfloat16),
    "split": Format({"master_weights": "split", "state_dtype": "bf16"}, torch.bfloat16),
    "bf16-weights": Format({"state_dtype": "bf16"}, torch.bfloat16),
    "bf16-compute": Format({}, compute="bf16"),
}
# Largest relative difference of a loss. In block8 runs that never stop differ as much, from one number of ranks to
# another: blocks begin anew in each rank's range, so that other elements share a scale, and an element has 8 bits.
TOLERANCE = dict.fromkeys(FORMATS, 1e-5) | {"block8": 5e-4, "mixed-blocks": 5e-4}


@dataclass(frozen=True)
class Place:
    """An engine at a number of ranks."""

    engine: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.engine} x{self.ranks}"

    def config(self, compute: Literal["fp32", "bf16"]) -> engines.EngineConfig:
        kind, _, stage = self.engine.partition("-")
        if self.engine == "zero-replicated":
            return ZeroConfig(replicate=GROUPS[self.ranks], compute_dtype=compute)
        if self.engine == "hsdp":
            return FsdpConfig(replicate=GROUPS[self.ranks], compute_dtype=compute)
        if kind == "zero":
            return ZeroConfig(stage=int(stage), bucket_mb=0.001, compute_dtype=compute)  # type: ignore[arg-type]
        if kind == "deepspeed":
            return DeepspeedConfig(stage=int(stage), compute_dtype=compute)  # type: ignore[arg-type]
        return {"single": SingleConfig, "ddp": DdpConfig, "fsdp": FsdpConfig}[kind](compute_dtype=compute)


def places(fmt: str, ranks: list[int]) -> list[Place]:
    """Where `fmt` can be: DeepSpeed's flat partitions take no blocks, and its weights are fp32 masters of its own."""
    kept = FORMATS[fmt]
    plain = kept.weights == torch.float32 and "block" not in str(kept.arguments)
    return [
        Place(engine, n)
        for n in ranks
        for engine in ENGINES
        if (engine != "single" or n == 1)
        and (engine not in ("zero-replicated", "hsdp") or n in GROUPS)
        and (plain or not engine.startswith("deepspeed"))
    ]


# -- the model and its training -----------------------------------------------------------------------------------


def products(params: Any, seeds: list[int]) -> Tensor:
    """The sum of all elements, in bf16, times small integers that depend on their positions and on `seeds`."""
    total = torch.zeros(())
    for param in params:
        positions = torch.arange(param.numel()).view(param.shape)
        factors = sum((positions * 7 + seed) % 5 - 2 for seed in seeds)
        total = total + (param.bfloat16().float() * factors).sum()
    return total


class Block(nn.Linear):
    def forward(self, x: Tensor | list[int]) -> Tensor:
        if isinstance(x, list):
            return products(self.parameters(), x)
        return x + torch.tanh(super().forward(x))


class Model(nn.Module):
    """Odd sizes, a tied weight, a frozen layer, one and three elements, and persistent buffers."""

    def __init__(self, exact: bool) -> None:
        super().__init__()
        self.exact = exact  # a loss whose gradients have no rounding
        self.embed = nn.Embedding(31, 13)
        self.layers = nn.ModuleList(Block(13, 13) for _ in range(2))
        self.frozen = nn.Linear(13, 13)
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))
        self.three = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(13, 31, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        """This process's share of the loss: tokens of shape (rows, length)."""
        if self.exact:
            seeds = tokens.sum(1).tolist()
            total = products((self.embed.weight, self.scale, self.three), seeds)
            for block in self.layers:
                total = total + block(seeds)
            return total / 8 + 1000 * len(tokens)  # so that the loss is not near zero
        x = self.embed(tokens[:, :-1])
        for block in self.layers:
            x = block(x)
        x = torch.cat([x[..., :3] * self.three, x[..., 3:] * self.scale], -1)
        logits = self.head(self.frozen(x)).flatten(0, 1)
        return nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum") / (4 * ROWS)


@dataclass
class Built:
    """An engine, with the model as it was before it was wrapped."""

    engine: Engine
    model: Model

    def train(self, first: int, steps: int) -> list[float]:
        """The losses of steps `first` and following, of which every rank takes some rows."""
        losses = []
        ranks = self.engine.ranks
        for step in range(first, first + steps):
            rows = torch.randint(31, (ROWS, 5), generator=torch.Generator().manual_seed(step))
            with self.engine.accumulate(True):
                loss = self.engine.model(rows[ranks.rank :: ranks.world_size])
                self.engine.backward(loss)
            self.engine.clip_grad_norm(None)
            self.engine.step()
            self.engine.zero_grad()
            self.model.seen += step
            self.model.steps += 1
            losses.append(ranks.sum([loss.item()])[0])
        return losses


def build(fmt: str, place: Place, ranks: Ranks) -> Built:
    kept = FORMATS[fmt]
    torch.manual_seed(3)
    model = Model(kept.exact).to(kept.weights)
    if kept.compute == "bf16":
        del model.frozen  # which DeepSpeed, alone, would round to bf16
    spec = registry.spec("ademamix", **OPTIMIZER, **kept.arguments)
    inputs = EngineInputs(ranks, model, lambda _: None, spec, list(model.layers))
    return Built(engines.build(place.config("bf16" if kept.exact else "fp32"), inputs), model)


_built: dict[tuple[str, Place], Built] = {}  # in each rank process


def at(fmt: str, place: Place, rank: int) -> Built:
    """The engine of this rank process, made when it is first asked for."""
    if (fmt, place) not in _built:
        alone = place.engine == "single"
        _built[fmt, place] = build(fmt, place, Ranks(rank, place.ranks, rank, torch.device("cpu"), not alone))
    return _built[fmt, place]


def release(rank: int, world_size: int) -> None:
    """Close all engines of this process."""
    while _built:
        _built.popitem()[1].engine.close()


def control(fmt: str) -> list[float]:
    """The losses of one process that never stops."""
    alone = Ranks(0, 1, 0, torch.device("cpu"), False)
    return build(fmt, Place("single", 1), alone).train(0, BEFORE + AFTER)


# -- what is in a state, without the code of checkpoints ------------------------------------------------------------


def copied(s: Slice) -> Slice:
    return replace(s, tensors=tuple(t.detach().reshape(-1).clone() for t in s.tensors))


def packed(s: Slice) -> list[tuple[Range, Tensor]]:
    """Each range with its values; those of a block format decoded."""
    if s.format is None:
        flat = s.tensors[0].reshape(-1)
        return [(r, flat.narrow(0, r.local_start, r.length)) for r in s.layout.ranges]
    parts = states.read_slice(s).split([r.length for r in s.layout.ranges]) if s.layout.ranges else []
    return list(zip(s.layout.ranges, parts, strict=True))


@dataclass
class Saved:
    """What all ranks together held at a save.

    Args:
        whole: by "NAME/KIND", flat; of a block format the decoded values.
        blocks: codes and scales by key and ranges.
        counts: step counts by name.
    """

    whole: dict[str, Tensor]
    blocks: dict[tuple[str, tuple[Range, ...]], tuple[Tensor, ...]]
    counts: dict[str, Any]

    @classmethod
    def of(cls, engine: Engine) -> Saved:
        """A collective."""
        mine = [copied(s) for s in engine.state.slices()]
        saved = cls({}, {}, {})
        for slices, counts in engine.ranks.gather((mine, engine.state.step_counts())):
            saved.counts.update(counts)
            for s in slices:
                key = f"{s.name}/{s.kind}"
                for r, values in packed(s):
                    whole = saved.whole.setdefault(key, torch.zeros(s.layout.numel, dtype=values.dtype))
                    whole[r.global_start : r.global_start + r.length] = values
                if s.format is not None:
                    saved.blocks[key, s.layout.ranges] = s.tensors
        return saved

    def differing(self, engine: Engine) -> list[str]:
        """The keys of this rank's slices that are not as saved, and the names whose counts are not."""
        names = [name for name, entry in engine.state.step_counts().items() if entry != self.counts[name]]
        return names + [f"{s.name}/{s.kind}" for s in engine.state.slices() if not self._equal(copied(s))]

    def _equal(self, s: Slice) -> bool:
        key = f"{s.name}/{s.kind}"
        if s.kind == "buffer":  # small numbers, in the dtype that the engine has them in
            return torch.equal(s.tensors[0].float(), self.whole[key].float())
        if s.format is None:
            return all(same_bits(v, self.whole[key].narrow(0, r.global_start, r.length)) for r, v in packed(s))
        wanted = self.blocks.get((key, s.layout.ranges))
        if wanted is None:  # another layout: what rounding the values to nearest makes of them
            values = [self.whole[key].narrow(0, r.global_start, r.length) for r in s.layout.ranges]
            again = copied(s)
            states.write_slice(again, torch.cat(values) if values else torch.empty(0))
            wanted = again.tensors
        return all(same_bits(a, b) for a, b in zip(s.tensors, wanted, strict=True))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# -- on every rank --------------------------------------------------------------------------------------------------


def save(rank: int, world_size: int, fmt: str, sources: list[Place], root: Path) -> list[list[float]]:
    """On each source: train from the start, save, and train on, so that nothing is as saved. The losses of each."""
    losses = []
    for place in sources:
        built = at(fmt, place, rank)
        first = built.train(0, BEFORE)
        saved, folder = Saved.of(built.engine), folder_of(root, fmt, place)
        checkpoint.save(folder, built.engine.state, {"step": BEFORE})
        if rank == 0:
            torch.save(saved, folder.with_suffix(".pt"))
        losses.append(first + built.train(BEFORE, AFTER))
    return losses


def folder_of(root: Path, fmt: str, source: Place) -> Path:
    return root / f"{fmt}-{source.engine}-{source.ranks}"


Outcome = tuple[bool, list[str], dict[str, set[tuple[int, int]]], list[float]]


def load(rank: int, world_size: int, fmt: str, targets: list[Place], folder: Path) -> list[Outcome]:
    """For each target: whether it differed before, what differs after, the ranges held by key, the next losses."""
    saved: Saved = torch.load(folder.with_suffix(".pt"), weights_only=False)
    outcomes = []
    for place in targets:
        built = at(fmt, place, rank)
        built.engine.state.init()
        differed = bool(saved.differing(built.engine))
        checkpoint.load(folder, built.engine.state)
        held: dict[str, set[tuple[int, int]]] = {}
        for s in built.engine.state.slices():
            held.setdefault(f"{s.name}/{s.kind}", set()).update((r.global_start, r.length) for r in s.layout.ranges)
        outcomes.append((differed, saved.differing(built.engine), held, built.train(BEFORE, AFTER)))
    return outcomes


# -- in the process that leads --------------------------------------------------------------------------------------


def judge(fmt: str, ranks: list[Outcome], expected: list[float], numels: dict[str, int]) -> tuple[list[str], float]:
    """What is wrong with a load, from what its ranks say, and the largest relative difference of a loss."""
    wrong = []
    if not any(differed for differed, *_ in ranks):
        wrong.append("nothing differed before the load")
    if keys := sorted({key for _, different, _, _ in ranks for key in different}):
        wrong.append(f"not as saved: {', '.join(keys[:4])}" + f" and {len(keys) - 4} more" * (len(keys) > 4))
    for key, numel in numels.items():
        ranges = {r for _, _, held, _ in ranks for r in held.get(key, ())}
        if sum(length for _, length in ranges) != numel:
            wrong.append(f"{key} is not whole")
    off = max(difference(losses, expected) for *_, losses in ranks)
    if not off <= TOLERANCE[fmt]:
        wrong.append(f"losses differ by {off:.1e}")
    return wrong, off


def difference(losses: list[float], expected: list[float]) -> float:
    """The largest relative difference; infinite where a loss is not finite."""
    parts = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]
    return max(parts) if all(part == part for part in parts) else float("inf")


def numels_of(fmt: str) -> dict[str, int]:
    """The number of elements of every key, from one process."""
    built = build(fmt, Place("single", 1), Ranks(0, 1, 0, torch.device("cpu"), False))
    built.engine.state.init()
    return {f"{s.name}/{s.kind}": s.layout.numel for s in built.engine.state.slices()}


def by_ranks(where: list[Place]) -> dict[int, list[Place]]:
    return {n: [place for place in where if place.ranks == n] for n in sorted({place.ranks for place in where})}


def save_all(fmt: str, sources: list[Place], root: Path, expected: list[float]) -> dict[Place, float]:
    """Save on every source, before anything is loaded: how far the losses of each are from `expected`."""
    off = {}
    for n, these in by_ranks(sources).items():
        replies = on_ranks(n, save, fmt, these, root, timeout=300)
        off |= {place: max(difference(r[i], expected) for r in replies) for i, place in enumerate(these)}
    return off


def load_all(
    fmt: str, source: Place, targets: list[Place], root: Path, expected: list[float]
) -> dict[Place, tuple[list[str], float]]:
    """Load what was saved on `source` into every target: what is wrong with each, and how far its losses are off."""
    outcomes: dict[Place, tuple[list[str], float]] = {}
    numels = numels_of(fmt)
    for n, these in by_ranks(targets).items():
        try:
            replies = on_ranks(n, load, fmt, these, folder_of(root, fmt, source), timeout=300)
        except RankError as error:
            outcomes |= {target: ([f"a rank failed: {error}"], 0.0) for target in these}
            continue
        for i, target in enumerate(these):
            outcomes[target] = judge(fmt, [reply[i] for reply in replies], expected[BEFORE:], numels)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", help="only sources with this in their name, such as 'bf16 fsdp x3'")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2, 3, 4, 5])
    arguments = parser.parse_args()
    moved = good = saved = 0
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="move-checkpoints-") as folder:
        root = Path(folder)
        for fmt in arguments.formats:
            everywhere = places(fmt, arguments.ranks)
            sources = [place for place in everywhere if arguments.k in f"{fmt} {place}"]
            expected = control(fmt)
            for source, off in save_all(fmt, sources, root, expected).items():
                begin = time.monotonic()
                outcomes = load_all(fmt, source, everywhere, root, expected)
                right = sum(not wrong for wrong, _ in outcomes.values()) if off <= TOLERANCE[fmt] else 0
                off = max(off, *(each for _, each in outcomes.values()))
                moved, good, saved, worst = moved + len(outcomes), good + right, saved + 1, max(worst, off)
                seconds = time.monotonic() - begin
                print(
                    f"{fmt:12} {source!s:18} {right} of {len(outcomes)} right, {off:.1e}, {seconds:.1f} s", flush=True
                )
                for target, (wrong, _) in outcomes.items():
                    if wrong:
                        print(f"    on {target}: {'; '.join(wrong)}", flush=True)
            for n in arguments.ranks:
                on_ranks(n, release)
    print(f"{good} of {moved} loads right, of {saved} checkpoints; losses differ by at most {worst:.1e}")
    sys.exit(good < moved or not moved)


if __name__ == "__main__":
    main()
