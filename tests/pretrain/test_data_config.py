"""Config sections are strict but take what YAML can write; the data section's short forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import Field, ValidationError

from shardopt.pretrain.data.config import BpeTokenizer, ByteTokenizer, DataConfig, HfSource, PathTokenizer, TextSource
from shardopt.pretrain.section import Section


class Inner(Section):
    x: float = 1.0


class Outer(Section):
    count: int = 1
    rate: float = 1.0
    pair: tuple[float, float] = (0.1, 0.2)
    folder: Path = Path("a")
    warmup: int | Literal["total"] | None = None
    clip: float | None = None
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    table: dict[str, float] = Field(default_factory=dict)
    name: str | dict[str, str] = "a"
    active: bool = False


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("rate: 1e-3", 0.001),
        ("rate: 1", 1.0),
        ("pair: [1e-3, 2]", (0.001, 2.0)),
        ("folder: ~/x", Path.home() / "x"),
        ("warmup: total", "total"),
        ("count: 3.0", 3),
        ("warmup: 3", 3),
        ("warmup: 3.0", 3),
        ("clip: 1e-3", 0.001),
        ("clip: null", None),
        ("inner: {x: 1e-2}", Inner(x=0.01)),
        ("many: [{x: 2}, {x: 1e-2}]", (Inner(x=2.0), Inner(x=0.01))),
        ("table: {a: 1e-2}", {"a": 0.01}),
        ("name: 1e-3", "1e-3"),
        ("active: yes", True),
    ],
)
def test_section_takes_what_yaml_writes(text: str, value: Any) -> None:
    data = yaml.safe_load(text)
    (key,) = data
    assert getattr(Outer.model_validate(data), key) == value
    assert Outer.model_validate(Outer.model_validate(data).model_dump(mode="json")) == Outer.model_validate(data)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("count: '3'", ("count",)),
        ("count: 3.5", ("count",)),
        ("count: true", ("count",)),
        ("count: 1e3", ("count",)),
        ("rate: fast", ("rate",)),
        ("rate: true", ("rate",)),
        ("rate: .nan", ("rate",)),
        ("pair: [1.0]", ("pair", 1)),
        ("warmup: '3'", ("warmup", "int")),
        ("active: 1", ("active",)),
        ("inner: {y: 1}", ("inner", "y")),
        ("many: [{}, {y: 1}]", ("many", 1, "y")),
        ("typo: 1", ("typo",)),
    ],
)
def test_section_refuses_and_says_where(text: str, place: tuple[str | int, ...]) -> None:
    with pytest.raises(ValidationError) as error:
        Outer.model_validate(yaml.safe_load(text))
    assert place in [one["loc"] for one in error.value.errors()]


def test_section_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Outer().count = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "tokenizer"),
    [
        ("byte", ByteTokenizer()),
        ("bpe", BpeTokenizer()),
        ("{bpe: 8192}", BpeTokenizer(vocab_size=8192)),
        ("{type: bpe, vocab_size: 300, train_mb: 1}", BpeTokenizer(vocab_size=300, train_mb=1)),
        ("gpt2", PathTokenizer(path="gpt2")),
        ("{path: byte}", PathTokenizer(path="byte")),
    ],
)
def test_tokenizer_forms(text: str, tokenizer: Section) -> None:
    config = DataConfig.model_validate({"tokenizer": yaml.safe_load(text)})
    assert config.tokenizer == tokenizer
    assert DataConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    "text",
    [
        "tokenizer: {bpe: '300'}",
        "tokenizer: {bpe: 256}",
        "tokenizer: {words: 3}",
        "tokenizer: 3",
        "holdout: 0.0",
        "holdout: 1",
        "block_size: 0",
        "sources: []",
        "sources: [{source: txt}]",
        "sources: [{}]",
        "sources: [{source: text}]",
        "sources: [{source: text, paths: []}]",
        "sources: [{source: stdlib, weight: -1}]",
        "sources: [{source: stdlib, column: text}]",
    ],
)
def test_data_section_refuses(text: str) -> None:
    with pytest.raises(ValidationError):
        DataConfig.model_validate(yaml.safe_load(text))


def test_sources_by_kind() -> None:
    config = DataConfig.model_validate(
        yaml.safe_load(
            "sources: [{source: text, paths: a, weight: 2}, {source: hf, name: owner/name, streaming: true}]"
        )
    )
    assert config.sources == (TextSource(paths=("a",), weight=2.0), HfSource(name="owner/name", streaming=True))
    for short in ("stdlib", ["stdlib"], {"source": "stdlib"}):
        assert DataConfig.model_validate({"sources": short}) == DataConfig()


def test_every_key_is_documented_where_it_stands() -> None:
    """`source` and `type` choose the class, whose docstring says it."""
    sections = [DataConfig, *Section.__subclasses__()]
    for section in sections:
        if section.__module__.startswith("shardopt.pretrain.data"):
            for leaf in [section, *section.__subclasses__()]:
                for name, field in leaf.model_fields.items():
                    assert field.description or name in ("source", "type"), f"{leaf.__name__}.{name}"


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert DataConfig().cache_folder == tmp_path / "shardopt" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert DataConfig().cache_folder == Path.home() / ".cache" / "shardopt" / "data"
    assert DataConfig(cache=tmp_path).cache_folder == tmp_path
