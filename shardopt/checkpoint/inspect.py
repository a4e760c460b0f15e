"""What is in a checkpoint, or in a run's folder of them, as plain data and as text of at most 80 columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shardopt.checkpoint import folders
from shardopt.checkpoint.blocks import reading
from shardopt.checkpoint.document import DOCUMENT, FORMAT, OTHER_FORMAT_ADVICE, OtherFormatError, read_document
from shardopt.checkpoint.store import as_folder, exists, is_local, listing
from shardopt.checkpoint.stored import SLICES, Stored, check_begun, check_folder, complete_in, root_of, step_of
from shardopt.errors import InputError

_FIRST = ("weight", "buffer", "m1", "m2", "nu")
_MOST_FILES = 10


def describe(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds and who wrote it, as JSON has it. Reads its documents and not its data.

    Raises:
        InputError: it is not a complete checkpoint.
    """
    stored = Stored(folder)
    document, config = stored.document, stored.config
    written = document["checkpoint"]

    def known(kind: type, key: str, of: Mapping[str, Any] = document) -> Any:
        """A value as the launcher writes it; None where another program keeps something else by that name."""
        return value if type(value := of.get(key)) is kind else None

    run, model, optimizer, engine, train = (
        known(dict, key, config) or {} for key in ("run", "model", "optimizer", "engine", "train")
    )
    step = known(int, "step")
    kinds: dict[str, dict[str, Any]] = {}
    for name, kind in sorted(stored.keys, key=lambda key: (key[1] not in _FIRST, *map(key[1].__ne__, _FIRST), key[1])):
        row = kinds.setdefault(kind, {"dtypes": [], "tensors": 0, "elements": 0, "bytes": 0})
        entry = stored.parameters[name]["kinds"][kind]
        row["dtypes"] = sorted({*row["dtypes"], entry.get("format", entry["dtypes"][0])})
        row["tensors"] += 1
        row["elements"] += math.prod(stored.parameters[name]["shape"])
        row["bytes"] += stored.bytes(name, kind)
    counts = [int(entry["step"]) for entry in written["step_counts"].values() if "step" in entry]
    with reading(folder):
        files = {name: size for name, size in sorted(listing(folder).items()) if size is not None}
    return {
        "folder": str(folder),
        "step": step_of(folder) if step is None else step,
        "steps": known(int, "steps", train),
        "tokens": known(int, "tokens"),
        "skipped_steps": known(int, "skipped"),
        "optimizer_steps": sorted({min(counts), max(counts)}) if counts else None,
        "run": known(str, "name", run),
        "model": known(str, "model_type", model) or known(str, "path", model),
        "optimizer": known(str, "name", optimizer),
        "engine": known(str, "name", engine) or known(str, "host"),
        "ranks": written["world_size"],
        "torch": written["torch"],
        "written": _time(written["time"]),
        "format": written["format"],
        "parameters": kinds.get("weight", {}).get("elements", 0),
        "kinds": kinds,
        "extras": written["extras"],
        "files": files,
        "bytes": sum(files.values()),
    }


def as_text(what: dict[str, Any]) -> str:
    """`describe`'s answer for a terminal."""
    of = f" of {what['steps']:,}" if what["steps"] else ""
    step = "not known" if what["step"] is None else f"{what['step']:,}{of}"
    counts = what["optimizer_steps"]
    by = [f"{what['engine'] or 'a program'} on {_many(what['ranks'], 'rank')}", f"torch {what['torch']}"]
    run = [what["run"], what["model"], what["optimizer"]]
    verified = ", every checksum is right" if what.get("verified") else ""
    facts = {
        "step": step + (f", {what['skipped_steps']:,} skipped" if what["skipped_steps"] else ""),
        "tokens": f"{what['tokens']:,}" if what["tokens"] is not None else None,
        "updates": " to ".join(f"{count:,}" for count in counts) + " of each parameter" if counts else None,
        "run": ", ".join(filter(None, run)) or None,
        "written by": ", ".join(by),
        "written": what["written"],
        "parameters": f"{what['parameters']:,}",
        "format": f"{what['format']}, {_many(len(what['files']), 'file')} of {size(what['bytes'])}{verified}",
        "other": f"{_many(len(what['extras']), 'tensor')} that the program added" if what["extras"] else None,
    }
    rows = [["kind", "dtype", "tensors", "elements", "size"]]
    for kind, row in what["kinds"].items():
        dtypes = ", ".join(row["dtypes"])
        rows.append([kind, dtypes, f"{row['tensors']:,}", f"{row['elements']:,}", size(row["bytes"])])
    listed = list(what["files"].items())
    if len(listed) > _MOST_FILES:
        rest = listed[_MOST_FILES - 1 :]
        listed[_MOST_FILES - 1 :] = [(f"and {len(rest):,} more", sum(n for _, n in rest))]
    rows += [["file", "", "", "", ""], *([name, "", "", "", size(n)] for name, n in listed)]
    lines = [what["folder"], *(f"  {key:<12}{value}" for key, value in facts.items() if value is not None), ""]
    return "\n".join([*lines, *_table(rows, "<<>>>")])


def list_run(run: str | Path) -> list[dict[str, Any]]:
    """Each checkpoint of a run by its step, and what else lies there: `complete`, or the reason why it is not.

    Raises:
        InputError: no folder with checkpoints.
    """
    check_folder(run := as_folder(run), "a run's folder, such as runs/NAME")
    root = root_of(run)
    if root is None:
        check_begun(run)
        raise InputError(f"{run} has no checkpoints: give a run's folder, such as runs/NAME")
    complete = complete_in(root)
    rows = []
    for step, folder in complete.items():
        what = describe(folder)
        rows.append({key: what[key] for key in ("folder", "step", "tokens", "engine", "ranks", "bytes", "written")})
        rows[-1] |= {"step": step, "status": "complete"}
    known = {(folder.parent if folder.parent != root else folder).name for folder in complete.values()}
    with reading(root):
        for folder in (root / name for name, size in sorted(listing(root).items()) if size is None):
            if folder.name not in known:
                written = _time(folder.stat().st_mtime) if is_local(folder) else ""
                rows.append(
                    {"folder": str(folder), "bytes": _bytes(folder), "written": written, "status": _why(folder)}
                )
    return rows


def list_as_text(rows: list[dict[str, Any]]) -> str:
    """`list_run`'s answer for a terminal."""
    table = [["step", "tokens", "written by", "size", "written", "status"]]
    for row in rows:
        tokens = row.get("tokens")
        by = f"{row['engine'] or 'a program'}, {_many(row['ranks'], 'rank')}" if "ranks" in row else ""
        step = f"{row['step']:,}" if "step" in row else Path(row["folder"]).name
        shown = "" if tokens is None else f"{tokens:,}"
        table.append([step, shown, by, size(row["bytes"]), row["written"][:16], row["status"]])
    lines = list(_table(table, ">><><<"))
    if any("format" in row["status"] for row in rows):
        advice = f"This shardopt reads format {FORMAT}. Of another one: {OTHER_FORMAT_ADVICE}."
        lines += ["", *textwrap.wrap(advice, 80, break_on_hyphens=False)]
    return "\n".join(lines)


def size(number: float) -> str:
    """Bytes in few characters: 812 B, 33.7 MB."""
    for power, name in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if number >= 1000**power:
            return f"{number / 1000**power:.1f} {name}"
    return f"{number} B"


def _bytes(folder: Path) -> int:
    return sum(_bytes(folder / name) if size is None else size for name, size in listing(folder).items())


def _why(folder: Path) -> str:
    if folder.name.endswith((".partial", ".deleting", ".previous")):
        return folder.name.rpartition(".")[2]
    if not is_local(folder) and folders.step_of(folder.name) is not None and not exists(folder / DOCUMENT):
        return "partial"
    if folders.trainers_step_of(folder.name) is not None:
        folder = folder / SLICES
    try:
        read_document(folder)
    except OtherFormatError as error:
        return error.what
    except InputError:
        return "no checkpoint"
    return "damaged"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _table(rows: Sequence[Sequence[str]], sides: str) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
