"""Ready-made files of token ids, in the three formats that people have."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardopt.pretrain.data import reading
from shardopt.pretrain.data.packing import is_held_out
from tests.pretrain.test_data import documents_in, load, made_up, packed_folders, refused

EOS = 256
TEXTS = made_up(40)
IDS = [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in TEXTS]


def nanogpt(path: Path) -> Path:
    """As nanoGPT's data/openwebtext/prepare.py: each document, then the end-of-text token."""
    np.concatenate([part for ids in IDS for part in (ids, [EOS])]).astype(np.uint16).tofile(path)
    return path


def llmc(path: Path) -> Path:
    """As llm.c's dev/data/data_common.py: a header of 256 int32; the end-of-text token, then each document."""
    ids = np.concatenate([part for ids in IDS for part in ([EOS], ids)]).astype(np.uint16)
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(ids)
    path.write_bytes(header.tobytes() + ids.tobytes())
    return path


def megatron(path: Path, end: list[int], per_document: int = 1) -> Path:
    """As Megatron's indexed_dataset.py; a document may have several sequences."""
    sequences = [part for ids in IDS for part in np.array_split(np.concatenate([ids, end]), per_document)]
    sizes = np.asarray([len(one) for one in sequences], np.int32)
    np.concatenate(sequences).astype(np.int32).tofile(path)
    pointers = np.concatenate([[0], np.cumsum(4 * sizes[:-1], dtype=np.int64)])
    documents = np.arange(0, len(sequences) + 1, per_document, dtype=np.int64)
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, len(sizes), len(documents))
    index = head + sizes.tobytes() + pointers.astype(np.int64).tobytes() + documents.tobytes()
    path.with_suffix(".idx").write_bytes(index)
    return path


def test_every_format_gives_the_same_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        "nanogpt": nanogpt(tmp_path / "nanogpt.bin"),
        "llmc": llmc(tmp_path / "llmc.bin"),
        "megatron": megatron(tmp_path / "megatron.bin", []),
        "with ends": megatron(tmp_path / "ends.bin", [EOS]),
        "parts": megatron(tmp_path / "parts.bin", [EOS], per_document=3),
    }
    expected: Any = None
    for piece in (1 << 24, 300):
        monkeypatch.setattr(reading, "PIECE_BYTES", piece)
        for name, path in made.items():
            home = tmp_path / f"{name}-{piece}"
            train, holdout = load(home, {"source": "tokens", "paths": str(path)})
            (folder,) = packed_folders(home)
            sides = [np.fromfile(folder / f"{side}.bin", np.uint16) for side in ("train", "holdout")]
            documents = [documents_in(ids, EOS) for ids in sides]
            held = [is_held_out(ids.tobytes(), 0.2) for ids in IDS]
            assert documents[0] == [text for text, out in zip(TEXTS, held, strict=True) if not out]
            assert documents[1] == [text for text, out in zip(TEXTS, held, strict=True) if out]
            packed = train.corpora[0]
            assert packed.train.bytes + packed.holdout.bytes == sum(len(text.encode()) for text in TEXTS)
            assert packed.longest[0]["tokens"] == max(len(ids) for ids in IDS) + 1
            expected = expected or [ids.tolist() for ids in sides]
            assert [ids.tolist() for ids in sides] == expected
            assert holdout.target_bytes(holdout.batch(0, holdout.n_blocks)) > 0
    # Megatron's own way to name them.
    assert load(tmp_path / "named", {"source": "tokens", "paths": str(tmp_path / "megatron")})[0].tokens == train.tokens


def test_ids_of_32_bits_are_read_as_asked(tmp_path: Path) -> None:
    np.concatenate([part for ids in IDS for part in (ids, [EOS])]).astype(np.uint32).tofile(tmp_path / "wide.bin")
    source = {"source": "tokens", "paths": str(tmp_path / "wide.bin"), "dtype": "uint32"}
    assert (
        load(tmp_path, source)[0].tokens
        == load(tmp_path, {"source": "tokens", "paths": str(nanogpt(tmp_path / "a.bin"))})[0].tokens
    )


def test_what_cannot_be_such_a_file_is_refused(tmp_path: Path) -> None:
    good = nanogpt(tmp_path / "good.bin")
    ids = np.fromfile(good, np.uint16)
    ids[7] = 300
    ids.tofile(tmp_path / "large.bin")
    (tmp_path / "odd.bin").write_bytes(good.read_bytes()[:-1])
    np.full(1000, 65, np.uint16).tofile(tmp_path / "endless.bin")
    (tmp_path / "cut.bin").write_bytes(llmc(tmp_path / "whole.bin").read_bytes()[:-2])
    megatron(tmp_path / "other.bin", []).write_bytes(good.read_bytes())
    megatron(tmp_path / "not.bin", []).with_suffix(".idx").write_bytes(b"x" * 100)
    (tmp_path / "none.bin").write_bytes(good.read_bytes())
    (tmp_path / "none.idx").write_bytes(b"x")
    for name, words in {
        "large.bin": "holds the id 300, and data.tokenizer has 257: take the tokenizer that the file was made with",
        "odd.bin": "odd.bin cannot be read (its",
        "endless.bin": "does not part documents in",
        "cut.bin": "cut.bin cannot be read (its header says",
        "other.bin": "other.idx says",
        "not.bin": "not.idx is no index of Megatron's",
        "none.bin": "none.idx is no index of Megatron's",
    }.items():
        message = refused(tmp_path, {"source": "tokens", "paths": str(tmp_path / name)})
        assert words in message, message
        assert message.startswith("data.sources[0]")
    message = refused(tmp_path, {"source": "tokens", "paths": str(good)}, tokenizer={"bpe": 300})
    assert "data.sources[0]: has no text to train a bpe on; set data.tokenizer" in message
