"""Layouts: whatever a mesh cuts, each element lies in one place, the one that torch gives it."""

from __future__ import annotations

import math
from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from shardopt import slices
from shardopt.slices import Layout, Range
from tests.fuzz import budget

SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)


@st.composite
def meshes(draw, shapes=SHAPES):
    """A shape, and the cuts of each dimension of a mesh: dimension, parts, pieces (see `slices._cut`)."""
    shape = draw(shapes)
    cut = st.tuples(st.integers(0, max(len(shape) - 1, 0)), st.integers(1, 4), st.sampled_from([1, 1, 1, 2, 3]))
    return shape, draw(st.lists(cut, max_size=3 if shape else 0))


def coordinates(cuts):
    """The cuts of every shard, with the number of its part."""
    for parts in product(*(range(parts) for _, parts, _ in cuts)):
        yield tuple((dim, count, part, pieces) for (dim, count, pieces), part in zip(cuts, parts, strict=True))


def chunk(tensor, parts, number, dim):
    """As torch cuts; what it leaves out is empty."""
    found = torch.chunk(tensor, parts, dim)
    return found[number] if number < len(found) else tensor.narrow(dim, 0, 0)


def shard(tensor, cuts):
    """The local tensor of a shard, by torch's own functions."""
    for dim, parts, part, pieces in cuts:
        of_pieces = [chunk(chunk(tensor, pieces, piece, dim), parts, part, dim) for piece in range(pieces)]
        tensor = torch.cat(of_pieces, dim)
    return tensor


@budget(100)
@given(meshes())
def test_any_mesh_cuts_a_tensor_as_torch_does(mesh):
    shape, cuts = mesh
    whole = torch.arange(math.prod(shape)).view(shape)
    together = torch.full((whole.numel(),), -1)
    for own in coordinates(cuts):
        layout = Layout("w", shape, slices._cut(shape, own))
        expected = shard(whole, own)
        assert layout.local_numel == expected.numel()
        local = torch.full((expected.numel(),), -1)
        layout.copy_from_whole(local, whole)
        assert torch.equal(local, expected.reshape(-1)), (own, layout)
        seen = together.clone()
        layout.copy_to_whole(local, together)
        assert (seen[together != seen] == -1).all(), "an element that two shards hold"
    assert torch.equal(together, whole.reshape(-1))


@st.composite
def ranges(draw, largest=6):
    """Contiguous, or several rows with gaps between them."""
    start, local, row, rows = (draw(st.integers(low, largest)) for low in (0, 0, 1, 1))
    if rows == 1:
        return Range(start, local, row)
    return Range(start, local, row * rows, row, row + draw(st.integers(1, largest)))


def elements(r):
    """Of the whole parameter, in the order of the local tensor; worked out one by one."""
    if not r.row:
        return list(range(r.global_start, r.global_start + r.length))
    return [r.global_start + i // r.row * r.stride + i % r.row for i in range(r.length)]


@budget(100)
@given(ranges(), st.data())
def test_a_part_of_a_range_has_its_elements_or_is_refused(r, data):
    assert r.global_end == elements(r)[-1] + 1
    assert [i for row in r.rows() for i in elements(row)] == elements(r)
    begin = data.draw(st.integers(0, r.length - 1))
    length = data.draw(st.integers(1, r.length - begin))
    expected = elements(r)[begin : begin + length]
    fits = not r.row or begin % r.row + length <= r.row or not (begin % r.row or length % r.row)
    try:
        part = r.part(begin, length)
    except ValueError:
        assert not fits
        return
    assert fits
    assert (elements(part), part.local_start, part.length) == (expected, r.local_start + begin, length)


@budget(100)
@given(st.lists(st.builds(Range, *[st.integers(-1, 9)] * 5), max_size=3), st.lists(st.integers(0, 5), max_size=3))
def test_what_a_layout_accepts_names_each_element_once_within_the_shape(given_ranges, shape):
    try:
        layout = Layout("w", tuple(shape), tuple(given_ranges))
    except ValueError:
        return
    held = [i for r in layout.ranges for i in elements(r)]
    assert len(set(held)) == len(held) == layout.local_numel
    assert all(0 <= i < layout.numel for i in held)
    places = [r.local_start + i for r in layout.ranges for i in range(r.length)]
    assert places == sorted(set(places))
    whole = torch.arange(layout.numel)
    local = torch.full((max(places, default=-1) + 1,), -1)
    layout.copy_from_whole(local, whole)
    assert local[places].tolist() == held
