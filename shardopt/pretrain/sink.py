"""What a run is recorded in: the interface of metrics.jsonl, W&B and TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Status = Literal["finished", "interrupted", "failed"]
EventKind = Literal["start", "save", "warning", Status]


class Sink:
    """One place of a run's record; `Tracker` calls all of them, and outlives their failures. Override any method.

    Attributes:
        name: for warnings.
        where: its page, or the command that shows it; None where there is nothing to show.
    """

    name: str
    where: str | None = None

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """A row of metrics, `step` among them; steps ascend."""

    def sample(self, step: int, text: str) -> None:
        """Text that the model has written after `step`."""

    def event(self, kind: EventKind, step: int, facts: Mapping[str, Any]) -> None:
        """Something has happened after `step`; `facts` are JSON values."""

    def keep(self, kind: Literal["checkpoint", "export"], folder: Path) -> None:
        """A folder that the run has left at its end, complete."""

    def rewind(self, step: int, last: int) -> None:
        """The run goes back to `step` from `last`, the last one logged: other rows of the steps between will come."""

    def close(self, status: Status, summary: Mapping[str, float | int]) -> None:
        """The end of this start.

        Args:
            summary: figures of the whole run: see `record.summary`.
        """
