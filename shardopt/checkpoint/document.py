"""checkpoint.json: everything of a checkpoint that is not a tensor, and what its other files must be."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

from shardopt.checkpoint.blocks import DamagedError, FileRecord, checksum, reading
from shardopt.checkpoint.store import as_folder, exists, is_local, listing, put
from shardopt.errors import InputError, few

DOCUMENT = "checkpoint.json"
FORMAT = 6
OTHER_FORMAT_ADVICE = (
    "load it with the version that wrote it; or convert it, with that version by shardopt checkpoint convert FOLDER "
    "FILE.pt --to torch, and with this one by shardopt checkpoint convert FILE.pt NEW"
)


class OtherFormatError(InputError):
    """A checkpoint is of another version of shardopt.

    Attributes:
        what: "old format 5", say.
    """

    def __init__(self, folder: Path, version: int) -> None:
        self.what = f"{'old' if version < FORMAT else 'new'} format {version}"
        super().__init__(
            f"{folder} has checkpoint format {version}, this shardopt reads format {FORMAT}: {OTHER_FORMAT_ADVICE}"
        )


# The first line has a checksum of all that follows; the whole is JSON.
_FIRST_LINE = re.compile(rb'\{"xxh3": "([0-9a-f]{16})",\n')


def read_document(folder: str | Path) -> dict[str, Any]:
    """A checkpoint's JSON: what the caller of `save` gave, and under "checkpoint" what was written.

    `document["checkpoint"]` has `format`, `save_id`, `name` (of the folder), `time` (of the save, in seconds since
    1970), `loss` and `after_finite_step` (see `Saver.save`), `torch`, `byteorder`, `world_size`, `parameters` ({name:
    {shape, kinds: {kind: {dtypes, and format where it is a block format}}}}), `step_counts` ({name: {"step": 3, ...}}),
    `groups` ({names: [...], lr: ...} of each parameter group), `extras` ({key: {shape, dtypes}}) and `files` ({name:
    {size, xxh3 of each block}}).

    Raises:
        DamagedError: it is missing or is not what was written.
        OtherFormatError: it is of another version.
        InputError: it cannot be read.
    """
    path = as_folder(folder) / DOCUMENT
    try:
        with reading(path):
            content = path.read_bytes()
    except DamagedError as error:
        raise DamagedError(_no_document(as_folder(folder))) from error
    first = _FIRST_LINE.match(content)
    if first is not None and first[1].decode() != checksum(content[first.end() :]):
        raise DamagedError(f"{path} is damaged, or was edited: its checksum is another")
    try:
        document = json.loads(content)
        version = document["checkpoint"]["format"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path} is not the document of a shardopt checkpoint ({error!r})") from error
    if type(version) is int and 0 < version != FORMAT:
        raise OtherFormatError(as_folder(folder), version)
    if first is None:
        raise DamagedError(f"{path} is damaged: it has no checksum")
    del document["xxh3"]
    try:
        _check(document["checkpoint"])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DamagedError(f"{folder} has a document that is not of this format ({error!r})") from error
    if document["checkpoint"]["byteorder"] != sys.byteorder:
        raise InputError(f"{folder} was written on a machine of another byte order")
    return document


def _no_document(folder: Path) -> str:
    """Why a folder, which has no document, is no checkpoint."""
    with reading(folder):
        if not exists(folder):
            return f"{folder} does not exist"
        if folder.is_file():
            return f"{folder} is a file, not the folder of a checkpoint"
        steps = [name for name in listing(folder) if name.startswith("step-")]
    if steps:
        return f"{folder} holds {few(steps)}: give one of them, or checkpoint.latest({str(folder)!r})"
    return f"{folder} is not a complete checkpoint: it has no {DOCUMENT}"


def write_document(folder: Path, document: dict[str, Any]) -> None:
    """Write what `read_document` returns; on the disk when this returns."""
    rest = json.dumps(document, indent=1, allow_nan=False).encode()[1:]
    write_bytes(folder / DOCUMENT, b'{"xxh3": "%s",\n' % checksum(rest).encode() + rest)


def infix_for(folder: Path, save_id: str) -> str:
    """What is in the names of the files of a new save: in a store its id, since they are written beside those of the
    save before, which stay until the document is exchanged."""
    return "" if is_local(folder) else f"-{save_id}"


def infix_of(document: dict[str, Any]) -> str:
    """What is in the names of a checkpoint's files, wherever it lies now; see `infix_for`."""
    written = document["checkpoint"]
    return "" if index_file("") in written["files"] else f"-{written['save_id']}"


def index_file(infix: str) -> str:
    return f"index{infix}.bin"


def records_of(document: dict[str, Any]) -> dict[str, FileRecord]:
    """What the files beside a checked document must be; what else it may say of them is passed over."""
    files = document["checkpoint"]["files"].items()
    return {name: FileRecord(stored["size"], stored["xxh3"]) for name, stored in files}


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, on the disk when this returns; in a store by one request, so that it is there whole or not."""
    if not is_local(path):
        put(path, content)
        return
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: Any) -> None:
    """`content` as strict JSON, on the disk when this returns."""
    write_bytes(path, json.dumps(content, indent=1, allow_nan=False).encode())


def _check(written: dict[str, Any]) -> None:
    """Check that all in a document's "checkpoint" is of the type that it must be of; ValueError and others if not."""
    if not re.fullmatch("[0-9a-f]{32}", written["save_id"]):
        raise ValueError("its save_id is none")
    _expect(str, written["name"], written["byteorder"], written["torch"])
    _expect(int, written["world_size"])
    _expect(float, written["time"], *filter(None, [written["loss"]]))
    if not 0 <= written["time"] < 2**37:  # before the year 6325: what a date can be made of
        raise ValueError("its time is none")
    _expect(bool, written["after_finite_step"])
    _expect(dict, *written["groups"])
    for counts in written["step_counts"].values():
        for number in counts.values():
            if type(number) not in (int, float) or not math.isfinite(number):
                raise TypeError("a step count is not a number")
    for group in written["groups"]:
        _expect(str, *group["names"])
    for parameter in written["parameters"].values():
        _expect(int, *parameter["shape"])
        for kind in parameter["kinds"].values():
            _expect(str, *kind["dtypes"])
            if not kind["dtypes"]:
                raise ValueError("a vector has no dtype")
            if "format" in kind:
                _expect(str, kind["format"])
    for extra in written["extras"].values():
        _expect(int, *extra["shape"])
        (dtype,) = extra["dtypes"]
        _expect(str, dtype)
    for name, stored in written["files"].items():
        if "/" in name or name.startswith("."):
            raise ValueError(f"{name!r} is not a file of a checkpoint")
        FileRecord.parse(stored)
    if index_file(infix_of({"checkpoint": written})) not in written["files"]:
        raise ValueError("it names no index")


def _expect(kind: type, *values: Any) -> None:
    """Check types; a number must not be negative either."""
    for value in values:
        if type(value) is not kind or (type(value) is int and value < 0):
            raise TypeError(f"{value!r} is no {kind.__name__}")
