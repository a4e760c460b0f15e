"""Checkpoints to and from the files of other codes, in one process and without holding a model in memory."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from shardopt.checkpoint import folders
from shardopt.checkpoint.convert import deepspeed, native, state_dict, torchtitan, trainer
from shardopt.checkpoint.convert.state import Scratch, TrainingState, reading
from shardopt.checkpoint.export import cannot_write
from shardopt.checkpoint.inspect import size
from shardopt.checkpoint.store import as_folder, exists, get, is_local, sync
from shardopt.checkpoint.stored import SLICES, locate
from shardopt.checkpoint.verify import naming_whole
from shardopt.errors import InputError, NonFiniteError, did_you_mean

Write = Callable[[Path, TrainingState, Scratch], None]
_SOURCES = (native, trainer, deepspeed, torchtitan, state_dict)
TARGETS: dict[str, Write] = {
    native.NAME: native.write,
    "torch": state_dict.write,
    "paper": partial(state_dict.write, names="paper"),
    "bitsandbytes": partial(state_dict.write, names="bitsandbytes"),
    "torchtitan": torchtitan.write,
    "deepspeed": deepspeed.write,
    "trainer": trainer.write,
}
_FILES = ("torch", "paper", "bitsandbytes")


def read(source: Path) -> TrainingState:
    """What `source` holds, in whichever of the formats it is.

    Raises:
        InputError: it is in none of them, or damaged.
    """
    with reading(source):
        if not exists(source):
            raise InputError(f"{source} is not there")
    if native.holds(source) and (newest := locate(source)) != source and newest.name == SLICES:
        source = newest.parent  # HF Trainer's, whose own files have what is not trained
    for form in _SOURCES:
        if form.holds(source):
            try:
                with reading(source):
                    return form.read(source).checked()
            except InputError as error:
                raise error if str(source) in str(error) else InputError(f"{source}: {error}") from error
    raise InputError(
        f"{source} is none of: a checkpoint or run of shardopt, a .pt file of model and optimizer, a DCP folder of "
        f"torchtitan, DeepSpeed's universal folder (with zero/ in it), HF Trainer's checkpoint folder"
    )


def convert(
    source: str | Path,
    target: str | Path,
    to: str = native.NAME,
    *,
    optimizer: str | None = None,
    drop: Iterable[str] = (),
) -> TrainingState:
    """Write what `source` holds to `target`, bit for bit where the format keeps the dtype.

    Args:
        source: of any format; it is recognised. In a store, what is not shardopt's own is copied to this machine first.
        target: a new folder or file.
        to: one of `TARGETS`.
        optimizer: "ademamix" takes over AdamW's state as AdEMAMix.from_adamw does; "adamw" leaves m2 out.
        drop: state tensors and counts to leave out, by key.

    Returns:
        What was written; its tensors may lie in temporary files that are gone.

    Raises:
        InputError: a source that is damaged, a format that has no place for part of the state, a target that exists,
            has another step in its name or cannot be written, too little space. Nothing is left of the target then.
    """
    if to not in TARGETS:
        raise InputError(f"there is no format {to!r}{did_you_mean(to, TARGETS)}; there are {', '.join(TARGETS)}")
    source, target = as_folder(source), as_folder(target)
    with reading(target):
        occupied = exists(target)
    if occupied:
        raise InputError(f"{target} exists already: name another place, or move it away")
    if to in _FILES and target.suffix not in (".pt", ".pth"):
        raise InputError(f"{target}: {to} is a file, so name it .pt")
    if to not in _FILES and target.suffix in (".pt", ".pth"):
        raise InputError(f"{target}: {to} is a folder; for a file give --to {', --to '.join(_FILES)}")
    guard = naming_whole(locate(source)) if native.holds(source) else contextlib.nullcontext()
    with guard, _on_this_machine(source) as copy, folders.made_here(target) as here:
        state = read(copy).for_optimizer(optimizer).without(drop)
        _check_step(target, state.step)
        try:
            _write(here, target, to, state)
        except NonFiniteError as error:
            raise InputError(f"{source} is not converted: {error}") from error
    return state


def _check_step(target: Path, step: int | None) -> None:
    """Raise InputError where the target's name has another step: whoever resumes goes by the number in it."""
    name = target.name
    named = [n for n in (folders.step_of(name), folders.trainers_step_of(name)) if n is not None]
    if named and step not in (None, *named):
        stem = name.rstrip("0123456789")
        padding = len(name) - len(stem) if name[len(stem)] == "0" else 0
        right = target.with_name(stem + str(step).zfill(padding))
        raise InputError(f"{target}: the source is of step {step}, and whoever resumes goes by the number: {right}")


@contextlib.contextmanager
def _on_this_machine(source: Path) -> Iterator[Path]:
    """`source` itself or, where torch, DCP or safetensors must read it and it is in a store, a temporary copy."""
    with reading(source):
        if is_local(source) or (native.holds(source) and locate(source).name != SLICES):
            copy = None
        else:
            copy = Path(tempfile.mkdtemp(prefix="shardopt-"))
    if copy is None:
        yield source
        return
    try:
        with reading(source):
            get(source, copy / source.name)
        yield copy / source.name
    except InputError as error:
        raise InputError(str(error).replace(str(copy / source.name), str(source))) from error
    finally:
        shutil.rmtree(copy)


def _write(here: Path, target: Path, to: str, state: TrainingState) -> None:
    """Write `target`, by way of a folder beside `here`: itself, or in its place on this machine."""
    parent, partial_ = here.parent, folders.partial_of(here)
    try:
        with _writing(target, parent):
            parent.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(parent).free) < state.nbytes:
                raise InputError(f"{parent} has {size(free)} of free space, {target} takes {size(state.nbytes)}")
            _remove(partial_)  # of a conversion that was killed
            # Told before the scratch is deleted, which makes room.
            with (
                tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=parent) as scratch,
                _writing(target, parent),
            ):
                TARGETS[to](partial_, state, Scratch(Path(scratch)))
            for path in partial_.rglob("*"):
                sync(path)
            folders.publish(partial_, here if is_local(target) else target, lambda _: False)
    finally:
        with contextlib.suppress(OSError):  # the disk's first error is being raised
            _remove(partial_)


@contextlib.contextmanager
def _writing(target: Path, disk: Path) -> Iterator[None]:
    """Raise what a full disk makes Python, torch or DCP raise as an InputError."""
    try:
        yield
    except NonFiniteError:
        raise
    except (OSError, RuntimeError, CheckpointException) as error:
        raise cannot_write(target, disk, error) from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
