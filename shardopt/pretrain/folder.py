"""The run folder: its lock, its config, and the checkpoint to resume from."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import yaml

from shardopt import checkpoint
from shardopt.checkpoint.document import DOCUMENT
from shardopt.checkpoint.stored import step_of, store_of
from shardopt.errors import InputError, writing
from shardopt.pretrain import branch, hub, strict_yaml
from shardopt.pretrain.advice import instead_of
from shardopt.pretrain.config import Config, differences
from shardopt.pretrain.data import check_sources
from shardopt.pretrain.lock import RunLock
from shardopt.pretrain.progress import read_document

# What config.yaml is written as; left by a process that was killed, or whose disk was full.
_UNFINISHED = "config.tmp"
# All that a start has written when it is refused.
_BEFORE_A_RUN = (".lock", "config.yaml", _UNFINISHED, branch.RECORD)


class RunFolder:
    """runs/NAME, held by rank 0 for as long as the run lasts.

    Args:
        config: of this run.

    Attributes:
        config: the same, with the checkpoint itself as `run.from`, and the commits of what is on the hub.

    Raises:
        InputError: the folder cannot be written, is not a run's, holds another run, is in use, or does not fit
            `run.resume`; there is no checkpoint that fits `run.from`.
    """

    def __init__(self, config: Config) -> None:
        self.path = config.folder
        self._began = False  # whether it holds anything of this run that must not be lost
        with writing(f"the run folder {self.path}"):
            self._is_new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.path / ".lock")
        try:
            config = self._check(config)
            self.config = config = config if self._began else hub.pin(config)
            self._record(config)
        except BaseException:
            self.release()
            raise

    def _record(self, config: Config) -> None:
        recorded, temporary = self.path / "config.yaml", self.path / _UNFINISHED
        with writing(recorded):
            temporary.write_text(config.as_yaml(), encoding="utf-8")
            temporary.replace(recorded)

    def write(self, name: str, values: dict[str, Any]) -> None:
        """Write JSON values into a file of the folder."""
        with writing(self.path / name):
            (self.path / name).write_text(json.dumps(values, indent=1), encoding="utf-8")

    def keep(self, config: Config) -> bool:
        """Before something is written: false where somebody has removed the folder, which is then made again.

        Raises:
            InputError: another process has taken it.
            StorageError: it cannot be written now, or is no folder.
        """
        with writing(f"the run folder {self.path}"):
            if self._lock.check():
                return True
        self._record(config)
        return False

    def _check(self, config: Config) -> Config:
        recorded = self.path / "config.yaml"
        strangers = {p.name for p in self.path.iterdir()} - {".lock", _UNFINISHED}
        if recorded.exists():
            config = self._check_same(recorded, config)
        elif strangers:
            raise InputError(
                f"run.name: {self.path} exists, and holds no run of shardopt ({', '.join(sorted(strangers)[:3])}): "
                f"choose another run.name or run.dir"
            )
        elif (newest := checkpoint.latest(config.store / "checkpoints")) is not None:  # they lie elsewhere
            config = self._check_same(newest / DOCUMENT, config)
        begins = checkpoint.latest(config.store / "checkpoints") is None
        return branch.resolve(config) if begins and config.run.source is not None else config

    def _check_same(self, recorded: Path, config: Config) -> Config:
        """`config`, which is of the same run as `recorded`: config.yaml, or the document of its newest checkpoint."""
        newest = checkpoint.latest(config.store / "checkpoints")
        self._began = began = newest is not None or (self.path / "metrics.jsonl").exists()
        try:
            if recorded.name == DOCUMENT:
                old = read_document(recorded.parent)["config"]
            else:
                old = strict_yaml.parse(recorded.read_text(encoding="utf-8"))
            config = hub.keep(old, branch.keep_source(old, config)) if began else config
            changed = differences(old, config.as_dict())
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError) as e:
            raise InputError(f"{recorded} is damaged ({e}): restore it, or choose another run.name") from e
        if began and changed and all(key.startswith(("train.steps:", "train.stages[")) for key in changed):
            reason = branch.why_not(old, config, (newest and step_of(newest)) or 0)
            changed = [] if reason is None else [*changed[:-1], f"{changed[-1]} ({reason})"]
        if changed and began:  # a run that failed before its first step leaves nothing to lose
            listed = "\n  ".join(changed[:8])
            store = config.store if recorded.name == DOCUMENT else store_of(self.path)
            raise InputError(
                f"run.name: {self.path} already holds another run; these keys differ:\n  {listed}\n"
                f"{instead_of(self.path, store)}."
            )
        if config.run.resume == "never" and began:
            raise InputError(
                f"run.resume: never, but {self.path} already holds this run: choose another run.name"
                + ("" if newest else f", or remove {self.path}: it has no checkpoint")
            )
        return config

    def release(self) -> None:
        """Let others have the folder; a start that made it and failed before it began leaves none."""
        files = {p.name for p in self.path.rglob("*") if p.is_file()}
        self._lock.release()
        if self._is_new and files <= set(_BEFORE_A_RUN):
            with contextlib.suppress(OSError):  # somebody else has begun in it
                for name in _BEFORE_A_RUN:
                    (self.path / name).unlink(missing_ok=True)
                for folder in sorted(self.path.rglob("*"), reverse=True):
                    folder.rmdir()
                self.path.rmdir()


def open_folder(config: Config) -> RunFolder:
    """The folder of `config`'s run; of several mistakes in the config, the one in its data is said first."""
    try:
        return RunFolder(config)
    except InputError:
        check_sources(config.data)  # under another run.name it would come next
        raise
