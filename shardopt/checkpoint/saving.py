"""Write slices: every rank its part, in a file of its own, as rank 0 has planned it."""

from __future__ import annotations

import itertools
import json
import logging
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from shardopt.checkpoint import blocks, folders, manifest, planning
from shardopt.checkpoint.blocks import FileRecord
from shardopt.checkpoint.document import FORMAT, index_file, infix_for, write_document
from shardopt.checkpoint.finite import not_finite
from shardopt.checkpoint.index import data_file, write_index
from shardopt.checkpoint.manifest import Description
from shardopt.checkpoint.planning import Plan, Share
from shardopt.checkpoint.ranges import Ints, part
from shardopt.checkpoint.staging import Staging
from shardopt.checkpoint.store import as_folder, check_shared, is_local
from shardopt.distributed import Ranks, all_gather_objects
from shardopt.engines.state import Saveable, refused_steps, require_state
from shardopt.errors import InputError, NonFiniteError, StorageError, few
from shardopt.optim import states
from shardopt.slices import Slice

T = TypeVar("T")
logger = logging.getLogger(__name__)


def save(
    folder: str | Path,
    state: Saveable,
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
        StorageError: the folder cannot be written, on every rank; the disk is full.
        InputError: the folder holds something else; the state was loaded by half.
        InputError: replicas (DDP) whose weights or step counts differ; a document that is not JSON.
        InputError: an element that no rank holds, ranks that disagree about shapes or dtypes.
    """
    prepare(as_folder(folder), state, document or {}, extras or {}, kept=Kept(), allow_nonfinite=allow_nonfinite)()


@dataclass
class Kept:
    """What stays from one save to the next: the plan, while no rank holds anything else, and the memory of the copy."""

    described: Description | None = None
    share: Share = None
    plan: Plan | None = None
    """On rank 0."""
    staging: Staging = field(default_factory=Staging)

    def agree(self, described: Description, ranks: Ranks) -> None:
        """Make a new plan if any rank holds something else than at the save before. A collective."""
        if not ranks.any(self.described != described):
            return
        self.staging.clear()
        descriptions = ranks.gather_to_main(described)
        plan, shares = ranks.together(lambda: planning.make_plan(descriptions) if descriptions else (None, None))
        self.share = ranks.scatter_from_main(shares)
        self.described, self.plan = described, plan


class Report(NamedTuple):
    """What one rank tells rank 0 at every save."""

    counts: bytes
    """See `manifest.pack_counts`."""
    firsts: Ints | None
    """See `manifest.first_bits`."""
    folder: str


def prepare(
    folder: Path,
    state: Saveable,
    document: Mapping[str, Any],
    extras: Mapping[str, Tensor],
    *,
    kept: Kept,
    group: dist.ProcessGroup | None = None,
    after: Callable[[], None] = lambda: None,
    copy: bool = False,
    allow_nonfinite: bool = False,
    facts: Mapping[str, Any] = MappingProxyType({"loss": None, "after_finite_step": True}),
) -> Callable[[], None]:
    """Check and plan what is to be saved, and copy it if asked to. A collective, as is what it returns: the write.

    Args:
        kept: of the save before, for the next.
        facts: what else the document has under "checkpoint".
        group: the ranks, for the collectives of the write; None is all of them.
        after: called on rank 0 when the checkpoint is complete.
    """
    require_state(state, Saveable)
    ranks, began = state.ranks, time.time()

    def describe() -> tuple[Description, list[Slice], Report, dict[str, Any]]:
        check_shared(folder, ranks.world_size)
        if (reason := refused_steps(state.optimizer)) is not None:
            raise InputError(f"there is nothing to save: {reason}")
        if ranks.is_main and state.holds_gradients():
            logger.warning(
                "checkpoint %s is saved between micro-batches, and keeps no gradients: those that no step has used are "
                "lost to whoever goes on from it. Save after optimizer.step(), or repeat these micro-batches",
                folder,
            )
        state.init()
        # Buffers need not agree (BatchNorm's under DDP), so rank 0's are written whole.
        slices = [s for s in state.slices() if s.kind != "buffer" or ranks.is_main]
        described, chunks = manifest.describe(slices + manifest.extras_as_slices(extras))
        groups = {"groups": states.group_settings(state.inner)}
        report = Report(manifest.pack_counts(state.step_counts()), manifest.first_bits(chunks), str(folder))
        return described, chunks, report, {**_checked(document), "checkpoint": groups}

    described, chunks, report, content = ranks.together(describe)
    kept.agree(described, ranks)
    if kept.share is None:  # no replicas, whose first elements could differ
        report = report._replace(firsts=None)
    reports = ranks.gather_to_main(report)

    def compare() -> manifest.StepCounts:
        """On rank 0: folders, and what replicas have, must be equal."""
        if reports is None or kept.plan is None:
            return {}
        for rank, told in enumerate(reports):
            manifest.check_same_folder(str(folder), told.folder, rank)
        if kept.plan.replicas is not None:
            kept.plan.replicas.check([r.firsts for r in reports if r.firsts is not None])
        return manifest.merge_counts(r.counts for r in reports)

    step_counts = ranks.together(compare)
    mine = chunks if kept.share is None else [part(chunks[i], begin, n) for i, begin, n in kept.share.tolist()]
    if not allow_nonfinite:
        bad = set(itertools.chain(*ranks.gather(ranks.together(lambda: not_finite(mine)))))
        if bad:
            raise NonFiniteError(f"checkpoint {folder} is not written: {few(bad)}")

    def begin() -> list[Tensor]:
        if ranks.is_main:
            folders.begin(folder)
        tensors = [t for s in mine for t in s.tensors]
        return [kept.staging.copy(tensors)] if copy and tensors else tensors

    tensors = ranks.together(begin)
    save_id = ranks.from_main(uuid.uuid4().hex)
    plan, partial, infix = kept.plan, folders.partial_of(folder), infix_for(folder, save_id)

    def write_own() -> FileRecord | None:
        if not tensors:
            return None
        if is_local(partial):
            partial.mkdir(parents=True, exist_ok=True)
        return blocks.write_file(partial / data_file(ranks.rank, infix), save_id, tensors)

    def publish(plan: Plan, files: dict[str, FileRecord]) -> None:
        if is_local(partial) and not partial.is_dir():
            raise StorageError(f"{partial} has been removed while it was written")
        for name, record in files.items():
            path = partial / name
            if not path.is_file() or path.stat().st_size != record.size:
                raise InputError(
                    f"{path}, written by another rank, is not there: the folder (run.dir, of a run) must be on a file "
                    f"system that all nodes share"
                )
        index = index_file(infix)
        records = {index: write_index(partial / index, save_id, plan.table), **files}
        content["checkpoint"] |= {
            "format": FORMAT,
            "save_id": save_id,
            "name": folders.final_name(folder.name),
            "time": began,
            **facts,
            "torch": torch.__version__,
            "byteorder": sys.byteorder,
            "world_size": ranks.world_size,
            "parameters": plan.parameters,
            "step_counts": step_counts,
            "extras": plan.extras,
            "columns": plan.table.shape[1],
            "files": {name: record._asdict() for name, record in records.items()},
        }
        write_document(partial, content)
        folders.publish(partial, folder, folders.is_replaceable)
        after()

    def write() -> None:
        records = _on_all(write_own, folder, ranks, group)
        files = {data_file(rank, infix): record for rank, record in enumerate(records) if record is not None}
        _on_all(lambda: publish(plan, files) if plan is not None else None, folder, ranks, group)

    return write


def _checked(document: Mapping[str, Any]) -> dict[str, Any]:
    """A copy, since a caller may count on in the same dict while this is written in the background."""
    if "checkpoint" in document:
        raise ValueError('the document has a key "checkpoint", which is ours')
    for key, value in document.items():  # better now, on this line, than in the background
        try:
            json.dumps({key: value}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"document[{key!r}]: {error}") from error
    return deepcopy(dict(document))


def _on_all(action: Callable[[], T], folder: Path, ranks: Ranks, group: dist.ProcessGroup | None) -> list[T]:
    """Run `action` on every rank. A collective.

    Returns:
        What it returned, by rank.

    Raises:
        StorageError, InputError, RuntimeError: the first rank's error, on all; what was written for `folder` is deleted
            then.
    """
    error: BaseException | None = None
    failure: tuple[type[Exception], str] | None = None
    result: T | None = None
    try:
        result = action()
    except BaseException as e:  # Ctrl-C too, since the others wait for this rank
        error = e
        if isinstance(e, OSError):
            advice = "free some space, or name another folder (for a run: run.dir or checkpoint.dir)"
            failure = StorageError, f"cannot write checkpoint {folder} (rank {ranks.rank}: {e}); {advice}"
        elif isinstance(e, InputError):
            failure = StorageError if isinstance(e, StorageError) else InputError, str(e)
        else:
            failure = RuntimeError, f"checkpoint {folder} was not written: rank {ranks.rank}: {type(e).__name__}: {e}"
    world = group if group is not None or not ranks.distributed else dist.group.WORLD
    results = all_gather_objects((failure, result), world)
    first = next((told for told, _ in results if told is not None), None)
    if first is None:
        return cast(list[T], [result for _, result in results])
    if ranks.is_main:
        folders.abandon(folder)
    if error is not None and not isinstance(error, Exception):
        raise error
    raise first[0](first[1]) from error
