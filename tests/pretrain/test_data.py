"""Text to packed blocks: sources, tokenizers, the split, the cache, and what is refused."""

from __future__ import annotations

import gzip
import json
import logging
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shardopt.distributed import Ranks
from shardopt.errors import InputError
from shardopt.pretrain.data import DataConfig, HoldoutData, TrainData, packing, prepare, sources, tokenizers
from shardopt.pretrain.data.packing import is_held_out
from shardopt.pretrain.data.reading import Tally
from shardopt.pretrain.data.sources import Corpus

ALONE = Ranks(0, 1, 0, torch.device("cpu"), distributed=False)


def made_up(count: int, seed: int = 0) -> list[str]:
    """Documents of 1 to 60 words, all different, with text that is awkward to tokenise."""
    rng = random.Random(seed)
    words = ["tree", "naïve", "漢字", "😀", "<|endoftext|>", "a\tb", "  two", "\n\n", "x=1;"]
    return [f"{seed}-{i} " + " ".join(rng.choices(words, k=rng.randint(1, 60))) for i in range(count)]


def write_jsonl(path: Path, documents: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: text, "id": i}) + "\n" for i, text in enumerate(documents)))
    return path


def load(tmp_path: Path, source: dict[str, Any] | list[dict[str, Any]], **more: Any) -> tuple[TrainData, HoldoutData]:
    config = {"sources": source if isinstance(source, list) else [source], "cache": tmp_path / "cache"}
    config |= {"block_size": 16, "holdout": 0.2, **more}
    return prepare(DataConfig.model_validate(config), ALONE, seed=0, global_batch=4)


def refused(tmp_path: Path, source: dict[str, Any] | list[dict[str, Any]], **more: Any) -> str:
    with pytest.raises(InputError) as error:
        load(tmp_path, source, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def bytes_per_target(holdout: HoldoutData) -> float:
    batch = holdout.batch(0, holdout.n_blocks)
    return holdout.target_bytes(batch) / batch[:, 1:].numel()


def packed_folders(tmp_path: Path) -> set[Path]:
    return set((tmp_path / "cache" / "packed").iterdir())


def documents_in(ids: np.ndarray, eos: int) -> list[str]:
    """Byte tokens back to documents."""
    assert ids[-1] == eos
    ends = np.flatnonzero(ids == eos)
    return [bytes(part[:-1].astype(np.uint8)).decode() for part in np.split(ids, ends + 1)[:-1]]


def sides(tmp_path: Path) -> list[tuple[list[str], list[str]]]:
    """The documents of each packed source in the cache, train and held out."""
    found = []
    for folder in sorted(packed_folders(tmp_path)):
        ids = [np.fromfile(folder / f"{side}.bin", np.uint16) for side in ("train", "holdout")]
        found.append((documents_in(ids[0], 256), documents_in(ids[1], 256) if len(ids[1]) else []))
    return found


# --- sources ----------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    texts = made_up(60)
    jsonl = write_jsonl(tmp_path / "j" / "a.jsonl", texts[:30])
    write_jsonl(tmp_path / "j" / "deep" / "b.jsonl", texts[30:])
    (tmp_path / "j" / "readme.md").write_text("not a corpus")
    pa.parquet.write_table(pa.table({"body": texts}), tmp_path / "p.parquet")
    folder = tmp_path / "t [1]"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text)
    (folder / ".hidden").write_text("hidden")
    write_jsonl(folder / "other.jsonl", ["another kind's"])
    (folder / "other.json.gz").write_bytes(gzip.compress(b"{}"))
    packed = tmp_path / "z.jsonl.gz"
    packed.write_bytes(gzip.compress(b"".join(file.read_bytes() for file in (jsonl, tmp_path / "j/deep/b.jsonl"))))
    wanted = [text for text in texts if not is_held_out(text, 0.2)]
    for number, source in enumerate(
        [
            {"source": "jsonl", "paths": [str(tmp_path / "j")]},
            {"source": "jsonl", "paths": str(tmp_path / "j" / "**" / "*.jsonl")},
            {"source": "jsonl", "paths": [str(jsonl), str(tmp_path / "j/deep/b.jsonl"), str(jsonl)]},
            {"source": "jsonl", "paths": str(packed)},
            {"source": "parquet", "paths": str(tmp_path / "p.parquet"), "column": "body"},
            {"source": "text", "paths": str(folder)},
        ]
    ):
        home = tmp_path / str(number)
        train, _ = load(home, source)
        ((got, held),) = sides(home)
        assert got == wanted, source
        assert held == [text for text in texts if is_held_out(text, 0.2)]
        assert train.corpora[0].train.documents == len(wanted)


def test_text_is_cut_into_documents_as_asked(tmp_path: Path) -> None:
    lines = [f"line {i} of one file" for i in range(80)]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
    load(tmp_path, {"source": "text", "paths": str(tmp_path / "a.txt"), "sample_by": "line"})
    ((train, held),) = sides(tmp_path)
    assert sorted(train + held) == sorted(lines)


def test_stdlib_is_the_sources_without_tests(tmp_path: Path) -> None:
    config = DataConfig(cache=tmp_path)
    train, holdout = prepare(config, ALONE, 0, 4)
    corpus = train.corpora[0]
    assert corpus.train.bytes > 10e6
    assert corpus.corpus == Corpus(config, 0).key
    root = Path(sysconfig.get_path("stdlib"))
    files = [path.relative_to(root) for path in Corpus(config, 0).files]
    assert Path("argparse.py") in files
    assert Path("json/decoder.py") in files
    assert not {"test", "tests", "idle_test", "site-packages"} & {part for path in files for part in path.parts}
    assert train.tokens == corpus.train.tokens
    assert holdout.n_blocks > 100


def test_files_that_are_not_utf8_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i, text in enumerate(made_up(40)):
        (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "cut.txt").write_bytes("naï".encode()[:-1])
    (tmp_path / "binary.txt").write_bytes(b"\x7fELF\x01\x00")  # UTF-8 all the same
    for _ in range(2):  # built, then from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            train, _ = load(tmp_path / "home", {"source": "text", "paths": str(tmp_path / "*.txt")})
        assert train.corpora[0].skipped == 3
        assert "skipped 3 files that are not UTF-8 text" in caplog.text
        assert "latin.txt" in caplog.text
    ((train_texts, held),) = sides(tmp_path / "home")
    assert len(train_texts) + len(held) == 40


# --- tokenizers -------------------------------------------------------------------------------------------


def test_byte_tokenizer_is_bytes_and_loads_in_transformers(tmp_path: Path) -> None:
    tokenizers.byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 257
    assert tokenizer.eos_token_id == 256
    text = (
        "".join(map(chr, range(0x800))) + "漢字😀\r\n" + " 's  n't" + "".join(made_up(20)).replace("<|endoftext|>", "")
    )
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    # Bytes that no UTF-8 text holds have an id too: one token a byte, in the order of the bytes.
    for byte in range(256):
        assert tokenizer.decode([byte]) == bytes([byte]).decode(errors="replace")
    assert tokenizer("ab<|endoftext|>")["input_ids"] == [97, 98, 256]


def test_bpe_is_trained_on_training_text_only_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def text_of(i: int) -> str:
        plain = f"document {i} about trees and houses"
        return plain + (" zyzzyva" * 30 if is_held_out(plain + " zyzzyva" * 30, 0.2) else "")

    texts = [text_of(i) for i in range(200)]
    held_out = [text for text in texts if is_held_out(text, 0.2)]
    assert any("zyzzyva" in text for text in held_out)
    assert not any("zyzzyva" in text for text in texts if text not in held_out)
    source = {"source": "jsonl", "paths": str(write_jsonl(tmp_path / "a.jsonl", texts))}
    train, holdout = load(tmp_path, source, tokenizer={"bpe": 400})
    tokenizer = train.tokenizer
    assert train.vocab_size == len(tokenizer) == 400
    assert "data.tokenizer" not in caplog.text
    assert len(tokenizer.encode(" houses")) == 1
    assert len(tokenizer.encode(" zyzzyva")) > 4
    assert train.bytes_per_token(0) > 2 > bytes_per_target(holdout) / 1.5
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    again, _ = load(tmp_path, source, tokenizer={"bpe": 400})
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before
    assert torch.equal(again.batch(3, 0, 4), train.batch(3, 0, 4))
    larger, _ = load(tmp_path, source, tokenizer={"bpe": 4000})
    assert 400 < larger.vocab_size < 4000
    assert f"data.tokenizer: bpe has {larger.vocab_size} tokens instead of 4000" in caplog.text


def test_packed_tokens_are_what_the_tokenizer_gives(tmp_path: Path) -> None:
    """Also where a document spells out the end of a document: that stays text."""
    texts = made_up(80)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    trained, _ = load(tmp_path, {"source": "jsonl", "paths": str(path)}, tokenizer={"bpe": 300})
    trained.tokenizer.save_pretrained(tmp_path / "saved")
    train, _ = load(tmp_path, {"source": "jsonl", "paths": str(path)}, tokenizer={"path": str(tmp_path / "saved")})
    assert train.vocab_size == trained.vocab_size
    # Same ids from the same text and tokenizer: one cache entry serves both.
    assert len(packed_folders(tmp_path)) == 1
    (folder,) = packed_folders(tmp_path)
    tokenizer = train.tokenizer
    stream: list[int] = []
    for text in texts:
        if not is_held_out(text, 0.2):
            stream += [*tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], 0]
    assert tokenizer.eos_token_id == 0
    assert np.fromfile(folder / "train.bin", np.uint16).tolist() == stream
    kept = [text for text in texts if not is_held_out(text, 0.2)]
    assert train.bytes_per_token(0) == sum(len(text.encode()) for text in kept) / len(stream)
    assert "<|endoftext|>" in tokenizer.decode([i for i in stream if i != 0])


def sentencepiece_like(folder: Path) -> Path:
    """Metaspace pieces with bytes for what they lack, as in Llama 2."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz", "▁t", "▁tr"]
    backend = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "t"), ("▁t", "r")], byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["byte", "bpe", "sentencepiece"])
def test_bytes_of_scored_targets_are_those_of_the_text_they_stand_for(tmp_path: Path, kind: str) -> None:
    source = {"source": "jsonl", "paths": str(write_jsonl(tmp_path / "a.jsonl", made_up(300)))}
    shape = {"byte": "byte", "bpe": {"bpe": 400}, "sentencepiece": str(sentencepiece_like(tmp_path / "sp"))}[kind]
    train, holdout = load(tmp_path, source, tokenizer=shape, holdout=0.5)
    tokenizer = train.tokenizer
    # The whole held-out file, each document of which stands for its own bytes.
    (folder,) = packed_folders(tmp_path)
    ids = np.fromfile(folder / "holdout.bin", np.uint16)
    texts = [text for text in made_up(300) if is_held_out(text, 0.5)]
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    assert len(ends) == len(texts)
    for text, document in zip(texts, np.split(ids, ends + 1), strict=False):
        # The first place is an input only, so another token stands there.
        assert holdout.target_bytes(torch.tensor([[0, *document.tolist()]])) == len(text.encode())


def test_every_token_but_the_first_is_a_target_once(tmp_path: Path) -> None:
    source = {"source": "jsonl", "paths": str(write_jsonl(tmp_path / "a.jsonl", made_up(50)))}
    train, holdout = load(tmp_path, source)
    (folder,) = packed_folders(tmp_path)
    ids = np.fromfile(folder / "train.bin", np.uint16)
    n_blocks = (len(ids) - 1) // 16
    steps = -(-n_blocks // 4)
    rows = torch.cat([train.batch(step, 0, 4) for step in range(steps)])[:n_blocks]
    wanted = [ids[i * 16 : i * 16 + 17].tolist() for i in range((len(ids) - 1) // 16)]
    assert sorted(rows.tolist()) == sorted(wanted)
    held = np.fromfile(folder / "holdout.bin", np.uint16)
    assert sorted(row[0] for row in holdout.batch(0, holdout.n_blocks).tolist()) == sorted(
        held[:-1:16][: holdout.n_blocks]
    )


def test_a_large_vocabulary_takes_wider_tokens(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)} | {"<end>": 70_000}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path / "wide")
    texts = [f"w{i} w69999 w3" for i in range(65_500, 65_600)]
    source = {"source": "jsonl", "paths": str(write_jsonl(tmp_path / "a.jsonl", texts))}
    train, _ = load(tmp_path, source, tokenizer=str(tmp_path / "wide"), block_size=3)
    assert train.vocab_size == 70_001
    assert {*train.batch(0, 0, 4).flatten().tolist()} >= {69_999, 3}


# --- the split --------------------------------------------------------------------------------------------


def test_no_text_is_on_both_sides_even_across_sources(tmp_path: Path) -> None:
    shared, own = made_up(60), made_up(60, seed=1)
    first = write_jsonl(tmp_path / "a.jsonl", shared + shared[:20] + [""])
    second = write_jsonl(tmp_path / "b.jsonl", own + shared[::-1], column="body")
    train, holdout = load(
        tmp_path,
        [
            {"source": "jsonl", "paths": str(first)},
            {"source": "jsonl", "paths": str(second), "column": "body", "weight": 3},
        ],
    )
    (one, two) = sides(tmp_path)
    trained, held = {*one[0], *two[0]}, {*one[1], *two[1]}
    assert not trained & held
    assert trained | held == {*shared, *own}
    assert sum(map(len, (*one, *two))) == 60 + 20 + 120
    assert 0.1 < len(held) / 120 < 0.3
    rates = [
        sum(len(text.encode()) for text in texts) / sum(len(text.encode()) + 1 for text in texts)
        for texts in (one[0], two[0])
    ]
    assert train.bytes_per_token(0) in (
        pytest.approx(0.25 * rates[0] + 0.75 * rates[1]),
        pytest.approx(0.25 * rates[1] + 0.75 * rates[0]),
    )
    tokens = sum(len(text.encode()) + 1 for text in (*one[1], *two[1]))
    assert holdout.tokens == tokens
    assert bytes_per_target(holdout) == pytest.approx((tokens - len(one[1]) - len(two[1])) / tokens, rel=0.02)


def test_a_growing_corpus_never_moves_a_document_across(tmp_path: Path) -> None:
    texts = made_up(300)
    small = [is_held_out(text, 0.1) for text in texts]
    assert all(is_held_out(text, 0.2) for text, held in zip(texts, small, strict=True) if held)
    assert 15 < sum(small) < 50


# --- the cache --------------------------------------------------------------------------------------------


def test_the_cache_is_used_and_its_key_covers_what_shaped_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", made_up(60))
    source = {"source": "jsonl", "paths": str(path)}
    first, _ = load(tmp_path, source)
    one = packed_folders(tmp_path)

    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "read", lambda self, *_: pytest.fail("read again"))
        assert load(tmp_path, source)[0].fingerprint == first.fingerprint
        # Cut and mixed when opened, so not built again; but the samples are others.
        assert load(tmp_path, source, block_size=8)[0].fingerprint != first.fingerprint
        assert load(tmp_path, {**source, "weight": 2.0})[0].tokens == first.tokens
        copy = tmp_path / "copy" / "a.jsonl"
        copy.parent.mkdir()
        copy.write_bytes(path.read_bytes())
        assert load(tmp_path, {"source": "jsonl", "paths": str(copy)})[0].fingerprint == first.fingerprint
    assert packed_folders(tmp_path) == one

    fingerprints = {first.fingerprint}
    size, text = path.stat().st_size, path.read_text()
    path.write_text(text.replace("tree", "bush"))
    assert path.stat().st_size == size
    fingerprints.add(load(tmp_path, source)[0].fingerprint)
    path.write_text(text)
    fingerprints.add(load(tmp_path, source, holdout=0.3)[0].fingerprint)
    fingerprints.add(load(tmp_path, source, tokenizer={"bpe": 300})[0].fingerprint)
    fingerprints.add(load(tmp_path, source, tokenizer={"bpe": 301})[0].fingerprint)
    assert len(fingerprints) == len(packed_folders(tmp_path)) == 5
    monkeypatch.setattr("shardopt.pretrain.data.build.FORMAT", packing.FORMAT + 1)
    load(tmp_path, source)
    assert len(packed_folders(tmp_path)) == 6


def test_a_corpus_too_large_to_hash_is_known_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CONTENT_KEY_BYTES", 0)
    path = write_jsonl(tmp_path / "a.jsonl", made_up(60))
    config = DataConfig.model_validate({"sources": [{"source": "jsonl", "paths": str(path)}]})
    before = Corpus(config, 0).key
    assert Corpus(config, 0).key == before
    path.write_text(path.read_text().replace("tree", "bush"))
    assert Corpus(config, 0).key != before


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    path = write_jsonl(tmp_path / "a.jsonl", made_up(60))
    load(tmp_path, {"source": "jsonl", "paths": str(path)}, tokenizer={"bpe": 300})
    bad = tmp_path / "bad.jsonl"
    bad.write_text(path.read_text() + "{broken\n")
    refused(tmp_path, {"source": "jsonl", "paths": str(bad)})
    assert list(scratch.iterdir()) == []
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"packed", "tokenizers"}
    assert len(list((tmp_path / "cache" / "packed").iterdir())) == 1


def test_an_abandoned_build_is_removed_and_a_live_one_is_not(tmp_path: Path) -> None:
    import os

    old, live = (tmp_path / "cache" / "packed" / f".building-{name}" for name in ("old", "live"))
    for folder in (old, live):
        folder.mkdir(parents=True)
        (folder / "train.bin").write_bytes(b"x")
    for path in (old / "train.bin", old):
        os.utime(path, (1e9, 1e9))
    load(tmp_path, {"source": "jsonl", "paths": str(write_jsonl(tmp_path / "a.jsonl", made_up(60)))})
    assert not old.exists()
    assert live.exists()


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_damaged_cache_is_built_again_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = {"source": "jsonl", "paths": str(write_jsonl(tmp_path / "a.jsonl", made_up(60)))}
    before, _ = load(tmp_path, source, tokenizer={"bpe": 300})
    (packed,), (tokenizer,) = packed_folders(tmp_path), (tmp_path / "cache" / "tokenizers").iterdir()
    files = [path for folder in (packed, tokenizer) for path in folder.iterdir()]
    assert {"train.bin", "holdout.bin", "tokenizer.json", "meta.json"} <= {path.name for path in files}
    whole = {path: path.read_bytes() for path in files}
    for path in files:
        for damage in (_flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes() + b"xx")):
            damage(path)
            caplog.clear()
            after, _ = load(tmp_path, source, tokenizer={"bpe": 300})
            said = [record.getMessage() for record in caplog.records]
            assert said == [f"data.cache: {path.parent} is damaged, and is built again"]
            assert path.read_bytes() == whole[path]
            assert after.fingerprint == before.fingerprint
            assert torch.equal(after.batch(0, 0, 4), before.batch(0, 0, 4))
    assert set((tmp_path / "cache" / "packed").iterdir()) == {packed}


def test_a_file_that_is_cut_after_the_cache_was_checked_is_refused(tmp_path: Path) -> None:
    load(tmp_path, {"source": "jsonl", "paths": str(write_jsonl(tmp_path / "a.jsonl", made_up(60)))})
    (folder,) = packed_folders(tmp_path)
    with (folder / "train.bin").open("ab") as file:
        file.write(b"xx")
    with pytest.raises(InputError, match=f"{folder} is damaged; remove that folder"):
        packing.Packed.open(folder).blocks("train", 32)


# --- bad input --------------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused_by_the_key_to_change(tmp_path: Path) -> None:
    good = str(write_jsonl(tmp_path / "good.jsonl", made_up(60)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero.txt").touch()
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    (tmp_path / "short.jsonl").write_text('{"text": "short"}\n')
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "no.parquet").write_text("this is not parquet")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(Path(good).read_bytes())[:100])
    (tmp_path / "one.txt").write_text("a single file is a single document. " * 50)
    cases: list[tuple[str, str, dict[str, Any], list[str]]] = [
        ("text", "missing.txt", {}, ["data.sources[0].paths", "missing.txt does not exist"]),
        ("text", "*.nothing", {}, ["data.sources[0].paths", "matches no file"]),
        ("text", "empty", {}, ["data.sources[0].paths", "holds no text file"]),
        ("jsonl", "empty", {}, ["data.sources[0].paths", "holds no jsonl file"]),
        ("text", "zero.txt", {}, ["data.sources[0]", "every file is empty"]),
        ("jsonl", "blank.jsonl", {}, ["data.sources[0]", "holds no text"]),
        ("text", "latin.txt", {}, ["data.sources[0]", "no file is UTF-8", "latin.txt"]),
        ("jsonl", "short.jsonl", {}, ["data.sources[0]", "shorter than one block", "data.block_size"]),
        ("jsonl", "good.jsonl", {"block_size": 10**6}, ["shorter than one block", "data.block_size"]),
        ("jsonl", "good.jsonl", {"holdout": 1e-9}, ["data.holdout", "60 documents"]),
        ("jsonl", "good.jsonl", {"holdout": 0.999999}, ["data.holdout", "to train on"]),
        ("text", "one.txt", {}, ["data.holdout", "sample_by"]),
        ("jsonl", "numbers.jsonl", {}, ["data.sources[0].column", "int"]),
        ("jsonl", "broken.jsonl", {}, ["data.sources[0]", "cannot be read"]),
        ("parquet", "no.parquet", {}, ["data.sources[0]", "cannot be read"]),
        ("jsonl", "cut.jsonl.gz", {}, ["data.sources[0]", "cut.jsonl.gz cannot be read"]),
        ("jsonl", "good.jsonl", {"tokenizer": str(tmp_path / "empty")}, ["data.tokenizer", "empty"]),
    ]
    for kind, name, more, words in cases:
        message = refused(tmp_path, {"source": kind, "paths": str(tmp_path / name)}, **more)
        assert all(word in message for word in words), message
    message = refused(tmp_path, {"source": "jsonl", "paths": good, "column": "txt"})
    assert "data.sources[0].column: there is no column 'txt'; there are id, text" in message
    message = refused(
        tmp_path, [{"source": "jsonl", "paths": good}, {"source": "jsonl", "paths": str(tmp_path / "short.jsonl")}]
    )
    assert message.startswith("data.sources[1]")


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    backend: Any = tokenizers.byte_tokenizer()
    PreTrainedTokenizerFast(tokenizer_object=backend.backend_tokenizer).save_pretrained(tmp_path / "endless")
    source = {"source": "jsonl", "paths": str(write_jsonl(tmp_path / "a.jsonl", made_up(60)))}
    assert "end-of-sequence" in refused(tmp_path, source, tokenizer=str(tmp_path / "endless"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    source = {"source": "jsonl", "paths": str(write_jsonl(tmp_path / "a.jsonl", made_up(60)))}
    # Nobody can make a folder there, root included.
    assert refused(tmp_path, source, cache="/proc/shardopt").startswith("data.cache: cannot write /proc/shardopt")
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert refused(tmp_path, source).startswith("data.cache: cannot read")


# --- hub datasets and streams, on local folders laid out like one -----------------------------------------------


def hub_folder(tmp_path: Path, count: int = 400) -> tuple[Path, list[str]]:
    texts = made_up(count)
    for part in range(3):
        write_jsonl(tmp_path / "hub" / f"train-{part}.jsonl", texts[part * count // 3 : (part + 1) * count // 3])
    return tmp_path / "hub", texts


def test_hub_dataset_is_packed(tmp_path: Path) -> None:
    folder, texts = hub_folder(tmp_path)
    train, _ = load(tmp_path, {"source": "hf", "name": str(folder)})
    ((got, held),) = sides(tmp_path)
    assert got == [text for text in texts if not is_held_out(text, 0.2)]
    assert len(got) + len(held) == len(texts)
    write_jsonl(folder / "train-0.jsonl", texts[:50])
    assert load(tmp_path, {"source": "hf", "name": str(folder)})[0].fingerprint != train.fingerprint


def test_hub_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = hub_folder(tmp_path, 30)
    assert "data.sources[0].split: " in refused(tmp_path, {"source": "hf", "name": str(folder), "split": "dev"})
    assert "data.sources[0].column: " in refused(tmp_path, {"source": "hf", "name": str(folder), "column": "txt"})
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for streaming in (False, True):
        source = {"source": "hf", "name": "owner/no-such-corpus", "streaming": streaming}
        message = refused(tmp_path, source)
        assert message.startswith("data.sources[0].name: cannot open 'owner/no-such-corpus'")
        assert "online" in message
    message = refused(tmp_path, {"source": "hf", "name": str(folder)}, tokenizer="owner/no-such-tokenizer")
    assert message.startswith("data.tokenizer: 'owner/no-such-tokenizer'")


def expected_stream(texts: list[str], epochs: int) -> list[int]:
    out: list[int] = []
    for _ in range(epochs):
        for text in texts:
            if not is_held_out(text, 0.2):
                out += [*text.encode(), 256]
    return out


@pytest.mark.parametrize("piece", [1, 700, 1 << 18])
def test_a_stream_is_the_documents_in_order_over_and_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr("shardopt.pretrain.data.streams._STREAM_CHARACTERS", piece)
    folder, texts = hub_folder(tmp_path, 40)
    source = {"source": "hf", "name": str(folder), "streaming": True, "scan": 20}
    train, holdout = load(tmp_path, source)
    assert train.tokens is None
    ids = expected_stream(texts, 4)
    steps = (len(ids) - 1) // 16 // 4
    whole = [train.batch(step, 0, 4) for step in range(steps)]
    for index, row in enumerate(torch.cat(whole).tolist()):
        assert row == ids[16 * index : 16 * index + 17], index
    held = b"".join(text.encode() + b"\0" for text in texts[:20] if is_held_out(text, 0.2))
    assert holdout.tokens == len(held)
    # Ranks take their rows of the same stream.
    other, _ = load(tmp_path, source)
    for step in range(5):
        parts = [other.batch(step, start, start + 1) for start in range(4)]
        assert torch.equal(torch.cat(parts), whole[step])
    # Resuming is exact from a state that went through JSON, in the first epoch and later.
    for stop in (1, 7, steps // 2, steps - 2):
        stopped, _ = load(tmp_path, source)
        for step in range(stop):
            stopped.batch(step, 0, 2)
        state = json.loads(json.dumps(stopped.state_dict(stop)))
        resumed, _ = load(tmp_path, source)
        resumed.load_state_dict(state, stop)
        for step in range(stop, min(stop + 6, steps)):
            assert torch.equal(resumed.batch(step, 0, 4), whole[step])
    # Without a state the stream is read again up to the step; and going back works.
    fresh, _ = load(tmp_path, source)
    assert torch.equal(fresh.batch(steps - 1, 0, 4), whole[steps - 1])
    assert torch.equal(fresh.batch(2, 0, 4), whole[2])


def test_resuming_a_stream_does_not_read_what_came_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardopt.pretrain.data.streams._STREAM_CHARACTERS", 500)
    folder, texts = hub_folder(tmp_path, 60)
    source = {"source": "hf", "name": str(folder), "streaming": True}
    train, _ = load(tmp_path, source)
    for step in range(20):
        train.batch(step, 0, 4)
    wanted = train.batch(20, 0, 4)
    stopped, _ = load(tmp_path, source)
    for step in range(20):
        stopped.batch(step, 0, 4)
    seen: list[str] = []

    texts_in = Corpus.texts

    def watched(self: Corpus, *rows: Any) -> Iterator[str]:
        for text in texts_in(self, *rows):
            seen.append(text)
            yield text

    monkeypatch.setattr(Corpus, "texts", watched)
    resumed, _ = load(tmp_path, source)
    resumed.load_state_dict(stopped.state_dict(20), 20)
    assert torch.equal(resumed.batch(20, 0, 4), wanted)
    assert texts[0] not in seen
    assert 0 < len(seen) < 20


def test_broken_rows_of_a_stream_are_counted_and_left_out_up_to_their_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = made_up(40)
    rows = [json.dumps({"text": text}) for text in texts]
    rows[30:30] = ['{"text": 5}', '{"text": {"a": "b"}}', '{"text": ""}']
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text("\n".join(rows))
    source = {"source": "hf", "name": str(tmp_path / "hub"), "streaming": True, "scan": 30}
    train, _ = load(tmp_path, source, max_broken=0.06)
    ids = expected_stream(texts, 3)
    steps = (len(ids) - 1) // 16 // 4
    whole = torch.cat([train.batch(step, 0, 4) for step in range(steps)]).tolist()
    assert whole == [ids[16 * index : 16 * index + 17] for index in range(len(whole))]
    said = [record.getMessage() for record in caplog.records]
    assert said == ["data.sources[0] (hub): 2 of 43 rows read are broken, and left out: 'text' holds int, not text"]
    strict, _ = load(tmp_path, source)
    listed = rf"{tmp_path}/hub 'text' holds int, not text; {tmp_path}/hub 'text' holds dict, not text$"
    refusal = rf"data\.sources\[0\]: 2 of 34 rows cannot be read, more than .* data\.max_broken = 0\.001: {listed}"
    with pytest.raises(InputError, match=refusal):
        strict.batch(steps - 1, 0, 4)


def test_a_stream_mixes_with_packed_text(tmp_path: Path) -> None:
    folder, _ = hub_folder(tmp_path)
    packed = write_jsonl(tmp_path / "a.jsonl", made_up(60, seed=1))
    mixed = [
        {"source": "hf", "name": str(folder), "streaming": True, "weight": 0.75},
        {"source": "jsonl", "paths": str(packed), "weight": 0.25},
    ]
    train, _ = load(tmp_path, mixed, tokenizer={"bpe": 300})
    whole = [train.batch(step, 0, 4) for step in range(40)]
    alone, _ = load(tmp_path, mixed, tokenizer={"bpe": 300})
    state: dict[str, Any] = {}
    for step in range(40):
        assert torch.equal(torch.cat([alone.batch(step, 2, 4), alone.batch(step, 0, 2)]), whole[step][[2, 3, 0, 1]])
        state = state or (alone.state_dict(18) if step == 17 else {})
    assert list(state["streams"]) == ["0"]
    resumed, _ = load(tmp_path, mixed, tokenizer={"bpe": 300})
    resumed.load_state_dict(state, 18)
    for step in range(18, 40):
        assert torch.equal(resumed.batch(step, 0, 4), whole[step])
    reweighted = [mixed[0] | {"weight": 0.5}, mixed[1]]
    assert load(tmp_path, reweighted, tokenizer={"bpe": 300})[0].fingerprint != train.fingerprint


def test_vocabulary_reaches_to_the_largest_id_where_ids_have_gaps():
    class Gaps(dict):
        eos_token_id = 9

        def get_vocab(self):
            return self

    assert tokenizers.vocab_size(Gaps({"a": 0, "b": 1, "</s>": 9})) == 10


def test_of_a_streams_broken_rows_datasets_hides_a_missing_column_and_refuses_a_lone_surrogate(tmp_path: Path) -> None:
    """As docs/data.md says."""
    rows = [json.dumps({"text": text, "id": 1}) for text in made_up(5)]
    for name, row in {"missing": '{"id": 5}', "surrogate": r'{"text": "half \ud83d", "id": 3}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("\n".join([*rows, row]))

    def read(name: str) -> Tally:
        source = {"source": "hf", "name": str(tmp_path / name), "streaming": True}
        corpus = Corpus(DataConfig.model_validate({"sources": [source], "cache": tmp_path / "cache"}), 0)
        tally = Tally()
        assert len(list(corpus.texts(corpus.stream(), tally))) == 5
        return tally

    tally = read("missing")
    assert (tally.rows, tally.empty, tally.broken) == (6, 1, {})
    with pytest.raises(InputError, match=r"data\.sources\[0\]: cannot be read .*surrogate"):
        read("surrogate")
