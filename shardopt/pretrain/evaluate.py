"""`shardopt eval`: what a trained model makes of text: its loss, and bits per byte of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from rich import box
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from shardopt.distributed import Ranks
from shardopt.engines.base import autocast_forward
from shardopt.errors import InputError
from shardopt.pretrain import data
from shardopt.pretrain.config_errors import explain
from shardopt.pretrain.data.config import DataConfig
from shardopt.pretrain.data.text_sets import Reader, TextSet
from shardopt.pretrain.data.tokenizers import SavedTokenizer, vocab_size
from shardopt.pretrain.loss import loss_in_forward
from shardopt.pretrain.model import position_limits
from shardopt.pretrain.report import count, one_line
from shardopt.pretrain.scoring import Score, check_documents_apart, held_out, losses
from shardopt.pretrain.trained import Trained

_MOST_BLOCK = 1024
_BATCH = 8

Tick = Callable[[float], None]
"""Called with the share of the work that has been done since the last call."""


@dataclass(frozen=True)
class How:
    """How text is scored; what is None is as in the run that the model is of.

    Attributes:
        raw: the weights themselves, not the weight EMA that the run kept of them.
        dtype: of weights and computation; None: weights as they are stored, computed as the run did.
        document_mask: see `data.document_mask`; False where no run is known.
        block_size: target tokens of a block; where no run is known what the model takes, at most 1,024.
        batch: blocks at a time; 8 where no run is known.
    """

    raw: bool = False
    dtype: torch.dtype | None = None
    document_mask: bool | None = None
    block_size: int | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Evaluator:
    """A loaded model that scores text; see `scoring.Model`.

    Attributes:
        block_size, document_mask, batch: see `How`, where nothing is None.
    """

    trained: Trained
    model: PreTrainedModel
    ranks: Ranks
    block_size: int
    document_mask: bool
    batch: int

    @classmethod
    def load(cls, trained: Trained, ranks: Ranks, how: How) -> Evaluator:
        """The model on the device of `ranks`, which is one process.

        Raises:
            InputError: it cannot be loaded, or does not take the blocks.
        """
        run = trained.run
        in_data, in_train, in_engine, in_model = (run.get(key, {}) for key in ("data", "train", "engine", "model"))
        limit = min(position_limits(trained.config).values(), default=_MOST_BLOCK)
        block_size = how.block_size or in_data.get("block_size") or min(limit, _MOST_BLOCK)
        if block_size > limit and position_limits(trained.config):
            raise InputError(f"--block-size {block_size}: the model has {limit} positions")
        mask = how.document_mask if how.document_mask is not None else in_data.get("document_mask", False)
        attention = in_model.get("attention")
        if ranks.device.type == "cpu" and attention not in ("sdpa", "eager"):  # the others may need a GPU
            attention = None
        model = trained.model(how.dtype, attention)
        loss_in_forward(model, in_train.get("loss_chunks", 1), trained.end_of_text if mask else None)
        trained.load(model, ranks.device, how.raw)
        if how.dtype is None and run:
            autocast_forward(model, ranks.device, in_engine.get("compute_dtype", "auto"))
        loaded = cls(trained, model, ranks, block_size, mask, how.batch or in_train.get("micro_batch", _BATCH))
        if mask:
            check_documents_apart(loaded, trained.end_of_text, block_size, loaded.batch)
        return loaded

    def held_out(self, tick: Tick) -> Score:
        """The score of the held-out blocks that the run itself scores: its own figure.

        Raises:
            InputError: the run is not known, or its text is not what it was.
        """
        run, fingerprint = self.trained.run, self.trained.fingerprint
        if not run or fingerprint is None:
            raise InputError(
                f"{self.trained.path} does not say which text was held out, as the checkpoints of shardopt pretrain "
                f"do: give --data PATH"
            )
        # The tokenizer that was saved: the run's own need not be there any more, and a bpe is not trained again.
        own = {"type": "path", "path": str(self.trained.files), "trust_remote_code": self.trained.trust_remote_code}
        try:
            config = DataConfig.model_validate(run["data"] | {"tokenizer": own})
        except ValidationError as error:
            raise InputError(
                f"{self.trained.path}: the run's data section is not of this version "
                f"({explain(error.errors()[0], DataConfig)}): give --data PATH"
            ) from error
        batch, batches = run["train"]["global_batch"], run["eval"]["batches"]
        train, holdout = data.prepare(config, self.ranks, run["run"]["seed"], batch)
        if train.fingerprint != fingerprint:
            raise InputError(
                f"data.sources: the text has changed since {self.trained.path} was trained on it, so that none of it "
                f"is known to be held out: restore it, or give --data PATH"
            )
        blocks = min(batches * batch, holdout.n_blocks)
        return held_out(self, holdout, blocks, self.batch, lambda done: tick(done / blocks))

    def texts(self, sets: Sequence[TextSet], most_broken: float, tick: Tick) -> Score:
        """The score of all documents of some sets, every token of them, each set apart.

        Raises:
            InputError: a set has no text, or more than the share `most_broken` of its rows is broken.
        """
        tokenizer = SavedTokenizer(
            folder=self.trained.files,
            key="",  # nothing is kept
            vocab_size=vocab_size(self.trained.tokenizer),
            eos=self.trained.end_of_text,
            is_bytes=False,
            trust_remote_code=self.trained.trust_remote_code,
        )
        total = sum(one.size for one in sets)
        scores = {}
        for one in sets:
            read = Reader(one, tokenizer)
            scores[one.label] = self._score(read, lambda size: tick(size / total))
            read.check(most_broken)
        return Score.of(scores)

    @torch.no_grad()
    def _score(self, read: Reader, tick: Tick) -> Score:
        """The score of one set; `tick` gets bytes of text."""
        nats, tokens = torch.zeros((), dtype=torch.float64, device=self.ranks.device), 0
        self.model.eval()
        for rows in _batches(read.blocks(self.block_size), self.batch):
            loss, _ = losses(self, rows.to(self.ranks.device))
            nats += loss.double()
            targets = rows[:, 1:].numel()
            tokens += targets
            tick(targets * read.text_bytes / read.tokens)
        return Score(nats.item(), tokens, read.text_bytes)


def table(score: Score) -> Table:
    """A score for a terminal of 80 columns: a row for each source, and one for all."""
    table = Table(box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0), show_footer=bool(score.sources))
    table.add_column("text", footer="all", overflow="fold")
    whole = _cells(score)
    for header, footer in zip(("tokens", "bytes", "loss", "bits per byte"), whole, strict=True):
        table.add_column(header, footer=footer, justify="right", no_wrap=True)
    for label, one in score.sources.items():
        table.add_row(one_line(label), *_cells(one))
    if not score.sources:
        table.add_row("held out", *whole)
    return table


def _cells(score: Score) -> list[str]:
    return [count(score.tokens), count(score.text_bytes), f"{score.loss:.4f}", f"{score.bits_per_byte:.4f}"]


def as_dict(score: Score) -> dict[str, Any]:
    """A score as JSON has it; what is not finite is null."""
    loss, bits = (value if math.isfinite(value) else None for value in (score.loss, score.bits_per_byte))
    own = {"loss": loss, "bits_per_byte": bits, "tokens": score.tokens, "bytes": score.text_bytes}
    return own | ({"sets": {label: as_dict(one) for label, one in score.sources.items()}} if score.sources else {})


@contextmanager
def progress(label: str) -> Iterator[Tick]:
    """A bar on stderr, where that is a terminal, which is told the shares that have been done; from the first on."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = "{task.description}", BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(label, total=1.0)

    def tick(share: float) -> None:
        bar.start()  # not before: text may be tokenised first, with a bar of its own
        bar.advance(task, share)

    try:
        yield tick
    finally:
        bar.stop()


def _batches(blocks: Iterable[np.ndarray], most: int) -> Iterator[Tensor]:
    """Blocks of one length together, at most `most`: int64, [rows, tokens + 1]."""
    some: list[np.ndarray] = []
    for block in blocks:
        if some and (len(some) == most or len(block) != len(some[0])):
            yield torch.from_numpy(np.stack(some).astype(np.int64))
            some = []
        some.append(block)
    if some:
        yield torch.from_numpy(np.stack(some).astype(np.int64))
