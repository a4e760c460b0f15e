"""Gradients in flight to the ranks that own them, while backward still runs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from shardopt.engines.zero.buckets import Bucket, Message
from shardopt.engines.zero.flat import FlatParameters
from shardopt.engines.zero.transports import Communicator, Part, PeerError, Reduction
from shardopt.errors import InputError

if TYPE_CHECKING:
    from shardopt.engines.gradient_hooks import GradientHook


class Reducer:
    """Counts gradients as autograd finishes them, sends full buckets, and adds up what this rank owns.

    Every micro-batch's backward (in stage 1 the last one's only) sends every bucket once, in one order on all ranks,
    whatever order its gradients came in; buckets still unfilled at its end go with zeros for what has no gradient.
    The order is that of the buckets' numbers, until the ranks have agreed on the one in which the first step's
    buckets were full: modules may be registered in another order than they are run.

    Args:
        flat: the layout, the parameters, and where reduced gradients go.
        comm: the ranks that the buckets are cut over.
        reduce_dtype: bf16 makes wider gradients narrower on the wire; fp32 leaves all as they are.
        scale: what sums over ranks are multiplied by.
    """

    def __init__(self, flat: FlatParameters, comm: Communicator, reduce_dtype: torch.dtype, scale: float) -> None:
        self.flat, self.buckets, self.comm = flat, flat.buckets, comm
        self.params = [p.param for p in flat.parameters]
        self.reduce_dtype, self.scale = reduce_dtype, scale
        self.hooks: list[GradientHook] = []
        self.norms: list[Tensor] = [g.new_zeros(()) for g in flat.gradients]  # L2, of what was reduced last
        buckets = self.buckets
        self._wire = [b.dtype if b.dtype.itemsize <= 2 or reduce_dtype.itemsize > 2 else reduce_dtype for b in buckets]
        # Orders of sending and of arriving: the ranks' and this rank's own.
        self._sequence, self._arrivals = list(buckets), [m.index for b in buckets for m in b.members]
        self.learns = True  # until the ranks have agreed on a sequence
        self.budget = 2 * max(b.nbytes for b in buckets)
        self.may_wait = True  # for room, within a backward
        self.filled = list(range(len(buckets)))  # in the last backward, by number
        self.clear()
        self._begin()

    def clear(self) -> None:
        """Forget all gradients: what the next round brings replaces them."""
        self.rounds = 0  # reductions of all buckets
        self.present = [False] * len(self.params)  # whether this rank brought a gradient, in registration order
        self.blame: dict[int, list[int]] = {}  # by bucket, the ranks whose gradients were not finite, where known

    def skip(self) -> None:
        """Forget all gradients, whose step is not taken."""
        if self.rounds:
            for hook in self.hooks:
                hook.reset()
        self.clear()

    def _begin(self) -> None:
        self._remaining = [len(b.members) for b in self.buckets]
        self._sent = [False] * len(self.buckets)
        self._seen: dict[int, None] = {}  # parameters, in the order of their gradients
        self._full: list[int] = []  # buckets, in the order in which they were
        self._next = self._expected = 0
        self._flying: deque[tuple[Bucket, Reduction]] = deque()
        self._waiting_bytes = self._flying_bytes = 0

    @property
    def idle(self) -> bool:
        """True while no gradient has come since the last reduction of all buckets."""
        return not self._seen and self._next == 0

    def is_sent(self, index: int) -> bool:
        """True once the bucket of parameter `index` has been sent in this micro-batch."""
        return self._sent[self.flat.parameters[index].bucket.index]

    def ready(self, index: int) -> None:
        """Take note that the `.grad` of parameter `index` is complete for this backward; send what is full."""
        bucket = self.flat.parameters[index].bucket
        if self.is_sent(index):
            raise InputError(
                f"{self.flat.parameters[index].name} got a second gradient in one micro-batch: checkpoint activations "
                f"with use_reentrant=False, and call one backward in each optimizer.accumulate(last=...)"
            )
        if index in self._seen:
            return
        self._seen[index] = None
        self._remaining[bucket.index] -= 1
        if not self._remaining[bucket.index]:
            self._full.append(bucket.index)
        self._waiting_bytes += self.params[index].nbytes
        while self._next < len(self._sequence) and not self._remaining[self._sequence[self._next].index]:
            self._launch(self._sequence[self._next])
        # Autograd allocates the next gradient before it says so.
        while self._expected < len(self._arrivals) and self._arrivals[self._expected] in self._seen:
            self._expected += 1
        if self._expected < len(self._arrivals):
            self._make_room(self.params[self._arrivals[self._expected]].nbytes)

    def flush(self) -> None:
        """Send the buckets that are left. A collective."""
        for bucket in self._sequence[self._next :]:
            self._launch(bucket)

    def finish_round(self) -> None:
        """Send what is left and wait for all of it. A collective."""
        self.flush()
        while self._flying:
            self._complete()
        self.rounds += 1
        # What has no gradient comes last, in the order of its number.
        self._arrivals = list(dict.fromkeys([*self._seen, *self._arrivals]))
        self.filled = list(dict.fromkeys([*self._full, *range(len(self.buckets))]))
        self._begin()

    def send_in_order(self, numbers: Sequence[int]) -> None:
        """Send the buckets of later backwards in the order of `numbers`, the same on all ranks."""
        self._sequence = [self.buckets[number] for number in numbers]
        self.learns = False

    def _make_room(self, wanted: int) -> None:
        while self._flying and self._waiting_bytes + self._flying_bytes + wanted > self.budget and self.may_wait:
            self._complete()

    def _launch(self, bucket: Bucket) -> None:
        with record_function(f"zero: send {bucket.index}"):
            wire = self._wire[bucket.index]
            self._make_room(bucket.numel * wire.itemsize)
            gradients = {}
            for m in bucket.members:
                gradient = self.params[m.index].grad
                self.params[m.index].grad = None
                if gradient is not None:
                    if gradient.layout != torch.strided:
                        raise InputError(f"{m.name} has a sparse gradient: use dense ones (Embedding(sparse=False))")
                    self.present[m.index] = True
                    gradients[m.index] = gradient.detach()
                if m.index in self._seen:
                    self._waiting_bytes -= self.params[m.index].nbytes
            if self.hooks or not self.comm.takes_messages:
                dtype = self.flat.gradients[bucket.index].dtype if self.hooks else wire
                whole = self._packed(bucket.whole(), gradients, dtype)
                gradients.clear()
                for hook in self.hooks:
                    hook.before_reduce(bucket.index, whole)
                parts: Sequence[Part] = [[part] for part in whole.to(wire).chunk(self.comm.size)]
                del whole
            else:
                parts = [[self._message(m, gradients, wire) for m in messages] for messages in bucket.messages]
            gradients.clear()
            reduction = self.comm.reduce_scatter(parts)
            self._flying.append((bucket, reduction))
            self._flying_bytes += reduction.held_bytes()
            self._sent[bucket.index] = True
            self._next += 1

    def _message(self, message: Message, gradients: dict[int, Tensor], wire: torch.dtype) -> Tensor:
        if len(message.pieces) == 1:
            m, first, last, _ = message.pieces[0]
            gradient = gradients.get(m.index)
            alone = last - first == message.length
            if gradient is not None and alone and gradient.dtype == wire and gradient.is_contiguous():
                return gradient.view(-1)[first:last]  # sent from where autograd left it
        return self._packed(message, gradients, wire)

    def _packed(self, message: Message, gradients: dict[int, Tensor], dtype: torch.dtype) -> Tensor:
        packed = torch.zeros(message.length, dtype=dtype, device=self.params[0].device)
        for m, first, last, at in message.pieces:
            if (gradient := gradients.get(m.index)) is not None:
                packed[at : at + last - first].copy_(gradient.reshape(-1)[first:last])
        return packed

    def _complete(self) -> None:
        bucket, reduction = self._flying.popleft()
        with record_function(f"zero: add {bucket.index}"):
            out = self.flat.gradients[bucket.index]
            try:
                norm = self.norms[bucket.index] = reduction.finish(out, self.rounds > 0, self.scale)
                # On a GPU looking would stall the stream; the agreement before the step finds it there.
                if out.device.type == "cpu" and not math.isfinite(norm.item()) and (ranks := reduction.not_finite()):
                    self.blame[bucket.index] = ranks
                reduction.release()
            except PeerError as error:
                raise PeerError(f"{bucket}: {error}") from error
            self._flying_bytes -= reduction.held_bytes()
