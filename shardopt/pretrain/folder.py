"""The run folder: its lock, its config, and the checkpoint to resume from."""

from __future__ import annotations

import contextlib
from pathlib import Path

import yaml

from shardopt import checkpoint
from shardopt.errors import InputError
from shardopt.pretrain.config import Config, differences
from shardopt.pretrain.lock import RunLock


class RunFolder:
    """runs/NAME, held by rank 0 for as long as the run lasts.

    Args:
        config: of this run.

    Raises:
        InputError: the folder cannot be written, is not a run's, holds another run, is in use, or does not fit
            `run.resume`.
    """

    def __init__(self, config: Config) -> None:
        self.path = config.folder
        try:
            self._is_new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.path / ".lock")
        except OSError as e:
            raise InputError(f"run.dir: cannot write the run folder {self.path}: {e.strerror or e}") from e
        try:
            self._check(config)
            self._record(config)
        except BaseException:
            self.release()
            raise

    def _record(self, config: Config) -> None:
        recorded = self.path / "config.yaml"
        temporary = recorded.with_suffix(".tmp")
        temporary.write_text(config.as_yaml(), encoding="utf-8")
        temporary.replace(recorded)

    def keep(self, config: Config) -> bool:
        """Before something is written: false where somebody has removed the folder, which is then made again.

        Raises:
            InputError: another process has taken it.
        """
        if self._lock.check():
            return True
        self._record(config)
        return False

    def _check(self, config: Config) -> None:
        recorded = self.path / "config.yaml"
        strangers = {p.name for p in self.path.iterdir()} - {".lock"}
        if recorded.exists():
            self._check_same(recorded, config)
        elif strangers:
            raise InputError(
                f"run.name: {self.path} exists, and holds no run of shardopt ({', '.join(sorted(strangers)[:3])}): "
                f"choose another run.name or run.dir"
            )

    def _check_same(self, recorded: Path, config: Config) -> None:
        try:
            old = yaml.safe_load(recorded.read_text(encoding="utf-8"))
            changed = differences(old, config.as_dict())
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError) as e:
            raise InputError(f"{recorded} is damaged ({e}): restore it, or choose another run.name") from e
        began = (self.path / "metrics.jsonl").exists() or checkpoint.latest(self.path / "checkpoints") is not None
        if changed and began:  # a run that failed before its first step leaves nothing to lose
            listed = "\n  ".join(changed[:8])
            advice = "Set them back to go on with it, or choose another run.name"
            if any(key.startswith("train.steps:") for key in changed):
                advice += f", with model='{{path: {self.path}/export}}' to train the weights of a finished run on"
            raise InputError(
                f"run.name: {self.path} already holds another run; these keys differ:\n  {listed}\n{advice}."
            )
        if config.run.resume == "never" and began:
            raise InputError(f"run.resume: never, but {self.path} already holds this run: choose another run.name")

    def release(self) -> None:
        """Let others have the folder; a start that made it and failed before it began leaves none."""
        files = {p.name for p in self.path.rglob("*") if p.is_file()}
        self._lock.release()
        if self._is_new and files <= {".lock", "config.yaml"}:
            with contextlib.suppress(OSError):  # somebody else has begun in it
                (self.path / "config.yaml").unlink(missing_ok=True)
                for folder in sorted(self.path.rglob("*"), reverse=True):
                    folder.rmdir()
                self.path.rmdir()
