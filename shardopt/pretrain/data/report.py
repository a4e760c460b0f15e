"""What the data of a run is: size, share and repetition of each source, what was left out; as JSON and for people."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from shardopt.pretrain.data.batches import HoldoutData, TrainData
from shardopt.pretrain.data.config import DataConfig
from shardopt.pretrain.data.packing import Packed, Side
from shardopt.pretrain.data.reading import show
from shardopt.pretrain.data.streams import Stream
from shardopt.pretrain.report import count, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

_MOST_SOURCES = 4
_BLOCK_CHARACTERS = 400
_COLUMNS = 80


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


def size(number: float) -> str:
    """Bytes in few characters, with decimal units."""
    for power, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= power:
            return f"{number / power:.3g} {unit}"
    return f"{number:.0f} B"


def _epochs(source: dict[str, Any]) -> str:
    return "a stream" if source["epochs"] is None else f"{source['epochs']:.2g} epochs"


def left_out(source: dict[str, Any]) -> str:
    """What of a source is not trained on, and the first place of what is broken; "" for nothing."""
    broken = sum(source["broken"].values())
    what = []
    if broken:
        what.append(f"{broken:,} broken ({source['broken_examples'][0]})")
    if source["empty"]:
        what.append(f"{source['empty']:,} empty")
    if source["skipped_files"]:
        what.append(f"{source['skipped_files']:,} files that are no UTF-8 text")
    return ", ".join(what)


def stages_in_words(report: dict[str, Any]) -> list[str] | None:
    """Lines for each stage, of what is not as before; None where there is one."""
    lines: list[str] = []
    batch, shares = None, None
    for stage in report["stages"]:
        what = []
        if stage["global_batch"] != batch:
            what.append(f"{stage['global_batch']:,} sequences a step")
        if stage["shares"] != shares and len(stage["shares"]) > 1:
            what += [f"{label} {share:.1%}" for label, share in stage["shares"].items()]
        line = f"from step {stage['from_step'] + 1:,}: {', '.join(what) or 'as before'}"
        lines += textwrap.wrap(line, 65, subsequent_indent="  ")
        batch, shares = stage["global_batch"], stage["shares"]
    return lines if len(report["stages"]) > 1 else None


def in_short(report: dict[str, Any]) -> dict[str, object]:
    """Facts for the start of a run, by label: three, and the stages; what was left out is a line of the second."""
    sources = report["sources"]
    documents, text_bytes, tokens = (sum(one[key] for one in sources) for key in ("documents", "bytes", "tokens"))
    scanned = " scanned" if any(one["streaming"] for one in sources) else ""
    lines = [f"{documents:,}{scanned} ({size(text_bytes)}), {tokens / text_bytes:.3g} tokens a byte"]
    if len(sources) == 1:
        lines[0] += f", {_epochs(sources[0])}"
    else:
        shares = "" if len(report["stages"]) == 1 else "over the whole run: "
        parts = [f"{one['label']} {one['share']:.1%} ({_epochs(one)})" for one in sources[:_MOST_SOURCES]]
        lines += textwrap.wrap(
            shares + ", ".join([*parts, f"and {len(sources) - _MOST_SOURCES} more"][: len(sources)]), 65
        )
    for one in sources:
        if what := left_out(one):
            lines.append(f"left out of {one['label']}: {what}")
    text = "a stream" if report["tokens"] is None else f"{count(report['tokens'])} tokens"
    scored = f"{report['holdout_blocks_scored']:,} of {report['holdout_blocks']:,} blocks scored"
    return {
        "data": f"{text}, fingerprint {report['fingerprint'][:12]}",
        "documents": lines,
        "held-out text": f"{count(report['holdout_tokens'])} tokens, {scored}",
        "stages": stages_in_words(report),
    }


def render(report: dict[str, Any], blocks: list[str]) -> list[RenderableType]:
    """The report for a console of at least 80 columns, and the text of some packed blocks; see `Report.show`."""
    from rich import box
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("source", overflow="fold")
    for name in ("documents", "text", "tokens", "tokens/byte", "share", "epochs", "held out"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in report["sources"]:
        table.add_row(
            one["label"],
            f"{one['documents']:,}",
            size(one["bytes"]),
            count(one["tokens"]),
            f"{one['tokens_per_byte']:.3f}",
            f"{one['share']:.1%}",
            "stream" if one["epochs"] is None else f"{one['epochs']:.3g}",
            f"{count(one['holdout']['tokens'])} tokens",
        )
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
