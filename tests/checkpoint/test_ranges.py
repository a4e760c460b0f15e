import pytest

from shardopt.checkpoint.ranges import coverage_error


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
