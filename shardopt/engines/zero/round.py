"""The round of one optimizer step as a state machine: what ZeRO is doing, and what may be called then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from shardopt.errors import InputError


class RoundState(Enum):
    """IDLE -> ACCUMULATING <-> ACCUMULATED -> REDUCED -> STEPPING -> GATHERING -> IDLE; REDUCING lies in between."""

    IDLE = "idle"  # no gradient of the coming step
    ACCUMULATING = "accumulating"  # inside accumulate() or a backward
    REDUCING = "reducing"  # waiting for gradients, or for the ranks to agree on their norm
    ACCUMULATED = "accumulated"  # between micro-batches: gradients are held, and more may come
    REDUCED = "reduced"  # the norm is known on every rank
    STEPPING = "stepping"
    GATHERING = "gathering"  # updated weights are in flight
    AVERAGED = "averaged"  # inside use_weight_ema(): the weights are the averaged ones
    FAILED = "failed"  # for good: ranks may differ


# States of a training loop between its calls.
RESTING = (RoundState.IDLE, RoundState.ACCUMULATED, RoundState.REDUCED, RoundState.GATHERING)

_WAY_OUT = {
    RoundState.ACCUMULATING: "a micro-batch is under way: leave the accumulate() block, or let the backward end, first",
    RoundState.REDUCING: "a gradient hook called it: call it from the training loop",
    RoundState.REDUCED: (
        "the gradients were clipped or measured, and neither stepped nor dropped: call optimizer.step() or "
        "optimizer.zero_grad() first"
    ),
    RoundState.STEPPING: "the inner optimizer's step called it: call it from the training loop",
    RoundState.AVERAGED: "the weights are the averaged ones: leave the use_weight_ema() block first",
}


@dataclass
class Round:
    """The state of a round, and what is known of its gradients."""

    state: RoundState = RoundState.IDLE
    last: bool | None = None  # accumulate()'s argument inside its block; None outside
    begun: bool = False  # a backward has brought gradients since the accumulate() block was entered
    unsent: bool = False  # whole gradients of earlier micro-batches are held and not reduced (stage 1)
    norm: float = 0.0  # L2 norm of the whole gradient after clipping, in REDUCED
    clip: float = 1.0  # what the gradients are still to be multiplied by, in REDUCED
    orphaned: bool = False  # a reentrant checkpoint's own backward has ended, the one around it has not gone on yet
    failure: str = ""  # what led to FAILED; the exception itself would keep its frames, and their tensors, alive

    def require(self, call: str, *allowed: RoundState) -> None:
        """Refuse `call` in any state but `allowed`.

        Raises:
            InputError: names the state and the way out of it.
            RuntimeError: the round has failed.
        """
        if self.orphaned:
            self.backward_raised()
        if self.state is RoundState.FAILED:
            raise RuntimeError(
                f"this optimizer stopped at an earlier failure and its ranks may differ: start again from a "
                f"checkpoint ({self.failure})"
            )
        if self.state not in allowed:
            raise InputError(f"{call} is not allowed in state {self.state.name}: {_WAY_OUT[self.state]}")

    def backward_raised(self) -> None:
        """Stop for good: other ranks have, or wait for, gradients of this backward that will not be sent."""
        self.fail(RuntimeError("a backward raised after some of its gradients had been taken"))

    def fail(self, error: BaseException) -> None:
        """Stop for good; the first failure is kept."""
        if self.state is not RoundState.FAILED:
            self.state, self.failure = RoundState.FAILED, f"{type(error).__name__}: {error}"

    @contextmanager
    def failing(self) -> Iterator[None]:
        """An exception inside the block leads to FAILED."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    @contextmanager
    def during(self, state: RoundState, then: RoundState) -> Iterator[None]:
        """`state` inside the block and `then` after it; an exception leads to FAILED."""
        self.state = state
        with self.failing():
            yield
        self.state = then

    def drop(self) -> None:
        """Return to IDLE from a state that holds gradients."""
        self.unsent = False
        if self.state in (RoundState.ACCUMULATED, RoundState.REDUCED):
            self.state = RoundState.IDLE
