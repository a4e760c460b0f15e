"""Who keeps the others waiting: when a wait between ranks ends in vain, every rank says where it is."""

from __future__ import annotations

import faulthandler
import math
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

_LOOK = 1.0  # seconds between two looks at the store
_ANSWER = 5.0  # seconds that a rank has to answer
_SAME = 60.0  # seconds after an answer in which whoever fails has failed for the same reason
_MARGIN = 10.0  # seconds before the process group's timeout at which a step that still runs is asked about
_TIMEOUT = re.compile(r"timed out|time-?out", re.IGNORECASE)


class Watchdog:
    """Answers for its rank, from a thread of its own, when a rank of the job has waited in vain for another.

    A rank that answers prints the Python stacks of its threads on its standard error. One that is stopped or gone, or
    whose main thread holds the interpreter in C code, does not answer: it is the one that the others wait for. Nothing
    is sent until somebody asks; each rank looks at the store once a second.

    Args:
        store: the job's.
        rank, world_size: this process's place.
        timeout: the process group's. NCCL ends a process whose collective takes longer, without an exception: so a
            `watched` block that lasts nearly as long asks by itself.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> None:
        self.rank, self.world_size = rank, world_size
        seconds = timeout.total_seconds()
        self._patience = max(seconds / 2, seconds - _MARGIN)
        # A connection of its own: the main thread may be waiting on the other one.
        self._store = dist.PrefixStore("watchdog", store.clone())  # type: ignore[attr-defined]
        self._since: float | None = None  # when the `watched` block was entered
        self._answered, self._answered_at = 0, -math.inf  # the last question, counted from 1, and when it was
        self._lock = threading.Lock()
        self._closed = threading.Event()
        if not faulthandler.is_enabled():
            faulthandler.enable(sys.__stderr__ or 2)  # NCCL's own watchdog ends a process by SIGABRT
        threading.Thread(target=self._look, name="watchdog", daemon=True).start()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around what no rank should be in for longer than the timeout: a step."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def explain(self, error: BaseException | None = None) -> str:
        """Where every rank is, and which do not answer; of `error`, this rank's own. Empty if it is no timeout.

        Any rank may call it, and all of them: the first one asks. It takes a few seconds at most.
        """
        if error is not None and not _TIMEOUT.search(str(error)):
            return ""
        found: list[str] = []
        # The process with the store may be the one that is stopped.
        thread = threading.Thread(target=lambda: found.append(self._explain(error)), daemon=True)
        thread.start()
        thread.join(3 * _ANSWER)
        return found[0] if found else "no rank can be asked: the process with the job's store does not answer"

    def close(self) -> None:
        """Stop answering."""
        self._closed.set()

    def _explain(self, error: BaseException | None) -> str:
        try:
            number = self._asked()
            first = False
            if number == self._answered and time.monotonic() - self._answered_at > _SAME:
                number += 1
                first = self._store.add(f"{number}/first", 1) == 1
                if first:
                    self._store.add("asked", 1)
            self._answer(number, error.__traceback__ if error is not None else None)
            if first:
                self._store.set(f"{number}/all", self._collect(number))
            self._store.wait([f"{number}/all"], timedelta(seconds=2 * _ANSWER))
            return self._store.get(f"{number}/all").decode()
        except (dist.DistError, RuntimeError) as lost:
            return f"no rank can be asked: {lost}"

    def _asked(self) -> int:
        """How often somebody has asked."""
        return self._store.add("asked", 0)

    def _collect(self, number: int) -> str:
        """Wait for the answers, and put those that are alike together."""
        keys = [f"{number}/{rank}" for rank in range(self.world_size)]
        deadline = time.monotonic() + _ANSWER
        while not self._store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.1)
        ranks: dict[str, list[int]] = {}
        for rank, key in enumerate(keys):
            # One at a time: a store answers for several keys only whether all of them are there.
            place = self._store.get(key).decode() if self._store.check([key]) else ""
            ranks.setdefault(place, []).append(rank)
        silent = ranks.pop("", [])
        lines = [f"{_ranks(silent)}: no answer, stopped or gone; the others wait for it"] if silent else []
        return "\n".join(lines + [f"{_ranks(there)}: {place}" for place, there in ranks.items()])

    def _look(self) -> None:
        while not self._closed.wait(_LOOK):
            try:
                if (number := self._asked()) > self._answered:
                    self._answer(number)
            except (dist.DistError, RuntimeError):  # the store has gone, and the job with it
                return
            began = self._since
            if began is not None and time.monotonic() - began > self._patience:
                self._since = None  # once
                waited = f"a step has taken {self._patience:g} s on rank {self.rank}"
                print(f"shardopt: {waited}\n{self._explain(None)}", file=sys.stderr, flush=True)

    def _answer(self, number: int, failure: TracebackType | None = None) -> None:
        """Post where the main thread is, or was when it failed, and dump all threads' stacks; once per question."""
        with self._lock:
            if number <= self._answered:
                return
            self._answered, self._answered_at = number, time.monotonic()
        if failure is not None:
            stack = traceback.extract_tb(failure)
        else:
            stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
        self._store.set(f"{number}/{self.rank}", _place(stack))
        print(f"shardopt: stacks of rank {self.rank}", file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or 2)


def _place(stack: Iterable[traceback.FrameSummary]) -> str:
    """The innermost frame, and the innermost one of ours."""
    frames = list(stack)
    ours = [frame for frame in frames if Path(__file__).parent in Path(frame.filename).parents]
    shown = [frames[-1], *(frame for frame in ours[-1:] if frame is not frames[-1])]
    return ", called by ".join(f"{f.name} ({'/'.join(Path(f.filename).parts[-2:])}:{f.lineno})" for f in shown)


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
