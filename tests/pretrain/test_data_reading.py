"""Rows that are broken, files in pieces, builds that are cut, and the report of what the data is."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from shardopt import commands
from shardopt.errors import InputError
from shardopt.pretrain.data import DataConfig, parts, reading
from shardopt.pretrain.data.packing import Packed
from shardopt.pretrain.data.sources import Corpus
from tests.pretrain import tiny
from tests.pretrain.test_data import load, made_up, refused, sides, write_jsonl

GOOD = made_up(40)
# What stands between the good lines, and why it gives no document; None: it is counted as empty.
BAD = [
    (b'{"text": ', "is not JSON"),
    (b'{"body": "x", "id": 3}', "there is no column 'text'; there are body, id"),
    (b'{"text": 5}', "'text' holds int, not text"),
    (b'["text"]', "is no JSON object but list"),
    (b'{"text": "na\xefve"}', "is not JSON"),
    (b"[" * 100_000, "is not JSON"),
    (b'{"text": null}', None),
    (b'{"text": ""}', None),
]


def broken_file(path: Path) -> list[tuple[int, str]]:
    """GOOD and BAD in turn, a date, and half a character; the numbers of the broken lines, and why."""
    lines, broken = [], []
    for index, text in enumerate(GOOD):
        lines.append(json.dumps({"text": text, "id": index}).encode())
        if index < len(BAD):
            lines.append(BAD[index][0])
            if BAD[index][1] is not None:
                broken.append((len(lines), BAD[index][1]))
    lines += [b"  ", b'{"text": "2024-01-01T00:00:00"}', b'{"text": "caf\\ud83d"}', b'{"text": "\\ud83d\\ude00!"}']
    broken.append((len(lines) - 1, "a lone surrogate"))
    path.write_bytes(b"\n".join(lines))
    return broken


@pytest.mark.parametrize("piece", [1 << 24, 300])
def test_broken_rows_are_left_out_and_counted_with_their_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", piece)
    path = tmp_path / "a.jsonl"
    broken = broken_file(path)
    train, _ = load(tmp_path, {"source": "jsonl", "paths": str(path)}, max_broken=0.2)
    ((trained, held),) = sides(tmp_path)
    assert sorted(trained + held) == sorted([*GOOD, "2024-01-01T00:00:00", "caf\ufffd", "😀!"])
    tally = train.corpora[0].tally
    assert (tally.rows, tally.empty, tally.n_broken) == (len(GOOD) + len(BAD) + 3, 2, len(broken))
    assert tally.broken == {"not JSON": 3, "no column": 1, "not text": 1, "no JSON object": 1, "lone surrogate": 1}
    assert [(place.path, place.row) for place, _ in tally.examples] == [(str(path), line) for line, _ in broken]
    for (_, words), (_, why) in zip(tally.examples, broken, strict=True):
        assert why in words
    longest = train.corpora[0].longest
    lines = path.read_bytes().splitlines()
    assert [one["tokens"] for one in longest] == sorted((len(text.encode()) + 1 for text in GOOD), reverse=True)[:5]
    for one in longest:
        number = int(one["place"].removeprefix(f"{path}:"))
        text = json.loads(lines[number - 1])["text"]
        assert one["bytes"] == len(text.encode())
        assert " ".join(text[:60].split()) == one["beginning"]


def test_too_many_broken_rows_are_refused_with_their_lines_also_from_the_cache(tmp_path: Path) -> None:
    broken = broken_file(tmp_path / "a.jsonl")
    source = {"source": "jsonl", "paths": str(tmp_path / "a.jsonl")}
    message = refused(tmp_path, source)
    assert (
        f"data.sources[0]: {len(broken)} of 51 rows cannot be read, more than the share data.max_broken = 0.001: "
        in (message)
    )
    assert f"{tmp_path}/a.jsonl:{broken[0][0]} is not JSON" in message
    assert "and 4 more" in message
    load(tmp_path, source, max_broken=0.2)
    assert f"{len(broken)} of 51 rows" in refused(tmp_path, source, max_broken=0.1)


def test_a_wrong_column_is_told_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_HOPELESS", 10)
    path = write_jsonl(tmp_path / "a.jsonl", GOOD)
    corpus = Corpus(DataConfig(sources=[{"source": "jsonl", "paths": str(path), "column": "body"}]), 0)
    tally = reading.Tally()
    with pytest.raises(InputError, match=rf"column: there is no column 'body'; there are id, text \({path}:1\)"):
        list(corpus.read(corpus.pieces()[0], tally))
    assert tally.rows == 10


def test_compressed_files_and_arrays_give_the_same_documents(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in GOOD]
    first, second = b"".join(lines[:15]), b"".join(lines[15:])
    for name, compress in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", _zstd)):
        (tmp_path / f"a.jsonl.{name}").write_bytes(compress(first) + compress(second))
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in GOOD], indent=1))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + first + second)
    for name in ("jsonl.gz", "jsonl.bz2", "jsonl.xz", "jsonl.zst", "json"):
        corpus = Corpus(DataConfig(sources=[{"source": "jsonl", "paths": str(tmp_path / f"a.{name}")}]), 0)
        assert list(corpus.documents()) == GOOD, name
    corpus = Corpus(DataConfig(sources=[{"source": "jsonl", "paths": str(tmp_path / "bom.jsonl")}]), 0)
    assert list(corpus.documents()) == GOOD


def _zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def test_parquet_rows_are_counted_across_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 1000)
    texts = [*GOOD, None]
    pa.parquet.write_table(pa.table({"text": texts, "id": range(41)}), tmp_path / "a.parquet", row_group_size=7)
    dates = [datetime.datetime(2024, 1, 1)] * 2
    pa.parquet.write_table(pa.table({"text": dates}), tmp_path / "b.parquet")
    pa.parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "c.parquet")
    train, _ = load(tmp_path, {"source": "parquet", "paths": str(tmp_path)}, max_broken=0.2)
    ((trained, held),) = sides(tmp_path)
    assert sorted(trained + held) == sorted(GOOD)
    tally = train.corpora[0].tally
    assert (tally.rows, tally.empty, tally.broken) == (44, 1, {"not text": 2, "no column": 1})
    assert [reading.show(place) for place, _ in tally.examples] == [
        f"{tmp_path}/{name}" for name in ("b.parquet:1", "b.parquet:2", "c.parquet:1")
    ]
    longest = train.corpora[0].longest[0]
    text = texts[int(longest["place"].rpartition(":")[2]) - 1]
    assert text is not None
    assert " ".join(text[:60].split()) == longest["beginning"]


@pytest.mark.parametrize("sample_by", ["document", "paragraph", "line"])
def test_text_is_cut_as_datasets_cuts_it(tmp_path: Path, sample_by: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\ntwo\n\n\nthree\rfour\n\n\n\nfive \u2028six\x0bseven\n\n".encode())
    corpus = Corpus(DataConfig(sources=[{"source": "text", "paths": str(path), "sample_by": sample_by}]), 0)
    rows = datasets.load_dataset("text", data_files=[str(path)], split="train", sample_by=sample_by, streaming=True)
    assert list(corpus.documents()) == [row["text"] for row in rows if row["text"]]


def test_a_killed_build_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 700)
    source = {"source": "jsonl", "paths": str(write_jsonl(tmp_path / "a.jsonl", GOOD))}
    whole, _ = load(tmp_path / "whole", source)
    packed: list[int] = []
    real = parts.pack_part

    def pack_part(corpus: Any, pieces: list[reading.Piece], *rest: Any) -> None:
        if len(packed) == most:
            raise KeyboardInterrupt
        packed.append(pieces[0].start)
        real(corpus, pieces, *rest)

    monkeypatch.setattr(parts, "pack_part", pack_part)
    most = 3
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, source)
    first, most = packed.copy(), 1000
    train, _ = load(tmp_path, source)
    assert len(first) == 3
    assert packed == sorted(set(packed))
    assert len(packed) > 6
    assert train.fingerprint == whole.fingerprint
    assert train.corpora[0].longest == whole.corpora[0].longest
    assert [folder.name for folder in (tmp_path / "cache" / "packed").iterdir()] == [train.corpora[0].folder.name]


@pytest.mark.slow
def test_several_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 2000)
    broken_file(tmp_path / "a.jsonl")
    config = DataConfig.model_validate({"sources": {"source": "jsonl", "paths": str(tmp_path / "a.jsonl")}})
    one, _ = load(tmp_path / "one", config.sources[0].model_dump(), max_broken=0.5)
    corpus, tokenizer = Corpus(config, 0), one.saved_tokenizer
    said: list[tuple[int, int]] = []
    files = parts.pack_parts(corpus, tokenizer, 0.2, tmp_path / "kept", 2, lambda *done: said.append(done))
    joined = parts.join(files, tmp_path)
    assert len(files) > 2
    assert said[-1][0] == said[-1][1] == (tmp_path / "a.jsonl").stat().st_size
    packed: Packed = one.corpora[0]
    assert (joined.sides["train"], joined.sides["holdout"]) == (packed.train, packed.holdout)
    assert joined.tally == packed.tally
    assert joined.longest == packed.longest


def test_inspect_says_what_the_data_is_and_a_run_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.corpus(tmp_path / "text")
    broken_file(tmp_path / "a.jsonl")
    (tmp_path / "text" / "000.txt").write_text("\x1b[2Jgone " * 400)  # the longest, which a terminal must not obey
    sources = [
        {"source": "text", "paths": str(tmp_path / "text"), "weight": 3, "label": "made"},
        {"source": "jsonl", "paths": str(tmp_path / "a.jsonl")},
    ]
    changes = {"data__sources": json.dumps(sources), "data__max_broken": 0.2, "train__steps": 2}
    config = tmp_path / "run.yaml"
    config.write_text(tiny.config(tmp_path, **changes).as_yaml())
    assert commands.main(["data", "inspect", str(config), "--processes", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    made, jsonl = found["sources"]
    assert [made["label"], made["share"], jsonl["label"], jsonl["share"]] == ["made", 0.75, "jsonl", 0.25]
    assert made["documents"] == 60
    assert made["bytes"] == sum(path.stat().st_size for path in (tmp_path / "text").iterdir())
    assert made["tokens"] == made["bytes"] + 60 == made["train"]["tokens"] + made["holdout"]["tokens"]
    assert made["epochs"] == 2 * 8 * 0.75 / made["train"]["blocks"]
    assert jsonl["broken"]["not JSON"] == 3
    assert found["blocks"][0] in " ".join(path.read_text() for path in (tmp_path / "text").iterdir())
    assert commands.main(["data", "inspect", str(config)]) == 0
    said = capsys.readouterr().out
    assert max(len(line) for line in said.splitlines() if str(tmp_path) not in line) <= 80
    assert f"{jsonl['longest'][0]['tokens']:>13,} tokens  {jsonl['longest'][0]['place']}" in said  # in one piece
    assert "\x1b" not in said
    assert "made 75.0% (" in said
    assert f"left out of jsonl: 7 broken ({tmp_path}/a.jsonl:2 is not JSON" in said.replace("\n", "")
    assert commands.main(["data", "prepare", str(config), "data.max_broken=0.01"]) == 2
    capsys.readouterr()
    tiny.run(0, 1, tmp_path, engine="{name: single}", **changes)
    assert json.loads((tmp_path / "runs" / "tiny" / "data.json").read_text()) | {"blocks": found["blocks"]} == found
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("documents      103 (") for line in lines)
