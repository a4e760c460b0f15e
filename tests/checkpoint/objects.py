"""objects://PATH: a store like S3 in a local folder, which several processes see. Puts are atomic, nothing is renamed.

`faults.before` is called before each request, with what it is and its path, and may raise.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

WRITES = ("put", "delete", "copy")
"""The requests that change something. A large file is one "put", which is asked for when the file is closed."""


class _Faults:
    before: Callable[[str, str], None] = staticmethod(lambda what, path: None)


faults = _Faults()


class Objects(AbstractFileSystem):
    protocol = "objects"
    cachable = False

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        self._ask("list", path)
        here = Path(path)
        found = [p for p in sorted(here.iterdir()) if _holds(p)] if here.is_dir() else []
        if not found:
            raise FileNotFoundError(path)
        return [self._info(p) for p in found] if detail else [str(p) for p in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        self._ask("info", path)
        here = Path(path)
        if not _holds(here):
            raise FileNotFoundError(path)
        return self._info(here)

    def _info(self, path: Path) -> dict[str, Any]:
        is_file = path.is_file()
        return {
            "name": str(path),
            "size": path.stat().st_size if is_file else 0,
            "type": "file" if is_file else "directory",
        }

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        self._ask("get", path)
        with Path(path).open("rb") as file:
            file.seek(start or 0)
            return file.read() if end is None else file.read(end - (start or 0))

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        self._ask("put", path)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp()  # where nobody lists
        with os.fdopen(descriptor, "wb") as file:
            file.write(value)
        shutil.move(temporary, target)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode == "rb":
            return io.BytesIO(self.cat_file(path))
        return _Upload(self, path)

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        self._ask("copy", path1)
        Path(path2).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path1, path2)

    def rm_file(self, path: str) -> None:
        self._ask("delete", path)
        Path(path).unlink()

    def rm(self, path: str, recursive: bool = False, **_: Any) -> None:
        here = Path(path)
        if not here.exists():
            raise FileNotFoundError(path)
        for file in [p for p in (*sorted(here.rglob("*"), reverse=True), here) if p.is_file()]:
            self.rm_file(str(file))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """There are no folders."""

    def mv(self, *_: Any, **__: Any) -> None:
        raise AssertionError("a store does not rename")

    rename = move = mv

    def _ask(self, what: str, path: str) -> None:
        faults.before(what, path)


def _holds(path: Path) -> bool:
    """A folder without objects is none."""
    return path.is_file() or any(p.is_file() for p in path.rglob("*"))


class _Upload(io.BytesIO):
    def __init__(self, store: Objects, path: str) -> None:
        super().__init__()
        self._store, self._path = store, path

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._store.pipe_file(self._path, self.getvalue())
        super().close()


fsspec.register_implementation("objects", Objects, clobber=True)
