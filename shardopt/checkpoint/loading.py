"""Read slices back, on any engine and any number of ranks, after everything has been checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardopt.checkpoint import manifest
from shardopt.checkpoint.blocks import Wanted
from shardopt.checkpoint.document import read_document
from shardopt.checkpoint.folders import check_name
from shardopt.checkpoint.index import DTYPES, SCALE, Index, StoredTensor, read_index, read_table, scales_at
from shardopt.checkpoint.manifest import EXTRA, Entries, vector_key
from shardopt.checkpoint.ranges import Ints, packed, same_blocks, shared
from shardopt.checkpoint.store import as_folder, check_shared
from shardopt.engines.state import ShardedState, require_state
from shardopt.errors import InputError, few
from shardopt.optim import states
from shardopt.optim.precision import BLOCK, blocks, join_fp32
from shardopt.optim.schema import LOW_HALF, MASTERS
from shardopt.slices import Layout, Range, Slice, local_tensor

Tensors = Mapping[tuple[str, str], StoredTensor]  # by name and kind


def load(
    folder: str | Path,
    state: ShardedState,
    *,
    strict: bool = True,
    convert: bool = False,
    kinds: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """Fill weights, optimizer state and step counts from a checkpoint, in place. A collective.

        >>> import tempfile, torch
        >>> from shardopt import AdEMAMix, checkpoint
        >>> from shardopt.engines.state import ModuleState
        >>> model = torch.nn.Linear(3, 2)
        >>> state = ModuleState(AdEMAMix(model.named_parameters(), lr=1e-3), model)
        >>> folder = tempfile.mkdtemp() + "/step-00000100"
        >>> checkpoint.save(folder, state, {"step": 100})
        >>> checkpoint.load(folder, state)["step"]
        100

    Every rank reads its own ranges, and only the files that hold them. Nothing is overwritten unless all
    checks pass on all ranks: names, shapes, kinds, dtypes, step counts, each element there exactly once, data
    files of full length. Where a disk fails after that, the optimizer refuses to step until a load has succeeded.

    Args:
        folder: a complete checkpoint, of any engine and world size.
        state: what this rank holds, created where it is not there yet; elements that no rank holds are not read.
        strict: refuse a checkpoint that has more or less than the ranks together hold. Otherwise parameters that
            are not in it (but not all of them) keep their values, and document["checkpoint"]["not_loaded"] lists their
            slices; a parameter of which only a part is in it (weights without masters, say) is refused all the same.
        convert: let a vector change its dtype or format, rounded once, to nearest. (A block format that keeps its
            format and changes its layout goes through fp32, and a buffer takes the dtype here, without being asked.)
        kinds: for a kind here ("m1") the kind there that it is read from ("exp_avg"), where the names differ; None for
            a kind that is left alone, here and there. Masters are made of fp32 weights by {"master": "weight"}, split
            ones by {"master_low": "weight"} ("master" of a checkpoint that has such), and of split ones fp32 weights by
            {"weight": "master_low"}, fp32 masters by {"master": "master_low"}; with `convert`, exactly.

    Returns:
        The checkpoint's document: what `save` was given, and "checkpoint" (see `read_document`).

    Raises:
        InputError: the checkpoint does not fit; on every rank, with a handful of the names. The message says
            what to change.
    """
    require_state(state)
    folder, ranks = as_folder(folder), state.ranks

    def read() -> tuple[dict[str, Any], Ints, str]:
        """Rank 0 reads and checks the document and the index; the others get what they say."""
        check_shared(folder, ranks.world_size)
        document = read_document(folder)
        check_name(folder, document)
        return document, read_table(folder, document), str(folder)

    document, table, main = ranks.ask_main(read)
    index = Index.of(document, table)
    kinds = kinds or {}
    stored = _renamed(index.tensors, kinds)

    def describe_live() -> tuple[list[Slice], manifest.StepCounts, bytes]:
        manifest.check_same_folder(main, str(folder), ranks.rank)
        state.init()
        slices = [s for s in state.slices() if kinds.get(s.kind, s.kind) is not None]
        return slices, state.step_counts(), manifest.table_of(slices)

    slices, counts, held = ranks.together(describe_live)
    tables = ranks.gather_to_main(held)

    def check() -> tuple[list[str], manifest.StepCounts]:
        beyond: list[str] = []
        if tables is not None:
            live = manifest.merge(map(manifest.read_table, dict.fromkeys(tables)))
            _check_match(folder, {key: t.entry for key, t in stored.items()}, live, strict=strict, convert=convert)
            beyond = sorted(vector_key(*key) for key in live.keys() - stored.keys())
        saved: manifest.StepCounts = document["checkpoint"]["step_counts"]
        for s in slices:
            _check_slice(folder, s, stored)
        if uncounted := (counts.keys() & {name for name, _ in stored}) - saved.keys():
            raise InputError(f"checkpoint {folder} has no step counts of {few(uncounted)}: another optimizer wrote it")
        return beyond, counts | saved

    not_loaded, counts = ranks.together(check)
    ranks.together(lambda: index.check_files(folder, sorted(index.records)[ranks.rank :: ranks.world_size]))
    with state.loading(folder):
        ranks.together(lambda: read_slices(folder, index, stored, slices))
        state.load_step_counts(counts)
    document["checkpoint"]["not_loaded"] = ranks.from_main(not_loaded)
    return document


def load_extras(folder: str | Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """The whole tensors kept under `keys`, on the CPU. Not a collective: each rank may ask for its own.

    Keys that the checkpoint does not have (the generator of a rank that did not exist) are left out, for the
    caller to see; document["checkpoint"]["extras"] lists what there is.

    Raises:
        InputError: not a checkpoint that can be read.
    """
    folder = as_folder(folder)
    document = read_document(folder)
    check_name(folder, document)
    index = read_index(folder, document)
    found: dict[str, Tensor] = {}
    for key in keys:
        if there := index.tensors.get((key, EXTRA)):
            found[key] = torch.empty(there.entry.shape, dtype=DTYPES[there.entry.dtypes[0]])
    read_slices(folder, index, index.tensors, manifest.extras_as_slices(found))
    return found


def _renamed(stored: Tensors, kinds: Mapping[str, str | None]) -> Tensors:
    """What is stored of the parameters, under the kinds of this side (see `load`)."""
    sources = set(kinds.values())
    renamed: dict[tuple[str, str], StoredTensor] = {}
    for (name, kind), there in stored.items():
        # The weights may be read as something else too.
        if kind != EXTRA and kind not in kinds and (kind == "weight" or kind not in sources):
            renamed[name, kind] = there
        renamed |= {(name, here): there for here, source in kinds.items() if source == kind}
    if kinds.get("weight") is not None:  # those that have no masters, being frozen or wider
        renamed = {key: there for key, there in stored.items() if key[1] == "weight"} | renamed
    if kinds.get(LOW_HALF) is not None:  # the bf16 weight is the other half of the same values
        renamed |= {(name, "weight"): there for (name, kind), there in renamed.items() if kind == LOW_HALF}
    return renamed


def _check_match(folder: Path, stored: Entries, live: Entries, *, strict: bool, convert: bool) -> None:
    """Check that the checkpoint and the live slices are of the same model and optimizer.

    Raises:
        InputError: they are not; one line, with the first few names of each kind of difference.
    """
    shapes_there, shapes_here = ({name: entry.shape for (name, _), entry in of.items()} for of in (stored, live))
    shared = shapes_there.keys() & shapes_here.keys()
    problems = []
    if strict and (missing := shapes_here.keys() - shapes_there.keys()):
        problems.append(f"the checkpoint has no {few(missing)}")
    if strict and (extra := shapes_there.keys() - shapes_here.keys()):
        problems.append(f"the model has no {few(extra)}")
    if live and not shared and not strict:
        problems.append(f"none of the names here ({few(shapes_here)}) is among its names ({few(shapes_there)})")
    if problems:
        unnamed = any(name.isdigit() for name in shapes_here.keys() ^ shapes_there.keys())
        hint = "a number is a parameter without a name: build the optimizer over model.named_parameters()"
        problems.append(hint if unnamed else "it was written by another model")
    differ = {n for n in shared if shapes_there[n] != shapes_here[n]}
    if differ:
        shapes = few(f"{n} ({shapes_there[n]} there, {shapes_here[n]} here)" for n in differ)
        problems.append(f"shapes differ: {shapes}; set model as it was")
    wanted, there = ({key for key in of if key[0] in shared} for of in (live, stored))
    # Not strict either: weights without their masters, or averages without their counts, would go on wrong.
    if missing_kinds := {vector_key(*k) for k in wanted - there}:
        hint = _hint_of_masters({kind for _, kind in wanted - there}, {kind for _, kind in there})
        problems.append(f"the checkpoint has no {few(missing_kinds)}; set optimizer as it was{hint}")
    if strict and (extra_kinds := {vector_key(*k) for k in there - wanted}):
        taken = f"nothing here takes its {few(extra_kinds)}"
        problems.append(f"{taken}; set optimizer as it was, or load with strict=False")
    if not convert:
        was, now = ({key: of[key].stored_as for key in wanted & there} for of in (stored, live))
        changed = {key for key in was if was[key] != now[key]}
        alike: dict[tuple[str, str, bool], set[tuple[str, str]]] = {}  # is said once
        for name, kind in changed:
            if kind != "buffer":
                alike.setdefault((was[name, kind], now[name, kind], kind == "weight"), set()).add((name, kind))
        for (before, after, of_weights), keys in sorted(alike.items()):
            kinds = few({kind for _, kind in keys})
            setting = "the weights' dtype" if of_weights else f"the optimizer's state_dtype (of {kinds})"
            problems.append(
                f"{kinds} is {before} there and {after} here, in {few({name for name, _ in keys})}; set {setting} as "
                f"it was (where a program calls checkpoint.load itself: or convert=True)"
            )
    if problems:
        raise InputError(f"checkpoint {folder} does not fit: " + "; ".join(problems))


def _hint_of_masters(missing: set[str], there: set[str]) -> str:
    """How to load masters of 16-bit weights from what a checkpoint has in their place; empty where it cannot be."""
    masters = [key for key, _ in MASTERS.values()]
    if not missing <= {*masters}:
        return ""
    source = next((key for key in masters if key in there), "weight")
    return f", or load with kinds={dict.fromkeys(sorted(missing), source)}, convert=True"


def _check_slice(folder: Path, s: Slice, stored: Tensors) -> None:
    there = stored.get((s.name, s.kind))
    if there is None or not s.layout.ranges:
        return
    here = [manifest.dtype_name(t.dtype) for t in s.tensors]
    names = (*here, *there.entry.dtypes)
    floating = all(DTYPES[n].is_floating_point for n in (names[len(here) :] if s.kind == LOW_HALF else names))
    floating |= _is_joined(s, there)
    if tuple(here) != there.entry.dtypes and s.format is None and there.entry.format is None and not floating:
        raise InputError(f"checkpoint {folder}: {s.name}/{s.kind} cannot become {here[0]} from {names[-1]}")


def read_slices(folder: Path, index: Index, stored: Tensors, slices: Iterable[Slice]) -> None:
    """Fill slices from a checkpoint's data, each rank by itself; what is not stored stays as it is.

    Args:
        stored: the tensors of `index` under the names and kinds that slices have.

    Raises:
        DamagedError, InputError: as `blocks.read_file`.
    """
    held = [(s, stored[s.name, s.kind]) for s in slices if (s.name, s.kind) in stored]
    # What is not contiguous (channels_last, a transposed weight) is read by way of a copy.
    read = [(replace(s, tensors=tuple(local_tensor(t).detach().contiguous() for t in s.tensors)), t) for s, t in held]
    direct = [(s, there) for s, there in read if _is_direct(s, there)]
    index.read(folder, (one for s, there in direct for one in wanted(s, there)))
    for s, there in read:
        if _is_joined(s, there):
            join(folder, index, there, s)
        elif not _is_direct(s, there):
            recode(folder, index, there, s)
    for (s, _), (copy, _) in zip(held, read, strict=True):
        for tensor, values in zip(map(local_tensor, s.tensors), copy.tensors, strict=True):
            if not tensor.is_contiguous():
                tensor.detach().copy_(values)


def _is_direct(s: Slice, there: StoredTensor) -> bool:
    """True where the stored elements can be read straight into the live tensors."""
    if there.entry.format != s.format or _is_rounded(s, there) or _is_joined(s, there):
        return False
    cuts = ((r, there.overlapping(r)) for r in s.layout.ranges) if s.format is not None else ()
    return all(same_blocks(r, *chunks[:, [0, 1, 4, 5]].T) for r, chunks in cuts)


def _is_rounded(s: Slice, there: StoredTensor) -> bool:
    """True for bf16 weights and their low halves that are made of wider values: see `states.write_slice`."""
    (dtype, *_) = (t.dtype for t in s.tensors)
    return dtype != DTYPES[there.entry.dtypes[0]] and (
        s.kind == LOW_HALF or (s.kind, dtype) == ("weight", torch.bfloat16)
    )


def _is_joined(s: Slice, there: StoredTensor) -> bool:
    """True for fp32 values that are made of low halves and the bf16 weights beside them."""
    low, dtype = DTYPES[there.entry.dtypes[0]] == torch.int16, s.tensors[0].dtype
    return low and there.entry.format is None and s.format is None and dtype == torch.float32


def wanted(s: Slice, there: StoredTensor) -> Iterator[tuple[int, Wanted]]:
    """What to read of which file into a slice of the same format."""
    dtype = DTYPES[there.entry.dtypes[0]]
    values = s.tensors[0].view(-1)
    scale = 0
    for r in s.layout.ranges:
        for start, length, file, byte, row, stride in there.overlapping(r).tolist():
            for here, at, count in shared(r, Range(start, 0, length, row, stride)):
                target = values.narrow(0, r.local_start + here, count)
                yield file, Wanted(byte + at * dtype.itemsize, dtype, target)
                if s.format is not None:
                    scales = s.tensors[1].narrow(0, scale + here // BLOCK, blocks(count))
                    yield file, Wanted(scales_at(byte, length, dtype), SCALE, scales)
        scale += blocks(r.length)


def join(folder: Path, index: Index, there: StoredTensor, s: Slice) -> None:
    """Fill `s` with the fp32 values whose low halves are `there`."""
    mine = packed(s.layout)
    halves = {"weight": torch.zeros(mine.local_numel, dtype=torch.bfloat16)}
    halves[LOW_HALF] = torch.zeros(mine.local_numel, dtype=torch.int16)
    stored = {"weight": index.tensors[s.name, "weight"], LOW_HALF: there}
    index.read(folder, (
        one for kind, half in halves.items() for one in wanted(Slice(s.name, kind, mine, (half,)), stored[kind])
    ))  # fmt: skip
    states.write_slice(s, join_fp32(*halves.values()))


def recode(folder: Path, index: Index, there: StoredTensor, s: Slice) -> None:
    """Fill `s` through fp32, from another layout or format."""
    mine = packed(s.layout)
    values = torch.zeros(mine.local_numel)
    if there.entry.format is None:
        plain = Slice(s.name, s.kind, mine, (values,))
        index.read(folder, wanted(plain, there))
        states.write_slice(s, values)
        return
    dtype = DTYPES[there.entry.dtypes[0]]
    rows = {tuple(row) for r in mine.ranges for row in there.overlapping(r).tolist()}
    chunks = {row: (torch.empty(row[1], dtype=dtype), torch.empty(blocks(row[1]), dtype=SCALE)) for row in rows}
    index.read(folder, (w for (_, length, file, byte, *_), (codes, scales) in chunks.items() for w in (
        (file, Wanted(byte, dtype, codes)), (file, Wanted(scales_at(byte, length, dtype), SCALE, scales)),
    )))  # fmt: skip
    for (start, length, _, _, row, stride), tensors in chunks.items():
        chunk = Range(start, 0, length, row, stride)
        layout = Layout(s.name, s.layout.shape, (chunk,))
        source = states.read_slice(Slice(s.name, s.kind, layout, tensors, there.entry.format))
        for r in mine.ranges:
            for here, at, count in shared(r, chunk):
                values.narrow(0, r.local_start + here, count).copy_(source.narrow(0, at, count))
    states.write_slice(s, values)
