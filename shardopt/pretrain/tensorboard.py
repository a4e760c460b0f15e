"""The run in TensorBoard: event files in the run folder, one per start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardopt.errors import MissingExtraError
from shardopt.pretrain.sink import Sink, Status


class TensorboardLog(Sink):
    """Scalars under their names in metrics.jsonl, samples and what the run is as text.

    A start that resumes tells TensorBoard to forget what earlier ones logged beyond the checkpoint, so that no step
    stands twice.

    Args:
        folder: the run folder; files go to tensorboard/ in it.
        resume_step: the step of the checkpoint that the run continues from, 0 for none.
        about: facts about the run, shown as text.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, resume_step: int, about: Mapping[str, Any]) -> None:
        self._folder = folder / "tensorboard"
        self.where = f"tensorboard --logdir {folder}"
        self._open(resume_step)
        self._writer.add_text("about", _table(about), resume_step)

    def _open(self, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "tensorboard") from error
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)
        self._writer.flush()  # so that a run that is killed has lost nothing

    def sample(self, step: int, text: str) -> None:
        quoted = "\n".join(f"    {line}" for line in text.splitlines())  # as it stands, not as markdown
        self._writer.add_text("sample", quoted, step)

    def rewind(self, step: int, last: int) -> None:
        self._writer.close()
        self._open(step)

    def close(self, status: Status, summary: Mapping[str, float | int]) -> None:
        self._writer.add_text("summary", _table({"status": status, **summary}), int(summary.get("step", 0)))
        self._writer.close()


def _table(facts: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {key} | {str(value).replace('|', ' ')} |" for key, value in facts.items())
    return f"| | |\n|---|---|\n{rows}"
