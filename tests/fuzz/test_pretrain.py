"""Configs of any YAML, and files beside a run of any bytes: a value, or the error that the docstring names."""

from __future__ import annotations

import json
import math
import re
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from shardopt.errors import InputError
from shardopt.pretrain import config, keys, strict_yaml
from shardopt.pretrain.data.token_files import TokenFile
from shardopt.pretrain.events import read_events
from shardopt.pretrain.page import records
from shardopt.pretrain.record import last_row, read_metrics, recorded_config
from tests.fuzz import budget

TREE = {
    "model": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "data": {"sources": [{"source": "stdlib"}], "tokenizer": "byte", "block_size": 16},
    "train": {"steps": 300},
}
KEYS = sorted({key.name for group in keys.groups() for key in group.keys})
SECTIONS = sorted({part for key in KEYS for part in key.split(".")})

# Configs

WORDS = [
    "total",
    "fp32",
    "bf16",
    "fsdp",
    "zero",
    "deepspeed",
    "ddp",
    "single",
    "adamw",
    "muon",
    "byte",
    "llama",
    "gpt2",
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 3)
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=6)
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(SECTIONS) | SCALARS.filter(lambda key: key == key), inner, max_size=3)
    ),
    max_leaves=6,
)


def names_a_key(message: str, tree: Any) -> bool:
    """Whether each problem is told of a key: one of the config's, or one that the tree has."""
    keys = [*map(str, tree)] if isinstance(tree, dict) else []
    firsts = [line for line in message.splitlines() if not line.startswith(" ")]
    if firsts and any(firsts[0].startswith(repr(key)) for key in keys):  # one that one would not see
        return True
    return bool(firsts) and any(word in {*SECTIONS, *keys} for word in re.split(r"[.:=\[\] ]", firsts[0]))


def outcome(action: Callable[[], Any]) -> tuple[Any, str]:
    """What `action` returned, or None and the message of its InputError; any other exception is a defect."""
    try:
        return action(), ""
    except InputError as error:
        return None, str(error)


def refused_or_whole(tree: Any) -> None:
    made, refusal = outcome(lambda: config.parse(tree))
    assert made is not None or names_a_key(refusal, tree), refusal
    # What the run's config.yaml will say is this config.
    assert made is None or config.parse(strict_yaml.parse(made.as_yaml())) == made


@budget(60)
@given(st.dictionaries(st.sampled_from(SECTIONS) | SCALARS.filter(lambda key: key == key), TREES, max_size=4))
@example({"": 1})
@example({1: 2})
def test_any_tree_is_a_config_or_an_error_that_names_a_key(tree):
    refused_or_whole(tree)


@budget(120)
@given(st.sampled_from(KEYS), TREES, st.booleans())
def test_any_value_of_any_key_is_taken_or_refused_by_the_keys_name(name, value, beside):
    tree = json.loads(json.dumps(TREE))
    *parents, leaf = name.split(".")
    node = tree
    for parent in parents:
        following = node.get(parent)
        node[parent] = node = following if isinstance(following, dict) else {}
    node[f"{leaf}x" if beside and leaf else leaf] = value
    refused_or_whole(tree)


MARKS = (*":[]{}|>'\"#%", ": ", "\n", "\n  ", "- ", "&a ", "*a", "<<: ", "? ", ", ")
TAGS = ("!!int ", "!!bool ", "!!float ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!python/name:os.system ")
VALUES = ("1e-3", "0x", "_", "~", "1:30", "---\n", "\t", "\0", "é")
YAML_TEXT = st.lists(st.sampled_from([*SECTIONS[:40], *MARKS, *TAGS, *VALUES]) | st.text(max_size=3), max_size=14).map(
    "".join
)


@budget(120)
@given(YAML_TEXT)
@example("a: " + "9" * 5000)
@example("a: !!bool maybe")
@example("a: !!int x")
@example("a: !!timestamp x")
@example("a: 0x_")
@example("[" * 5000)
@example("run: &a {name: *a}")
@example("? [1]\n: 2")
def test_any_text_is_read_or_refused(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text, encoding="utf-8", newline="")
        tree, refusal = outcome(lambda: config.read(path))
    assert tree is not None or str(path) in refusal
    if tree is not None:
        refused_or_whole(tree)


@budget(60)
@given(st.binary(max_size=30))
def test_a_config_of_any_bytes_is_read_or_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(content)
        tree, refusal = outcome(lambda: config.read(path))
        assert tree is not None or str(path) in refusal


@budget(80)
@given(st.lists(st.sampled_from(KEYS), max_size=1), YAML_TEXT)
@example(["train.steps"], "=" + "9" * 5000)
@example(["train"], "=!!int x")
@example([], " =")
def test_any_override_is_taken_or_refused(name, text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(TREE))
        override = "".join([*name, text])
        tree, refusal = outcome(lambda: config.read(path, [override]))
    assert tree is not None or repr(override) in refusal or override.partition("=")[0] in refusal
    if tree is not None:
        refused_or_whole(tree)


# Token files

MEGATRON = struct.Struct("<9sQBQQ")


def index_bytes(sizes, bounds, code=4, sequences=None, documents=None):
    head = MEGATRON.pack(b"MMIDIDX\0\0", 1, code, len(sizes) if sequences is None else sequences,
                         len(bounds) if documents is None else documents)  # fmt: skip
    pointers = np.zeros(len(sizes), np.int64)
    return head + np.array(sizes, np.int32).tobytes() + pointers.tobytes() + np.array(bounds, np.int64).tobytes()


def read_or_refuse(content: bytes, index: bytes | None, dtype: str) -> None:
    """A damaged file is refused by ValueError; of any other, every id but the ends is in one document."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.bin"
        path.write_bytes(content)
        if index is not None:
            path.with_suffix(".idx").write_bytes(index)
        try:
            file = TokenFile.open(path, dtype)
        except ValueError:
            return
        end = 5
        found = [ids for piece in file.pieces() for ids in file.documents(piece, end)]
        if index is None:
            assert [i for ids in found for i in ids if i != end] == [i for i in file.ids.tolist() if i != end]
        else:
            assert file.starts is not None
            assert [file.starts[0], file.starts[-1]] == [0, len(file.ids)]
            assert (np.diff(file.starts) >= 0).all()
            assert len(found) == len(file.starts) - 1


@budget(60)
@given(st.binary(max_size=30), st.binary(max_size=60) | st.none(), st.sampled_from(["uint16", "uint32"]))
def test_token_files_of_any_bytes_are_read_or_refused(content, index, dtype):
    read_or_refuse(content, index, dtype)


@budget(60)
@given(st.integers(-4, 4), st.sampled_from([(20240520, 1), (20240801, 7)]), st.binary(max_size=12))
def test_headers_that_say_another_length_are_refused(more, kind, content):
    width = 2 if kind[1] == 1 else 4
    head = np.zeros(256, np.int32)
    head[:3] = *kind, len(content) // width + more
    read_or_refuse(head.tobytes() + content, None, "uint16")


@budget(120)
@given(
    st.lists(st.integers(-2, 4), max_size=4),
    st.lists(st.integers(-2, 6) | st.integers(-(2**63), 2**63 - 1), max_size=4),
    st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 5),
    st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 5),
    st.integers(0, 9),
)
@example([2, 3], [0, 7], None, None, 4)
@example([4, -1, 2], [0, 3], None, None, 4)
@example([2, 3], [0, 1], None, None, 4)
@example([], [], None, None, 4)
@example([2], [0, 1], 2**64 - 1, None, 4)
def test_indices_that_are_not_of_their_file_are_refused(sizes, bounds, sequences, documents, code):
    content = np.arange(max(sum(sizes), 0), dtype=np.int32).tobytes()
    read_or_refuse(content, index_bytes(sizes, bounds, code, sequences, documents), "uint16")


# What a run leaves behind

LINES = st.lists(
    st.binary(max_size=20)
    | st.dictionaries(st.sampled_from(["step", "loss", "time", "event"]), SCALARS, max_size=4)
    .map(lambda row: json.dumps(row).encode())
    | st.sampled_from([b'{"step": 1, "loss": 2.5}', b'{"step": true}', b'{"step": 1e400}', b"\xff\xfe{\0}\0"]),
    max_size=5,
).map(b"\n".join)  # fmt: skip


@budget(80)
@given(LINES)
@example(b"[" * 100_000)
@example(b'{"step": ' + b"9" * 5000 + b"}")
def test_records_of_any_bytes_give_the_whole_rows(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        path.write_bytes(content)
        rows = read_metrics(path)
        steps = [row["step"] for row in rows]
        assert steps == sorted(set(steps))
        assert all(type(step) is int for step in steps)
        assert (b'{"step": 1, "loss": 2.5}' not in content.split(b"\n")) or 1 in steps
        last = last_row(path)
        assert (last is None) == (not rows)
        assert last is None or last["step"] in steps
        for event in read_events(path):
            assert isinstance(event["time"], int | float)
            assert not math.isnan(event["step"])


@budget(20)
@given(st.sampled_from(["config.yaml", "data.json", "samples.jsonl", "events.jsonl"]), st.binary(max_size=30))
@example("data.json", b"[" * 100_000)
@example("config.yaml", b"[" * 5000)
@example("config.yaml", b"!!bool x")
@example("data.json", b"9" * 5000)
def test_a_run_with_a_damaged_file_is_read_or_refused(name, content):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        (run / "config.yaml").write_text("run: {name: a}")
        (run / name).write_bytes(content)
        for read in (lambda: records.read([run]), lambda: recorded_config(run) or {}):
            found, refusal = outcome(read)
            assert found is not None or folder in refusal


def test_the_tree_that_is_changed_is_a_config():
    refused_or_whole(TREE)
    with pytest.raises(AssertionError):
        assert names_a_key("something is wrong", TREE)
