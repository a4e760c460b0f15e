"""The report on the data of a run in a few lines; for readers of data.json, who need no torch."""

from __future__ import annotations

import textwrap
from typing import Any

from shardopt.pretrain.report import count

_MOST_SOURCES = 4


def size(number: float) -> str:
    """Bytes in few characters, with decimal units."""
    for power, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= power:
            return f"{number / power:.3g} {unit}"
    return f"{number:.0f} B"


def source_figures(source: dict[str, Any]) -> dict[str, str]:
    """What a table has of a source, by the heads of its columns; the last is in tokens."""
    return {
        "source": source["label"],
        "documents": f"{source['documents']:,}",
        "text": size(source["bytes"]),
        "tokens": count(source["tokens"]),
        "tokens/byte": f"{source['tokens_per_byte']:.3f}",
        "share": f"{source['share']:.1%}",
        "epochs": "stream" if source["epochs"] is None else f"{source['epochs']:.3g}",
        "broken": f"{n_broken(source):,}",
        "held out": count(source["holdout"]["tokens"]),
    }


def n_broken(source: dict[str, Any]) -> int:
    return sum(source["broken"].values())


def _epochs(source: dict[str, Any]) -> str:
    return "a stream" if source["epochs"] is None else f"{source['epochs']:.2g} epochs"


def left_out(source: dict[str, Any]) -> str:
    """What of a source is not trained on, and the first place of what is broken; "" for nothing."""
    what = []
    if broken := n_broken(source):
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
