"""Files of token ids that others have made: nanoGPT's and llm.c's .bin, and Megatron's .bin with its .idx."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shardopt.errors import InputError
from shardopt.pretrain.data import reading
from shardopt.pretrain.data.reading import Document, Piece, Place, Tally

if TYPE_CHECKING:
    from shardopt.pretrain.data.tokenizers import SavedTokenizer

# llm.c, dev/data/data_common.py: magic number, version, dtype of the ids that follow 256 int32.
_LLMC_HEADER = 1024
_LLMC = {(20240520, 1): np.uint16, (20240801, 7): np.uint32}
# Megatron-LM, megatron/core/datasets/indexed_dataset.py: magic, version, dtype code, sequences, document indices.
_MEGATRON = struct.Struct("<9sQBQQ")
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


@dataclass(frozen=True)
class TokenFile:
    """Token ids of a file, through a memory map, and where its documents begin, if it says.

    Attributes:
        starts: first token of each document, and the number of tokens at the end; None: a token ends each.
    """

    path: Path
    ids: np.ndarray
    starts: np.ndarray | None

    @classmethod
    def open(cls, path: Path, dtype: str) -> TokenFile:
        """The file, in whichever of the formats it is.

        Args:
            dtype: of the ids of a file that does not say.

        Raises:
            ValueError: it is damaged.
        """
        if index_of(path).exists():
            return cls._megatron(path)
        size = path.stat().st_size
        if size >= _LLMC_HEADER:
            magic, version, tokens = np.fromfile(path, "<i4", 3).tolist()
            if (kind := _LLMC.get((magic, version))) is not None:
                if size != _LLMC_HEADER + tokens * np.dtype(kind).itemsize:
                    raise ValueError(f"its header says {tokens:,} tokens, which are not {size:,} bytes")
                return cls(path, np.memmap(path, kind, "r", _LLMC_HEADER), None)
        if size % np.dtype(dtype).itemsize:
            raise ValueError(f"its {size:,} bytes are no whole number of {dtype}")
        return cls(path, np.memmap(path, dtype, "r"), None)

    @classmethod
    def _megatron(cls, path: Path) -> TokenFile:
        index = index_of(path).read_bytes().ljust(_MEGATRON.size)
        magic, version, code, sequences, documents = _MEGATRON.unpack_from(index)
        if magic != _MEGATRON_MAGIC or version != 1 or code not in _MEGATRON_DTYPES:
            raise ValueError(f"{index_of(path).name} is no index of Megatron's with ids of whole numbers")
        if _MEGATRON.size + 12 * sequences + 8 * documents > len(index):
            raise ValueError(f"{index_of(path).name} is cut short: it says {sequences:,} sequences")
        sizes = np.frombuffer(index, "<i4", sequences, _MEGATRON.size)
        # The byte where each sequence begins follows from the sizes; then the sequence that each document begins with.
        bounds = np.frombuffer(index, "<i8", documents, _MEGATRON.size + 12 * sequences)
        if (sizes < 0).any() or [*bounds[:1], *bounds[-1:]] != [0, sequences] or (np.diff(bounds) < 0).any():
            raise ValueError(f"{index_of(path).name} has documents that are not made of its {sequences:,} sequences")
        dtype, size = np.dtype(_MEGATRON_DTYPES[code]), path.stat().st_size
        ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        if ends[-1] * dtype.itemsize != size:
            raise ValueError(f"{index_of(path).name} says {ends[-1]:,} tokens of {dtype}, which are not {size:,} bytes")
        return cls(path, np.memmap(path, dtype, "r"), ends[bounds])

    def pieces(self) -> list[Piece]:
        """The documents that begin among some tokens, or some documents, at a time."""
        width = self.ids.itemsize
        if self.starts is None:
            step, count = reading.PIECE_BYTES // width, len(self.ids)
            size = step * width
        else:
            count = len(self.starts) - 1
            size = reading.PIECE_BYTES
            step = max(1, count * size // max(1, len(self.ids) * width))
        ranges = [(at, min(at + step, count)) for at in range(0, count, step)]
        return [Piece(self.path, size, start, stop, start, len(ranges) == 1) for start, stop in ranges]

    def documents(self, piece: Piece, eos: int) -> Iterator[np.ndarray]:
        """The ids of each document of a piece, without the token `eos` at either end."""
        if self.starts is not None:
            for first, last in zip(self.starts[piece.start : piece.stop], self.starts[piece.start + 1 :], strict=False):
                yield _stripped(self.ids[first:last], eos)
            return
        at = piece.start
        if at:  # the document that is under way belongs to the piece before
            at = self._end(at - 1, eos) + 1
        while at < piece.stop:
            end = self._end(at, eos)
            yield _stripped(self.ids[at:end], eos)
            at = end + 1

    def _end(self, at: int, eos: int) -> int:
        """The place of the next `eos` from `at` on."""
        for start in range(at, len(self.ids), 1 << 16):
            found = np.flatnonzero(self.ids[start : start + (1 << 16)] == eos)
            if len(found):
                return start + int(found[0])
        return len(self.ids)


def _stripped(ids: np.ndarray, eos: int) -> np.ndarray:
    if len(ids) and ids[-1] == eos:
        ids = ids[:-1]
    return ids[1:] if len(ids) and ids[0] == eos else ids


def index_of(path: Path) -> Path:
    """Megatron's index of a file, which may be there."""
    return path.with_suffix(".idx")


def read_tokens(
    file: TokenFile, piece: Piece, tally: Tally, tokenizer: SavedTokenizer, where: str
) -> Iterator[Document]:
    """The documents of a piece of a file.

    Raises:
        InputError: an id that the tokenizer does not have.
    """
    text_bytes = tokenizer.token_bytes()
    for number, ids in enumerate(file.documents(piece, tokenizer.eos), piece.first + 1):
        tally.rows += 1
        if not len(ids):
            tally.empty += 1
            continue
        if ids.max() >= tokenizer.vocab_size or ids.min() < 0:
            bad = ids.max() if ids.max() >= tokenizer.vocab_size else ids.min()
            raise InputError(
                f"{where}: {file.path} holds the id {bad}, and data.tokenizer has {tokenizer.vocab_size}: take the "
                f"tokenizer that the file was made with, and for ids of 32 bits dtype: uint32"
            )
        place = Place(str(file.path), 0, number if file.starts is not None else 0)
        yield Document("", place, ids.astype(tokenizer.dtype), int(text_bytes[ids].sum()))
