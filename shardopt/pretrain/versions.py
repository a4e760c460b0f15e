"""The packages that shardopt declares, and whether those installed are new enough."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from shardopt.errors import InputError

ALWAYS = ""


class Package(NamedTuple):
    """A package that shardopt declares.

    Attributes:
        name: of the package.
        extra: the extra that brings it; ALWAYS: shardopt itself.
        needed: the versions that will do, such as >=5.
        installed: the version that is there; None: none is.
    """

    name: str
    extra: str
    needed: SpecifierSet
    installed: str | None

    @property
    def refused(self) -> bool:
        return self.installed is not None and not self.needed.contains(self.installed, prereleases=True)

    def __str__(self) -> str:
        return f"{self.name} {self.installed}" + (f" (needs {self.needed})" if self.refused else "")


def declared() -> list[Package]:
    """Every package, once for each extra that brings it; none where shardopt is not installed but on the path."""
    try:
        about = importlib.metadata.metadata("shardopt")
    except importlib.metadata.PackageNotFoundError:
        return []
    requirements = [Requirement(line) for line in about.get_all("Requires-Dist") or ()]
    always = [need for need in requirements if need.marker is None or need.marker.evaluate({"extra": ""})]
    packages = [_package(need, ALWAYS) for need in always]
    for extra in about.get_all("Provides-Extra") or ():
        brought = [need for need in requirements if need not in always]
        packages += [
            _package(need, extra) for need in brought if need.marker and need.marker.evaluate({"extra": extra})
        ]
    return packages


def _package(need: Requirement, extra: str) -> Package:
    try:
        installed = importlib.metadata.version(need.name)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    return Package(need.name, extra, need.specifier, installed)


def check(extras: Iterable[str]) -> None:
    """
    Raises:
        InputError: a package that shardopt always needs, or that one of `extras` brings, is too old.
    """
    wanted = {ALWAYS, *extras}
    refused = {package.name: package for package in declared() if package.refused and package.extra in wanted}
    if refused:
        remedy = " ".join(f"'{package.name}{package.needed}'" for package in refused.values())
        raise InputError(f"too old: {', '.join(map(str, refused.values()))}: pip install {remedy}")
