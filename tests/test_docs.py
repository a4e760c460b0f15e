"""The pages of docs/: the site is built, every page is in it, and its commands name configs and keys that there are."""

import logging
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from shardopt import cli
from shardopt.commands import COMMANDS
from shardopt.pretrain.config import load

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("**/*.md"))
# A command in a block or in backticks, continued by a backslash.
COMMAND = re.compile(r"(?:^ {4}|`)((?:shardopt|torchrun|sbatch|\./scripts/)[^`\n]*)", re.MULTILINE)


def named(nav):
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav if isinstance(nav, list) else nav.values()) for page in named(part)]


def commands_of(path):
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(command, comments=True) for command in COMMAND.findall(text)]


def test_every_page_has_a_place_in_the_navigation():
    nav = named(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    missing = sorted({str(path.relative_to(ROOT / "docs")) for path in PAGES} - set(nav))
    assert not missing, f"add to nav in mkdocs.yml: {', '.join(missing)}"
    assert len(nav) == len(set(nav))


def test_the_site_is_built_and_no_link_or_anchor_leads_nowhere(tmp_path, caplog):
    mkdocs = pytest.importorskip("mkdocs.commands.build", reason="mkdocs-material is in the dev extra")
    from mkdocs.config import load_config

    with caplog.at_level(logging.WARNING, "mkdocs"):
        mkdocs.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    assert [record.getMessage() for record in caplog.records if record.name.startswith("mkdocs")] == []
    for path in PAGES:
        assert list(tmp_path.glob(f"**/{path.stem}/index.html")) or path.stem == "index", path
    assert (tmp_path / "index.html").exists()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_configs_and_settings_in_commands_are_accepted(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands_of(path):
        configs = [word for word in words if re.fullmatch(r"configs/[\w.-]+\.yaml", word)]
        if configs:
            given = [word for before, word in pairwise(words) if before != "--grid"]  # whose values are a list
            load(configs[0], [word for word in given if re.match(r"[a-z_]+(\.\w+)*=", word)])


def test_the_first_commands_of_the_guide_run_as_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ours = [words[1:] for words in commands_of(ROOT / "docs/getting-started.md") if words[0] == "shardopt"]
    ran = [words for words in ours if words[0] in ("init", "config")]
    assert {words[0] for words in ran} == {"init", "config"}
    for words in ran:
        assert cli.main(words) == 0, capsys.readouterr().err
    (start,) = [words for words in ours if words[0] == "pretrain" and "llama-124m.yaml" in words]
    assert load("llama-124m.yaml", [word for word in start if "=" in word]).data.sources[0].source == "text"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_a_command_is_there_and_names_it(name):
    page = ROOT / COMMANDS[name].page
    assert f"shardopt {name}" in page.read_text(encoding="utf-8")
