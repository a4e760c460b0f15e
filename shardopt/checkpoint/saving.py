"""Write slices with torch.distributed.checkpoint: now, or in the background from a copy."""

from __future__ import annotations

import atexit
import json
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from shardopt.checkpoint import folders, manifest
from shardopt.checkpoint.blocks import FileRecord
from shardopt.checkpoint.document import FORMAT, INDEX, write_bytes, write_document
from shardopt.checkpoint.flat import FlatShard, chunks_of
from shardopt.checkpoint.index import index_content
from shardopt.checkpoint.storage import Writer, Written
from shardopt.distributed import Ranks
from shardopt.engines.state import ShardedState, refused_steps, require_state
from shardopt.errors import InputError
from shardopt.optim import states
from shardopt.slices import Slice, local_tensor

# Writing alone is meant where there is no process group. A filter for the whole process, because the warning
# may come from the background thread, where warnings cannot be caught without touching other threads.
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to"
)


def save(
    folder: str | Path,
    state: ShardedState,
    document: Mapping[str, Any] | None = None,
    extras: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights, optimizer state and step counts to `folder`, complete when this returns. A collective.

        >>> import tempfile, torch
        >>> from shardopt import AdEMAMix, checkpoint
        >>> from shardopt.engines.state import ModuleState
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = AdEMAMix(model.named_parameters(), lr=1e-3)
        >>> folder = tempfile.mkdtemp() + "/step-00000100"
        >>> checkpoint.save(folder, ModuleState(optimizer, model), {"step": 100})
        >>> sorted(checkpoint.read_document(folder)["checkpoint"]["parameters"])
        ['bias', 'weight']

    It is written beside `folder` and takes its name once every rank's data is on the disk, so a checkpoint
    that is there already is replaced whole or not at all. All ranks must see the same file system.

    Args:
        folder: for instance runs/x/checkpoints/step-00000100.
        state: what this rank holds. Elements that several ranks hold are written once.
        document: JSON to keep with it (the run's step, the config), of which rank 0's is kept. The key "checkpoint"
            is ours.
        extras: whole tensors of any shape beside them, by key; this rank's own under a key that says so
            ("rng/rank-00000/torch"), while equal keys on several ranks must mean equal values.

    Raises:
        InputError: the folder cannot be written, on every rank; the disk is full; the state was loaded by half.
        InputError: replicas (DDP) whose weights or step counts differ; a document that is not JSON.
        ValueError: an element that no rank holds, ranks that disagree about shapes or dtypes.
            (On the other ranks a RuntimeError that quotes it, where one rank alone found it.)
    """
    _prepare(Path(folder), state, document or {}, extras or {})()


class Saver:
    """Saves under `root`/step-NNNNNNNN, in the background if `asynchronous`, and deletes old checkpoints.

    Args:
        root: for instance runs/x/checkpoints.
        keep: how many complete checkpoints to keep at least; an older one is deleted only when a newer one is
            complete.
        ranks: all of them make a Saver, and call its methods together.
        asynchronous: `save` returns once the slices are copied to the CPU; an error of the background write
            is raised by the next `save`, `wait` or `close`.

    As a context manager it is closed at the end of the block; after an exception without waiting for a save in the
    background, which would wait for ranks that may be gone.

    Raises:
        InputError: `root` cannot be written, or `keep` is less than 1.
    """

    def __init__(self, root: str | Path, keep: int, ranks: Ranks, asynchronous: bool) -> None:
        self.root, self.keep, self.ranks, self.asynchronous = Path(root), keep, ranks, asynchronous
        self._cleaned = False
        self._pending: Future[None] | None = None

        def check() -> None:
            if keep < 1:
                raise InputError(f"checkpoint.keep must be at least 1, got {keep}")
            if ranks.is_main:
                folders.begin(self.root / "probe").rmdir()

        ranks.together(check)
        # The background thread's collectives must not mix with the training's.
        self._group = dist.new_group(backend="gloo", timeout=ranks.timeout) if ranks.distributed else None

    def save(
        self,
        step: int,
        state: ShardedState,
        document: Mapping[str, Any] | None = None,
        extras: Mapping[str, Tensor] | None = None,
    ) -> None:
        """As the function `save`, to the folder of `step`, after the save before it has ended. A collective.

        The tensors may change as soon as this returns.
        """
        self.wait()
        # Not at construction: a resuming run may still be reading one that was caught mid-replacement.
        if not self._cleaned:
            self.ranks.together(lambda: folders.clean(self.root) if self.ranks.is_main else None)
            self._cleaned = True
        folder = folders.step_folder(self.root, step)
        write = _prepare(
            folder, state, document or {}, extras or {},
            group=self._group,
            after=lambda: folders.prune(self.root, self.keep, folder),
            copy=self.asynchronous,
        )  # fmt: skip
        if not self.asynchronous:
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
        threading.Thread(target=run, name="checkpoint", daemon=True).start()
        atexit.register(self.wait)

    def wait(self) -> None:
        """Return when what was saved is complete on the disk.

        Raises:
            InputError, RuntimeError: the background write failed, on every rank; said once.
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
        pending.result()

    def close(self, wait: bool = True) -> None:
        """Wait, unless told not to, and leave the process group of the background writes. Call it once."""
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


def _prepare(
    folder: Path,
    state: ShardedState,
    document: Mapping[str, Any],
    extras: Mapping[str, Tensor],
    *,
    group: dist.ProcessGroup | None = None,
    after: Callable[[], None] = lambda: None,
    copy: bool = False,
) -> Callable[[], None]:
    """Check and describe what is to be saved, and copy it if asked to. A collective, as is what it returns: the write.

    Args:
        group: the ranks, for the collectives of the write; None is all of them.
        after: called on rank 0 when the checkpoint is complete.
    """
    require_state(state)
    ranks, partial = state.ranks, folders.partial_of(folder)

    def prepare() -> tuple[dict[str, Tensor], _SavePlanner, list[dict[str, Any]]]:
        if (reason := refused_steps(state.optimizer)) is not None:
            raise InputError(f"there is nothing to save: {reason}")
        state.init()
        # Buffers need not agree (BatchNorm's under DDP), so rank 0's are written whole.
        slices = [s for s in state.slices() if s.kind != "buffer" or ranks.is_main]
        planner = _SavePlanner(manifest.describe(slices), state.step_counts(), manifest.first_weights(slices))
        if "checkpoint" in document:
            raise ValueError('the document has a key "checkpoint", which is ours')
        for key, value in document.items():  # better now, on this line, than in the background
            try:
                json.dumps({key: value}, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise InputError(f"document[{key!r}]: {error}") from error
        if ranks.is_main:
            folders.begin(folder)
        return _tensors(slices, extras, copy=copy), planner, states.group_settings(state.inner)

    tensors, planner, groups = ranks.together(prepare)
    save_id = ranks.from_main(uuid.uuid4().hex)

    def publish(written: list[Written], metadata: Metadata) -> None:
        for file in written:
            path = partial / file.file
            if not path.is_file() or path.stat().st_size != file.record.size:
                raise InputError(
                    f"{path}, written by another rank, is not there: run.dir must be on a file system "
                    f"that all nodes share"
                )
        index = index_content(save_id, written, metadata)
        write_bytes(partial / INDEX, index)
        records = {INDEX: FileRecord.of(index), **{file.file: file.record for file in written}}
        described = {
            "format": FORMAT,
            "save_id": save_id,
            "torch": torch.__version__,
            "byteorder": sys.byteorder,
            "world_size": ranks.world_size,
            "parameters": planner.parameters,
            "step_counts": planner.step_counts,
            "groups": groups,
            "extras": planner.extras,
            "files": {name: record._asdict() for name, record in records.items()},
        }
        write_document(partial, {**document, "checkpoint": described})
        folders.publish(partial, folder, folders.is_complete)
        after()

    writer = Writer(partial, ranks.rank, save_id, publish)

    def write() -> None:
        try:
            dcp.save(
                tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=not ranks.distributed
            )
        except CheckpointException as error:
            _give_up(folder, error, ranks)

    return write


def _tensors(slices: list[Slice], extras: Mapping[str, Tensor], copy: bool) -> dict[str, Tensor]:
    """The tensors that DCP is to write. With `copy`, tensors of its own on the CPU."""

    def staged(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=True) if copy else tensor.detach()

    tensors: dict[str, Tensor] = {}
    for s in slices:
        parts = tuple(local_tensor(t) for t in s.tensors)
        if s.layout.ranges and s.format is None:
            chunks = {start: staged(c) for start, c in chunks_of(s.layout, parts[0]).items()}
            tensors[manifest.vector_key(s.name, s.kind)] = FlatShard(s.layout.numel, parts[0].dtype, chunks)
        elif s.layout.ranges:
            for key, part in zip(manifest.block_keys(s.name, s.kind, s.layout.ranges), parts, strict=True):
                tensors[key] = staged(part.reshape(-1))  # a rank may hold the same range in another shape
    tensors.update((manifest.extra_key(key), staged(tensor)) for key, tensor in extras.items())
    return tensors


class _SavePlanner(DefaultSavePlanner):
    """Also sends every rank's descriptions to rank 0, which puts them together and refuses a gap."""

    def __init__(self, described: manifest.Descriptions, *by_name: dict[str, dict[str, Any]]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.described, self.by_name = described, by_name
        self.step_counts: manifest.StepCounts = {}
        self.parameters: manifest.Parameters = {}
        self.extras: list[str] = []

    def create_local_plan(self) -> SavePlan:
        return replace(super().create_local_plan(), planner_data=(self.described, *self.by_name))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        self.parameters = manifest.merge([plan.planner_data[0] for plan in all_plans])
        self.step_counts, _ = (manifest.merge_equal([p.planner_data[i] for p in all_plans]) for i in (1, 2))
        # DCP looks for gaps itself, but not when a rank writes alone, and it names bounds without ranges.
        chunks: dict[str, set[tuple[int, int]]] = {}
        for item in (item for plan in all_plans for item in plan.items):
            if len(item.tensor_data.size) == 1:  # type: ignore[union-attr]
                chunk = item.tensor_data.chunk  # type: ignore[union-attr]
                chunks.setdefault(item.index.fqn, set()).add((chunk.offsets[0], chunk.sizes[0]))
        manifest.check_coverage(self.parameters, chunks)
        plans, metadata = super().create_global_plan([replace(plan, planner_data=None) for plan in all_plans])
        keys, prefix = metadata.state_dict_metadata, manifest.extra_key("")
        self.extras = sorted(key.removeprefix(prefix) for key in keys if key.startswith(prefix))
        return plans, metadata


def _give_up(folder: Path, error: CheckpointException, ranks: Ranks) -> NoReturn:
    """Raise DCP's error, which every rank has, as what it was where it arose; drop what was written."""
    if ranks.is_main:
        folders.abandon(folder)
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, OSError):
        raise InputError(
            f"cannot write checkpoint {folder} (rank {rank}: {cause}); free some space or change run.dir"
        ) from error
    if isinstance(cause, InputError):
        raise InputError(str(cause)) from error
    if isinstance(cause, ValueError):
        raise ValueError(f"checkpoint {folder}: {cause}") from error
    if not isinstance(cause, Exception):  # Ctrl-C
        raise cause
    raise RuntimeError(f"checkpoint {folder} was not written: rank {rank}: {type(cause).__name__}: {cause}") from error
