"""HF Trainer's checkpoint-N folders: whole or absent, every file with a checksum, the newest intact one found.

Trainer writes into checkpoint-N under its final name, file after file, and resumes from the highest N that it sees. So
its save is led to a folder beside, which takes the name when every rank has written, before an older one is deleted:

    RUN/_saving/checkpoint-N      being written, or left by a run that died
    RUN/_previous/checkpoint-N    what had the name before, for the moment between two renames
    RUN/_deleting/checkpoint-N    on its way out

Uploads to the hub leave out what begins with "_"; for Trainer and get_last_checkpoint these are no checkpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, load_sharded_checkpoint
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from shardopt import checkpoint
from shardopt.checkpoint import renaming
from shardopt.checkpoint.blocks import DamagedError, reading
from shardopt.checkpoint.folders import trainers_step_of
from shardopt.checkpoint.store import sync
from shardopt.checkpoint.stored import SLICES
from shardopt.checkpoint.trainer_files import check_files, write_checksums
from shardopt.checkpoint.verify import first_damage
from shardopt.distributed import Ranks
from shardopt.errors import InputError, NonFiniteError, few
from shardopt.slices import named_parameters, persistent_buffers

SAVING, PREVIOUS, DELETING = "_saving", "_previous", "_deleting"
_log = logging.getLogger(__name__)


def save_whole(
    save: Callable[[Any, Any], None], trainer: Trainer, write_slices: Callable[[Path], None], model: Any, trial: Any
) -> None:
    """Do what `Trainer._save_checkpoint`, which is `save`, does; whatever is killed when, a folder is whole or absent.

    A collective.

    Args:
        write_slices: writes every rank's slices into the folder it is given; a collective.

    Raises:
        NonFiniteError: weights or state are not finite; on every rank, and nothing is left of the folder.
    """
    ranks, args, state = Ranks.current(), trainer.args, trainer.state
    run = Path(trainer._get_output_dir(trial))
    folder = run / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    partial = run / SAVING / folder.name

    def begin() -> None:
        if args.should_save:
            _put_in_order(run)
            partial.mkdir(parents=True)

    ranks.together(begin)
    if not args.save_only_model:
        try:
            write_slices(partial)
        except NonFiniteError as error:  # on every rank
            ranks.together(lambda: _abandon(partial) if args.should_save else None)
            found, _ = _newest_intact(run, ranks)
            raise NonFiniteError(
                f"{error}. The training has diverged: lower learning_rate or max_grad_norm in TrainingArguments, and "
                + (f"resume from {found}, which is whole" if found else "begin again: there is no earlier checkpoint")
            ) from error
    pushed: list[str] = []
    # Else it would upload the folder that is about to be renamed.
    with _replaced(trainer, _get_output_dir=lambda trial: str(run / SAVING), _push_from_checkpoint=pushed.append):
        save(model, trial)
    if state.best_global_step:
        best = run / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if best == folder or best.is_dir():
            state.best_model_checkpoint = str(best)

    def publish() -> None:
        if args.should_save:
            state.save_to_json(str(partial / TRAINER_STATE_NAME))  # now that it names the best one by its final name
            _publish(partial, folder)

    ranks.gather(None)  # every rank has written
    ranks.together(publish)
    if pushed:
        trainer._push_from_checkpoint(str(folder))
    if args.should_save and args.save_total_limit is not None and args.save_total_limit > 0:
        _rotate(run, args.save_total_limit, {folder, Path(state.best_model_checkpoint or folder)})


def find_damage(folder: Path, ranks: Ranks) -> str | None:
    """A sentence about what keeps training from going on exactly from a checkpoint-N; None where nothing does.

    The same on every rank. A collective: every rank reads its share of the files.

    Raises:
        InputError: a file cannot be read now, or the slices are of another version; on every rank.
    """
    found = first_damage(lambda: _check(folder, ranks), ranks)
    return found or checkpoint.find_damage(folder / SLICES, ranks)


def newest_whole(run: Path) -> Path:
    """The newest whole checkpoint of a run, with a warning about each newer one. A collective.

    Raises:
        InputError: there is none.
    """
    ranks = Ranks.current()
    found, reasons = _newest_intact(run, ranks)
    if found is None:
        raise InputError(f"no checkpoint in {run} is whole: {'; '.join(reasons) or 'there is none'}")
    for reason in reasons if ranks.is_main else []:
        _log.warning(f"{reason}. It is passed over, and training goes on from {found}")
    return found


def refuse_damage(folder: Path) -> None:
    """Raise InputError where a checkpoint-N is not whole, naming an older one that is. A collective."""
    ranks = Ranks.current()
    if (reason := find_damage(folder, ranks)) is None:
        return
    older, _ = _newest_intact(folder.parent, ranks, below=trainers_step_of(folder.name))
    raise InputError(f"{reason}. {f'Resume from {older}, which is whole' if older else 'No older one is whole'}")


def beyond_trainer(folder: Path, host: str) -> str | None:
    """The reason why Trainer under `host` cannot load a checkpoint-N although shardopt can; None where it can."""
    if not (folder / SLICES).is_dir():
        return None
    document, here = checkpoint.read_document(folder / SLICES), Ranks.current().world_size
    if document["host"] != host and not {document["host"], host} <= {"single", "ddp"}:
        return f"it was written under {document['host']}, and this is {host}"
    if host == "deepspeed" and (wrote := document["checkpoint"]["world_size"]) != here:
        return f"it was written by {wrote} ranks and DeepSpeed reads it on as many only, not on {here}"
    return None


def load_beside_slices(folder: Path, model: Any) -> None:
    """Load the frozen weights and buffers, which no slices have, into a model that is not wrapped yet.

    Raises:
        InputError: `model` has some, and the checkpoint no whole model.
    """
    if (folder / SAFE_WEIGHTS_NAME).exists():
        model.load_state_dict(load_file(folder / SAFE_WEIGHTS_NAME), strict=False)
    elif (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        load_sharded_checkpoint(model, str(folder), strict=False)
    else:
        beside = [name for name, param in named_parameters(model) if not param.requires_grad]
        beside += [name for name, _ in persistent_buffers(model)]
        if beside:
            raise InputError(
                f"{folder} was written under another host and has no {SAFE_WEIGHTS_NAME}, so that what is not trained "
                f"({few(beside)}) cannot be loaded: resume under the host that wrote it"
            )


def scheduler_in(folder: Path) -> dict[str, Any]:
    """The state of the lr scheduler.

    Raises:
        InputError: the checkpoint has none.
    """
    if not (folder / SCHEDULER_NAME).exists():
        raise InputError(f"{folder} has no {SCHEDULER_NAME}: resume under the host that wrote it")
    return torch.load(folder / SCHEDULER_NAME, weights_only=True)


def _newest_intact(run: Path, ranks: Ranks, below: int | None = None) -> tuple[Path | None, list[str]]:
    """The checkpoint-N under `run` with the highest N that is whole, and a sentence about each newer one that is not.

    A collective.

    Args:
        below: only those with a smaller N.
    """
    there = ranks.ask_main(lambda: _checkpoints(run))
    reasons: list[str] = []
    for step in sorted(there, reverse=True):
        if below is None or step < below:
            if (reason := find_damage(there[step], ranks)) is None:
                return there[step], reasons
            reasons.append(reason)
    return None, reasons


def _checkpoints(run: Path) -> dict[int, Path]:
    with reading(run):
        there = (
            {trainers_step_of(folder.name): folder for folder in run.iterdir() if folder.is_dir()}
            if run.is_dir()
            else {}
        )
    return {step: folder for step, folder in there.items() if step is not None}


def _check(folder: Path, ranks: Ranks) -> None:
    """Check that all of Trainer's files are as they were written, this rank's share of them byte for byte."""
    if not (folder / SLICES).is_dir():
        converted = f"shardopt checkpoint convert {folder} NEW/{folder.name} --optimizer ademamix --to trainer"
        raise DamagedError(
            f"{folder} has no {SLICES} folder: it was saved by another optimizer or with save_only_model. "
            + (f"To go on from AdamW's state: {converted}. " if (folder / OPTIMIZER_NAME).exists() else "")
            + f"Start a new run from its weights: from_pretrained({str(folder)!r}), without resume_from_checkpoint"
        )
    check_files(folder, ranks)


def _publish(partial: Path, folder: Path) -> None:
    """Give `partial` the name `folder`, with the checksums of all that is in it, once everything is on the disk."""
    write_checksums(partial)
    for path in (*partial.rglob("*"), partial):
        sync(path)
    renaming.swap_in(partial, folder, folder.parent / PREVIOUS / folder.name)
    _remove_empty(folder.parent)


def _rotate(run: Path, limit: int, protected: set[Path]) -> None:
    """Keep `limit` checkpoints, `protected` ones among them; each that goes is renamed before anything in it goes."""
    there = sorted(_checkpoints(run).items(), key=lambda item: (item[1].stat().st_mtime, item[0]))
    others = [folder for _, folder in there if folder not in protected]
    for folder in others[: max(0, len(others) - max(0, limit - len(protected)))]:
        renaming.retire(folder, run / DELETING / folder.name)
    _remove_empty(run)


def _put_in_order(run: Path) -> None:
    """After a run that died: one caught between two renames comes back, leftovers go."""
    for previous in (run / PREVIOUS).glob("*"):
        renaming.swap_back(previous, run / previous.name)
    for leftover in (*(run / SAVING).glob("*"), *(run / DELETING).glob("*")):
        renaming.delete(leftover)
    _remove_empty(run)


def _abandon(partial: Path) -> None:
    renaming.delete(partial)
    _remove_empty(partial.parent.parent)


def _remove_empty(run: Path) -> None:
    """Remove the folders for what is written or on its way out, unless something is in there."""
    for aside in (SAVING, PREVIOUS, DELETING):
        with suppress(OSError):
            (run / aside).rmdir()


@contextmanager
def _replaced(trainer: Trainer, **methods: Any) -> Iterator[None]:
    """Methods of `trainer` replaced within the block."""
    before = {name: trainer.__dict__.get(name) for name in methods}
    trainer.__dict__.update(methods)
    try:
        yield
    finally:
        for name, method in before.items():
            trainer.__dict__.pop(name)
            if method is not None:
                trainer.__dict__[name] = method
