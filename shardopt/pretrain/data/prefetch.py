"""A rank's batches, prepared ahead of the step by a thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from shardopt.distributed import Ranks
from shardopt.pretrain.data.batches import TrainData, merge_places

# A source that does not answer may outlast the run, but must not keep its process from ending.
_PATIENCE = 5.0


@dataclass(frozen=True)
class _Prepared:
    """A batch, the place in the data after it, and on a GPU the event that its copy has arrived."""

    tokens: Tensor
    place: dict[str, Any]
    copied: torch.cuda.Event | None


class Batches:
    """This rank's rows of each step's batch: every world-size-th, on its device.

    The data runs ahead of the loop; `state_dict` is the place after the batch that was handed out last. An error while
    a batch was prepared is raised when that batch is asked for.

    Args:
        data: belongs to this object from the first batch on.
        ahead: batches that are prepared beyond the one asked for; 0 prepares each when it is asked for.

    Attributes:
        waited: seconds that the last `batch` took.
        failure: the error of the last `attempt`.
    """

    def __init__(self, data: TrainData, ranks: Ranks, ahead: int) -> None:
        self.data, self._ranks, self._ahead = data, ranks, ahead
        self.waited = 0.0
        self.failure: Exception | None = None
        self._stream = torch.cuda.Stream(ranks.device) if ranks.device.type == "cuda" else None
        self._next: int | None = None  # step of the batch to be handed out next
        self._place: dict[str, Any] = {}
        self._worker: _Worker | None = None

    def batch(self, step: int) -> Tensor:
        """Token ids of `step` (from 0): int64, [rows, block_size + 1]."""
        began = time.perf_counter()
        if step != self._next:
            self._stop()
        if self._ahead and self._worker is None:
            self._worker = _Worker(self, step)
        prepared = self._worker.take(self._ahead) if self._worker is not None else self.prepare(step)
        if prepared.copied is not None:
            torch.cuda.current_stream().wait_event(prepared.copied)
            prepared.tokens.record_stream(torch.cuda.current_stream())
        self._next, self._place = step + 1, prepared.place
        self.waited = time.perf_counter() - began
        return prepared.tokens

    def attempt(self, step: int) -> Tensor:
        """As `batch`; after an error something of its shape, for a step that is not taken, and then `check`.

        The error may be this rank's alone, and the others must not wait for it in the middle of the step.
        """
        try:
            tokens, self.failure = self.batch(step), None
        except Exception as error:
            rows, self.failure = self.data.stages.at(step).global_batch // self._ranks.world_size, error
            tokens = torch.zeros(rows, self.data.block_size + 1, dtype=torch.int64, device=self._ranks.device)
        return tokens

    def check(self) -> None:
        """Raise the error of the last `attempt`, if it had one."""
        if self.failure is not None:
            raise self.failure

    def prepare(self, step: int) -> _Prepared:
        """The batch of `step`, made now; for the thread."""
        data, ranks, stream = self.data, self._ranks, self._stream
        tokens = data.batch(step, ranks.rank, data.stages.at(step).global_batch, ranks.world_size)
        place = data.state_dict(step + 1)
        if stream is None:
            return _Prepared(tokens, place, None)
        with torch.cuda.stream(stream):  # a thread begins on the first GPU
            tokens = tokens.pin_memory().to(ranks.device, non_blocking=True)
            return _Prepared(tokens, place, stream.record_event())

    def state_dict(self, step: int) -> dict[str, Any]:
        """The place before `step`, the one after the last batch, of all ranks. A collective.

        Raises:
            RuntimeError: another batch was handed out last.
        """
        if step != self._next:
            raise RuntimeError(f"the place before step {step} is asked for, that before step {self._next} is known")
        return merge_places(self._ranks.gather(self._place)) if self.data.streams_in_shards else self._place

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Go on at a place with `step`: see TrainData."""
        self._stop()
        self.data.load_state_dict(state, step)

    def begin(self, step: int) -> None:
        """Begin with the first sample at `step`."""
        self._stop()
        self.data.begin(step)

    def close(self) -> None:
        """End the thread. One that waits for a source which does not answer is left behind."""
        self._stop(_PATIENCE)

    def _stop(self, patience: float | None = None) -> None:
        if self._worker is not None:
            self._worker.close(patience)
        self._worker = self._next = None


class _Worker:
    """The thread, and the batches that it has been asked for."""

    def __init__(self, batches: Batches, step: int) -> None:
        self._batches, self._step = batches, step
        self._asked: SimpleQueue[tuple[Future[_Prepared], int] | None] = SimpleQueue()
        self._futures: deque[Future[_Prepared]] = deque()
        # Not an executor's, which would keep an interrupted process from ending.
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def take(self, ahead: int) -> _Prepared:
        """The next batch; asks for `ahead` more."""
        while len(self._futures) <= ahead:
            self._futures.append(Future())
            self._asked.put((self._futures[-1], self._step))
            self._step += 1
        return self._futures.popleft().result()

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            future, step = asked
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._batches.prepare(step))
            except BaseException as error:  # whoever takes the batch gets it
                future.set_exception(error)

    def close(self, patience: float | None) -> None:
        for future in self._futures:
            future.cancel()
        self._asked.put(None)
        self._thread.join(patience)
