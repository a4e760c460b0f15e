"""A forecast in 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator

from shardopt.pretrain.forecast import USABLE, Forecast, Row
from shardopt.pretrain.report import count, duration, unit_of

_WIDTH = 80
_LABEL = 16
_SHORT = {"deepspeed": "ds"}


def as_text(f: Forecast) -> str:
    """All of it: the run, then a table with a column for each engine and the state formats below each other."""
    return "\n".join([*_facts(f), "", *_table(f), "", *_notes(f)])


def _facts(f: Forecast) -> Iterator[str]:
    yield f"{f.name}: {count(f.parameters)} parameters on {f.world_size:,} × {f.device.name}"
    of_a_step = f" of {count(f.stages[0].tokens_per_step)} tokens" if len(f.stages) == 1 else ""
    facts = {"run": f"{f.steps:,} steps{of_a_step}: {count(f.tokens)} tokens, {f.flops:.3g} FLOPs"}
    for stage in f.stages:
        batches = f"{stage.micro_batches:,} micro-batch{'es' if stage.micro_batches > 1 else ''}"
        batches += f" of {f.micro_batch:,} sequence{'s' if f.micro_batch > 1 else ''} on a rank"
        if len(f.stages) == 1:
            facts["a step"] = batches
        else:
            facts[f"step {stage.from_step + 1:,} on"] = f"{count(stage.tokens_per_step)} tokens a step, {batches}"
    if f.hours is not None:
        hours = f"{f.hours:,.0f}" if f.hours >= 10 else f"{f.hours:.2g}"
        facts["hours"] = f"{hours} ({duration(f.hours * 3600)}) at an MFU of {f.mfu:.0%}"
    own = next((row for row in f.rows if row.chosen), None)
    if own is not None:
        size = f.checkpoint_bytes[own.state_dtype]
        unit, name = unit_of(size)
        facts["checkpoint"] = f"{size / unit:,.2f} {name}; checkpoint.keep has {f.checkpoints_kept} of them"
        if f.device.memory is not None:
            verdict = "fits" if own.memory.total <= USABLE * f.device.memory else "does not fit"
            facts["memory"] = (
                f"{own.engine} with {own.state_dtype or 'its'} state takes {own.memory.total / 2**30:,.1f} of "
                f"{f.device.memory / 2**30:.1f} GiB: it {verdict}"
            )
    for label, text in facts.items():
        yield f"{label:{_LABEL}}{text}"


def _table(f: Forecast) -> Iterator[str]:
    if not f.rows:
        return
    engines = list(dict.fromkeys(row.engine for row in f.rows))
    own = {row.engine for row in f.rows if row.chosen}
    unit, name = unit_of(max(row.memory.total for row in f.rows))
    width = (_WIDTH - _LABEL) // len(engines)

    def line(label: str, cell: Callable[[Row], object], rows: dict[str, Row]) -> str:
        return f"{label:{_LABEL}}" + "".join(
            f"{cell(rows[engine]) if engine in rows else '-':>{width}}" for engine in engines
        )

    def size(nbytes: int | None) -> str:
        if nbytes is None:
            return "?"
        return f"{nbytes / unit:,.2f}" if nbytes < 1000 * unit else f"{nbytes / unit:,.0f}"

    titles = [(e.replace("deepspeed", _SHORT["deepspeed"])) + ("*" if e in own else "") for e in engines]
    yield f"{name + ' a rank':{_LABEL}}" + "".join(f"{title:>{width}}" for title in titles)
    any_state = {row.engine: row for row in reversed(f.rows)}
    yield line("weights", lambda row: size(row.memory.weights), any_state)
    yield line("masters", lambda row: size(row.memory.masters), any_state)
    yield line("gradients", lambda row: size(row.memory.gradients), any_state)
    yield line("buckets", lambda row: size(row.memory.buckets), any_state)
    yield line("activations", lambda row: size(row.memory.activations), any_state)
    for state_dtype in f.checkpoint_bytes:
        rows = {row.engine: row for row in f.rows if row.state_dtype == state_dtype}
        if not rows:
            continue
        mark = "*" if any(row.chosen for row in rows.values()) else ""
        yield f"with {state_dtype or 'its'} state{mark}"
        for key in dict.fromkeys(key for row in rows.values() for key in row.memory.state):
            yield line(f"  {key}", lambda row, key=key: size(row.memory.state.get(key, 0)), rows)  # type: ignore[misc]
        yield line("  all of it", lambda row: size(row.memory.total), rows)
        if any(row.largest_micro_batch is not None for row in rows.values()):
            yield line("  micro-batch ≤", lambda row: "?" if (n := row.largest_micro_batch) is None else n, rows)
    unit, name = unit_of(max(1, *(row.reduce + row.gather for row in f.rows)))
    yield f"sent a step, {name}"
    yield line("  gradients", lambda row: size(row.reduce), any_state)
    yield line("  weights", lambda row: size(row.gather), any_state)


def _notes(f: Forecast) -> Iterator[str]:
    notes = ["* as in the config. ds: deepspeed. Bytes are of the rank that holds most."]
    if any(row.largest_micro_batch is not None for row in f.rows):
        notes.append(
            f"micro-batch ≤: the largest that fits into {USABLE:.0%} of the memory and divides the global batch; 0: "
            f"none does."
        )
    if f.unknown_activations is not None:
        notes.append(f"?: not known, nor in all of it. {f.unknown_activations}.")
    notes += [f"Not for {engine}: {reason}." for engine, reason in f.refused.items()]
    for note in notes:
        yield from _wrapped(note)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_long_words=False)
