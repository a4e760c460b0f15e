"""The manifest: what all ranks together hold, in the form that a checkpoint's document keeps.

Every rank describes its slices; rank 0 puts the descriptions together and refuses gaps and contradictions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from shardopt.checkpoint.flat import chunks_of, coverage_error, few
from shardopt.checkpoint.index import dtype_name
from shardopt.errors import InputError
from shardopt.slices import Layout, Range, Slice, local_tensor

PARTS = ("codes", "scales")  # of a block format, in the order of Slice.tensors


class Described(NamedTuple):
    """One slice of one rank without its values."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    format: str | None  # name of a block format
    ranges: tuple[Range, ...]


Descriptions = dict[tuple[str, str], Described]  # by parameter name and kind
StepCounts = dict[str, dict[str, int | float]]  # by parameter name
Parameters = dict[str, dict[str, Any]]  # as in the document, see document.read_document


def stored_as(entry: dict[str, Any]) -> str:
    """The block format, or else the dtype, of a kind in the document."""
    return entry.get("format") or entry["dtypes"][0]


def vector_key(name: str, kind: str) -> str:
    return f"{name}/{kind}"


def block_keys(name: str, kind: str, ranges: tuple[Range, ...]) -> list[str]:
    """Keys of the codes and scales of one layout; equal layouts (replicas) share them."""
    where = ",".join(f"{start}:{local}:{length}" for start, local, length in ranges)
    return [f"{name}/{kind}.{part}@{where}" for part in PARTS]


def extra_key(key: str) -> str:
    return f"/extras/{key}"  # a parameter's key does not begin with a slash


def describe(slices: list[Slice]) -> Descriptions:
    """The slices of this rank without their values.

    Raises:
        ValueError: two slices of the same name and kind.
        InputError: a tensor on the meta device, which holds no values.
    """
    described: Descriptions = {}
    for s in slices:
        if (s.name, s.kind) in described:
            raise ValueError(f"{vector_key(s.name, s.kind)!r} is given twice")
        if any(local_tensor(t).is_meta for t in s.tensors):
            raise InputError(f"{vector_key(s.name, s.kind)} is on the meta device: give the model its memory first")
        dtypes = tuple(dtype_name(t.dtype) for t in s.tensors)
        described[s.name, s.kind] = Described(s.layout.shape, dtypes, s.format, s.layout.ranges)
    return described


def merge(ranks: list[Descriptions]) -> Parameters:
    """The slices of all ranks, in the document's form.

    Raises:
        ValueError: ranks disagree about a shape, a dtype or a format.
    """
    parameters: Parameters = {}
    for (name, kind), here in (pair for described in ranks for pair in described.items()):
        parameter = parameters.setdefault(name, {"shape": list(here.shape), "kinds": {}})
        in_blocks = {} if here.format is None else {"format": here.format, "layouts": []}
        stored = parameter["kinds"].setdefault(kind, {"dtypes": list(here.dtypes), **in_blocks})
        known = parameter["shape"], stored["dtypes"], stored.get("format")
        other = list(here.shape), list(here.dtypes), here.format
        if known != other:
            raise ValueError(f"{vector_key(name, kind)}: ranks disagree, {known} on one and {other} on another")
        if here.format is not None:
            layouts = stored["layouts"]
            as_lists = [list(r) for r in here.ranges]
            if as_lists and as_lists not in layouts:
                layouts.append(as_lists)
    return parameters


def first_weights(slices: list[Slice]) -> dict[str, dict[str, Any]]:
    """The first element of each range of the weights held here, as text (NaN too), by its name and place."""
    chunks = ((s.name, chunks_of(s.layout, s.tensors[0])) for s in slices if s.kind == "weight")
    return {f"{n}[{at}]": {"weight": repr(c[0].item())} for n, parts in chunks for at, c in parts.items()}


def merge_equal(ranks: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The step counts, or first weights, of all ranks, each of which may know its own parameters only.

    Raises:
        InputError: ranks disagree about a parameter that several hold.
    """
    together: dict[str, dict[str, Any]] = {}
    for name, values in (pair for rank in ranks for pair in rank.items()):
        if together.setdefault(name, values) != values:
            raise InputError(
                f"{name}: ranks disagree, {together[name]} on one and {values} on another: replicas must be equal "
                f"(is DistributedDataParallel missing?)"
            )
    return together


def check_coverage(parameters: Parameters, chunks: dict[str, set[tuple[int, int]]]) -> None:
    """Check that every element of every slice is there exactly once.

    Args:
        parameters: as in the document.
        chunks: (start, length) pairs by vector key.

    Raises:
        ValueError: an element is missing or there twice.
    """
    errors = {}
    for name, parameter in parameters.items():
        numel = Layout.whole(name, parameter["shape"]).numel
        for kind, stored in parameter["kinds"].items():
            key = vector_key(name, kind)
            if "format" not in stored:
                held = chunks.get(key, set())
            else:
                held = {(r[0], r[2]) for ranges in stored["layouts"] for r in ranges}
            if error := coverage_error(numel, held):
                errors[key] = error
    if errors:
        raise ValueError("incomplete: " + few(f"{key}: {error}" for key, error in errors.items()))
