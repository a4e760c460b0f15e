"""The files that a host of repositories reads."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from scripts import list_api, list_licences

ROOT = Path(__file__).parent.parent
FORMS = sorted((ROOT / ".github").rglob("*.yml"))


def test_every_pinned_package_has_a_line_with_its_licence():
    rows = re.findall(r"^\| ([\w.-]+) \| (.+) \|$", list_licences.PAGE.read_text(), re.MULTILINE)
    assert [name for name, _ in rows[1:]] == list_licences.pinned()
    assert not [name for name, licence in rows if licence == "not stated"]


def test_oldest_versions_are_pinned_at_the_bottom_of_each_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in extras if name != "dev" for line in extras[name])]
    needs = [need for need in map(Requirement, lines) if need.name != "shardopt"]
    pins = re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE)
    pinned = {canonicalize_name(name): Version(version).release for name, version in pins}
    for need in needs:
        (floor,) = need.specifier
        release = Version(floor.version).release
        assert floor.operator == ">="
        assert pinned[canonicalize_name(need.name)][: len(release)] == release, need


def test_versions_of_the_page_are_those_that_are_declared_and_pinned():
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|", (ROOT / "docs/versions.md").read_text(), re.MULTILINE)
    assert {"torch", "transformers", "accelerate", "datasets", "deepspeed", "wandb"} <= {name for name, *_ in rows}
    oldest, usual = (
        dict(re.findall(r"^([\w.-]+)==(.+)$", (ROOT / file).read_text(), re.MULTILINE))
        for file in ("constraints-oldest.txt", "constraints.txt")
    )
    assert rows == [(name, oldest[name], usual[name]) for name, *_ in rows]


def test_public_names_and_signatures_are_those_of_the_page():
    hint = "run scripts/list_api.py, and write the change into CHANGELOG.md"
    assert list_api.PAGE.read_text() == list_api.page(), hint


def test_what_the_documentation_imports_is_public():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")]
    imports = re.findall(
        r"^\s*from (shardopt[\w.]*) import ([\w, ]+)$", "\n".join(map(Path.read_text, pages)), re.MULTILINE
    )
    assert len(imports) > 5
    for module, names in imports:
        for name in names.split(", "):
            name = name.split(" as ")[0]
            if f"{module}.{name}" in list_api.PUBLIC:
                continue
            public = list_api.PUBLIC[module]
            assert name in (importlib.import_module(module).__all__ if public is None else public), (module, name)


@pytest.mark.parametrize("path", FORMS, ids=lambda p: p.name)
def test_what_forms_and_workflows_name_is_there(path):
    text = path.read_text()
    content = yaml.safe_load(text)
    assert content.get("body") or content["jobs"]
    commands = re.findall(r"(?:run: .*?)((?:\./)?scripts/[\w.]+)", text)
    assert all((ROOT / command).exists() for command in commands)
    assert bool(commands) == ("jobs" in content)


def test_workflow_tests_every_python_that_is_supported():
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]
    versions = jobs["tests"]["strategy"]["matrix"]["python"]
    oldest = re.search(r'requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text())[1]
    assert versions[0] == oldest
    assert versions == [f"3.{minor}" for minor in range(11, 11 + len(versions))]


def test_tests_that_the_security_page_names_are_there():
    named = re.findall(r"`(tests/[\w/.]+)`", (ROOT / ".github/SECURITY.md").read_text())
    assert len(named) >= 2
    assert all((ROOT / name).exists() for name in named)


def test_citation_has_what_is_required():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == re.search(r'license = "(.*)"', (ROOT / "pyproject.toml").read_text())[1]
