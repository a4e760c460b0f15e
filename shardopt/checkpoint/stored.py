"""Read a checkpoint alone: whole tensors one at a time, without a model, an optimizer or a process group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardopt.checkpoint import folders
from shardopt.checkpoint.blocks import reading
from shardopt.checkpoint.document import DOCUMENT, read_document
from shardopt.checkpoint.index import DTYPES, read_index
from shardopt.checkpoint.loading import read_slices
from shardopt.checkpoint.store import as_folder, exists, is_local, listing
from shardopt.errors import InputError, no_folder
from shardopt.rows import newest_rows
from shardopt.slices import Layout, Slice

SLICES = "shardopt"
"""The folder in an HF Trainer's checkpoint-N that holds every rank's slices."""


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint's folder, ours or an HF Trainer's."""
    if folder.name == SLICES:
        return folders.trainers_step_of(folder.parent.name)
    return folders.step_of(folder.name)


def store_of(run: Path) -> Path:
    """Where a run keeps its checkpoints, export and model: its own folder, unless its config says `checkpoint.dir`.

    Raises:
        InputError: its config.yaml cannot be read.
    """
    recorded = run / "config.yaml"
    if not is_local(run) or not recorded.is_file():
        return run
    import yaml

    with reading(recorded):
        text = recorded.read_bytes()
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:  # !!int x
        raise InputError(f"{recorded} is damaged, so that its checkpoint.dir is not known: {error}") from error
    match config:  # another program's config.yaml says nothing here
        case {"run": {"name": str(name)}, "checkpoint": {"dir": str(elsewhere)}}:
            return as_folder(elsewhere) / name
    return run


def root_of(path: Path) -> Path | None:
    """The folder of a run's checkpoints: of a run, wherever it keeps them, or of itself; None where there is none."""
    for root in dict.fromkeys((store_of(path) / "checkpoints", path / "checkpoints", path)):
        with reading(root):
            names = listing(root)
        if any(folders.step_of(name) is not None or folders.trainers_step_of(name) is not None for name in names):
            return root
    return None


def complete_in(root: Path) -> dict[int, Path]:
    """The complete checkpoints under `root` by their step, oldest first; those of HF Trainer too."""
    found = {step: folder for folder in folders.complete_steps(root) if (step := step_of(folder)) is not None}
    with reading(root):
        names = listing(root)
    for name in names:
        step, folder = folders.trainers_step_of(name), root / name / SLICES
        if step is not None and folders.is_complete(folder):
            found[step] = folder
    return dict(sorted(found.items()))


def check_folder(path: Path, give: str) -> None:
    """Raise InputError where there is no folder, which says what to `give`."""
    with reading(path):
        there = path.is_dir() if is_local(path) else listing(path)
    if not there:
        raise no_folder(path, give) if is_local(path) else InputError(f"{path} is not a folder: give {give}")


def check_begun(path: Path) -> None:
    """Raise InputError where a folder is a run's that has no checkpoint, and say why it has none."""
    if not (is_local(path) and (path / "config.yaml").is_file()):
        return
    event = next(newest_rows(path / "events.jsonl"), {})
    if event.get("event") == "failed":
        reason = " ".join(str(event.get("text", "")).split())
        raise InputError(
            f"{path} failed at step {event['step']:,}, before its first checkpoint{reason and f': {reason}'}"
        )
    raise InputError(f"{path} has no checkpoint yet: one is written every checkpoint.every steps, and at the end")


def locate(path: str | Path, step: int | None = None) -> Path:
    """The checkpoint that `path` stands for: itself, the one in HF Trainer's, or a run's newest (or that of `step`).

    Raises:
        InputError: there is none; the message lists the steps there are.
    """
    path = as_folder(path)
    check_folder(path, "a run's folder, such as runs/NAME, or a checkpoint's")
    for folder in (path, path / SLICES):
        if exists(folder / DOCUMENT):
            if step is not None and step != step_of(folder):
                raise InputError(f"--step {step}: {path} is one checkpoint already; give its run's folder, or no step")
            return folder
    root = root_of(path)
    if root is None:
        check_begun(path)
        raise InputError(
            f"{path} is neither a checkpoint of shardopt (it has no {DOCUMENT}) nor a run with checkpoints"
        )
    found = complete_in(root)
    if not found:
        raise InputError(f"{root} holds no complete checkpoint: shardopt checkpoint list {path} says what is there")
    if step is None:
        return found[max(found)]
    if step not in found:
        raise InputError(f"--step {step}: {root} has steps {', '.join(map(str, found))}")
    return found[step]


class Stored:
    """A complete checkpoint on the disk.

    Args:
        folder: the checkpoint itself (see `locate`).

    Attributes:
        document: see `read_document`.
        parameters: {name: {"shape": ..., "kinds": {kind: {"dtypes": ...}}}} of weights, buffers and state.

    Raises:
        InputError: it is not a complete checkpoint.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = as_folder(folder)
        self.document = read_document(self.folder)
        folders.check_name(self.folder, self.document)
        self._index = read_index(self.folder, self.document)
        self.parameters: dict[str, dict[str, Any]] = self.document["checkpoint"]["parameters"]

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Name and kind of each tensor, kind after kind of one parameter."""
        return [(name, kind) for name, parameter in self.parameters.items() for kind in parameter["kinds"]]

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration; empty where no run of the launcher wrote it."""
        config = self.document.get("config")  # another program keeps there what it likes
        return config if isinstance(config, dict) else {}

    def dtype(self, name: str, kind: str) -> torch.dtype:
        """Of what `read` gives: as it is stored, fp32 for a block format."""
        entry = self.parameters[name]["kinds"][kind]
        return torch.float32 if "format" in entry else DTYPES[entry["dtypes"][0]]

    def bytes(self, name: str, kind: str) -> int:
        """Bytes of a tensor's data as it is stored."""
        return self._index.nbytes(name, kind)

    def read(self, name: str, kind: str, into: Tensor | None = None) -> Tensor:
        """A whole tensor in its own shape, on the CPU; bits as they are stored, a block format as fp32.

        Args:
            into: where to put it, a contiguous tensor of that shape and dtype; by default a new one.
        """
        shape = self.parameters[name]["shape"]
        into = torch.empty(shape, dtype=self.dtype(name, kind)) if into is None else into
        whole = Slice(name, kind, Layout.whole(name, shape), (into,))
        read_slices(self.folder, self._index, self._index.tensors, [whole])
        return into

    def weights(self, raw: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Weights and buffers, one after the other: the weight EMA of the weights that have one, unless `raw`."""
        for name, parameter in self.parameters.items():
            kinds = parameter["kinds"]
            if "weight" in kinds or "buffer" in kinds:
                own = "weight" if "weight" in kinds else "buffer"
                value = self.read(name, "weight_ema" if "weight_ema" in kinds and not raw else own)
                yield name, value.to(self.dtype(name, own))
