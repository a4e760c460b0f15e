"""Which checkpoints of a run stay on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from shardopt.errors import InputError


@dataclass(frozen=True)
class Keep:
    """A checkpoint stays where any of these asks for it; the others are deleted once a newer one is complete.

    Besides, the newest that a finite step came after always stays: what only comes before steps that are not finite
    may be the cause of them, though its values are finite.

    Args:
        last: the newest ones.
        every: those whose step is a multiple of it, for ever; None for no such rule.
        hours: one for each so many hours of wall time, for ever; None for no such rule.
        best: those with the lowest held-out loss, of those that have one.

    Raises:
        InputError: a number that makes no sense.
    """

    last: int = 3
    every: int | None = None
    hours: float | None = None
    best: int = 0

    def __post_init__(self) -> None:
        if self.last < 1:
            raise InputError(f"checkpoint.keep must be at least 1, got {self.last}")
        if self.every is not None and self.every < 1:
            raise InputError(f"checkpoint.keep_every must be at least 1 (or null), got {self.every}")
        if self.hours is not None and not self.hours > 0:
            raise InputError(f"checkpoint.keep_hours must be more than 0 (or null), got {self.hours}")
        if self.best < 0:
            raise InputError(f"checkpoint.keep_best must be at least 0, got {self.best}")

    def check(self, saved_every: int, evaluated_every: int) -> None:
        """Raise InputError where the rules cannot work with checkpoints and evaluations every so many steps."""
        if self.every is not None and self.every % saved_every:
            raise InputError(
                f"checkpoint.keep_every: {self.every} is not a multiple of checkpoint.every = {saved_every}, so few "
                f"checkpoints would have such a step"
            )
        if self.best and saved_every % evaluated_every:
            raise InputError(
                f"checkpoint.keep_best: goes by the held-out loss, which has to be measured at every checkpoint: make "
                f"checkpoint.every = {saved_every} a multiple of eval.every = {evaluated_every}"
            )

    def kept(self, checkpoints: Mapping[int, Mapping[str, Any]]) -> set[int]:
        """The steps of those that stay.

        Args:
            checkpoints: of each complete one, by its step, what `read_document` has under "checkpoint".
        """
        steps = sorted(checkpoints)
        kept = set(steps[-self.last :])
        if self.every is not None:
            kept |= {step for step in steps if step % self.every == 0}
        if self.hours is not None:
            at = -float("inf")
            for step in steps:
                if checkpoints[step]["time"] >= at + 3600 * self.hours:
                    kept.add(step)
                    at = checkpoints[step]["time"]
        measured = [step for step in steps if checkpoints[step]["loss"] is not None]
        kept |= set(sorted(measured, key=lambda step: (checkpoints[step]["loss"], -step))[: self.best])
        return kept | set(followed(checkpoints)[-1:])


def followed(checkpoints: Mapping[int, Mapping[str, Any]], newest: bool = False) -> list[int]:
    """The steps of those that a finite step came after, in order: each tells it of the one before.

    Args:
        checkpoints: see `Keep.kept`.
        newest: whether a finite step came after the newest.
    """
    steps = sorted(checkpoints)
    found = [step for step, after in pairwise(steps) if checkpoints[after]["after_finite_step"]]
    return found + steps[-1:] if newest else found
