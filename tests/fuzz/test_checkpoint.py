"""Checkpoints: ranges that are cut anyhow, plans of any shards, and files that are not what was written."""

from __future__ import annotations

import atexit
import json
import math
import shutil
import tempfile
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from shardopt import checkpoint, slices
from shardopt.checkpoint import inspect, manifest, planning, ranges
from shardopt.checkpoint.blocks import FileRecord
from shardopt.checkpoint.document import write_document
from shardopt.checkpoint.index import read_table, write_index
from shardopt.errors import InputError
from shardopt.optim import precision, states
from shardopt.slices import Layout, Range, Slice
from tests.checkpoint import made
from tests.distributed.pool import on_ranks, scratch
from tests.fuzz import budget
from tests.fuzz.test_slices import coordinates, elements
from tests.fuzz.test_slices import ranges as any_range

RANKS = 3

# Ranges


@budget(150)
@given(any_range(), any_range())
def test_what_two_ranges_share_is_all_that_both_hold(r, chunk):
    mine, theirs = elements(r), elements(chunk)
    covered = []
    for here, there, count in ranges.shared(r, chunk):
        assert mine[here : here + count] == theirs[there : there + count] != []
        covered += mine[here : here + count]
    assert sorted(covered) == sorted(set(mine) & set(theirs))


@budget(150)
@given(st.integers(0, 12), st.lists(any_range(3), max_size=4))
def test_ranges_have_no_gaps_where_each_element_is_held_once(numel, held):
    held = sorted(r for r in held if r.global_end <= numel)
    columns = np.array([(0, r.global_start, r.length, r.row, r.stride) for r in held], np.int64).reshape(-1, 5).T
    found = ranges.gaps(np.array([numel]), *columns)
    assert bool(found) == (sorted(i for r in held for i in elements(r)) != list(range(numel)))


@budget(100)
@given(any_range(12), st.data())
def test_codes_are_called_cut_alike_only_if_their_blocks_are(r, data):
    """With blocks of 4 elements."""
    chunks, begin = [], 0
    while begin < r.length:  # of any length, or whole rows
        step = data.draw(st.integers(1, r.length - begin))
        try:
            chunks.append(r.part(begin, step))
        except ValueError:
            step = 1
            chunks.append(r.part(begin, step))
        begin += step
    table = np.array([(c.global_start, c.length, c.row, c.stride) for c in sorted(chunks)], np.int64).T

    def blocks(*of):
        return {tuple(elements(r)[at : at + 4]) for r in of for at in range(0, r.length, 4)}

    with mock.patch.object(ranges, "BLOCK", 4):
        same = ranges.same_blocks(r, *table)
    assert not same or blocks(*chunks) == blocks(r)
    assert same or len(chunks) > 1


# Plans


@st.composite
def cuts(draw, shape, whole=True):
    """A layout for each of RANKS; together they hold every element if `whole`, some in several places."""
    numel = math.prod(shape)
    how = draw(st.sampled_from(["replicas", "mesh", "alone", "pieces"]))
    if how == "mesh" and shape:
        own = list(coordinates([(draw(st.integers(0, len(shape) - 1)), RANKS, draw(st.integers(1, 2)))]))
        held = [slices._cut(shape, cut) for cut in own]
    elif how == "pieces":
        ends = sorted(draw(st.sets(st.integers(1, max(1, numel)), max_size=5)) | {numel})
        held = [()] * RANKS
        for start, end in zip([0, *ends], ends, strict=False):
            for rank in draw(st.sets(st.integers(0, RANKS - 1), min_size=1)) if start < end <= numel else ():
                used = held[rank][-1].local_start + held[rank][-1].length if held[rank] else 0
                gap = draw(st.integers(0, 2))  # between the parts of a flat buffer
                held[rank] = (*held[rank], Range(start, used + gap, end - start))
    else:
        all_of_it = (Range(0, 0, numel),) if numel else ()
        held = [all_of_it if how == "replicas" or rank == 0 else () for rank in range(RANKS)]
    order = draw(st.permutations(range(RANKS)))
    if not whole:
        order = [draw(st.integers(0, RANKS - 1)) for _ in range(RANKS)]
    return [Layout("w", tuple(shape), held[i]) for i in order]


SHAPES = st.lists(st.integers(1, 9), max_size=3).map(tuple) | st.sampled_from([(300,), (5, 130), (0,), (4, 0)])


@budget(100)
@given(st.lists(SHAPES, min_size=1, max_size=4), st.data())
def test_a_plan_gives_each_element_to_one_rank_that_holds_it(shapes, data):
    held: list[list[Slice]] = [[] for _ in range(RANKS)]
    for number, shape in enumerate(shapes):
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
        for rank, layout in enumerate(data.draw(cuts(shape))):
            layout = Layout(f"w{number}", layout.shape, layout.ranges)
            end = max((r.local_start + r.length for r in layout.ranges), default=0)
            local = torch.full((end,), -1.0)
            layout.copy_from_whole(local, torch.arange(math.prod(shape)).float())
            held[rank].append(Slice(layout.name, "m1", layout, (local.to(dtype),)))
    described = [manifest.describe(own) for own in held]
    plan, shares = planning.make_plan([description for description, _ in described])
    written = [torch.zeros(math.prod(shape), dtype=torch.int64) for shape in shapes]
    for (_, chunks), share in zip(described, shares, strict=True):
        for i, begin, count in share.tolist() if share is not None else ((i, 0, None) for i in range(len(chunks))):
            piece = ranges.part(chunks[i], begin, chunks[i].layout.ranges[0].length if count is None else count)
            (r,) = piece.layout.ranges
            r.of_whole(written[int(piece.name[1:])]).add_(1)
            assert piece.tensors[0].float().tolist() == torch.tensor(elements(r)).to(piece.tensors[0].dtype).tolist()
    assert all((count == 1).all() for count in written)
    # And the table says so, of places that do not lie over each other.
    table = plan.table if plan.table.shape[1] == 7 else np.pad(plan.table, [(0, 0), (0, 2)])
    for number, count in enumerate(written):
        own = table[table[:, 0] == number]
        said = [i for _, start, n, _, _, row, stride in own.tolist() for i in elements(Range(start, 0, n, row, stride))]
        assert sorted(said) == list(range(len(count)))


STORED = ["float32", "bfloat16", "block16", "block8"]


@st.composite
def states_of_three_ranks(draw):
    """Tensors as (name, kind, stored as, where it is written, read as, where it is read)."""
    tensors = []
    for number in range(draw(st.integers(1, 2))):
        shape = draw(SHAPES)
        for kind in ("weight", *draw(st.sets(st.sampled_from(["m1", "m2"])))):
            formats = STORED[:2] if kind == "weight" else STORED
            there, here = (draw(st.sampled_from(formats)) for _ in range(2))
            tensors.append((f"w{number}", kind, there, draw(cuts(shape)), here, draw(cuts(shape, whole=False))))
    return tensors


def value(name, kind, layout, exact):
    """Of the whole tensor: any bits of fp32; or 1, -1 and 0 alone, which every format holds exactly."""
    generator = torch.Generator().manual_seed(slices.name_key(name + kind) % 2**60)
    if exact:
        return torch.randint(-1, 2, layout.shape, generator=generator).float()
    return (
        torch.randint(-(2**31), 2**31, layout.shape, generator=generator, dtype=torch.int64).int().view(torch.float32)
    )


def empty(name, kind, stored, layout):
    layout = Layout(name, layout.shape, layout.ranges)
    end = max((r.local_start + r.length for r in layout.ranges), default=0)
    if stored in precision.BLOCK_FORMATS:  # whose ranges lie one after the other
        layout = ranges.packed(layout)
        fmt = precision.FORMATS[stored]
        scales = torch.zeros(sum(precision.blocks(r.length) for r in layout.ranges))
        return Slice(
            name, kind, layout, (torch.zeros(layout.local_numel, dtype=fmt.dtype(torch.float32)), scales), stored
        )
    return Slice(name, kind, layout, (torch.full((end,), 7.0, dtype=getattr(torch, stored)),))


def fill(s, whole):
    if s.format is None:
        s.layout.copy_from_whole(s.tensors[0], whole.to(s.tensors[0].dtype))
    elif s.layout.ranges:
        packed = torch.empty(s.layout.local_numel)
        s.layout.copy_from_whole(packed, whole)
        states.write_slice(s, packed)
    return s


def _moved(rank, world_size, folder, tensors):
    """Save and load: what came back wrong, or the exception, of which the pool would be ended."""
    try:
        return _wrong_of(made.ranks_here(rank, world_size), folder, tensors)
    except Exception:
        return traceback.format_exc()


def _wrong_of(ranks, folder, tensors):
    rank = ranks.rank
    exact = any(there != here or there in precision.BLOCK_FORMATS for _, _, there, _, here, _ in tensors)
    saved = [
        fill(empty(name, kind, there, cut[rank]), value(name, kind, cut[rank], exact))
        for name, kind, there, cut, _, _ in tensors
    ]
    checkpoint.save(folder, made.State(saved, ranks), allow_nonfinite=True)
    live = [empty(name, kind, here, cut[rank]) for name, kind, _, _, here, cut in tensors]
    checkpoint.load(folder, made.State(live, ranks), convert=exact)
    wrong = []
    for s in live:
        expected = fill(empty(s.name, s.kind, s.format or manifest.dtype_name(s.tensors[0].dtype), s.layout),
                        value(s.name, s.kind, s.layout, exact))  # fmt: skip
        if any(not torch.equal(a.view(torch.uint8), b.view(torch.uint8))
               for a, b in zip(s.tensors, expected.tensors, strict=True)):  # fmt: skip
            wrong.append(f"{s.name}/{s.kind}")
    return wrong


@budget(4)
@given(states_of_three_ranks())
def test_what_any_shards_wrote_is_read_into_any_others(tensors):
    folder = scratch()
    try:
        assert on_ranks(RANKS, _moved, folder / "a", tensors) == [[]] * RANKS
    finally:
        shutil.rmtree(folder)


# Damage


@cache
def sound() -> Path:
    """A checkpoint of four parameters, of which one has a state in a block format, with a tensor beside them."""
    root = Path(tempfile.mkdtemp(prefix="shardopt-test-"))
    atexit.register(shutil.rmtree, root)
    state = made.State(live(filled=True), made.ranks_here(), {name: {"step": 3} for name in made.SHAPES})
    document = {"step": 3, "tokens": 96, "config": {"train": {"steps": 5}, "run": {"name": "a"}}}
    checkpoint.save(root / "step-00000003", state, document, {"rng": torch.arange(5)}, allow_nonfinite=True)
    return root / "step-00000003"


def live(filled: bool) -> list[Slice]:
    blocked = empty("embed.weight", "weight_ema", "block8", Layout.whole("embed.weight", made.SHAPES["embed.weight"]))
    if filled:
        fill(blocked, value("embed.weight", "weight_ema", blocked.layout, exact=True))
    return [*made.slices(made.strided, 0, 1, filled=filled), blocked]


def examine(folder: Path) -> str:
    """Read a checkpoint in all ways: "right", or what refused it. Any other exception is a defect."""
    with suppress(InputError):
        inspect.as_text(inspect.describe(folder))
    with suppress(InputError):
        checkpoint.load_extras(folder, ["rng"])
    given = live(filled=False)
    try:
        checkpoint.load(folder, made.State(given, made.ranks_here(), {name: {"step": 0} for name in made.SHAPES}))
    except InputError as error:
        return str(error)
    return "wrong" if made.wrong(given[:-1]) else "right"


def copied(target: str) -> Path:
    folder = Path(target) / "step-00000003"
    shutil.copytree(sound(), folder)
    return folder


@budget(60)
@given(st.data())
def test_bytes_that_are_not_what_was_written_are_refused(data):
    with tempfile.TemporaryDirectory() as root:
        folder = copied(root)
        path = folder / data.draw(st.sampled_from(sorted(p.name for p in folder.iterdir())))
        content = path.read_bytes()
        begin, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        changed = content[:begin] + data.draw(st.binary(max_size=40)) + content[end:]
        path.write_bytes(changed)
        told = examine(folder)
        assert told != "wrong"
        assert (told == "right") == (changed == content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def edited(draw, tree):
    """A tree of which a part is another, is gone, or has something beside it."""
    if not isinstance(tree, dict | list) or not tree or draw(st.integers(0, 5)) == 0:
        return draw(JSON | st.sampled_from([0, -1, 2**63, "float32", "block8", "int8", 0.5, [], {}]))
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = draw(st.sampled_from(keys))
    how = draw(st.sampled_from(["inside", "inside", "inside", "gone", "more"]))
    changed: Any = dict(tree) if isinstance(tree, dict) else list(tree)
    if how == "inside":
        changed[key] = draw(edited(tree[key]))
    elif how == "gone":
        del changed[key]
    elif isinstance(tree, dict):
        changed[draw(st.text(max_size=5))] = tree[key]
    else:
        changed.insert(key, draw(JSON))
    return changed


@budget(75)
@given(st.data())
def test_a_document_that_says_something_else_is_refused_or_changes_no_value(data):
    with tempfile.TemporaryDirectory() as root:
        folder = copied(root)
        document = json.loads((folder / "checkpoint.json").read_bytes())
        del document["xxh3"]
        part = data.draw(st.sampled_from(["checkpoint", "checkpoint", "checkpoint", None]))
        document = data.draw(edited(document)) if part is None else document | {part: data.draw(edited(document[part]))}
        if not isinstance(document, dict):
            document = {"a": document}
        write_document(folder, document)
        assert examine(folder) != "wrong"


NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 200) | st.sampled_from([2**31, 2**62, 2**63 - 1, -(2**63)])


@budget(75)
@given(st.data())
def test_an_index_that_says_something_else_is_refused_or_read(data):
    with tempfile.TemporaryDirectory() as root:
        folder = copied(root)
        document = checkpoint.read_document(folder)
        table = read_table(folder, document).copy()
        for _ in range(data.draw(st.integers(1, 3))):
            row, column = data.draw(st.integers(0, len(table) - 1)), data.draw(st.integers(0, table.shape[1] - 1))
            table[row, column] = data.draw(NUMBERS | st.integers(-2, 2).map(table[row, column].__add__))
        rows = data.draw(st.lists(st.integers(0, len(table) - 1), max_size=4))
        table = np.concatenate([table, table[rows]]) if data.draw(st.booleans()) else np.delete(table, rows, axis=0)
        record = write_index(folder / "index.bin", document["checkpoint"]["save_id"], table)
        document["checkpoint"]["files"]["index.bin"] = record._asdict()
        write_document(folder, document)
        examine(folder)


@budget(30)
@given(st.binary(max_size=60))
@example(b"[" * 100_000)
@example(b'{"checkpoint": {"format": ' + b"9" * 5000 + b"}}")
def test_a_document_of_any_bytes_is_refused(content):
    with tempfile.TemporaryDirectory() as root:
        folder = copied(root)
        (folder / "checkpoint.json").write_bytes(content)
        assert str(folder) in examine(folder)


def test_the_sound_one_is_read():
    assert examine(sound()) == "right"
    assert FileRecord.of((sound() / "index.bin").read_bytes()).blocks == 1


def test_what_else_is_said_of_a_file_is_passed_over():
    with tempfile.TemporaryDirectory() as root:
        folder = copied(root)
        document = checkpoint.read_document(folder)
        document["checkpoint"]["files"]["index.bin"]["mtime"] = 3568
        write_document(folder, document)
        assert examine(folder) == "right"


def test_what_another_program_keeps_in_the_document_is_passed_over():
    with tempfile.TemporaryDirectory() as root:
        folder = copied(root)
        document = checkpoint.read_document(folder)
        for other in ("mine", {"a": 1}, [3], {"run": "a", "train": 3}):
            write_document(folder, document | dict.fromkeys(["step", "tokens", "skipped", "config", "host"], other))
            what = inspect.describe(folder)
            assert (what["step"], what["tokens"], what["run"], what["steps"]) == (3, None, None, None)
            assert "written by" in inspect.as_text(what)
