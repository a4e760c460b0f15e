"""What a save and a load cost beside the data, on up to 1,024 ranks: SIMULATED, in one process without the data.

    OMP_NUM_THREADS=1 PYTHONPATH=. python scripts/simulate_checkpoint.py                  # 8B and 70B; some minutes
    OMP_NUM_THREADS=1 PYTHONPATH=. python scripts/simulate_checkpoint.py --models 8B --ranks 8 64

The layouts of a Llama 3 model under FSDP2 (rows), ZeRO (flat buckets) and DDP (replicas) are worked out for every rank,
and given to the same functions that real ranks call, one rank after the other. Nothing is sent: bytes are those of what
the ranks would hand to torch.distributed, and no time of a network is in the figures. Four fp32 tensors a parameter:
weight, m1, m2, nu.

- describe: each rank describes what it holds. plan: rank 0 puts the descriptions together, checks that every element is
  there, and deals out what several ranks hold. So it is at the first save of a run, and when something has changed.
- counts: step counts (and, of replicas, the first elements of the weights), gathered at every save, and put together.
- write: rank 0 writes index and document. read: rank 0 reads and checks them, for a load.
- broadcast: rank 0's index and document, to every rank; find: a rank unpacks it and finds what it has to read.
"""

from __future__ import annotations

import argparse
import os
import pickle
import platform
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shardopt.checkpoint import loading, manifest, planning
from shardopt.checkpoint.blocks import BLOCK, DIGITS, HEADER, FileRecord
from shardopt.checkpoint.document import FORMAT, index_file, read_document, write_document
from shardopt.checkpoint.index import Index, Sizes, data_file, read_table, write_index
from shardopt.slices import Layout, Slice

KINDS = ("weight", "m1", "m2", "nu")
# width, width of the MLP, blocks; vocabulary 128,256, 8 heads of 128 for keys and values
MODELS = {"8B": (4096, 14336, 32), "70B": (8192, 28672, 80), "tiny": (256, 512, 2)}
Shapes = dict[str, tuple[int, ...]]


def shapes_of(model: str) -> Shapes:
    """Names and shapes of a Llama 3 in transformers."""
    width, mlp, blocks = MODELS[model]
    vocabulary = 1000 if model == "tiny" else 128256
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(blocks):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{name}_proj.weight": (width, width) for name in "qo"}
        shapes |= {f"{at}self_attn.{name}_proj.weight": (1024, width) for name in "kv"}
        shapes |= {f"{at}mlp.{name}_proj.weight": (mlp, width) for name in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (width, mlp)}
        shapes |= {f"{at}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def fsdp(shapes: Shapes, rank: int, ranks: int) -> Iterator[Layout]:
    """Rows, ceil(rows / ranks) each."""
    for name, shape in shapes.items():
        chunk, row = -(-shape[0] // ranks), int(np.prod(shape[1:], dtype=np.int64))
        first, last = (min(chunk * i, shape[0]) for i in (rank, rank + 1))
        yield Layout.contiguous(name, shape, first * row, (last - first) * row)


def zero(shapes: Shapes, rank: int, ranks: int, bucket: int = 25 * 2**18) -> Iterator[Layout]:
    """Equal parts of flat buckets of 25 MiB, filled from the last parameter on."""
    waiting: list[tuple[str, int]] = []
    for name, shape in reversed(shapes.items()):
        waiting.append((name, int(np.prod(shape, dtype=np.int64))))
        total = sum(numel for _, numel in waiting)
        if total < bucket and name != next(iter(shapes)):
            continue
        part, at = -(-total // ranks), 0
        for held, numel in waiting:
            first, last = max(at, part * rank), min(at + numel, part * (rank + 1))
            yield Layout.contiguous(held, shapes[held], max(first - at, 0), max(last - first, 0))
            at += numel
        waiting = []


def ddp(shapes: Shapes, rank: int, ranks: int) -> Iterator[Layout]:
    """Replicas."""
    return (Layout.whole(name, shape) for name, shape in shapes.items())


ENGINES: dict[str, Callable[[Shapes, int, int], Iterator[Layout]]] = {"FSDP2": fsdp, "ZeRO": zero, "DDP": ddp}


def described(layouts: Sequence[Layout], table: bytes) -> manifest.Description:
    """What `manifest.describe` makes of `slices_of(layouts)`, in less time."""
    named = sorted(enumerate(layouts), key=lambda pair: pair[1].name)
    columns = [
        (len(KINDS) * number + KINDS.index(kind), r.global_start, r.length, r.row, r.stride)
        for kind in sorted(KINDS)
        for number, layout in named
        for r in layout.ranges
    ]
    rows = np.array(columns, dtype=np.int64).reshape(-1, 5).T
    return manifest.Description(table, zlib.compress(rows.tobytes(), 1))


def slices_of(layouts: Iterable[Layout]) -> list[Slice]:
    """With tensors of one number, which takes no memory."""
    number = torch.zeros(1)
    return [
        Slice(layout.name, kind, layout, (number.expand(layout.local_numel),)) for layout in layouts for kind in KINDS
    ]


class Row(NamedTuple):
    """Seconds and bytes. Where not said otherwise bytes are of all ranks together."""

    model: str
    engine: str
    ranks: int
    chunks: int
    describe: float
    gathered: int
    plan: float
    scattered: int
    counts: float
    counts_gathered: int
    write: float
    read: float
    broadcast: int
    """To each rank."""
    find: float
    most: float
    """Bytes of data that the busiest rank writes, times the ranks, over all bytes."""


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = action()
    return time.perf_counter() - begin, result


def simulate(model: str, engine: str, ranks: int, root: Path) -> Row:
    shapes = shapes_of(model)
    manifest.describe(slices_of(ddp({"warm": (1,)}, 0, 1)))  # what is imported at the first call
    describe, descriptions = [], []
    table = manifest.table_of(slices_of(ENGINES[engine](shapes, 0, ranks)))
    for rank in range(ranks):
        layouts = list(ENGINES[engine](shapes, rank, ranks))
        descriptions.append(described(layouts, table))
        if rank % -(-ranks // 4) == 0:  # some of them as they would do it themselves
            held = slices_of(layouts)
            seconds, (description, _) = timed(lambda held=held: manifest.describe(held))
            assert description == descriptions[-1]
            describe.append(seconds)
    gathered = sum(len(pickle.dumps(description)) for description in descriptions)
    plan_seconds, (plan, shares) = timed(lambda: planning.make_plan(descriptions))
    scattered = sum(len(pickle.dumps(share)) for share in shares)

    weights = [int((d.columns()[0] % len(KINDS) == 0).sum()) if plan.replicas is not None else 0 for d in descriptions]
    packed = manifest.pack_counts({name: {"step": 123456} for name in shapes})
    reports = [(packed, np.zeros(count, dtype=np.int64)) for count in weights]

    def put_together() -> None:
        if plan.replicas is not None:
            plan.replicas.check([firsts for _, firsts in reports])
        manifest.merge_counts(counts for counts, _ in reports)

    counts_seconds, _ = timed(put_together)
    counts_gathered = sum(len(pickle.dumps(report)) for report in reports)

    entries = [
        manifest.Entry(name, kind, shape, ("float32",), None) for name, shape in shapes.items() for kind in KINDS
    ]
    sizes = Sizes.of(sorted(entries, key=lambda e: manifest.file_order((e.name, e.kind))))
    ends = np.zeros(ranks, dtype=np.int64)
    np.maximum.at(ends, plan.table[:, 3], plan.table[:, 4] + sizes.spans(plan.table[:, 0], plan.table[:, 2]))
    records = {
        data_file(r, ""): FileRecord(int(end), "0" * DIGITS * -(-int(end) // BLOCK))
        for r, end in enumerate(ends)
        if end
    }

    def write() -> None:
        files = {index_file(""): write_index(root / index_file(""), "0" * 32, plan.table), **records}
        written = {
            "format": FORMAT, "save_id": "0" * 32, "name": "simulated", "time": 0.0, "loss": None,
            "after_finite_step": True, "torch": torch.__version__, "byteorder": sys.byteorder, "world_size": ranks,
            "parameters": plan.parameters, "step_counts": {name: {"step": 123456} for name in shapes}, "groups": [],
            "extras": plan.extras, "columns": plan.table.shape[1],
            "files": {name: record._asdict() for name, record in files.items()},
        }  # fmt: skip
        write_document(root, {"checkpoint": written})

    def read() -> tuple[dict[str, Any], Any]:
        document = read_document(root)
        return document, read_table(root, document)

    write_seconds, _ = timed(write)
    read_seconds, opened = timed(read)
    broadcast = pickle.dumps(opened)
    mine = slices_of(ENGINES[engine](shapes, ranks // 2, ranks))

    def find() -> int:
        index = Index.of(*pickle.loads(broadcast))
        return sum(1 for s in mine for _ in loading.wanted(s, index.tensors[s.name, s.kind]))

    find_seconds, _ = timed(find)
    data = ends - HEADER * (ends > 0)
    return Row(
        model, engine, ranks, len(plan.table), statistics.median(describe), gathered, plan_seconds, scattered,
        counts_seconds, counts_gathered, write_seconds, read_seconds, len(broadcast), find_seconds,
        float(data.max() * ranks / data.sum()),
    )  # fmt: skip


def report(rows: list[Row]) -> str:
    lines = [
        f"Simulated in one process ({os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}). Seconds "
        f"are of rank 0 where not said otherwise, MB of all ranks together.",
        "",
        "| model | layout | ranks | chunks | describe, a rank | gathered | plan | scattered | gathered at each save | "
        "write | read | broadcast, to each | find, a rank |",
        "|---|---|" + "--:|" * 11,
    ]
    for r in rows:
        cells = (
            f"{r.ranks:,}", f"{r.chunks:,}", f"{r.describe:.2f} s", _mb(r.gathered), f"{r.plan:.2f} s",
            _mb(r.scattered), _mb(r.counts_gathered), f"{r.write:.2f} s", f"{r.read:.2f} s", _mb(r.broadcast),
            f"{r.find:.2f} s",
        )  # fmt: skip
        lines.append(f"| {r.model} | {r.engine} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["8B", "70B"], choices=list(MODELS))
    parser.add_argument("--ranks", nargs="*", type=int, default=[8, 64, 1024])
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES))
    arguments = parser.parse_args()
    rows = []
    for model in arguments.models:
        for engine in arguments.engines:
            for ranks in arguments.ranks:
                with tempfile.TemporaryDirectory() as folder:
                    rows.append(simulate(model, engine, ranks, Path(folder)))
                print(rows[-1], file=sys.stderr, flush=True)
    print(report(rows))


if __name__ == "__main__":
    main()
