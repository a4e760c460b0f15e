"""Old names of public things, which go on working, with a FutureWarning, until the release that `until` names.

What is deprecated is a call of a function of this file in the module where the thing has its new name; `until` is a
literal, by which a test finds the calls whose time has come.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from shardopt.errors import InputError

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _warn(old: str, new: str, until: str) -> None:
    warnings.warn(f"{old} is now {new}; the old name goes in shardopt {until}", FutureWarning, stacklevel=3)


def names(module: str, renamed: Mapping[str, str], *, until: str) -> Callable[[str], Any]:
    """The `__getattr__` of the module `module`: its functions, classes and values under old names as well as new."""

    def __getattr__(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", renamed[name], until)
        return getattr(importlib.import_module(module), renamed[name])

    return __getattr__


def method(function: _Function, old: str, *, until: str) -> _Function:
    """The method `function`, for the class's body under its old name `old`."""

    @functools.wraps(function)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        _warn(f"{function.__qualname__.rpartition('.')[0]}.{old}", function.__name__, until)
        return function(*args, **kwargs)

    return renamed  # type: ignore[return-value]


def argument(old: str, new: str, *, until: str) -> Callable[[_Function], _Function]:
    """A decorator of a function whose keyword `new` was called `old`."""

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def renamed(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                _warn(f"{old}= of {function.__qualname__}", f"{new}=", until)
                if new in kwargs:
                    raise TypeError(f"{function.__qualname__}: {old} is now {new}; both are given")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return renamed  # type: ignore[return-value]

    return decorate


def keys(section: Mapping[str, Any], renamed: Mapping[str, str], *, until: str) -> dict[str, Any]:
    """The values of a section of a config, with new keys in the place of old ones.

    Raises:
        InputError: a value stands under its old and its new key.
    """
    for old, new in renamed.items():
        if old in section:
            _warn(old, new, until)
            if new in section:
                raise InputError(f"{old}: is now {new}, which is there, too: leave {old} out")
    return {renamed.get(key, key): value for key, value in section.items()}
