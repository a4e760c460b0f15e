"""The stages of a run: how many sequences a step has, and in what proportions they come from the sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from shardopt.errors import InputError, did_you_mean
from shardopt.pretrain.section import Section, Sequences, Steps, in_unit


class StageConfig(Section):
    """What changes at a step, in the order of the steps: the batch, the sources' weights, or both."""

    from_step: Steps
    """Steps that are done when it begins: its first is the step `from_step` + 1 of the metrics."""
    global_batch: Sequences | None = Field(None, ge=1)
    """Sequences per step over all ranks; null: as in the stage before."""
    weights: dict[str, Annotated[float, Field(ge=0), in_unit("relative to the others")]] | None = None
    """The weight of each source by its label, 0 for one that is left out; null: as in the stage before."""


@dataclass(frozen=True)
class Stage:
    """Steps that are alike.

    Attributes:
        from_step: the first of them, from 0.
        global_batch: sequences per step over all ranks.
        weights: of the sources, in their order; only their proportions count.
    """

    from_step: int
    global_batch: int
    weights: tuple[float, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the samples, by source."""
        return tuple(weight / sum(self.weights) for weight in self.weights)


class Stages:
    """The stages of a run, which answers for every step, from 0.

    Args:
        weights: of the sources by label, in their order, at step 0.
        global_batch: at step 0.
        changes: what changes later: `train.stages`.

    Attributes:
        all: the stages in their order.
        batches: the sizes of a global batch, by the key that says so.

    Raises:
        InputError: stages that do not follow each other, or change nothing; weights that are not the sources' or all 0.
    """

    def __init__(self, weights: Mapping[str, float], global_batch: int, changes: Sequence[StageConfig] = ()) -> None:
        self.all = [Stage(0, global_batch, tuple(weights.values()))]
        self.batches = {"train.global_batch": global_batch}
        if not any(weights.values()):
            raise InputError("data.sources: every weight is 0, so that there is nothing to begin with")
        for index, change in enumerate(changes):
            key, before = f"train.stages[{index}]", self.all[-1]
            if change.from_step <= before.from_step:
                than = f"after the stage before, at {before.from_step}" if index else "after step 0"
                raise InputError(
                    f"{key}.from_step: {change.from_step}, but stages begin one after the other, this one {than}; how "
                    f"a run begins say train.global_batch and the weights in data.sources"
                )
            if change.global_batch is None and change.weights is None:
                raise InputError(f"{key}: changes nothing; give it global_batch or weights")
            now = replace(before, from_step=change.from_step)
            if change.global_batch is not None:
                now = replace(now, global_batch=change.global_batch)
                self.batches[f"{key}.global_batch"] = change.global_batch
            if change.weights is not None:
                now = replace(now, weights=_in_order(f"{key}.weights", change.weights, list(weights)))
            self.all.append(now)

    def at(self, step: int) -> Stage:
        """The stage of `step`."""
        return next(stage for stage in reversed(self.all) if stage.from_step <= step)

    def between(self, start: int, stop: int) -> Iterator[tuple[Stage, int]]:
        """The stages of the steps start .. stop - 1, and how many of these steps each has."""
        ends = [*(stage.from_step for stage in self.all[1:]), stop]
        for stage, end in zip(self.all, ends, strict=True):
            steps = min(end, stop) - max(stage.from_step, start)
            if steps > 0:
                yield stage, steps

    def samples(self, start: int, stop: int) -> int:
        """Sequences of the steps start .. stop - 1."""
        return sum(steps * stage.global_batch for stage, steps in self.between(start, stop))


def _in_order(key: str, given: Mapping[str, float], labels: Sequence[str]) -> tuple[float, ...]:
    for label in given:
        if label not in labels:
            hint = did_you_mean(label, labels) or f"; there are: {', '.join(labels)}"
            raise InputError(f"{key}.{label}: no source has this label{hint}")
    if lacking := [label for label in labels if label not in given]:
        raise InputError(f"{key}: lacks {', '.join(lacking)}: give every source its weight, 0 to leave it out")
    if not any(given.values()):
        raise InputError(f"{key}: every weight is 0, so that there is nothing to train on")
    return tuple(given[label] for label in labels)
