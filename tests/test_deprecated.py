"""Old names go on working, with a warning, and no longer than they were promised to."""

import ast
import re
from pathlib import Path

import pytest
from packaging.version import Version
from pydantic import model_validator

from shardopt import __version__, deprecated
from shardopt.errors import InputError
from shardopt.pretrain.section import Section

PACKAGE = Path(__file__).parent.parent / "shardopt"
UNTIL = "9.0.0"


def promises(source: str) -> list[str]:
    """What `until` says in each call of a function of shardopt.deprecated in this module."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    ours = [call for call in calls if ast.unparse(call.func).startswith("deprecated.")]
    return [ast.literal_eval(word.value) for call in ours for word in call.keywords if word.arg == "until"]


def overdue(source: str, version: str) -> list[str]:
    return [until for until in promises(source) if Version(until) <= Version(version)]


def test_no_old_name_is_there_in_the_release_in_which_it_was_to_go():
    sources = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    late = {str(path): overdue(text, __version__) for path, text in sources.items() if "deprecated." in text}
    assert {path: until for path, until in late.items() if until} == {}, "remove these old names"


def test_every_use_is_found():
    # as `deprecated.name(...)`, which is what `promises` looks for
    direct = re.compile(r"from shardopt\.deprecated import")
    assert [str(path) for path in PACKAGE.rglob("*.py") if direct.search(path.read_text())] == []
    source = """
class A:
    old = deprecated.method(new, "old", until="1.2.0")

@deprecated.argument("a", "b", until="2.0.0")
def f(b): ...
"""
    assert sorted(promises(source)) == ["1.2.0", "2.0.0"]
    assert [overdue(source, version) for version in ("1.2.0.dev1", "1.2.0", "2.0.1")] == [
        [], ["1.2.0"], ["2.0.0", "1.2.0"]
    ]  # fmt: skip


def test_a_modules_old_name_is_the_thing_itself():
    getattr_ = deprecated.names("shardopt.errors", {"UserError": "InputError"}, until=UNTIL)
    with pytest.warns(
        FutureWarning, match=r"^shardopt.errors.UserError is now InputError; .* in shardopt 9\.0\.0$"
    ) as seen:
        assert getattr_("UserError") is InputError
    assert seen[0].filename == __file__
    with pytest.raises(AttributeError, match=r"module 'shardopt.errors' has no attribute 'Other'"):
        getattr_("Other")


class Made:
    @deprecated.argument("decay", "weight_ema", until=UNTIL)
    def __init__(self, lr, weight_ema=None):
        self.weight_ema = weight_ema

    def use(self, times=1):
        return times

    averaged = deprecated.method(use, "averaged", until=UNTIL)


def test_an_old_argument_and_an_old_method_go_on_working():
    with pytest.warns(FutureWarning, match=r"^decay= of Made.__init__ is now weight_ema=; ") as seen:
        assert Made(1, decay=2).weight_ema == 2
    assert seen[0].filename == __file__
    with pytest.raises(TypeError, match="both are given"), pytest.warns(FutureWarning):
        Made(1, decay=2, weight_ema=2)
    made = Made(1, weight_ema=3)
    with pytest.warns(FutureWarning, match=r"^Made.averaged is now use; "):
        assert made.averaged(times=4) == 4


class Renamed(Section):
    size: int = 1

    @model_validator(mode="before")
    @classmethod
    def _old(cls, data):
        return deprecated.keys(data, {"length": "size"}, until=UNTIL)


def test_an_old_key_of_a_config_goes_on_working():
    with pytest.warns(FutureWarning, match=r"^length is now size; "):
        assert Renamed.model_validate({"length": 3}).size == 3
    with pytest.warns(FutureWarning), pytest.raises(InputError, match=r"^length: is now size, which is there, too"):
        deprecated.keys({"length": 3, "size": 4}, {"length": "size"}, until=UNTIL)


@pytest.mark.filterwarnings("error")
def test_new_names_say_nothing():
    assert (Made(1, weight_ema=2).use(), Renamed(size=2).size) == (1, 2)
