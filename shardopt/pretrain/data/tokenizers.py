"""The tokenizer of a run: bytes, BPE trained on the corpus, or one of transformers'; kept in the cache."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shardopt.errors import InputError
from shardopt.pretrain.data.config import PathTokenizer
from shardopt.pretrain.data.sources import digest

if TYPE_CHECKING:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
_BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")

Encode = Callable[[list[str]], list[np.ndarray]]


@dataclass(frozen=True)
class SavedTokenizer:
    """A tokenizer in the cache, loaded when it is first needed.

    Attributes:
        folder: what `transformers.AutoTokenizer.from_pretrained` loads.
        key: hash of everything that decides the ids it gives.
        vocab_size: see `vocab_size`.
        eos: id of the token that ends a document.
        is_bytes: ids are UTF-8 bytes.
        trust_remote_code: run the code that was saved with it.
    """

    folder: Path
    key: str
    vocab_size: int
    eos: int
    is_bytes: bool
    trust_remote_code: bool = False

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def load(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of the text that each id stands for: int64, [vocab_size]; none for special tokens.

        Exact for bytes and byte-level vocabularies; elsewhere it is the length of the token's piece, which leaves
        out what the tokenizer changed in the text.
        """
        table = np.ones(self.vocab_size, np.int64)
        if not self.is_bytes:
            tokenizer: Any = self.load()
            byte_level = tokenizer.is_fast and "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
            added = tokenizer.get_added_vocab()
            for piece, number in tokenizer.get_vocab().items():
                if byte_level and piece not in added:
                    table[number] = len(piece)  # a character stands for a byte
                elif not _BYTE_FALLBACK.fullmatch(piece):
                    table[number] = len(piece.replace("\u2581", " ").removeprefix("##").encode())
            table[tokenizer.all_special_ids] = 0
        table[self.eos] = 0
        return table

    def encoder(self) -> Encode:
        """A function from texts to arrays of ids, on all cores (the tokenizers library's threads).

        Special tokens spelled out in the text are text: a document cannot end itself. None is added.
        """
        if self.is_bytes:
            return lambda texts: [np.frombuffer(text.encode(), np.uint8) for text in texts]
        tokenizer: Any = self.load()
        if tokenizer.is_fast:
            backend = tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = True

        def encode(texts: list[str]) -> list[np.ndarray]:
            if tokenizer.is_fast:
                rows = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
            else:
                rows = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            return [np.asarray(row, self.dtype) for row in rows]

        return encode


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Id b is the byte b, 256 ends a document."""
    from tokenizers import models
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # GPT-2's spelling of bytes, which ByteLevel uses

    model = models.BPE(vocab={char: byte for byte, char in bytes_to_unicode().items()}, merges=[])
    return _transformers(_backend(model, use_regex=False))


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of at most `vocab_size` tokens, the end of a document among them."""
    from tokenizers import models, pre_tokenizers, trainers

    backend = _backend(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _transformers(backend)


def load_path(config: PathTokenizer) -> PreTrainedTokenizerBase:
    """The transformers tokenizer in a folder or on the hub; its code, if it has any, is run only where that is asked.

    Raises:
        InputError: there is no such tokenizer, or it has no end-of-sequence token, or it needs code of its own.
    """
    from transformers import AutoTokenizer

    try:
        revision = config.commit or config.revision
        of = {} if revision is None else {"revision": revision}
        tokenizer = AutoTokenizer.from_pretrained(config.path, trust_remote_code=config.trust_remote_code, **of)
    except (OSError, ValueError, ImportError) as error:
        advice = f"; to run it, write data.tokenizer='{{path: {config.path}, trust_remote_code: true}}'"
        raise InputError(
            f"data.tokenizer: {config.path!r} is neither byte nor bpe, and transformers loads no tokenizer "
            f"from it ({str(error).strip().splitlines()[0]}){advice if 'trust_remote_code' in str(error) else ''}; "
            f"offline, give byte, a folder that has one, or {{bpe: 50257}}, which is trained on your own text"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"data.tokenizer: {config.path!r} has no end-of-sequence token to put between documents")
    return tokenizer


def check_same_ids(tokenizer: SavedTokenizer, folder: Path) -> None:
    """Raise InputError where the tokenizer in `folder`, a model's, gives other ids than `tokenizer`."""
    theirs = PathTokenizer(path=str(folder), trust_remote_code=tokenizer.trust_remote_code)
    if content_key(load_path(theirs)) != tokenizer.key:
        raise InputError(
            f"data.tokenizer: gives other ids than the tokenizer in model.path, which the weights there were trained "
            f"on; leave data.tokenizer out, or write data.tokenizer='{{path: {folder}}}'"
        )


def content_key(tokenizer: Any) -> str:
    """A hash of what decides the ids that the tokenizer gives."""
    with tempfile.TemporaryDirectory(prefix="shardopt-") as scratch:
        return save(tokenizer, Path(scratch))


def save(tokenizer: Any, folder: Path) -> str:
    """Write the tokenizer and return its `content_key`."""
    tokenizer.save_pretrained(folder)
    # tokenizer_config.json also holds paths and versions; a fast tokenizer is wholly in tokenizer.json.
    fast = folder / "tokenizer.json"
    files = [fast] if fast.exists() else sorted(path for path in folder.iterdir() if path.is_file())
    content = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return digest(content, tokenizer.eos_token_id)


def vocab_size(tokenizer: Any) -> int:
    """One more than the largest id."""
    return max([len(tokenizer), *(number + 1 for number in tokenizer.get_vocab().values())])


def _backend(model: models.Model, use_regex: bool) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    return backend


def _transformers(backend: Tokenizer) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)
