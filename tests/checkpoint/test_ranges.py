import math
import random

import numpy as np
import pytest

from shardopt import slices
from shardopt.checkpoint.ranges import coverage_error, ends, gaps, same_blocks, shared
from shardopt.optim.precision import BLOCK
from shardopt.slices import Range


@pytest.mark.parametrize(
    ("chunks", "wrong"),
    [
        ([(0, 4), (4, 6)], None),
        ([(4, 6), (0, 4)], None),
        ([(0, 4), (5, 5)], "elements 4 to 5 of 10 are held by no rank"),
        ([(0, 4), (3, 7)], "elements 3 to 4 of 10 are held in two ranges"),
        ([(0, 9)], "elements 9 to 10 of 10 are held by no rank"),
        ([], "elements 0 to 10 of 10 are held by no rank"),
        ([(0, 11)], "elements beyond the end (10) are held"),
    ],
)
def test_ranges_must_cover_a_vector_exactly_once(chunks, wrong):
    assert coverage_error(10, chunks) == wrong


def _mesh_cuts(draw, shape):
    """The ranges of all shards of one tensor on some mesh."""
    sizes = [(draw.randrange(len(shape)), draw.randint(1, 3)) for _ in range(draw.randint(1, 3))]
    found = [()]
    for dim, parts in sizes:
        found = [(*cuts, (dim, parts, part, 1)) for cuts in found for part in range(parts)]
    return [r for cuts in found for r in slices._cut(shape, cuts)]


def _elements(r):
    return [row.global_start + i for row in r.rows() for i in range(row.length)]


def test_what_two_ranges_share_is_what_both_hold():
    draw = random.Random(0)
    for _ in range(100):
        shape = tuple(draw.randint(1, 6) for _ in range(draw.randint(1, 4)))
        for r in _mesh_cuts(draw, shape):
            covered = []
            for chunk in _mesh_cuts(draw, shape):
                mine, theirs = _elements(r), _elements(chunk)
                for here, there, count in shared(r, chunk):
                    assert mine[here : here + count] == theirs[there : there + count] != []
                    covered += range(here, here + count)
            assert sorted(covered) == list(range(r.length)), (shape, r)


def test_shards_that_are_read_as_they_were_written_are_read_in_one_piece():
    r = Range(256, 0, 64 * 256, 256, 1024)
    assert list(shared(r, r)) == [(0, 0, r.length)]
    assert list(shared(r, r.part(512, 1024))) == [(512, 0, 1024)]
    whole = Range(0, 0, 64 * 1024)
    assert list(shared(r, whole)) == [(256 * i, 1024 * i + 256, 256) for i in range(64)]


def _columns(ranges):
    return (
        np.array([(0, r.global_start, r.length, r.row, r.stride) for r in sorted(ranges)], dtype=np.int64)
        .reshape(-1, 5)
        .T
    )


def test_shards_of_any_mesh_cover_their_tensor_and_one_less_does_not():
    draw = random.Random(1)
    for _ in range(100):
        shape = tuple(draw.randint(1, 6) for _ in range(draw.randint(1, 4)))
        ranges = _mesh_cuts(draw, shape)
        numel = np.array([math.prod(shape)])
        assert gaps(numel, *_columns(ranges)) == {}, (shape, ranges)
        left = list(ranges)
        lost = left.pop(draw.randrange(len(left)))
        assert "held by no rank" in gaps(numel, *_columns(left))[0]
        assert "held in two ranges" in gaps(numel, *_columns([*ranges, lost]))[0]
        _, start, length, row, stride = _columns(ranges)
        assert ends(start, length, row, stride).tolist() == [r.global_end for r in sorted(ranges)]


def test_blocks_of_columns_are_those_of_the_same_columns_alone():
    r = Range(96, 0, 40 * 96, 96, 192)
    whole = [r], [r.part(0, 4 * 96), r.part(4 * 96, 36 * 96)]  # 4 rows are 3 blocks
    other = [r.part(0, 96), r.part(96, 39 * 96)], [Range(0, 0, 40 * 192)], [r._replace(row=48, stride=96)]
    for cut in (*whole, *other):
        _, start, length, row, stride = _columns(cut)
        assert same_blocks(r, start, length, row, stride) == (cut in whole), cut
    for rows, exact in ((1, True), (2, False)):  # single rows of whole blocks are contiguous chunks
        r = Range(0, 0, 8 * BLOCK * rows, BLOCK, 3 * BLOCK)
        cut = list(r.rows()) if exact else [Range(BLOCK, 0, BLOCK)]
        assert same_blocks(r, *_columns(cut)[1:]) == exact
