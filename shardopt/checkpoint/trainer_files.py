"""The checksums of HF Trainer's own files in a checkpoint-N, whose slices have theirs in their document."""

from __future__ import annotations

import json
from pathlib import Path

from shardopt.checkpoint.blocks import BLOCK, DamagedError, FileRecord, reading
from shardopt.checkpoint.document import DOCUMENT, write_json
from shardopt.checkpoint.stored import SLICES
from shardopt.distributed import Ranks

FILES = "shardopt-files.json"


def write_checksums(folder: Path) -> None:
    """Keep size and checksums of all files in a checkpoint-N, but for the slices' data."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    own = [file for file in files if file.parent != folder / SLICES or file.name == DOCUMENT]
    write_json(folder / FILES, {str(file.relative_to(folder)): _record_of(file)._asdict() for file in own})


def check_files(folder: Path, ranks: Ranks) -> None:
    """Check that Trainer's files are as they were written, this rank's share of them byte for byte.

    Where nothing was kept of them, any are taken.

    Raises:
        DamagedError: one is not.
    """
    if not (folder / FILES).exists():
        return
    with reading(folder / FILES):
        content = (folder / FILES).read_bytes()
    try:
        records = {name: FileRecord.parse(stored) for name, stored in json.loads(content).items()}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DamagedError(f"{folder / FILES} is damaged ({error!r})") from error
    for name in sorted(records)[ranks.rank :: ranks.world_size]:
        with reading(folder / name):
            if _record_of(folder / name) != records[name]:
                raise DamagedError(
                    f"{folder / name} is damaged, or was edited: it is not what was written (to take Trainer's own "
                    f"files as they are, delete {FILES})"
                )


def _record_of(path: Path) -> FileRecord:
    with path.open("rb") as file:
        xxh3 = "".join(FileRecord.of(block).xxh3 for block in iter(lambda: file.read(BLOCK), b""))
    return FileRecord(path.stat().st_size, xxh3)
