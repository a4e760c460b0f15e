"""One run at a time in a run folder, whatever host it is on and whatever its file system can lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Literal

from shardopt.errors import InputError

logger = logging.getLogger(__name__)

_RENEW = 10.0  # seconds between two renewals
_STALE = 35.0  # seconds without one after which the holder is taken for dead
_SETTLE = 0.5  # seconds in which of two processes that take the lock at once the later one has written
_NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


class RunLock:
    """The file .lock: flock where there is one, and the name of its holder, renewed every few seconds.

    flock may be missing (Lustre, some NFS) or hold on one host only. So who finds the name of a process on another
    host, or has no flock, looks for half a minute whether it is renewed, and takes the lock if it is not.

    Args:
        path: runs/NAME/.lock; its folder is there.
        key: the setting that chose the folder, for messages.

    Raises:
        InputError: a process that is alive holds it.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, key: str = "run.name") -> None:
        self.path, self._key = path, key
        self._mine = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        self._closed = threading.Event()
        self._take()
        threading.Thread(target=self._renew, name="run lock", daemon=True).start()

    def _take(self) -> None:
        self._file = self.path.open("a+")
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                has_flock = True
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
                has_flock = False
            if has_flock and os.fstat(self._file.fileno()).st_nlink == 0:  # its holder removed it while we opened it
                raise BlockingIOError
            holder = self._read()
            if self._may_live(holder, has_flock) and self._is_renewed(holder):
                raise BlockingIOError
            self._file.truncate(0)
            self._file.write(json.dumps(self._mine))
            self._file.flush()
            if not has_flock:
                time.sleep(_SETTLE)
                if not self.is_mine():
                    raise BlockingIOError
        except BlockingIOError:
            holder = self._read()
            self._file.close()
            raise InputError(
                f"{self._key}: another process is running {self.path.parent} right now{_named(holder)}"
            ) from None
        except BaseException:
            self._file.close()
            raise

    def _may_live(self, holder: dict[str, Any], has_flock: bool) -> bool:
        if has_flock and holder.get("host") in (None, self._mine["host"]):
            return False  # flock would have said so
        if holder.get("host") == self._mine["host"]:
            return Path(f"/proc/{holder.get('pid')}").exists() or not Path("/proc").exists()
        return bool(holder) or self.path.stat().st_size > 0

    def _is_renewed(self, holder: dict[str, Any]) -> bool:
        logger.warning("%s: %s was in use%s: looking whether it still is", self._key, self.path.parent, _named(holder))
        before, deadline = self._stamp(), time.monotonic() + _STALE
        while time.monotonic() < deadline:
            time.sleep(min(0.5, _STALE / 10))
            if self._stamp() != before:
                return True
        return False

    def _stamp(self) -> int:
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:  # its holder has just ended
            return -1

    def _read(self) -> dict[str, Any]:
        return _holder(self.path)

    def is_mine(self) -> bool:
        return self._read().get("token") == self._mine["token"]

    def check(self) -> bool:
        """False where the file is gone, which is then made again, with its folder.

        Raises:
            InputError: another process has taken it meanwhile.
        """
        if self.is_mine():
            return True
        if self.path.exists():
            raise InputError(
                f"run.name: another process has taken {self.path.parent}{_named(self._read())}: this one stops, "
                f"before it writes there"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file.close()
        self._take()
        return False

    def release(self) -> None:
        """Let others have it."""
        self._closed.set()
        with contextlib.suppress(OSError):  # somebody has removed the folder meanwhile
            if self.is_mine():
                self.path.unlink()
        self._file.close()

    def _renew(self) -> None:
        while not self._closed.wait(_RENEW):
            with contextlib.suppress(OSError):  # `check` says so when there is something to write
                if self.is_mine():
                    os.utime(self.path)


def _holder(path: Path) -> dict[str, Any]:
    """Who holds a lock; empty where nobody does, or it is being written."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def look_at(path: Path) -> tuple[Literal["free", "held", "silent", "left"], str]:
    """What became of a lock, which is not taken, and whose it is, in words.

    free: nobody's. held: of a process that renews it. silent: of one on this host that does not, so that it is
    suspended, or has died and left its number to another. left: of one that has died.
    """
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return "free", ""
    holder = _holder(path)
    here = holder.get("host") == socket.gethostname() and Path("/proc").exists()
    lives = not here or Path(f"/proc/{holder.get('pid')}").exists()
    whose = _named(holder).strip(" ()")
    if age < _STALE:
        return ("held" if lives else "left"), whose
    return ("silent" if lives and here else "left"), whose


def _named(holder: dict[str, Any]) -> str:
    return f" (pid {holder['pid']} on {holder['host']})" if {"pid", "host"} <= holder.keys() else ""
