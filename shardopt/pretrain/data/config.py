"""The `data:` section: sources of text, tokenizer, block size."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from shardopt.pretrain.section import Section, Tokens, in_unit


class _Source(Section):
    weight: Annotated[float, in_unit("relative to the others")] = Field(default=1.0, ge=0)
    """Share of the samples drawn from this source, relative to the other sources' weights, until a stage of
    train.stages says otherwise; 0: none until then."""
    label: str | None = Field(default=None, pattern=r"^\w[\w.-]*$")
    """What reports and metrics call it; None is its kind or the last part of its name, numbered where several are
    alike."""


class StdlibSource(_Source):
    """The Python sources of the running interpreter's standard library, without its test folders."""

    source: Literal["stdlib"] = "stdlib"


class _FileSource(_Source):
    paths: tuple[str, ...] = Field(min_length=1)
    """Files, folders (searched whole for files of this kind) and globs (`**` crosses folders); one string, or a
    list of them."""

    @field_validator("paths", mode="before", json_schema_input_type=str | tuple[str, ...])
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class TextSource(_FileSource):
    """Plain UTF-8 text. A folder gives every file but hidden, jsonl and parquet ones; what is not UTF-8, or holds
    NUL bytes, is skipped and counted."""

    source: Literal["text"] = "text"
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """The unit of a document: a whole file, a paragraph (split at blank lines), or a line."""


class JsonlSource(_FileSource):
    """One JSON object per line, or a JSON array of objects."""

    source: Literal["jsonl"] = "jsonl"
    column: str = "text"
    """The key that holds a document's text."""


class ParquetSource(_FileSource):
    """Parquet files, one document per row."""

    source: Literal["parquet"] = "parquet"
    column: str = "text"
    """The column that holds a document's text."""


class TokensSource(_FileSource):
    """Token ids that were made elsewhere with `data.tokenizer`: .bin files of nanoGPT or llm.c, whose documents its
    end-of-text token parts, or of Megatron, with the .idx file beside each (`paths` may leave .bin out)."""

    source: Literal["tokens"] = "tokens"
    dtype: Literal["uint16", "uint32"] = "uint16"
    """Of the ids in a file that does not say, as nanoGPT's."""


class HfSource(_Source):
    """A dataset of the Hugging Face hub, or a local folder laid out like one."""

    source: Literal["hf"] = "hf"
    name: str
    """Name on the hub (`owner/name`), or a folder."""
    subset: str | None = None
    """Configuration of the dataset, where it has several."""
    split: str = "train"
    """Split to read."""
    revision: str | None = None
    """Branch, tag or commit; None is the newest."""
    commit: str | None = None
    """The commit that `revision` was at when the run began: found and recorded then, and opened again on resume."""
    column: str = "text"
    """The column that holds a document's text."""
    streaming: bool = False
    """Read documents in order while training, instead of downloading and packing all of them first; the order is
    the dataset's own."""
    shards: Annotated[int, in_unit("shards")] = Field(default=1, ge=1)
    """Streaming only: cut the dataset into so many shards, each read in order, and take samples from them in turn. A
    multiple of the ranks lets each read and tokenise only its share; it needs as many files, else each shard reads all
    of them and keeps every so-manyth document."""
    scan: Annotated[int, in_unit("documents")] = Field(default=10_000, ge=1)
    """Streaming only: how many documents are read ahead, once, for held-out text, for training a bpe
    tokenizer and for the bytes per token."""


class ByteTokenizer(Section):
    """One token per UTF-8 byte, and one for the end of a document: 257 tokens."""

    type: Literal["byte"] = "byte"


class BpeTokenizer(Section):
    """Byte-level byte-pair encoding, trained on the training documents and kept in the cache."""

    type: Literal["bpe"] = "bpe"
    vocab_size: Tokens = Field(default=4096, ge=257)
    """Tokens at most; fewer where the corpus has too few pairs to merge."""
    train_mb: int = Field(default=512, ge=1)
    """Megabytes of text to train on, shared among the sources by weight; each source's first documents."""


class PathTokenizer(Section):
    """A transformers tokenizer."""

    type: Literal["path"] = "path"
    path: str
    """A folder, or a name on the hub."""
    revision: str | None = None
    """On the hub: branch, tag or commit; None is the newest."""
    commit: str | None = None
    """On the hub: the commit that `revision` was at when the run began, recorded then."""
    trust_remote_code: bool = False
    """Run the Python code that comes with it, if it needs any."""


def holds_tokenizer(folder: Path) -> bool:
    """True where a transformers tokenizer was saved in `folder`."""
    return any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model"))


Source = Annotated[
    StdlibSource | TextSource | JsonlSource | ParquetSource | TokensSource | HfSource, Field(discriminator="source")
]
Tokenizer = Annotated[ByteTokenizer | BpeTokenizer | PathTokenizer, Field(discriminator="type")]


class _BpeInShort(TypedDict):
    bpe: int


class DataConfig(Section):
    """The text that the model is trained and evaluated on, its tokenizer, and how it is cut into blocks."""

    sources: tuple[Source, ...] = Field(default=(StdlibSource(),), min_length=1)
    """Where the text comes from: a source, or a list of them to mix by weight; `stdlib` is {source: stdlib}."""
    tokenizer: Tokenizer = ByteTokenizer()
    """`byte`, `bpe`, `{bpe: VOCAB_SIZE}`, or a transformers tokenizer: its folder or its name on the hub. By default
    the one in the folder of model.path, or with it on the hub, if it has one, else byte."""
    block_size: Tokens = Field(default=256, ge=1)
    """Target tokens of a sequence; a block has one more, because targets are the inputs shifted by one."""
    document_mask: bool = False
    """Attention stays within a document, which begins with the end of the one before it, and positions begin at 0 with
    each. False: a block is one text, though several documents stand in it."""
    holdout: Annotated[float, in_unit("share of the documents")] = Field(default=0.01, gt=0, lt=1)
    """Share of the documents kept out of training, chosen by a hash of their text."""
    max_broken: Annotated[float, in_unit("share of the rows")] = Field(default=0.001, ge=0, lt=1)
    """Largest share of a source's rows that may be broken, and are counted and left out: no JSON, no such column, no
    text. A row with half a character is broken too, but stays, with U+FFFD in its place."""
    prefetch: Annotated[int, in_unit("batches")] = Field(default=4, ge=0)
    """Batches that a thread prepares ahead of the step; 0: each is prepared when its step begins."""
    cache: Path | None = None
    """Where tokenizers and packed tokens are kept; None is $XDG_CACHE_HOME/shardopt/data, or
    ~/.cache/shardopt/data without that variable."""

    @field_validator(
        "sources",
        mode="before",
        json_schema_input_type=tuple[Source | Literal["stdlib"], ...] | Source | Literal["stdlib"],
    )
    @classmethod
    def _short_sources(cls, value: Any) -> Any:
        sources = value if isinstance(value, list | tuple) else (value,)
        if not all(isinstance(source, str | dict | Section) for source in sources):
            raise ValueError("must be a list of sources, such as [{source: stdlib}]")
        return tuple({"source": source} if isinstance(source, str) else source for source in sources)

    @field_validator("tokenizer", mode="before", json_schema_input_type=Tokenizer | _BpeInShort | str)
    @classmethod
    def _short_tokenizer(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"type": value} if value in ("byte", "bpe") else {"type": "path", "path": value}
        if isinstance(value, dict) and value.keys() == {"bpe"}:
            return {"type": "bpe", "vocab_size": value["bpe"]}
        if isinstance(value, dict) and "path" in value:
            return {"type": "path", **value}
        if isinstance(value, Section) or (isinstance(value, dict) and "type" in value):
            return value
        raise ValueError("must be byte, bpe, {bpe: VOCAB_SIZE}, or {path: FOLDER_OR_NAME}")

    @property
    def labels(self) -> list[str]:
        """A name for each source, no two alike."""
        names = [
            one.label or re.sub(r"[^\w.-]", "-", getattr(one, "name", one.source).rstrip("/").split("/")[-1])
            for one in self.sources
        ]
        return [name if names.count(name) == 1 else f"{name}-{index}" for index, name in enumerate(names)]

    @property
    def weights(self) -> dict[str, float]:
        """Of the sources, by label."""
        return dict(zip(self.labels, (one.weight for one in self.sources), strict=True))

    @property
    def cache_folder(self) -> Path:
        if self.cache is not None:
            return self.cache
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardopt" / "data"
