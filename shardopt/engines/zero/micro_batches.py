"""Micro-batches: gradients taken from autograd as they come, in backwards with or without accumulate() around them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import Node

from shardopt.engines.zero.flat import WeightGather
from shardopt.engines.zero.reducer import Reducer
from shardopt.engines.zero.round import RoundState
from shardopt.errors import InputError

_numbers = itertools.count()
_open: weakref.WeakSet[MicroBatches] = weakref.WeakSet()  # those that autograd may bring gradients
_in_backward: list[MicroBatches] = []  # those that the running backward has brought gradients, outside accumulate()


class MicroBatches:
    """Hands the reducer what autograd has finished, and ends the micro-batch with its backward or its block.

    With `whole` gradients are kept until the step's last micro-batch (stage 1); with `from_host` some host reduces
    them, and they are only taken note of.
    """

    def __init__(self, reducer: Reducer, gather: WeightGather, whole: bool, from_host: bool) -> None:
        self.reducer, self.flat, self.gather, self.round = reducer, reducer.flat, gather, gather.round
        self.whole, self.from_host = whole, from_host
        self.number = next(_numbers)  # ranks that share several have built them in one order
        self._callback_queued = False
        if not from_host:
            _open.add(self)

    def close(self) -> None:
        """Expect no more gradients."""
        _open.discard(self)

    def on_gradient(self, index: int) -> None:
        """Autograd's hook: the gradient of parameter `index` is complete."""
        current = self.round
        if self.from_host:
            if current.state is RoundState.REDUCED:  # the norm was that of gradients which are gone
                current.state = RoundState.ACCUMULATED
            return
        if not self._callback_queued:
            self._begin_backward()
        try:
            parameter = self.flat.parameters[index]
            if parameter.bucket.index in self.gather.in_flight:
                early = f"{parameter.name} was used in a forward before its updated weights had arrived"
                raise InputError(f"{early}: call modules, not their .forward; or call optimizer.wait() before it")
            if current.last is None and self.reducer.is_sent(index):
                self.reducer.finish_round()  # reentrant checkpoints of one block, each with a backward of its own
            if not self.whole or current.last is not False:
                self.reducer.ready(index)
        except BaseException as error:
            current.fail(error)
            raise

    def _begin_backward(self) -> None:
        current = self.round
        try:
            if current.last is None:
                current.require("backward", RoundState.IDLE, RoundState.ACCUMULATED, RoundState.GATHERING)
            else:
                current.require("backward", RoundState.ACCUMULATING)
        except InputError as error:
            if current.unsent:  # which have been added to
                current.fail(error)
            self.flat.drop_gradients()
            raise
        current.state, current.begun = RoundState.ACCUMULATING, True
        # Another rank may come by other optimizers' parameters first, and wait there for this one.
        self.reducer.may_wait = len(_open) == 1
        if current.last is None:
            _in_backward.append(self)
        self._callback_queued = True
        _EndOfBackward(self)

    def end_of_backward(self) -> None:
        """Autograd's callback."""
        self._callback_queued = False
        outer = torch._C._current_autograd_node()
        if outer is not None:
            self._go_on_in_backward_of(outer)
        elif self in _in_backward:
            # All send before one waits, and wait in one order: ranks may have met them in another.
            ended = sorted(_in_backward, key=lambda each: each.number)
            _in_backward.clear()
            for each in ended:
                with each.round.failing():
                    each.reducer.flush()
            for each in ended:
                each.finish()

    def _go_on_in_backward_of(self, node: Node) -> None:
        """A reentrant checkpoint's own backward has ended: wait for the end of the one around it."""
        self.round.orphaned = True
        handles: list[Any] = []

        def begin(*_: Any) -> None:
            for handle in handles:
                handle.remove()
            self.round.orphaned = False
            if not self._callback_queued:
                self._callback_queued = True
                _EndOfBackward(self)

        handles += [following.register_prehook(begin) for following, _ in node.next_functions if following is not None]

    def backward_raised(self) -> None:
        """Called where autograd lets go of its callback without a call."""
        self._callback_queued = False
        if self in _in_backward:
            _in_backward.remove(self)
        self.round.backward_raised()

    def finish(self) -> None:
        """Send what is left of a micro-batch and wait for all of it. A collective."""
        with self.round.during(RoundState.REDUCING, then=RoundState.ACCUMULATED):
            self.flat.verify()
            self.reducer.finish_round()
        self.reducer.is_last = False
        self.round.unsent = False

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch."""
        current = self.round
        current.require("accumulate()", RoundState.IDLE, RoundState.ACCUMULATED, RoundState.GATHERING)
        current.state, current.last, current.begun = RoundState.ACCUMULATING, last, False
        # With several optimizers ranks may come by the buckets in orders of their own.
        self.reducer.is_last = last and len(_open) == 1
        try:
            with current.failing():  # the other ranks wait for buckets that this one will never send
                yield
        finally:
            current.last = None
        current.require("accumulate()", RoundState.ACCUMULATING)
        if self.from_host or (self.whole and not last):
            current.state, current.unsent = RoundState.ACCUMULATED, True
        else:
            self.finish()


class _EndOfBackward:
    """Autograd's callback at the end of a backward. Let go without having been called, the backward has raised."""

    def __init__(self, owner: MicroBatches) -> None:
        self.owner: Callable[[], MicroBatches | None] = weakref.ref(owner)
        torch.autograd.Variable._execution_engine.queue_callback(self)

    def __call__(self) -> None:
        owner, self.owner = self.owner(), lambda: None
        if owner is not None:
            owner.end_of_backward()

    def __del__(self) -> None:
        if (owner := self.owner()) is not None:
            owner.backward_raised()
