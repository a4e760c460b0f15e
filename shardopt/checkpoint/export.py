"""A trained model as safetensors, which transformers and others load, written one parameter at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from shardopt.checkpoint import folders
from shardopt.checkpoint.blocks import reading
from shardopt.checkpoint.document import write_json
from shardopt.checkpoint.index import dtype_name
from shardopt.checkpoint.inspect import size as in_words
from shardopt.checkpoint.store import as_folder, exists, is_local, listing, sync
from shardopt.checkpoint.stored import SLICES, Stored
from shardopt.distributed import Ranks
from shardopt.errors import InputError, MissingExtraError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MODEL = "model"
"""The folder of a run that keeps the model's config and tokenizer, for exports of its checkpoints."""
_OF_A_MODEL = (
    "config.",
    "generation_config.",
    "tokenizer",
    "special_tokens",
    "vocab",
    "merges",
    "added_tokens",
    "chat_",
)


def export_safetensors(
    folder: str | Path,
    parameters: Iterator[tuple[str, Tensor | None]],
    ranks: Ranks,
    *,
    max_file_bytes: int = 4 * 2**30,
    complete: Callable[[Path], None] | None = None,
) -> None:
    """Write whole parameters to `folder` in the files that `from_pretrained` looks for. A collective.

    One file is model.safetensors; several are model-00001-of-0000N.safetensors with an index. Rank 0 holds up
    to `max_file_bytes` and one parameter, other ranks what `parameters` makes them hold. Written aside and
    renamed, so that `folder` is whole or as it was.

    Args:
        folder: an earlier export there is replaced.
        parameters: `ShardedState.full_parameters()`: names as in the transformers model, values on rank 0 alone.
        ranks: the processes.
        max_file_bytes: a file is closed rather than exceed this; a larger parameter has a file of its own.
        complete: adds what else belongs there (config, tokenizer); called on rank 0 with the folder to write
            in, before that gets its name.

    Raises:
        InputError: the folder cannot be written or holds something else; on every rank.
        MissingExtraError: safetensors is not installed.
    """
    target = as_folder(folder)
    with folders.made_here(target) as here:
        _export(target, here, parameters, ranks, max_file_bytes, complete)


def _export(
    target: Path,
    here: Path,
    parameters: Iterator[tuple[str, Tensor | None]],
    ranks: Ranks,
    max_file_bytes: int,
    complete: Callable[[Path], None] | None,
) -> None:
    """See `export_safetensors`; `here` is `target`, or in its place on this machine."""
    files = _Files(folders.partial_of(here), max_file_bytes)

    def begin() -> None:
        _save_file()
        if ranks.is_main:
            folders.begin(here)

    ranks.together(begin)
    failure: Exception | None = None
    for name, value in parameters:
        # Where the disk has failed, the other ranks still wait in the collectives of the next parameters.
        if ranks.is_main and failure is None:
            try:
                if value is None:
                    raise ValueError(f"{name} has no value on rank 0")
                files.add(name, value)
            except Exception as error:
                failure = error

    def end() -> None:
        if not ranks.is_main:
            return
        try:
            if failure is not None:
                raise failure
            files.end()
            if complete is not None:
                complete(files.folder)
            for path in files.folder.rglob("*"):
                if path.is_file():
                    sync(path)
            folders.publish(files.folder, here if is_local(target) else target, _is_export)
        except OSError as error:
            raise cannot_write(target, here.parent, error) from error
        finally:
            folders.abandon(here)  # nothing is left to abandon where it has its name

    ranks.together(end)


class _Files:
    """Takes parameters and writes a safetensors file whenever enough have come."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._held: dict[str, Tensor] = {}
        self._bytes = self._total = 0
        self._written: list[list[str]] = []

    def add(self, name: str, value: Tensor) -> None:
        if self._held and self._bytes + value.nbytes > self.max_bytes:
            self._flush()
        # A copy: the engine may gather every parameter into the same buffer, and the live one will change.
        self._held[name] = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
        self._bytes += value.nbytes

    def end(self) -> None:
        self._flush()
        count = len(self._written)
        if count == 1:
            self._part(1).rename(self.folder / WHOLE)
            return
        where: dict[str, str] = {}
        for number, names in enumerate(self._written, start=1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / file)
            where |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(where.items()))}
        write_json(self.folder / INDEX, index)

    def _flush(self) -> None:
        self._written.append(list(self._held))
        # transformers refuses a file that does not say which framework's it is.
        part = self._part(len(self._written))
        from safetensors import SafetensorError

        try:
            _save_file()(self._held, part, metadata={"format": "pt"})
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(str(error)) from error
        os.umask(umask := os.umask(0))
        part.chmod(0o666 & ~umask)  # safetensors keeps its files from everybody else
        self._total += self._bytes
        self._held, self._bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"{number}.part"


# What says that a disk is full; the last two are of torch's zip writer.
_FULL = ("No space left", "quota exceeded", "unexpected pos", "file write failed")


def cannot_write(target: Path, disk: Path, error: BaseException) -> InputError:
    """The error of a target that cannot be written, with what to do where the disk is full.

    Args:
        disk: a folder on the disk that was written to, or that was to be made there.
    """
    reason = " ".join(str(error).split())
    if any(words in reason for words in _FULL):
        disk = next(folder for folder in (disk, *disk.parents) if folder.exists())
        free = in_words(shutil.disk_usage(disk).free)
        reason = (
            f"the disk is probably full ({disk} has {free} left): free some space or name another folder ({reason})"
        )
    return InputError(f"cannot write {target}: {reason}")


def export_checkpoint(
    folder: str | Path, out: str | Path, *, dtype: torch.dtype | None = None, raw: bool = False
) -> list[str]:
    """Write a checkpoint's weights and buffers for `from_pretrained`, one at a time; no job, no training data.

    Args:
        folder: a complete checkpoint.
        out: does not exist yet, or is an empty folder.
        dtype: of the exported weights, rounded to nearest; by default as in the checkpoint. Buffers keep theirs.
        raw: the weights themselves where there is a weight EMA of them, which is exported else, as a run does.

    Returns:
        The names of the files of the model's config and tokenizer that were copied beside the weights; none where
        neither the run nor HF Trainer has kept them.

    Raises:
        InputError: `out` is there, the weights do not fit `dtype`, no space.
    """
    stored = Stored(folder)
    kept, out = model_files(stored.folder), as_folder(out)
    if exists(out) and not (is_local(out) and out.is_dir() and not listing(out)):
        raise InputError(f"{out} exists already: name another folder, or move it away")

    def parameters() -> Iterator[tuple[str, Tensor]]:
        for name, value in stored.weights(raw):
            if dtype is None or "buffer" in stored.parameters[name]["kinds"]:
                yield name, value
                continue
            cast = value.to(dtype)
            if cast.isinf().sum() > value.isinf().sum():
                raise InputError(f"{name} has values that {dtype_name(dtype)} cannot hold: export as bf16 or fp32")
            yield name, cast

    def complete(target: Path) -> None:
        for path in kept:
            (target / path.name).write_bytes(path.read_bytes())
        config = target / "config.json"
        if config.exists() and dtype is not None:
            described = json.loads(config.read_text(encoding="utf-8"))
            write_json(config, described | {"dtype": dtype_name(dtype)})

    try:
        export_safetensors(out, parameters(), Ranks.current(), complete=complete)
    finally:
        if is_local(out):
            folders.abandon(out.absolute())
    return sorted(path.name for path in kept)


def model_files(folder: Path) -> list[Path]:
    """Config and tokenizer: of the run that wrote the checkpoint, or those that HF Trainer put around it."""
    trainers = folder.name == SLICES
    kept = folder.parent if trainers else folder.parent.parent / MODEL
    with reading(kept):
        files = sorted(name for name, size in listing(kept).items() if size is not None)
    return [kept / name for name in files if not trainers or name.startswith(_OF_A_MODEL)]


def _save_file() -> Callable[..., None]:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise MissingExtraError("safetensors", "pretrain") from error
    return save_file


def _is_export(folder: Path) -> bool:
    return not {WHOLE, INDEX}.isdisjoint(listing(folder))
