"""Damage checkpoints in every way that a disk, a copy or a hand may, and see that each is found.

    PYTHONPATH=. python scripts/damage.py               # two checkpoints, written by two ranks; about a minute
    PYTHONPATH=. python scripts/damage.py --flips 500   # bits to flip in each file

Each damage is put into a copy of the newest of two checkpoints. It is found if `latest_intact` sets that one aside,
with one warning, and answers with the other, untouched, and if `load` of the damaged one raises DamagedError; any
other exception is a failure. The last line counts; the status is 1 unless every damage is found by both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from shardopt import AdEMAMix, checkpoint
from shardopt.checkpoint import DamagedError
from shardopt.distributed import Ranks
from shardopt.engines.state import ModuleState

OLD, NEW = "step-00000100", "step-00000200"
ALONE = Ranks(0, 1, 0, torch.device("cpu"), distributed=False)

_OTHERS: tuple[Any, ...] = (None, "x", -1, 0.5, [], {}, True)

Plant = Callable[[Path], None]
"""Damages the files of one folder."""


def plants(
    new: Path, old: Path, flips: int, types: int | None = None, seed: int = 0
) -> Iterator[tuple[str, str, Plant]]:
    """Kind, description and the damage itself: of each file of `new`, and with the files of `old`.

    Args:
        new: the checkpoint that copies are damaged of.
        old: another one.
        flips: bits to flip at random places of each file.
        types: wrong values to put into the document, one at a time; None puts all into all places.
        seed: of what is random.
    """
    draw = random.Random(seed)
    files = sorted(p.name for p in new.iterdir())
    for name in files:
        content = (new / name).read_bytes()
        size = len(content)
        places = {0, 1, size // 2, size - 2, size - 1, *(draw.randrange(size) for _ in range(flips))}
        for at in sorted(places):
            yield "flip", f"bit of byte {at} of {name}", partial(_flip, name=name, at=at, bit=draw.randrange(8))
        for length in (0, 1, size // 2, size - 1):
            yield "truncation", f"{name} to {length} bytes", partial(_write, name=name, content=content[:length])
        yield "growth", f"{name} by a byte", partial(_write, name=name, content=content + b"\n")
        for start, length in ((0, size), (size // 3, size // 3), (size - 9, 9), (draw.randrange(size), 512)):
            zeroed = content[:start] + bytes(min(length, size - start)) + content[start + length :]
            yield "zeros", f"{length} at byte {start} of {name}", partial(_write, name=name, content=zeroed)
        moved = content[: size // 2] + content[size // 4 : size // 4 + size - size // 2]
        yield "moved", f"a piece of {name} over another", partial(_write, name=name, content=moved)
        yield "missing", name, partial(_remove, names=[name])
        yield "missing", f"{name}, a folder instead", partial(_folder_instead, name=name)
        yield "swap", f"{name} of the step before", partial(_take, source=old, names=[name])
        others = [other for other in files if other != name]
        if all((old / other).exists() for other in others):
            yield "swap", f"all but {name} of the step before", partial(_take, source=old, names=others)
    data = [name for name in files if name.endswith(".data")]
    for a, b in itertools.pairwise(data):
        yield "swap", f"{a} and {b}", partial(_exchange, a=a, b=b)
    yield "missing", "everything", partial(_remove, names=files)
    document = json.loads((new / "checkpoint.json").read_text())
    every = [(path, other) for path, value in _leaves(document) for other in _OTHERS if repr(other) != repr(value)]
    for path, value in draw.sample(every, len(every) if types is None else types):
        said = f"{'.'.join(map(str, path))} is {value!r}"
        yield "types", said, partial(_edit, document=document, path=path, value=value)


def examine(root: Path, load: Callable[[Path], object]) -> str | None:
    """What went wrong with a damaged NEW beside a good OLD in `root`; None where the damage was found."""
    try:
        load(root / NEW)
        return "load took it"
    except DamagedError as error:
        if NEW not in str(error):
            return f"load does not name it: {error}"
    except Exception as error:
        return f"load raised {error!r}"
    warnings: list[str] = []
    try:
        found = checkpoint.latest_intact(root, ALONE, warnings.append)
    except Exception as error:
        return f"latest_intact raised {error!r}"
    if found != root / OLD:
        return f"latest_intact answered {found}"
    if sorted(p.name for p in root.iterdir()) != [OLD, f"{NEW}.damaged"]:
        return f"left are {sorted(p.name for p in root.iterdir())}"
    if len(warnings) != 1 or NEW not in warnings[0]:
        return f"warnings are {warnings}"
    return None


def run(
    root: Path, load: Callable[[Path], object], flips: int, types: int | None = None
) -> tuple[Counter[str], list[str]]:
    """Plant everything, one after the other: how many of each kind, and what was not found."""
    counts: Counter[str] = Counter()
    missed: list[str] = []
    for kind, what, plant in plants(root / NEW, root / OLD, flips, types):
        with tempfile.TemporaryDirectory() as folder:
            trial = Path(folder) / "checkpoints"
            shutil.copytree(root, trial)
            plant(trial / NEW)
            if _same(root / NEW, trial / NEW):  # zeros where there were zeros
                continue
            counts[kind] += 1
            if (wrong := examine(trial, load)) is not None:
                missed.append(f"{kind}, {what}: {wrong}")
            elif not _same(root / OLD, trial / OLD):
                missed.append(f"{kind}, {what}: the good one was changed")
    return counts, missed


def _flip(folder: Path, name: str, at: int, bit: int) -> None:
    content = bytearray((folder / name).read_bytes())
    content[at] ^= 1 << bit
    (folder / name).write_bytes(content)


def _write(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


def _remove(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).unlink()


def _folder_instead(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


def _take(folder: Path, source: Path, names: list[str]) -> None:
    for name in names:
        shutil.copy(source / name, folder / name)


def _exchange(folder: Path, a: str, b: str) -> None:
    (folder / a).rename(folder / "c")
    (folder / b).rename(folder / a)
    (folder / "c").rename(folder / b)


def _edit(folder: Path, document: dict[str, Any], path: list[Any], value: Any) -> None:
    changed = json.loads(json.dumps(document))
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    (folder / "checkpoint.json").write_text(json.dumps(changed, indent=1))


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[list[Any], Any]]:
    if path:
        yield list(path), value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _leaves(child, (*path, key))


def _same(a: Path, b: Path) -> bool:
    def content(folder: Path) -> dict[str, bytes | None]:
        return {p.name: p.read_bytes() if p.is_file() else None for p in folder.iterdir()}

    return content(a) == content(b)


def _state() -> ModuleState:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 11), torch.nn.Linear(11, 3), torch.nn.BatchNorm1d(3))
    optimizer = AdEMAMix(model.named_parameters(), lr=1e-3, state_dtype={"m1": "bf16", "m2": "block8"})
    for _ in range(2):
        model(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()
    return ModuleState(optimizer, model)


def _save(rank: int, root: Path, store: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    state = _state()
    for name, step in ((OLD, 100), (NEW, 200)):
        checkpoint.save(root / name, state, {"step": step}, {"rng": torch.arange(5)})
        for s in state.slices():
            if s.kind == "weight":
                s.tensors[0].add_(1.0)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=100, help="bits to flip at random places of each file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "checkpoints"
        mp.spawn(_save, (root, Path(folder) / "store"), nprocs=2)
        state = _state()
        assert examine_good(root, state)
        counts, missed = run(root, lambda path: checkpoint.load(path, state), arguments.flips)
    print("\n".join(missed))
    found = sum(counts.values()) - len(missed)
    print(f"{found} of {sum(counts.values())} found: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
    sys.exit(1 if missed else 0)


def examine_good(root: Path, state: ModuleState) -> bool:
    """Both checkpoints load, and the newest is the latest: so what is found later is the damage."""
    loaded = [checkpoint.load(root / name, state)["step"] for name in (OLD, NEW)]
    return loaded == [100, 200] and checkpoint.latest_intact(root, ALONE) == root / NEW


if __name__ == "__main__":
    main()
