"""Files in blocks, each with a checksum: written and read in threads, and never read without being checked."""

from __future__ import annotations

import itertools
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import xxhash
from torch import Tensor

from shardopt.checkpoint.store import Read, asking, is_local, opened, upload
from shardopt.errors import InputError, StorageError

T = TypeVar("T")

BLOCK = 4 * 2**20  # bytes; a reader of a few elements reads and checks this much
_REQUESTS = 16  # to a store at a time, each of which waits for the network most of the while
ALIGN = 64  # bytes; every tensor begins at a multiple, so that no element lies in two blocks
DIGITS = 16  # hexadecimal, of a block's checksum
HEADER = 128  # bytes of a data file before its first tensor


class DamagedError(InputError):
    """A checkpoint is not what was written: something is missing, cut short or changed."""


class FileRecord(NamedTuple):
    """What a checkpoint's document keeps of each file."""

    size: int
    xxh3: str
    """`DIGITS` hexadecimal digits for each block of `BLOCK` bytes."""

    @classmethod
    def of(cls, content: bytes) -> FileRecord:
        return cls(len(content), "".join(checksum(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK)))

    @classmethod
    def parse(cls, stored: Any) -> FileRecord:
        """A record as the document keeps it; ValueError where it is none."""
        size, xxh3 = stored["size"], stored["xxh3"]
        if type(size) is not int or size < 0 or not isinstance(xxh3, str):
            raise ValueError(f"{stored!r} is no record of a file")
        if not re.fullmatch("[0-9a-f]*", xxh3) or len(xxh3) != DIGITS * (-(-size // BLOCK)):
            raise ValueError(f"a file of {size} bytes has another number of checksums")
        return cls(size, xxh3)

    @property
    def blocks(self) -> int:
        return len(self.xxh3) // DIGITS


class Wanted(NamedTuple):
    """Elements of a file, and where they go."""

    start: int
    """Byte in the file, a multiple of the element size."""
    dtype: torch.dtype
    target: Tensor
    """As many elements, on any device, contiguous; of another dtype they are converted."""


def write_file(path: Path, save_id: str, tensors: Sequence[Tensor]) -> FileRecord:
    """Write the bytes of `tensors`, on any device, after a header with the save's id; on the disk, or in the store,
    when this returns.

    They lie there as `places` says, from `HEADER` on.
    """
    header = torch.frombuffer(bytearray(_header(path.name, save_id)), dtype=torch.uint8)
    parts = [header, *(t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors)]
    starts, end = places([part.numel() for part in parts])
    blocks: list[list[tuple[int, Tensor]]] = [[] for _ in range(-(-end // BLOCK))]
    for start, part in zip(starts, parts, strict=False):
        for block, at, piece in _cut(start, part):
            blocks[block].append((at, piece))

    def content_of(number: int) -> memoryview:
        length = min(BLOCK, end - number * BLOCK)
        pieces = blocks[number]
        if len(pieces) == 1 and pieces[0][1].numel() == length:
            block = pieces[0][1].cpu()
        else:
            block = torch.zeros(length, dtype=torch.uint8)
            for at, piece in pieces:
                block[at : at + piece.numel()].copy_(piece)
        return memoryview(block.numpy().data)

    if not is_local(path):
        sums = []
        with upload(path) as file:
            for content in map(content_of, range(len(blocks))):
                file.write(content)
                sums.append(checksum(content))
        return FileRecord(end, "".join(sums))

    with path.open("wb", buffering=0) as file:

        def write(number: int) -> str:
            content = content_of(number)
            done = 0
            while done < len(content):
                done += os.pwrite(file.fileno(), content[done:], number * BLOCK + done)
            if sys.platform == "linux":
                # The disk begins at once; what is not there yet stays in memory, whatever this says.
                os.posix_fadvise(file.fileno(), number * BLOCK, len(content), os.POSIX_FADV_DONTNEED)
            return checksum(content)

        xxh3 = "".join(_in_threads(write, range(len(blocks)), path))
        os.fsync(file.fileno())
    return FileRecord(end, xxh3)


def places(nbytes: Sequence[int]) -> tuple[list[int], int]:
    """Where tensors of so many bytes begin in a file, one after the other, and where the last one ends."""
    *starts, _ = itertools.accumulate((-(-count // ALIGN) * ALIGN for count in nbytes), initial=0)
    return starts, starts[-1] + nbytes[-1] if nbytes else 0


def read_file(path: Path, save_id: str, record: FileRecord, wanted: Iterable[Wanted]) -> None:
    """Fill the targets from a file that `write_file` wrote, checking every block that is read.

    Raises:
        DamagedError: the file, or what was read of it, is not what was written.
        StorageError: it cannot be read.
    """
    blocks: dict[int, list[tuple[int, torch.dtype, Tensor]]] = {}
    for start, dtype, target in wanted:
        for block, at, piece in _cut(start, target.view(-1), dtype.itemsize):
            blocks.setdefault(block, []).append((at, dtype, piece))
    with _opened(path, save_id, record) as read_bytes:

        def read(number: int) -> None:
            content = _block(path, read_bytes, record, number)
            for at, dtype, piece in blocks[number]:
                stored = torch.frombuffer(content, dtype=torch.uint8, count=piece.numel() * dtype.itemsize, offset=at)
                piece.copy_(stored.view(dtype))

        _in_threads(read, sorted(blocks), path)


def check_file(path: Path, save_id: str, record: FileRecord, blocks: Iterable[int]) -> None:
    """Check the size, the header and some blocks of a file that `write_file` wrote; raises as `read_file`."""
    with _opened(path, save_id, record) as read_bytes:
        _in_threads(lambda number: len(_block(path, read_bytes, record, number)), blocks, path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Tell a file that is missing (damage) from one that cannot be read now (a disk or network in trouble)."""
    try:
        with asking(path):
            yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DamagedError(f"{path} is missing ({error.strerror or error})") from error
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror or error}. The disk or the network may be in trouble, so this is "
            f"not taken for damage, and nothing is changed: try again, or move the checkpoint away to go on without it"
        ) from error


@contextmanager
def _opened(path: Path, save_id: str, record: FileRecord) -> Iterator[Read]:
    """How to read a file, of which the size and the header are as they must be."""
    with ExitStack() as stack:
        with reading(path):
            size, read = stack.enter_context(opened(path))
        if size != record.size:
            raise DamagedError(f"{path} is damaged: it has {size} bytes, and was written with {record.size}")
        with reading(path):
            header = read(0, HEADER)
        if header != _header(path.name, save_id):
            raise DamagedError(f"{path} is of another save, or damaged: its header is not of this checkpoint")
        yield read


def _block(path: Path, read: Read, record: FileRecord, number: int) -> memoryview:
    """A block that was read and checked; good until this thread's next."""
    start, end = number * BLOCK, min(number * BLOCK + BLOCK, record.size)
    with reading(path):
        content = read(start, end)
    if len(content) < end - start:
        raise DamagedError(f"{path} is damaged: it was cut short while it was read")
    if checksum(content) != record.xxh3[DIGITS * number : DIGITS * (number + 1)]:
        raise DamagedError(f"{path} is damaged: bytes {start} to {end} do not have their checksum")
    return content


def _header(name: str, save_id: str) -> bytes:
    """The first `HEADER` bytes of a data file."""
    return f"shardopt-data {save_id} {name}\n".encode().ljust(HEADER, b"\n")


def _cut(start: int, tensor: Tensor, itemsize: int = 1) -> Iterator[tuple[int, int, Tensor]]:
    """A 1-D tensor that lies at byte `start` of a file, cut into blocks: number, byte in the block, elements."""
    done = 0
    while done < tensor.numel():
        block, at = divmod(start + done * itemsize, BLOCK)
        count = min(tensor.numel() - done, (BLOCK - at) // itemsize)
        yield block, at, tensor[done : done + count]
        done += count


def checksum(content: bytes | bytearray | memoryview) -> str:
    """XXH3 in 64 bits, at about the speed of memory: it finds damage, and not who has put other bytes there."""
    return xxhash.xxh3_64_hexdigest(content)


def _in_threads(function: Callable[[int], T], numbers: Iterable[int], path: Path) -> list[T]:
    """The results in order, worked out by this thread and others, as many as the place of `path` serves at a time; or
    the first error."""
    todo = deque(enumerate(numbers))
    results: list[T | None] = [None] * len(todo)
    errors: list[BaseException] = []

    def work() -> None:
        while todo and not errors:
            try:
                at, number = todo.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                results[at] = function(number)
            except BaseException as error:
                errors.append(error)

    # Not an executor, which takes no work any more when the interpreter ends and a save is still being written.
    count = min(2 if is_local(path) else _REQUESTS, len(todo)) - 1
    helpers = [threading.Thread(target=work, name="checkpoint-blocks") for _ in range(count)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]
    return cast(list[T], results)
