"""The checkpoints of a run: written one after the other, now or in the background; old ones are deleted."""

from __future__ import annotations

import atexit
import math
import threading
from collections.abc import Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist
from torch import Tensor

from shardopt.checkpoint import folders
from shardopt.checkpoint.document import read_document
from shardopt.checkpoint.keep import Keep, followed
from shardopt.checkpoint.saving import Kept, prepare
from shardopt.checkpoint.store import as_folder
from shardopt.distributed import Ranks
from shardopt.engines.state import ShardedState
from shardopt.errors import InputError, StorageError


class Saver:
    """Saves under `root`/step-NNNNNNNN, in the background if `asynchronous`, and deletes old checkpoints.

    Args:
        root: for instance runs/x/checkpoints.
        keep: which checkpoints stay, or how many; an older one is deleted only when a newer one is complete.
        ranks: all of them make a Saver, and call its methods together; None takes those of the default process group.
        asynchronous: `save` returns once what this rank writes is copied to memory that the Saver keeps (pinned where a
            GPU is); an error of the background write is raised by the next `save`, `wait` or `close`.
        allow_nonfinite: see the function `save`.

    As a context manager it is closed at the end of the block; after an exception without waiting for a save in the
    background, which would wait for ranks that may be gone.

    Raises:
        InputError: `root` cannot be written, or `keep` is less than 1.
    """

    def __init__(
        self,
        root: str | Path,
        keep: int | Keep = 3,
        *,
        ranks: Ranks | None = None,
        asynchronous: bool = False,
        allow_nonfinite: bool = False,
    ) -> None:
        self.root, self.asynchronous = as_folder(root), asynchronous
        self.ranks = ranks = ranks or Ranks.current()
        self._closed = False
        self.allow_nonfinite = allow_nonfinite
        self._cleaned = False
        self._known: dict[Path, dict[str, Any]] = {}  # of complete checkpoints, on rank 0
        self._pending: Future[None] | None = None
        self.failed = 0
        """Saves that a disk or a store did not take, since the last one that is complete."""
        self._finite_step = False
        """Whether a step since the last save that is complete was finite, as far as saves have told."""
        self._kept = Kept()

        def check() -> None:
            if not isinstance(keep, int | Keep):
                raise InputError(f"keep must be a number of checkpoints or a checkpoint.Keep, got {keep!r}")
            self.keep = Keep(keep) if isinstance(keep, int) else keep
            if self.ranks.is_main:
                folders.check_writable(self.root)

        ranks.together(check)
        # The background thread's collectives must not mix with the training's.
        self._group = dist.new_group(backend="gloo", timeout=ranks.timeout) if ranks.distributed else None

    def save(
        self,
        step: int,
        state: ShardedState,
        document: Mapping[str, Any] | None = None,
        extras: Mapping[str, Tensor] | None = None,
        *,
        loss: float | None = None,
        after_finite_step: bool = True,
    ) -> None:
        """As the function `save`, to the folder of `step`, after the save before it has ended. A collective.

        The tensors may change as soon as this returns.

        Args:
            loss: held-out, if it was measured at this step; by it the best checkpoints are kept.
            after_finite_step: whether a step since the save before was finite, so that the weights then were good. If
                that save fails, what it was told counts for this one.
        """
        if self._closed:
            raise RuntimeError(f"the Saver of {self.root} is closed: make another one")
        if not isinstance(step, int) or step < 0:
            raise InputError(f"step must be a whole number >= 0, got {step!r}")
        try:
            self.wait()
        finally:  # where that one has failed, the next save is told of this call, too
            self._finite_step |= after_finite_step
        measured = float(loss) if loss is not None and math.isfinite(loss) else None
        folder = folders.step_folder(self.root, step)
        with self.counting():
            # Not at construction: a resuming run may still be reading one that was caught mid-replacement.
            if not self._cleaned:
                self.ranks.together(lambda: folders.clean(self.root) if self.ranks.is_main else None)
                self._cleaned = True
            write = prepare(
                folder, state, document or {}, extras or {},
                kept=self._kept,
                group=self._group,
                after=lambda: self._delete_old(folder),
                copy=self.asynchronous,
                allow_nonfinite=self.allow_nonfinite,
                facts={"loss": measured, "after_finite_step": self._finite_step},
            )  # fmt: skip
        if not self.asynchronous:
            with self.counting(done=True):
                write()
            return
        pending: Future[None] = Future()
        self._pending = pending

        def run() -> None:
            try:
                pending.set_result(write())
            except BaseException as error:
                pending.set_exception(error)

        # A daemon, so that a process that has failed can end; one that ends without `close` waits by atexit.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()
        atexit.register(self.wait)

    def wait(self) -> None:
        """Return when what was saved is complete on the disk.

        Raises:
            StorageError, InputError, RuntimeError: the background write failed, on every rank; said once.
            RuntimeError: it takes longer than `ranks.timeout` from now.
        """
        atexit.unregister(self.wait)
        pending, self._pending = self._pending, None
        if pending is None:
            return
        patience = self.ranks.timeout.total_seconds()
        if not futures.wait([pending], patience).done:
            raise RuntimeError(
                f"a checkpoint was not written to {self.root} within {patience:g} s (run.timeout_minutes): this rank's "
                f"disk, or another's, does not answer or is too slow"
            )
        self._thread.join()  # or a process that ends now may abort
        with self.counting(done=True):
            pending.result()

    def good(self, after_finite_step: bool = True) -> list[Path]:
        """The complete checkpoints that a finite step came after, newest first. A collective.

        What no finite step came after may be ruined, though its values are finite: a later NaN may come from it.

        Args:
            after_finite_step: whether a step since the last save was finite.
        """
        newest = after_finite_step or self._finite_step

        def find() -> list[Path]:
            found = {
                step: folder for step, folder in folders.step_folders(self.root).items() if folders.is_complete(folder)
            }
            facts = {step: read_document(folder)["checkpoint"] for step, folder in found.items()}
            return [found[step] for step in reversed(followed(facts, newest))]

        return self.ranks.ask_main(find)

    @contextmanager
    def counting(self, done: bool = False) -> Iterator[None]:
        """Around a part of a save, or what must come before one: a StorageError in it is counted in `failed`.

        Args:
            done: it is the last part, so that `failed` begins again at 0.
        """
        try:
            yield
        except StorageError:
            self.failed += 1
            raise
        if done:
            self.failed, self._finite_step = 0, False

    def _delete_old(self, written: Path) -> None:
        """Delete what need not stay; rank 0 alone, when `written` is complete."""
        self._known.pop(written, None)  # it may have been replaced
        try:
            found = folders.step_folders(self.root)
            for folder in found.values():
                if folder not in self._known and folders.is_complete(folder):
                    self._known[folder] = read_document(folder)["checkpoint"]
        except InputError as error:  # the new one is complete, so that no run ends by it
            folders.logger.warning("old checkpoints are not deleted: %s", error)
            return
        complete = {step: folder for step, folder in found.items() if folder in self._known}
        kept = self.keep.kept({step: self._known[folder] for step, folder in complete.items()})
        folders.prune(self.root, [f for step, f in complete.items() if step not in kept and f != written])

    def close(self, wait: bool = True) -> None:
        """Wait, unless told not to, and leave the process group of the background writes. Call it once."""
        self._closed = True
        try:
            if wait:
                self.wait()
        finally:
            atexit.unregister(self.wait)
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(wait=kind is None)
