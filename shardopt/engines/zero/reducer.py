"""Gradients on their way to the ranks that own them, while backward still runs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from shardopt.engines.zero.buckets import Bucket, Member
from shardopt.engines.zero.transports import Communicator, Part, PeerError, Reduction
from shardopt.errors import InputError

if TYPE_CHECKING:
    from shardopt.engines.gradient_hooks import GradientHook


# Elements [first, last) of a member's gradient, which lie from `at` in a message.
_Piece = tuple[Member, int, int, int]


class Reducer:
    """Counts gradients as autograd finishes them, sends full buckets, and adds up what this rank owns.

    A round is one micro-batch's backward (in stage 1 the last one's only): every rank sends every bucket once, in
    the order of their numbers, whatever order its gradients came in; buckets still unfilled at the round's end go
    with zeros for what has no gradient.

    Args:
        buckets: the layout.
        params: the model's parameters in registration order (`Member.index`).
        comm: the ranks that the buckets are cut over.
        reduce_dtype: bf16 makes wider gradients narrower on the wire; fp32 leaves all as they are.

    Attributes:
        scale: what sums over ranks are multiplied by.
        reduced: this rank's part of every bucket, fp32 (fp64 for fp64 parameters); views of `storage`.
        present: whether any round since `clear` brought a gradient on this rank, by registration order.
        rounds: since `clear`.
        blame: (bucket, ranks) whose gradients were not finite, where the ranks are known.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        params: Sequence[nn.Parameter],
        comm: Communicator,
        reduce_dtype: torch.dtype,
        scale: float,
    ) -> None:
        self.buckets, self.params, self.comm = buckets, params, comm
        self.reduce_dtype, self.scale = reduce_dtype, scale
        self.hooks: list[GradientHook] = []
        self.storage: dict[torch.dtype, Tensor] = {}
        self.reduced: list[Tensor] = []
        device = params[0].device
        for dtype in dict.fromkeys(b.dtype for b in buckets):
            wide = torch.promote_types(dtype, torch.float32)
            held = sum(b.part for b in buckets if torch.promote_types(b.dtype, torch.float32) == wide)
            if wide not in self.storage:
                self.storage[wide] = torch.zeros(held, dtype=wide, device=device)
        used = dict.fromkeys(self.storage, 0)
        for bucket in buckets:
            wide = torch.promote_types(bucket.dtype, torch.float32)
            self.reduced.append(self.storage[wide][used[wide] : used[wide] + bucket.part])
            used[wide] += bucket.part
        self.norms: list[Tensor | None] = [None] * len(buckets)
        self._wire = [b.dtype if b.dtype.itemsize <= 2 or reduce_dtype.itemsize > 2 else reduce_dtype for b in buckets]
        self._order = [m.index for b in buckets for m in b.members]
        self._bucket_of = {m.index: b for b in buckets for m in b.members}
        self._plans = [self._plan(b) for b in buckets] if comm.takes_messages else []
        sizes = [b.numel * max(b.dtype.itemsize, w.itemsize) for b, w in zip(buckets, self._wire, strict=True)]
        self.budget = 2 * max(sizes)
        self.delivered: dict[int, Tensor] = {}
        self.clear()
        self._begin()

    @staticmethod
    def _plan(bucket: Bucket) -> list[list[list[_Piece]]]:
        """For every rank's messages, which elements of which gradients go where."""
        plan = []
        for messages in bucket.messages:
            pieces_of: list[list[_Piece]] = []
            for message in messages:
                pieces: list[_Piece] = []
                for m in bucket.members:
                    first = max(m.offset, message.start)
                    last = min(m.offset + m.numel, message.start + message.length)
                    if first < last:
                        pieces.append((m, first - m.offset, last - m.offset, first - message.start))
                pieces_of.append(pieces)
            plan.append(pieces_of)
        return plan

    def clear(self) -> None:
        """Forget all gradients: what the next round brings replaces them."""
        self.rounds = 0
        self.present = [False] * len(self.params)
        self.blame: list[tuple[int, list[int]]] = []

    def _begin(self) -> None:
        self._remaining = [len(b.members) for b in self.buckets]
        self._seen: set[int] = set()
        self._next = self._expected = 0
        self._flying: deque[tuple[Bucket, Reduction]] = deque()
        self._waiting_bytes = self._flying_bytes = 0

    @property
    def idle(self) -> bool:
        """Whether no round has begun."""
        return not self._seen and self._next == 0

    @property
    def all_sent(self) -> bool:
        """Whether this round's last bucket is on its way."""
        return self._next == len(self.buckets)

    def ready(self, index: int, gradient: Tensor | None = None) -> None:
        """Parameter `index` has this backward's gradient: in `.grad`, or `gradient` where a host has it."""
        bucket = self._bucket_of[index]
        if bucket.index < self._next:
            name = next(m.name for m in bucket.members if m.index == index)
            raise InputError(
                f"{name} got a second gradient in one micro-batch, after its bucket had been sent: use "
                f"non-reentrant activation checkpointing (use_reentrant=False), and one backward in each "
                f"optimizer.accumulate(last=...)"
            )
        if gradient is not None:
            self.delivered[index] = gradient
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

    def finish_round(self) -> None:
        """Send what is left and wait for all of it. A collective."""
        for bucket in self.buckets[self._next :]:
            self._launch(bucket)
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
                gradient = self.delivered.pop(m.index, None)
                if gradient is None:
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
                    [
                        self._message(message.length, pieces, gradients, wire)
                        for message, pieces in zip(*of, strict=True)
                    ]
                    for of in zip(bucket.messages, self._plans[bucket.index], strict=True)
                ]
            gradients.clear()
            reduction = self.comm.reduce_scatter(parts)
            self._flying.append((bucket, reduction))
            self._flying_bytes += reduction.held_bytes()
            self._next = bucket.index + 1

    def _message(self, length: int, pieces: list[_Piece], gradients: dict[int, Tensor], wire: torch.dtype) -> Tensor:
        if len(pieces) == 1:
            m, first, last, _ = pieces[0]
            gradient = gradients.get(m.index)
            if gradient is not None and last - first == length and gradient.dtype == wire and gradient.is_contiguous():
                return gradient.view(-1)[first:last]  # sent from where autograd left it
        packed = torch.zeros(length, dtype=wire, device=self.params[0].device)
        for m, first, last, at in pieces:
            if (gradient := gradients.get(m.index)) is not None:
                packed[at : at + last - first].copy_(gradient.reshape(-1)[first:last])
        return packed

    def _flat(self, bucket: Bucket, gradients: dict[int, Tensor], wire: torch.dtype) -> list[list[Tensor]]:
        dtype = self.reduced[bucket.index].dtype if self.hooks else wire
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
            out = self.reduced[bucket.index]
            try:
                norm = self.norms[bucket.index] = reduction.finish(out, self.rounds > 0, self.scale)
                # On a GPU looking would stall the stream; the agreement before the step finds it there.
                if out.device.type == "cpu" and not math.isfinite(norm.item()) and (ranks := reduction.not_finite()):
                    self.blame.append((bucket.index, ranks))
                reduction.release()
            except PeerError as error:
                raise PeerError(f"{bucket}: {error}") from error
            self._flying_bytes -= reduction.held_bytes()
