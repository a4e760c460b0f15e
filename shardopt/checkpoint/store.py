"""Folders on this machine, or by URL in a store that fsspec knows: s3://, gs://, memory://, …

A local folder is a `Path`. One in a store is a `UPath`, which has a Path's interface; what must tell "not there" from
"cannot be asked now", or is one request to the store, is done by the functions here. Stores are not asked to rename.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from shardopt.errors import InputError, MissingExtraError, did_you_mean

Read = Callable[[int, int], memoryview]
"""The bytes of a file from one place to another; fewer where it ends before. Good until this thread's next read."""

_LOCAL = ("file", "local")
_STORES = ("memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "adl")  # where fsspec is not there to say


def as_folder(path: str | Path) -> Path:
    """`path` as a folder (or file): on this machine, or in a store where it is a URL or a UPath of one.

    A UPath's storage options (an endpoint, keys) are kept; fsspec's configuration and environment hold for the others.

    Raises:
        InputError: no path; a URL that is none, or of a protocol that fsspec does not know or whose package is not
            installed.
        MissingExtraError: universal_pathlib is not installed.
    """
    if not isinstance(path, str | os.PathLike) and not hasattr(path, "storage_options"):
        raise InputError(f"name a folder: got {path!r}")
    url = str(path)
    if not url:
        raise InputError("name a folder: got an empty path")
    protocol, colon, rest = url.partition(":")
    protocol = protocol.lower()
    if not rest.startswith("//"):
        if colon and protocol in (*_LOCAL, *_protocols()):
            raise InputError(f"{url}: a URL begins {protocol}:// (a folder of this name: give its absolute path)")
        return Path(path)
    if not protocol:
        raise InputError(f"{url} names no protocol, as s3:// does")
    if "?" in rest or "#" in rest:
        raise InputError(f"{url}: a folder's URL has no ? and no #; in a name they are %3F and %23")
    if protocol in _LOCAL:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise InputError(f"{url}: a local folder's URL is absolute, {protocol}:///home/…; or give the path itself")
        return Path(unquote(parts.path))
    try:
        from upath import UPath
    except ImportError as error:
        raise MissingExtraError("universal_pathlib", "fsspec") from error
    # A listing that is kept would show this process what others wrote only later.
    options = {**getattr(path, "storage_options", {}), "use_listings_cache": False}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="UPath .* not explicitly implemented")
            folder = UPath(f"{protocol}:{rest}", **options)
        _ = folder.fs
    except ImportError as error:
        raise InputError(f"{url}: {error}{_package_of(protocol)}") from error
    except Exception as error:  # whatever the file system's own constructor raises
        raise InputError(f"{url}: {error}{_nearest(protocol)}") from error
    return cast(Path, folder)


def _protocols() -> list[str]:
    """Those that fsspec knows."""
    try:
        import fsspec
    except ImportError:
        return list(_STORES)
    return fsspec.available_protocols()


def _nearest(protocol: str) -> str:
    known = _protocols()
    return "" if protocol in known else did_you_mean(protocol, known)


def _package_of(protocol: str) -> str:
    """How to install what a protocol needs; empty where fsspec's own message has to do."""
    from fsspec.registry import known_implementations

    package = known_implementations.get(protocol, {}).get("class", "fsspec").partition(".")[0]
    return "" if package == "fsspec" else f": pip install {package}"


def is_local(path: Path) -> bool:
    """Whether renames are atomic and files are synced, as this machine's file systems do."""
    return isinstance(path, Path)


def is_in_memory(path: Path) -> bool:
    """Whether a store lives in this process alone, and ends with it."""
    return getattr(path, "protocol", "") == "memory"


def check_shared(folder: Path, world_size: int) -> None:
    """Raise InputError where ranks cannot see the same files in `folder`."""
    if world_size > 1 and is_in_memory(folder):
        raise InputError(f"{folder} lives in one process, and there are {world_size} ranks: name a folder or a store")


@contextmanager
def asking(path: Path) -> Iterator[None]:
    """Around a request to a store: its client's own exceptions become OSErrors, as those of a disk are."""
    try:
        yield
    except (OSError, InputError):
        raise
    except Exception as error:
        if is_local(path):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error


def listing(folder: Path) -> dict[str, int | None]:
    """The names in a folder, with the size in bytes of each file and None for what is no file; none where there is
    no such folder.

    Raises:
        OSError: it cannot be read now.
    """
    if is_local(folder):
        there = folder.iterdir() if folder.is_dir() else ()
        return {path.name: path.stat().st_size if path.is_file() else None for path in there}
    fs, own = _of(folder)
    with asking(folder):
        try:
            found = fs.ls(own, detail=True)
        except FileNotFoundError:
            return {}
    entries = {info["name"].rstrip("/"): info for info in found}
    return {
        name.rpartition("/")[2]: info["size"] if info["type"] == "file" else None
        for name, info in entries.items()
        if name.strip("/") != own.strip("/")  # the marker that some programs put in the place of a folder
    }


def exists(path: Path) -> bool:
    """Whether there is a file or folder. (UPath's own says no, too, where it cannot ask.)"""
    if is_local(path):
        return path.exists()
    fs, own = _of(path)
    with asking(path):
        try:
            fs.info(own)
        except FileNotFoundError:
            return False
    return True


def sync(path: Path) -> None:
    """Make the contents of a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put(path: Path, content: bytes) -> None:
    """Write a file of a store in one request: readers see all of it, or what was there before."""
    fs, own = _of(path)
    with asking(path):
        fs.makedirs(own.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(own, content)


def put_file(source: Path, path: Path) -> None:
    """Copy a local file into a store."""
    fs, own = _of(path)
    with asking(path):
        fs.makedirs(own.rpartition("/")[0], exist_ok=True)
        fs.put_file(str(source), own)


def get(path: Path, target: Path) -> None:
    """Copy a file of a store, or a folder with all that is in it, to `target` on this machine; nothing of nothing.

    Raises:
        InputError: a name in it leads out of the folder.
        OSError: it cannot be read now, or `target` not be written.
    """
    fs, own = _of(path)
    with asking(path):
        for name in fs.find(own):
            inside = PurePosixPath(name.strip("/")).relative_to(own.strip("/"))
            if ".." in inside.parts:
                raise InputError(f"{path} holds {name}, which leads out of it")
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(name, str(target / inside))


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, Read]]:
    """The size of a file in bytes, and how to read it, which several threads may do at a time.

    Raises:
        Exception: whatever the store's client raises: see `asking`.
    """
    if not is_local(path):
        fs, own = _of(path)
        yield fs.size(own), lambda start, end: memoryview(bytearray(fs.cat_file(own, start=start, end=end)))
        return
    descriptor = os.open(path, os.O_RDONLY)
    own_buffers = threading.local()  # new memory would cost as much as reading into it

    def read(start: int, end: int) -> memoryview:
        if len(getattr(own_buffers, "one", b"")) < end - start:
            own_buffers.one = bytearray(end - start)
        content, done = memoryview(own_buffers.one)[: end - start], 0
        while count := os.preadv(descriptor, [content[done:]], start + done):
            done += count
        return content[:done]

    try:
        yield os.fstat(descriptor).st_size, read
    finally:
        os.close(descriptor)


@contextmanager
def upload(path: Path) -> Iterator[Any]:
    """A file of a store, written in order and there (in most stores) once the block has ended."""
    fs, own = _of(path)
    with asking(path):
        fs.makedirs(own.rpartition("/")[0], exist_ok=True)
        with fs.open(own, "wb") as file:
            yield file


def move(path: Path, target: Path) -> None:
    """Copy a file to another name in the same store, then delete it."""
    fs, own = _of(path)
    with asking(path):
        fs.cp_file(own, _of(target)[1])
        fs.rm_file(own)


def delete(path: Path) -> None:
    """Delete a file of a store."""
    fs, own = _of(path)
    with asking(path):
        fs.rm_file(own)


def delete_all(folder: Path) -> None:
    """Delete all that is in a folder of a store."""
    fs, own = _of(folder)
    with asking(folder):
        fs.rm(own, recursive=True)


def _of(path: Path) -> tuple[Any, str]:
    """The file system, and the path as it wants it."""
    return cast(Any, path).fs, cast(Any, path).path
