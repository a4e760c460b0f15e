"""What the data of a run is: size, share and repetition of each source, what was left out; as JSON and for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from shardopt.pretrain.data.batches import HoldoutData, TrainData
from shardopt.pretrain.data.config import DataConfig
from shardopt.pretrain.data.packing import Packed, Side
from shardopt.pretrain.data.reading import show
from shardopt.pretrain.data.streams import Stream
from shardopt.pretrain.data_facts import left_out, source_figures
from shardopt.pretrain.report import one_line, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

_BLOCK_CHARACTERS = 400
_COLUMNS = 80
_FIGURES = ("documents", "text", "tokens", "tokens/byte", "share", "epochs")


def describe(config: DataConfig, train: TrainData, holdout: HoldoutData, steps: int, scored: int) -> dict[str, Any]:
    """The report: JSON values. Sizes of text are UTF-8 bytes; those of a streaming source are of its scanned documents.

    Args:
        config: the `data:` section that `train` and `holdout` were made from.
        steps: of the run, from which follows how often a source is repeated.
        scored: held-out blocks that an evaluation scores.
    """
    stages = list(train.stages.between(0, steps))
    drawn = [sum(n * s.global_batch * s.shares[i] for s, n in stages) for i in range(len(train.sources))]
    samples = train.stages.samples(0, steps)
    sets = holdout.sets(scored)
    return {
        "fingerprint": train.fingerprint,
        "vocab_size": train.vocab_size,
        "block_size": train.block_size,
        "tokens": train.tokens,
        "holdout_tokens": holdout.tokens,
        "holdout_blocks": holdout.n_blocks,
        "holdout_blocks_scored": scored,
        "samples": samples,
        "stages": [
            {
                "from_step": stage.from_step,
                "steps": n,
                "global_batch": stage.global_batch,
                "shares": dict(zip(config.labels, stage.shares, strict=True)),
            }
            for stage, n in stages
        ],
        "sources": [
            _source(label, packed, isinstance(source, Stream), own / samples, own, train.block_size)
            | {"holdout_blocks_scored": len(sets[label])}
            for label, packed, source, own in zip(config.labels, train.corpora, train.sources, drawn, strict=True)
        ],
    }


def _source(label: str, packed: Packed, streams: bool, share: float, samples: float, block_size: int) -> dict[str, Any]:
    tally = packed.tally
    blocks = packed.blocks("train", block_size).n_blocks
    text_bytes, tokens = packed.train.bytes + packed.holdout.bytes, packed.train.tokens + packed.holdout.tokens
    return {
        "label": label,
        "streaming": streams,
        "share": share,
        "epochs": None if streams else samples / blocks,
        "documents": packed.train.documents + packed.holdout.documents,
        "bytes": text_bytes,
        "tokens": tokens,
        "tokens_per_byte": tokens / text_bytes,
        "train": _side(packed.train) | {"blocks": blocks},
        "holdout": _side(packed.holdout) | {"blocks": packed.blocks("holdout", block_size).n_blocks},
        "rows": tally.rows,
        "empty": tally.empty,
        "broken": tally.broken,
        "broken_examples": [f"{show(place)} {words}" for place, words in tally.examples],
        "skipped_files": tally.skipped,
        "skipped_examples": tally.skipped_examples,
        "longest": packed.longest,
    }


def _side(side: Side) -> dict[str, int]:
    sizes = asdict(side)
    del sizes["sha256"]
    return sizes


def render(report: dict[str, Any], blocks: list[str]) -> list[RenderableType]:
    """The report for a console of at least 80 columns, and the text of some packed blocks; see `Report.show`."""
    from rich import box
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("source", overflow="fold")
    for name in (*_FIGURES, "held out"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in report["sources"]:
        cells = source_figures(one)
        figures = (cells[name] for name in _FIGURES)
        table.add_row(one_line(one["label"]), *figures, f"{cells['held out']} tokens")
    shown: list[RenderableType] = [table, ""]
    for one in report["sources"]:
        shown += [f"{one['label']} left out: {what}"] if (what := left_out(one)) else []
        shown += [f"  {example}" for example in one["broken_examples"][:10]]
        shown += [f"{one['label']}, longest documents:"] if one["longest"] else []
        for long in one["longest"]:
            line = f"{long['tokens']:>13,} tokens  {long['place']}  "
            shown.append(line + long["beginning"][: max(0, _COLUMNS - len(line))])
    for number, text in enumerate(blocks):
        cut = text if len(text) <= _BLOCK_CHARACTERS else f"{text[:_BLOCK_CHARACTERS]} ..."
        title = f"sample {number}: {report['block_size']} tokens"
        shown.append(Panel(Text(printable(cut), overflow="fold"), title=title, title_align="left", border_style="dim"))
    return shown
