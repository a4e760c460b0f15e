"""The examples in the docstrings run as they stand."""

import doctest

import pytest

from shardopt.checkpoint import loading, saving


@pytest.mark.parametrize("function", [saving.save, loading.load], ids=lambda f: f.__name__)
def test_docstring_example_runs(function):
    (example,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs={})
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
