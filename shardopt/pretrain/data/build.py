"""From the config to the data of a run: build what the cache lacks once, then open it on every rank."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shardopt.distributed import Ranks
from shardopt.errors import InputError
from shardopt.pretrain.data.batches import HoldoutData, Shuffled, TrainData
from shardopt.pretrain.data.config import BpeTokenizer, ByteTokenizer, DataConfig, HfSource, holds_tokenizer
from shardopt.pretrain.data.packing import (
    FORMAT,
    Packed,
    aside,
    checksum,
    is_built,
    is_held_out,
    read_meta,
    write_meta,
)
from shardopt.pretrain.data.parts import join, pack_parts
from shardopt.pretrain.data.sources import Corpus, digest
from shardopt.pretrain.data.stages import StageConfig, Stages
from shardopt.pretrain.data.streams import Stream
from shardopt.pretrain.data.tokenizers import (
    SavedTokenizer,
    byte_tokenizer,
    check_same_ids,
    content_key,
    load_path,
    save,
    train_bpe,
    vocab_size,
)

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

logger = logging.getLogger("shardopt.data")

T = TypeVar("T")
CheckTokenizer = Callable[[str | None], None]
"""Takes the key of a tokenizer; None before one is trained, which may take long."""


def prepare(
    config: DataConfig,
    ranks: Ranks,
    seed: int,
    global_batch: int,
    weights: Path | None = None,
    processes: int = 1,
    check: CheckTokenizer | None = None,
    stages: Sequence[StageConfig] | None = None,
) -> tuple[TrainData, HoldoutData]:
    """Tokenise and pack what the cache lacks, and open it. A collective.

    Rank 0 builds. A node that does not see rank 0's cache folder builds its own, by its first rank. The
    others wait, however long it takes: the waiting is many short collectives, not one long one.

    Args:
        config: the `data:` section.
        ranks: this process among the others.
        seed: decides the order of the samples and how sources are mixed, not what is held out.
        global_batch: sequences per step, over all ranks, until a stage says otherwise.
        weights: the folder of a trained model, whose tokenizer must give the same ids.
        processes: that tokenise; with more than 1 the program must begin under `if __name__ == "__main__"`.
        check: raises InputError where the tokenizer does not fit; called before the text is tokenised.
        stages: another batch, or other weights of the sources, from a step on.

    Raises:
        InputError: on every rank; the message names the key to change.
    """
    of_steps = Stages(config.weights, global_batch, stages or ())
    build = partial(_build, config, weights, processes, check, progress=ranks.is_main)
    folders = ranks.from_main(_while_others_wait(ranks, build if ranks.is_main else None) or [])
    lacking = not all((folder / "meta.json").exists() for folder in folders)
    if ranks.any(lacking):
        _while_others_wait(ranks, build if lacking and ranks.local_rank == 0 else None)
        # Finds what this node's first rank has just built.
        folders = ranks.together(lambda: build() if lacking else folders)
    train, holdout = ranks.together(lambda: _open(config, folders, seed, of_steps))
    fingerprints = ranks.gather(train.fingerprint)
    for rank, fingerprint in enumerate(fingerprints):
        if fingerprint != fingerprints[0]:
            raise InputError(
                f"data.sources: rank {rank}'s machine holds other text, or another tokenizer, than rank 0's; copy the "
                f"same files to every machine"
            )
    if ranks.is_main:
        for index, corpus in enumerate(train.corpora):
            if corpus.skipped:
                examples = ", ".join(corpus.tally.skipped_examples[:3])
                message = "data.sources[%d]: skipped %d files that are not UTF-8 text (%s)"
                logger.warning(message, index, corpus.skipped, examples)
        for index, source in enumerate(train.sources):
            if isinstance(source, Stream) and source.shards % ranks.world_size:
                message = "data.sources[%d].shards: %d is no multiple of %d ranks: each tokenises more than its share"
                logger.warning(message, index, source.shards, ranks.world_size)
        shape, size = config.tokenizer, train.vocab_size
        if isinstance(shape, BpeTokenizer) and size < shape.vocab_size:
            message = "data.tokenizer: bpe has %d tokens instead of %d: the text has no more pairs to merge"
            logger.warning(message, size, shape.vocab_size)
    return train, holdout


def _while_others_wait(ranks: Ranks, action: Callable[[], T] | None) -> T | None:
    """Run `action` on the ranks that have one, while all meet so often that no collective times out.

    Raises:
        InputError, RuntimeError: as `Ranks.together`, on every rank.
    """
    if not ranks.distributed:
        return action() if action else None
    future: Future[T | None] = Future()

    def work() -> None:
        try:
            future.set_result(action() if action else None)
        except Exception as error:
            future.set_exception(error)

    # Not an executor's thread, which would keep an interrupted process from ending.
    threading.Thread(target=work, daemon=True).start()
    pause = 0.01
    while ranks.any(not future.done()):
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    return ranks.together(future.result)


def _build(
    config: DataConfig, weights: Path | None, processes: int, check: CheckTokenizer | None, progress: bool
) -> list[Path]:
    """Build what the cache lacks for `config`; the folders of the tokenizer and of each source's packed tokens."""
    corpora = [Corpus(config, index) for index in range(len(config.sources))]
    tokenizer = _build_tokenizer(config, corpora, check, progress)
    if check is not None:
        check(tokenizer.key)
    if weights is not None:
        if holds_tokenizer(weights):
            check_same_ids(tokenizer, weights)
        else:
            logger.warning("model.path holds no tokenizer: its weights must have been trained on data.tokenizer's ids")
    packed = [_build_packed(config, corpus, tokenizer, processes, progress) for corpus in corpora]
    return [tokenizer.folder, *packed]


def _build_tokenizer(
    config: DataConfig, corpora: list[Corpus], check: CheckTokenizer | None, progress: bool
) -> SavedTokenizer:
    root = config.cache_folder / "tokenizers"
    shape = config.tokenizer
    if isinstance(shape, (ByteTokenizer, BpeTokenizer)):
        what = shape.model_dump(mode="json")
        trained_on = [config.holdout, [(one.key, one.source.model_dump(include={"weight", "scan"})) for one in corpora]]
        folder = root / digest(FORMAT, what, trained_on if isinstance(shape, BpeTokenizer) else None)
        make = byte_tokenizer if isinstance(shape, ByteTokenizer) else lambda: _train(config, shape, corpora, progress)
    else:
        loaded = load_path(shape)
        folder = root / digest(FORMAT, content_key(loaded))
        make = lambda: loaded  # noqa: E731
    if not is_built(folder):
        if check is not None and isinstance(shape, BpeTokenizer):
            check(None)
        with aside(folder) as building:
            tokenizer = make()
            meta = {
                "key": save(tokenizer, building),
                "vocab_size": vocab_size(tokenizer),
                "eos": tokenizer.eos_token_id,
                "is_bytes": isinstance(shape, ByteTokenizer),
            }
            write_meta(building, meta, {path.name: checksum(path) for path in building.iterdir() if path.is_file()})
    return _saved_tokenizer(config, folder)


def _saved_tokenizer(config: DataConfig, folder: Path) -> SavedTokenizer:
    trusted = getattr(config.tokenizer, "trust_remote_code", False)  # the cache is not asked
    return SavedTokenizer(folder=folder, trust_remote_code=trusted, **read_meta(folder))


def _train(config: DataConfig, shape: BpeTokenizer, corpora: list[Corpus], progress: bool) -> Any:
    total_weight = sum(corpus.source.weight for corpus in corpora)

    def texts(tick: Callable[[int], None]) -> Iterator[str]:
        for corpus in corpora:
            left = shape.train_mb * 1e6 * corpus.source.weight / total_weight
            for text in corpus.documents():
                if left <= 0:
                    break
                if not is_held_out(text, config.holdout):
                    left -= len(text.encode())
                    tick(1)
                    yield text

    with _counter(f"training a bpe tokenizer of {shape.vocab_size}", progress) as tick:
        return train_bpe(texts(tick), shape.vocab_size)


def _build_packed(
    config: DataConfig, corpus: Corpus, tokenizer: SavedTokenizer, processes: int, progress: bool
) -> Path:
    scan = corpus.source.scan if isinstance(corpus.source, HfSource) and corpus.source.streaming else None
    key = digest(FORMAT, corpus.key, tokenizer.key, config.holdout, scan)
    folder, kept = config.cache_folder / "packed" / key, config.cache_folder / "packed" / f".parts-{key}"
    if is_built(folder):
        packed = Packed.open(folder)
        corpus.check(packed.tally, packed.documents, config.max_broken)  # which may be another now
        return folder
    with aside(folder) as building:
        with _bar(f"tokenising {corpus.label}", progress) as tick:
            parts = pack_parts(corpus, tokenizer, config.holdout, kept, processes, tick)
        joined = join(parts, building)
        try:
            corpus.check(joined.tally, sum(side.documents for side in joined.sides.values()), config.max_broken)
        except InputError:
            if len(parts) == 1:  # else what took long is not to be done again with another data.max_broken
                shutil.rmtree(kept)
            raise
        meta = {
            "corpus": corpus.key,
            "dtype": tokenizer.dtype.name,
            "tally": asdict(joined.tally),
            "longest": joined.longest,
            **{side: asdict(one) for side, one in joined.sides.items()},
        }
        write_meta(building, meta, {f"{side}.bin": one.sha256 for side, one in joined.sides.items()})
    shutil.rmtree(kept, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _counter(label: str, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr that counts documents; how many there are is not known before they are read."""
    from rich.progress import BarColumn, TimeElapsedColumn

    with _progress(shown, BarColumn(), "{task.completed:,} documents", TimeElapsedColumn()) as bar:
        task = bar.add_task(label, total=None)
        yield lambda documents: bar.advance(task, documents)
        bar.update(task, total=bar.tasks[0].completed)


@contextlib.contextmanager
def _bar(label: str, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that is told the bytes done and in all."""
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn

    with _progress(shown, BarColumn(), DownloadColumn(), TimeRemainingColumn(elapsed_when_finished=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _progress(shown: bool, *columns: str | ProgressColumn) -> Progress:
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    described = TextColumn("{task.description}", markup=False)  # a source's label among it
    return Progress(described, *columns, console=Console(stderr=True), disable=not shown)


def _open(config: DataConfig, folders: list[Path], seed: int, stages: Stages) -> tuple[TrainData, HoldoutData]:
    tokenizer = _saved_tokenizer(config, folders[0])
    packed = [Packed.open(folder) for folder in folders[1:]]
    sources: list[Shuffled | Stream] = []
    for index, (shape, one) in enumerate(zip(config.sources, packed, strict=True)):
        where = f"data.sources[{index}]"
        blocks = one.blocks("train", config.block_size)
        if blocks.n_blocks == 0:
            if one.train.tokens + one.holdout.tokens <= config.block_size:
                raise InputError(
                    f"{where}: the corpus is shorter than one block ({one.train.tokens + one.holdout.tokens} "
                    f"tokens; a block takes {config.block_size + 1}); lower data.block_size or add text"
                )
            raise InputError(
                f"data.holdout: {config.holdout} leaves {where} {one.train.tokens} tokens in "
                f"{one.train.documents} documents to train on, less than a block of {config.block_size + 1}; "
                f"lower data.holdout or data.block_size, or cut documents smaller (a text source's sample_by)"
            )
        if isinstance(shape, HfSource) and shape.streaming:
            sources.append(Stream(Corpus(config, index), tokenizer, config.holdout, config.block_size, shape.shards))
        else:
            sources.append(Shuffled(blocks, seed, index))
    holdout_tokens = sum(one.holdout.tokens for one in packed)
    held_out = [one.blocks("holdout", config.block_size) for one in packed]
    holdout = HoldoutData(held_out, config.block_size, holdout_tokens, tokenizer.token_bytes(), config.labels)
    if holdout.n_blocks == 0:
        documents = sum(one.train.documents + one.holdout.documents for one in packed)
        raise InputError(
            f"data.holdout: {config.holdout} of {documents} documents gives {holdout_tokens} tokens, less "
            f"than a block of {config.block_size + 1}; cut documents smaller (a text source "
            f"takes sample_by: paragraph, or line), raise data.holdout, or lower data.block_size"
        )
    weights = [shape.weight for shape in config.sources]
    contents = [(one.train.sha256, one.holdout.sha256, one.corpus) for one in packed]
    shards = [one.shards for one in sources if isinstance(one, Stream)]
    cut = [shards] if max(shards, default=1) > 1 else []
    train = TrainData(
        sources,
        stages,
        tokenizer,
        block_size=config.block_size,
        seed=seed,
        tokens=None if any(isinstance(one, Stream) for one in sources) else sum(one.train.tokens for one in packed),
        fingerprint=digest(contents, weights, tokenizer.key, config.block_size, *cut),
        corpora=packed,
    )
    return train, holdout
