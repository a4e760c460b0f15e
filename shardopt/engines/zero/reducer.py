"""Gradients in flight to the ranks that own them, while backward still runs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from shardopt.engines.zero.buckets import Bucket, Member
from shardopt.engines.zero.flat import FlatParameters
from shardopt.engines.zero.transports import Communicator, Part, PeerError, Reduction
from shardopt.errors import InputError

if TYPE_CHECKING:
    from shardopt.engines.gradient_hooks import GradientHook

# Elements [first, last) of a member's gradient, which lie from `at` in a message.
_Run = tuple[Member, int, int, int]


class Reducer:
    """Counts gradients as autograd finishes them, sends full buckets, and adds up what this rank owns.

    Every micro-batch's backward (in stage 1 the last one's only) sends every bucket once, in the order of their
    numbers, whatever order its gradients came in; buckets still unfilled at its end go with zeros for what has no
    gradient.

    Args:
        flat: the layout, the parameters, and where reduced gradients go.
        comm: the ranks that the buckets are cut over.
        reduce_dtype: bf16 makes wider gradients narrower on the wire; fp32 leaves all as they are.
        scale: what sums over ranks are multiplied by.

    Attributes:
        present: whether any micro-batch since `clear` brought a gradient on this rank, by registration order.
        rounds: reductions of all buckets since `clear`.
        norms: L2 norm of this rank's part of each bucket as reduced last.
        blame: (bucket, ranks) whose gradients were not finite, where the ranks are known.
    """

    def __init__(self, flat: FlatParameters, comm: Communicator, reduce_dtype: torch.dtype, scale: float) -> None:
        self.flat, self.buckets, self.comm = flat, flat.buckets, comm
        self.params = [p.param for p in flat.parameters]
        self.reduce_dtype, self.scale = reduce_dtype, scale
        self.hooks: list[GradientHook] = []
        self.norms: list[Tensor] = [g.new_zeros(()) for g in flat.gradients]
        buckets = self.buckets
        self._wire = [b.dtype if b.dtype.itemsize <= 2 or reduce_dtype.itemsize > 2 else reduce_dtype for b in buckets]
        self._order = [m.index for b in buckets for m in b.members]
        self._bucket_of = {m.index: b for b in buckets for m in b.members}
        self._plans = [self._plan(b) for b in buckets] if comm.takes_messages else []
        sizes = [b.numel * max(b.dtype.itemsize, w.itemsize) for b, w in zip(buckets, self._wire, strict=True)]
        self.budget = 2 * max(sizes)
        self.clear()
        self._begin()

    @staticmethod
    def _plan(bucket: Bucket) -> list[list[list[_Run]]]:
        """For every rank's messages, which elements of which gradients go where."""
        return [
            [
                [
                    (m, first - m.offset, last - m.offset, first - message.start)
                    for m in bucket.members
                    if (first := max(m.offset, message.start))
                    < (last := min(m.offset + m.numel, message.start + message.length))
                ]
                for message in messages
            ]
            for messages in bucket.messages
        ]

    def clear(self) -> None:
        """Forget all gradients: what the next round brings replaces them."""
        self.rounds = 0
        self.present = [False] * len(self.params)
        self.blame: list[tuple[int, list[int]]] = []

    def skip(self) -> None:
        """Forget all gradients, whose step is not taken."""
        if self.rounds:
            for hook in self.hooks:
                hook.reset()
        self.clear()

    def _begin(self) -> None:
        self._remaining = [len(b.members) for b in self.buckets]
        self._seen: set[int] = set()
        self._next = self._expected = 0
        self._flying: deque[tuple[Bucket, Reduction]] = deque()
        self._waiting_bytes = self._flying_bytes = 0

    @property
    def idle(self) -> bool:
        """Whether no gradient has come since the last reduction of all buckets."""
        return not self._seen and self._next == 0

    def is_sent(self, index: int) -> bool:
        """Whether the bucket of parameter `index` has been sent in this micro-batch."""
        return self._bucket_of[index].index < self._next

    def ready(self, index: int) -> None:
        """Take note that the `.grad` of parameter `index` is complete for this backward; send what is full."""
        bucket = self._bucket_of[index]
        if self.is_sent(index):
            raise InputError(
                f"{self.flat.parameters[index].name} got a second gradient in one micro-batch, after its bucket had "
                f"been sent: use non-reentrant activation checkpointing (use_reentrant=False), and one backward in "
                f"each optimizer.accumulate(last=...)"
            )
        if index in self._seen:
            return
        self._seen.add(index)
        self._remaining[bucket.index] -= 1
        self._waiting_bytes += self.params[index].nbytes
        while self._next < len(self.buckets) and not self._remaining[self._next]:
            self._launch(self.buckets[self._next])
        # Autograd allocates the next gradient before it says so.
        while self._expected < len(self._order) and self._order[self._expected] in self._seen:
            self._expected += 1
        if self._expected < len(self._order):
            self._make_room(self.params[self._order[self._expected]].nbytes)

    def flush(self) -> None:
        """Send the buckets that are left. A collective."""
        for bucket in self.buckets[self._next :]:
            self._launch(bucket)

    def finish_round(self) -> None:
        """Send what is left and wait for all of it. A collective."""
        self.flush()
        while self._flying:
            self._complete()
        self.rounds += 1
        self._begin()

    def _make_room(self, wanted: int) -> None:
        while self._flying and self._waiting_bytes + self._flying_bytes + wanted > self.budget:
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
            if self.hooks or not self._plans:
                parts: Sequence[Part] = self._flat(bucket, gradients, wire)
            else:
                parts = [
                    [self._message(message.length, runs, gradients, wire) for message, runs in zip(*of, strict=True)]
                    for of in zip(bucket.messages, self._plans[bucket.index], strict=True)
                ]
            gradients.clear()
            reduction = self.comm.reduce_scatter(parts)
            self._flying.append((bucket, reduction))
            self._flying_bytes += reduction.held_bytes()
            self._next = bucket.index + 1

    def _message(self, length: int, runs: list[_Run], gradients: dict[int, Tensor], wire: torch.dtype) -> Tensor:
        if len(runs) == 1:
            m, first, last, _ = runs[0]
            gradient = gradients.get(m.index)
            if gradient is not None and last - first == length and gradient.dtype == wire and gradient.is_contiguous():
                return gradient.view(-1)[first:last]  # sent from where autograd left it
        packed = torch.zeros(length, dtype=wire, device=self.params[0].device)
        for m, first, last, at in runs:
            if (gradient := gradients.get(m.index)) is not None:
                packed[at : at + last - first].copy_(gradient.reshape(-1)[first:last])
        return packed

    def _flat(self, bucket: Bucket, gradients: dict[int, Tensor], wire: torch.dtype) -> list[list[Tensor]]:
        dtype = self.flat.gradients[bucket.index].dtype if self.hooks else wire
        flat = torch.empty(bucket.numel, dtype=dtype, device=self.params[0].device)
        end = 0
        for m in bucket.members:
            flat[end : m.offset].zero_()
            end = m.offset + m.numel
            gradient = gradients.pop(m.index, None)
            if gradient is None:
                flat[m.offset : end].zero_()
            else:
                flat[m.offset : end].copy_(gradient.reshape(-1))
        flat[end:].zero_()
        for hook in self.hooks:
            hook.before_reduce(bucket.index, flat)
        return [[part] for part in flat.to(wire).chunk(self.comm.size)]

    def _complete(self) -> None:
        bucket, reduction = self._flying.popleft()
        with record_function(f"zero: add {bucket.index}"):
            out = self.flat.gradients[bucket.index]
            try:
                norm = self.norms[bucket.index] = reduction.finish(out, self.rounds > 0, self.scale)
                # On a GPU looking would stall the stream; the agreement before the step finds it there.
                if out.device.type == "cpu" and not math.isfinite(norm.item()) and (ranks := reduction.not_finite()):
                    self.blame.append((bucket.index, ranks))
                reduction.release()
            except PeerError as error:
                raise PeerError(f"{bucket}: {error}") from error
            self._flying_bytes -= reduction.held_bytes()
