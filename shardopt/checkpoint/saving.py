"""Write slices with torch.distributed.checkpoint."""

from __future__ import annotations

import itertools
import json
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

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
from shardopt.checkpoint.finite import not_finite
from shardopt.checkpoint.flat import FlatShard, chunks_of, few
from shardopt.checkpoint.index import index_content
from shardopt.checkpoint.storage import Writer, Written
from shardopt.distributed import Ranks
from shardopt.engines.state import ShardedState, refused_steps, require_state
from shardopt.errors import InputError, NonFiniteError
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
    *,
    allow_nonfinite: bool = False,
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
        allow_nonfinite: save infinite values and NaN in the weights and the optimizer's state, too. (Buffers may have
            them always.)

    Raises:
        NonFiniteError: such values, on every rank; nothing is written.
        InputError: the folder cannot be written, on every rank; the disk is full; the state was loaded by half.
        InputError: replicas (DDP) whose weights or step counts differ; a document that is not JSON.
        ValueError: an element that no rank holds, ranks that disagree about shapes or dtypes.
            (On the other ranks a RuntimeError that quotes it, where one rank alone found it.)
    """
    prepare(Path(folder), state, document or {}, extras or {}, allow_nonfinite=allow_nonfinite)()


def prepare(
    folder: Path,
    state: ShardedState,
    document: Mapping[str, Any],
    extras: Mapping[str, Tensor],
    *,
    group: dist.ProcessGroup | None = None,
    after: Callable[[], None] = lambda: None,
    copy: bool = False,
    allow_nonfinite: bool = False,
    facts: Mapping[str, Any] = MappingProxyType({"loss": None, "after_finite_step": True}),
) -> Callable[[], None]:
    """Check and describe what is to be saved, and copy it if asked to. A collective, as is what it returns: the write.

    Args:
        facts: what else the document has under "checkpoint".
        group: the ranks, for the collectives of the write; None is all of them.
        after: called on rank 0 when the checkpoint is complete.
    """
    require_state(state)
    ranks, partial, began = state.ranks, folders.partial_of(folder), time.time()

    def describe() -> tuple[list[Slice], _SavePlanner, list[dict[str, Any]], dict[str, Any]]:
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
        # A copy: a caller may count on in the same dict while this is written in the background.
        return slices, planner, states.group_settings(state.inner), deepcopy(dict(document))

    slices, planner, groups, kept = ranks.together(describe)
    bad = [] if allow_nonfinite else sorted(set(itertools.chain(*ranks.gather(not_finite(slices)))))
    if bad:
        raise NonFiniteError(f"checkpoint {folder} is not written: {few(bad)}")

    def begin() -> dict[str, Tensor]:
        if ranks.is_main:
            folders.begin(folder)
        return _tensors(slices, extras, copy=copy)

    tensors = ranks.together(begin)
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
            "name": folders.final_name(folder.name),
            "time": began,
            **facts,
            "torch": torch.__version__,
            "byteorder": sys.byteorder,
            "world_size": ranks.world_size,
            "parameters": planner.parameters,
            "step_counts": planner.step_counts,
            "groups": groups,
            "extras": planner.extras,
            "files": {name: record._asdict() for name, record in records.items()},
        }
        write_document(partial, {**kept, "checkpoint": described})
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
