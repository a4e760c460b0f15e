"""Read slices back, on any engine and any number of ranks, after everything has been checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from shardopt.checkpoint import manifest
from shardopt.checkpoint.blocks import DamagedError
from shardopt.checkpoint.document import read_document
from shardopt.checkpoint.flat import FlatShard, chunks_of, few
from shardopt.checkpoint.index import DTYPES, Index, dtype_name, read_index
from shardopt.checkpoint.storage import Reader
from shardopt.engines.state import ShardedState, require_state
from shardopt.errors import InputError
from shardopt.optim import states
from shardopt.optim.precision import FORMATS
from shardopt.optim.schema import format_of
from shardopt.slices import Layout, Range, Slice, local_tensor


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
            a kind that is left alone, here and there.

    Returns:
        The checkpoint's document: what `save` was given, and "checkpoint" (see `read_document`).

    Raises:
        InputError: the checkpoint does not fit; on every rank, with a handful of the names. The message says
            what to change.
    """
    require_state(state)
    folder, ranks = Path(folder), state.ranks
    document, index = ranks.together(lambda: open_checkpoint(folder))
    kinds = kinds or {}
    stored, index = _renamed(document["checkpoint"]["parameters"], index, kinds)

    def describe_live() -> tuple[list[Slice], manifest.StepCounts, manifest.Descriptions]:
        state.init()
        slices = [s for s in state.slices() if kinds.get(s.kind, s.kind) is not None]
        return slices, state.step_counts(), manifest.describe(slices)

    slices, counts, described = ranks.together(describe_live)
    live = manifest.merge(ranks.gather(described))

    def check() -> manifest.StepCounts:
        check_stored(folder, stored, index)
        saved: manifest.StepCounts = document["checkpoint"]["step_counts"]
        _check_match(folder, stored, live, strict=strict, convert=convert)
        for s in slices:
            _check_slice(folder, s, stored)
        if uncounted := (counts.keys() & stored.keys()) - saved.keys():
            raise InputError(f"checkpoint {folder} has no step counts of {few(uncounted)}: another optimizer wrote it")
        return counts | saved

    counts = ranks.together(check)
    ranks.together(lambda: index.check_files(folder, sorted(index.records)[ranks.rank :: ranks.world_size]))
    with state.loading(folder):
        ranks.together(lambda: _read(folder, index, stored, slices))
        state.load_step_counts(counts)
    document["checkpoint"]["not_loaded"] = sorted(
        manifest.vector_key(name, kind) for name, kind in _keys(live) - _keys(stored)
    )
    return document


def load_extras(folder: str | Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """The whole tensors kept under `keys`, on the CPU. Not a collective: each rank may ask for its own.

    Keys that the checkpoint does not have (the generator of a rank that did not exist) are left out, for the
    caller to see; document["checkpoint"]["extras"] lists what there is.

    Raises:
        InputError: not a checkpoint that can be read.
    """
    folder = Path(folder)
    _, index = open_checkpoint(folder)
    found: dict[str, Tensor] = {}
    for key in keys:
        if entry := index.tensors.get(manifest.extra_key(key)):
            found[key] = torch.empty(entry.size, dtype=entry.dtype)
    fill(folder, index, {manifest.extra_key(key): tensor for key, tensor in found.items()})
    return found


def open_checkpoint(folder: Path) -> tuple[dict[str, Any], Index]:
    """A checkpoint's document and index."""
    document = read_document(folder)
    return document, read_index(folder, document)


def _renamed(
    stored: manifest.Parameters, index: Index, kinds: Mapping[str, str | None]
) -> tuple[manifest.Parameters, Index]:
    """What is stored, under the kinds of this side (see `load`)."""
    if not kinds:
        return stored, index
    renamed: manifest.Parameters = {}
    tensors = dict(index.tensors)
    for name, parameter in stored.items():
        there = parameter["kinds"]
        # The weights may be read as something else too.
        kept = {k: v for k, v in there.items() if k not in kinds and (k == "weight" or k not in kinds.values())}
        read = {kind: there[source] for kind, source in kinds.items() if source in there}
        renamed[name] = {**parameter, "kinds": kept | read}
        for kind in read:
            keys = (tensor_keys(name, k, p) for k, p in ((kind, renamed[name]), (kinds[kind] or "", parameter)))
            tensors |= {key: index.tensors[old] for key, old in zip(*keys, strict=True) if old in index.tensors}
    return renamed, index._replace(tensors=tensors)


def _keys(parameters: manifest.Parameters) -> set[tuple[str, str]]:
    return {(name, kind) for name, parameter in parameters.items() for kind in parameter["kinds"]}


def check_stored(folder: Path, stored: manifest.Parameters, index: Index) -> None:
    """Check the data against the document: its index is complete and of the same sizes and dtypes.

    Raises:
        InputError: they do not fit.
    """
    chunks: dict[str, set[tuple[int, int]]] = {}
    for name, parameter in stored.items():
        numel = Layout.whole(name, parameter["shape"]).numel
        for kind, entry in parameter["kinds"].items():
            if "format" in entry and entry["dtypes"] != _dtypes_of(kind, entry["format"]):
                raise InputError(f"{folder}: {name}/{kind} is not in a known format, but in {entry['format']!r}")
            for at, key in enumerate(tensor_keys(name, kind, parameter)):
                tensor = index.tensors.get(key)
                dtype = DTYPES.get(entry["dtypes"][at % len(entry["dtypes"])])
                if tensor is None or tensor.dtype != dtype:
                    raise InputError(f"{folder}: {key!r} is not there with the dtype that its document names")
                if "format" not in entry:
                    if tuple(tensor.size) != (numel,):
                        raise InputError(f"{folder}: {key!r} has {tuple(tensor.size)} elements, not {numel}")
                    chunks[key] = {(start, length) for start, length in tensor.chunks[:, :2].tolist()}
    try:
        manifest.check_coverage(stored, chunks)
    except ValueError as error:
        raise InputError(f"{folder} is {error}") from error


def _dtypes_of(kind: str, name: str) -> list[str]:
    """Of the codes and scales of a block format; empty where there is none of this name."""
    return [dtype_name(format_of(kind, name).dtype(torch.float32)), "float32"] if name in FORMATS else []


def tensor_keys(name: str, kind: str, parameter: dict[str, Any]) -> list[str]:
    """The keys in the data of a parameter's kind: one, or codes and scales of each layout."""
    entry = parameter["kinds"][kind]
    if "format" not in entry:
        return [manifest.vector_key(name, kind)] if Layout.whole(name, parameter["shape"]).numel else []
    return [k for ranges in entry["layouts"] for k in manifest.block_keys(name, kind, _ranges(ranges))]


def _check_match(
    folder: Path, stored: manifest.Parameters, live: manifest.Parameters, *, strict: bool, convert: bool
) -> None:
    """Check that the checkpoint and the live slices are of the same model and optimizer.

    Raises:
        InputError: they are not; one line, with the first few names of each kind of difference.
    """
    shared = stored.keys() & live.keys()
    problems = []
    if strict and (missing := live.keys() - stored.keys()):
        problems.append(f"the checkpoint has no {few(missing)}")
    if strict and (extra := stored.keys() - live.keys()):
        problems.append(f"the model has no {few(extra)}")
    if live and not shared and not strict:
        problems.append(f"none of the names here ({few(live)}) is among its names ({few(stored)})")
    if problems:
        unnamed = any(name.isdigit() for name in live.keys() ^ stored.keys())
        hint = "a number is a parameter without a name: build the optimizer over model.named_parameters()"
        problems.append(hint if unnamed else "it was written by another model")
    differ = {n for n in shared if stored[n]["shape"] != live[n]["shape"]}
    if differ:
        shapes = few(f"{n} ({tuple(stored[n]['shape'])} there, {tuple(live[n]['shape'])} here)" for n in differ)
        problems.append(f"shapes differ: {shapes}; set model as it was")
    wanted = {(n, kind) for n in shared for kind in live[n]["kinds"]}
    there = {(n, kind) for n in shared for kind in stored[n]["kinds"]}
    # Not strict either: weights without their masters, or averages without their counts, would go on wrong.
    if missing_kinds := {manifest.vector_key(*k) for k in wanted - there}:
        problems.append(f"the checkpoint has no {few(missing_kinds)}; set optimizer as it was")
    if strict and (extra_kinds := {manifest.vector_key(*k) for k in there - wanted}):
        taken = f"nothing here takes its {few(extra_kinds)}"
        problems.append(f"{taken}; set optimizer as it was, or load with strict=False")
    if not convert:
        was, now = ({(n, k): manifest.stored_as(of[n]["kinds"][k]) for n, k in wanted & there} for of in (stored, live))
        changed = {key for key in was if was[key] != now[key]}
        for kind in sorted({kind for _, kind in changed} - {"buffer"}):
            names = {n for n, k in changed if k == kind}
            key = min(names), kind
            setting = "the weights' dtype" if kind == "weight" else f"optimizer.state_dtype (of {kind})"
            problems.append(
                f"{kind} is {was[key]} there and {now[key]} here, in {few(names)}; "
                f"set {setting} as it was, or load with convert=True"
            )
    if problems:
        raise InputError(f"checkpoint {folder} does not fit: " + "; ".join(problems))


def _check_slice(folder: Path, s: Slice, stored: manifest.Parameters) -> None:
    entry = stored.get(s.name, {"kinds": {}})["kinds"].get(s.kind)
    if entry is None or not s.layout.ranges:
        return
    here = [dtype_name(t.dtype) for t in s.tensors]
    names = (*here, *entry["dtypes"])
    floating = all(DTYPES[n].is_floating_point for n in names)
    if here != entry["dtypes"] and s.format is None and "format" not in entry and not floating:
        raise InputError(f"checkpoint {folder}: {s.name}/{s.kind} cannot become {here[0]} from {names[-1]}")


def _direct(s: Slice, entry: dict[str, Any]) -> bool:
    """True where the stored elements can be read straight into the live tensors."""
    same = entry.get("format") == s.format
    return same and (s.format is None or [list(r) for r in s.layout.ranges] in entry["layouts"])


def _read(folder: Path, index: Index, stored: manifest.Parameters, slices: list[Slice]) -> None:
    state: dict[str, Tensor] = {}
    # What is not contiguous (channels_last, a transposed weight) is read by way of a copy.
    contiguous = [replace(s, tensors=tuple(local_tensor(t).detach().contiguous() for t in s.tensors)) for s in slices]
    for s in contiguous:
        entry = stored.get(s.name, {"kinds": {}})["kinds"].get(s.kind)
        if entry is None or not s.layout.ranges:
            continue
        if not _direct(s, entry):
            recode(folder, index, entry, s)
        elif s.format is None:
            key = manifest.vector_key(s.name, s.kind)
            state[key] = FlatShard(s.layout.numel, DTYPES[entry["dtypes"][0]], chunks_of(s.layout, s.tensors[0]))
        else:
            for key, tensor in zip(manifest.block_keys(s.name, s.kind, s.layout.ranges), s.tensors, strict=True):
                state[key] = local_tensor(tensor).detach().view(-1)
    fill(folder, index, state)
    for s, read in zip(slices, contiguous, strict=True):
        for tensor, values in zip(map(local_tensor, s.tensors), read.tensors, strict=True):
            if not tensor.is_contiguous():
                tensor.detach().copy_(values)


def recode(folder: Path, index: Index, entry: dict[str, Any], s: Slice) -> None:
    """Fill `s` through fp32, from another layout or format."""
    mine = _packed(s.layout)
    values = torch.zeros(mine.local_numel)
    if "format" not in entry:
        vector = FlatShard(s.layout.numel, torch.float32, chunks_of(mine, values))
        fill(folder, index, {manifest.vector_key(s.name, s.kind): vector})
    for ranges in entry.get("layouts", []):
        theirs = Layout(s.name, s.layout.shape, _ranges(ranges))
        if not any(_overlap(a, b) for a in theirs.ranges for b in mine.ranges):
            continue
        tensors = {
            key: torch.empty(index.tensors[key].size, dtype=DTYPES[dtype])
            for key, dtype in zip(manifest.block_keys(s.name, s.kind, theirs.ranges), entry["dtypes"], strict=True)
        }
        fill(folder, index, dict(tensors))
        source = states.read_slice(Slice(s.name, s.kind, theirs, tuple(tensors.values()), entry["format"]))
        for a in _packed(theirs).ranges:
            for b in mine.ranges:
                if common := _overlap(a, b):
                    start, length = common
                    target = values.narrow(0, b.local_start + start - b.global_start, length)
                    target.copy_(source.narrow(0, a.local_start + start - a.global_start, length))
    states.write_slice(s, values)


def _packed(layout: Layout) -> Layout:
    """The same elements, one after the other: how states.read_slice and states.write_slice hold them."""
    ranges, at = [], 0
    for r in layout.ranges:
        ranges.append(Range(r.global_start, at, r.length))
        at += r.length
    return Layout(layout.name, layout.shape, tuple(ranges))


def _overlap(a: Range, b: Range) -> tuple[int, int] | None:
    """Start and length of the global elements that both ranges have."""
    start = max(a.global_start, b.global_start)
    length = min(a.global_start + a.length, b.global_start + b.length) - start
    return (start, length) if length > 0 else None


def _ranges(stored: Iterable[Iterable[int]]) -> tuple[Range, ...]:
    return tuple(Range(*r) for r in stored)


def fill(folder: Path, index: Index, state: dict[str, Tensor]) -> None:
    """Read `state`'s tensors in place, each rank by itself: DCP plans a load without the others anyway."""
    if not state:
        return
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = Reader(folder, index.save_id, index.records, index.metadata(state))
    try:
        dcp.load(dict(state), storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:
        (cause, _) = next(iter(error.failures.values()))
        if not isinstance(cause, Exception):
            raise cause from None
        if isinstance(cause, DamagedError):
            raise DamagedError(str(cause)) from error
        if isinstance(cause, InputError):
            raise InputError(str(cause)) from error
        raise InputError(f"cannot read checkpoint {folder}: {type(cause).__name__}: {cause}") from error
