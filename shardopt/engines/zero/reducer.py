"""Gradients in flight to the ranks that own them, while backward still runs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from shardopt.engines.zero.buckets import Bucket, Member, Message, budget
from shardopt.engines.zero.flat import FlatParameters
from shardopt.engines.zero.transports import Communicator, Part, PeerError, Reduction
from shardopt.errors import InputError

if TYPE_CHECKING:
    from shardopt.engines.gradient_hooks import GradientHook


@dataclass
class _InFlight:
    """A reduction of elements [first, last) of every rank's part of a bucket."""

    bucket: Bucket
    reduction: Reduction
    first: int
    last: int
    whole: Tensor | None  # what is sent, to be used again


class Reducer:
    """Counts gradients as autograd finishes them, sends full buckets, and adds up what this rank owns.

    Every micro-batch's backward (in stage 1 the last one's only) sends every bucket once, in one order on all ranks,
    whatever order its gradients came in; buckets still unfilled at its end go with zeros for what has no gradient.
    The order is that of the buckets' numbers, until the ranks have agreed on the one in which the first step's
    buckets were full: modules may be registered in another order than they are run.

    Where a communicator takes messages, gradients are sent from where autograd left them. Else the bucket whose turn it
    is lies in one tensor, into which its gradients are copied as they come, so that none is held twice; the tensor is
    used again once its reduction is over, which on CUDA is an order of the stream and no wait. A bucket of one
    parameter larger than `piece_bytes` is sent in pieces of that size.

    Args:
        flat: the layout, the parameters, and where reduced gradients go.
        comm: the ranks that the buckets are cut over.
        replicate: the ranks that have the same shards, over which the sums go on (HSDP).
        reduce_dtype: bf16 makes wider gradients narrower on the wire; fp32 leaves all as they are.
        scale: what sums over ranks are multiplied by.
        piece_bytes: of a bucket, where it does not hold one larger parameter.
    """

    def __init__(
        self,
        flat: FlatParameters,
        comm: Communicator,
        replicate: Communicator,
        reduce_dtype: torch.dtype,
        scale: float,
        piece_bytes: float,
    ) -> None:
        self.flat, self.buckets, self.comm, self.replicate = flat, flat.buckets, comm, replicate
        self.params = [p.param for p in flat.parameters]
        self.reduce_dtype, self.scale = reduce_dtype, scale
        self.hooks: list[GradientHook] = []
        self.norms: list[Tensor] = [g.new_zeros(()) for g in flat.gradients]  # L2, of what was reduced last
        buckets = self.buckets
        self._wire = [b.dtype if b.dtype.itemsize <= 2 or reduce_dtype.itemsize > 2 else reduce_dtype for b in buckets]
        # Orders of sending and of arriving: the ranks' and this rank's own.
        self._sequence, self._arrivals = list(buckets), [m.index for b in buckets for m in b.members]
        self.learns = True  # until the ranks have agreed on a sequence
        self._members = {m.index: m for b in buckets for m in b.members}
        self.piece_bytes = piece_bytes
        self.budget = budget(buckets, comm.depth, comm.takes_messages, piece_bytes)
        self.peak_bytes = 0  # of the budget, since construction
        self.may_wait = True  # for room, within a backward
        self.is_last = False  # whether sums over replicas may start within this backward
        self.filled = list(range(len(buckets)))  # in the last backward, by number
        self.clear()
        self._begin()

    def clear(self) -> None:
        """Forget all gradients: what the next round brings replaces them."""
        self.rounds = 0  # reductions of all buckets
        self.present = [False] * len(self.params)  # whether this rank brought a gradient, in registration order
        self.blame: dict[int, list[int]] = {}  # by bucket, the ranks whose gradients were not finite, where known
        self._replicated: set[int] = set()  # buckets that have been summed over replicas, too

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
        self._flying: deque[_InFlight] = deque()
        self._replicating: list[Callable[[], None]] = []
        self._packing: Tensor | None = None  # of the bucket whose turn it is
        self._packed: set[int] = set()  # parameters of which it holds a gradient
        self._spare: list[Tensor] = []
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
        if index in self._seen and index not in self._packed:
            return  # added to the one that waits
        self._waiting_bytes += self._bytes_that_wait(index)
        if index not in self._seen:
            self._seen[index] = None
            self._remaining[bucket.index] -= 1
            if not self._remaining[bucket.index]:
                self._full.append(bucket.index)
        self._note_peak(0)
        if self._packs and bucket is self._sequence[self._next]:
            self._pack(bucket, [self._members[index]])
        while self._next < len(self._sequence) and not self._remaining[self._sequence[self._next].index]:
            self._launch(self._sequence[self._next])
            if self._packs and self._next < len(self._sequence):
                turn = self._sequence[self._next]
                self._pack(turn, [m for m in turn.members if m.index in self._seen])
        # Autograd allocates the next gradient before it says so.
        while self._expected < len(self._arrivals) and self._arrivals[self._expected] in self._seen:
            self._expected += 1
        if self._expected < len(self._arrivals):
            self._make_room(self._bytes_that_wait(self._arrivals[self._expected]))

    def flush(self) -> None:
        """Send the buckets that are left. A collective."""
        for bucket in self._sequence[self._next :]:
            self._launch(bucket)

    def finish_round(self) -> None:
        """Send what is left and wait for all of it. A collective."""
        self.flush()
        while self._flying:
            self._complete()
        for wait in self._replicating:
            wait()
        self.rounds += 1
        # What has no gradient comes last, in the order of its number.
        self._arrivals = list(dict.fromkeys([*self._seen, *self._arrivals]))
        self.filled = list(dict.fromkeys([*self._full, *range(len(self.buckets))]))
        self._begin()

    def send_in_order(self, numbers: Sequence[int]) -> None:
        """Send the buckets of later backwards in the order of `numbers`, the same on all ranks."""
        self._sequence = [self.buckets[number] for number in numbers]
        self.learns = False

    @property
    def _packs(self) -> bool:
        """Whether a bucket is sent from one tensor."""
        return bool(self.hooks) or not self.comm.takes_messages

    @property
    def _held_bytes(self) -> int:
        return self._waiting_bytes + self._flying_bytes + (0 if self._packing is None else self._packing.nbytes)

    def _make_room(self, wanted: int) -> None:
        while self._flying and self._held_bytes + wanted > self.budget and self.may_wait:
            self._complete()
        self._note_peak(wanted)

    def _note_peak(self, wanted: int) -> None:
        self.peak_bytes = max(self.peak_bytes, self._held_bytes + wanted)

    def _is_cut(self, bucket: Bucket) -> bool:
        """Whether the bucket, of one parameter, is sent in pieces."""
        # Padding makes a full bucket of several a little larger, too.
        alone = len(bucket.members) == 1
        return alone and not (self.comm.takes_messages or self.hooks) and bucket.nbytes > self.piece_bytes

    def _take(self, m: Member) -> Tensor | None:
        """Take the gradient of a parameter out of its `.grad`."""
        gradient = self.params[m.index].grad
        self.params[m.index].grad = None
        if gradient is None:
            return None
        if gradient.layout != torch.strided:
            raise InputError(f"{m.name} has a sparse gradient: use dense ones (Embedding(sparse=False))")
        self.present[m.index] = True
        return gradient.detach()

    def _taken(self, m: Member) -> None:
        if m.index in self._seen:
            self._waiting_bytes -= self._bytes_that_wait(m.index)

    def _bytes_that_wait(self, index: int) -> int:
        """What the gradient of parameter `index` takes of the budget until it is sent or packed."""
        return 0 if self._is_cut(self.flat.parameters[index].bucket) else self.params[index].nbytes

    def _pack(self, bucket: Bucket, members: Sequence[Member]) -> None:
        """Copy gradients of `members` into the bucket's tensor."""
        if self._is_cut(bucket):
            return
        for m in members:
            if (gradient := self._take(m)) is not None:
                into = self._tensor_of(bucket)[m.offset : m.offset + m.numel]
                # Another backward of the same micro-batch may have been there.
                (into.add_ if m.index in self._packed else into.copy_)(gradient.reshape(-1))
                self._packed.add(m.index)
                self._taken(m)

    def _tensor_of(self, bucket: Bucket) -> Tensor:
        """The tensor, of zeros at first, that the bucket whose turn it is lies in."""
        if self._packing is None:
            dtype = self.flat.gradients[bucket.index].dtype if self.hooks else self._wire[bucket.index]
            self._make_room(bucket.numel * dtype.itemsize)
            self._packing = self._zeros(bucket.numel, dtype)
        return self._packing

    def _zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        for number, spare in enumerate(self._spare):
            if spare.dtype == dtype and spare.numel() >= numel:
                return self._spare.pop(number)[:numel].zero_()
        return torch.zeros(numel, dtype=dtype, device=self.params[0].device)

    def _launch(self, bucket: Bucket) -> None:
        with record_function(f"zero: send {bucket.index}"):
            if self._is_cut(bucket):
                self._launch_in_pieces(bucket)
            elif self._packs:
                self._pack(bucket, bucket.members)
                whole = self._tensor_of(bucket)
                self._packing = None
                self._packed.clear()
                for hook in self.hooks:
                    hook.before_reduce(bucket.index, whole)
                sent = whole.to(self._wire[bucket.index])
                self._send(bucket, [[part] for part in sent.chunk(self.comm.size)], 0, bucket.part, sent)
            else:
                self._make_room(bucket.numel * self._wire[bucket.index].itemsize)
                gradients = {}
                for m in bucket.members:
                    if (gradient := self._take(m)) is not None:
                        gradients[m.index] = gradient
                    self._taken(m)
                wire = self._wire[bucket.index]
                parts = [[self._message(m, gradients, wire) for m in messages] for messages in bucket.messages]
                gradients.clear()
                self._send(bucket, parts, 0, bucket.part)
            self._sent[bucket.index] = True
            self._next += 1

    def _launch_in_pieces(self, bucket: Bucket) -> None:
        """Send a bucket of one large parameter in pieces of the same elements of every rank's part."""
        (m,), ranks, wire = bucket.members, self.comm.size, self._wire[bucket.index]
        gradient = self._take(m)
        width = max(1, int(self.piece_bytes) // (ranks * wire.itemsize))
        for first in range(0, bucket.part, width):
            last = min(first + width, bucket.part)
            self._make_room(ranks * (last - first) * wire.itemsize)
            piece = self._zeros(ranks * (last - first), wire)
            if gradient is not None:
                # Rows of the parts that the parameter fills, and of the one that it ends in.
                flat, rows = gradient.reshape(-1), m.numel // bucket.part
                filled = flat[: rows * bucket.part].view(rows, bucket.part)[:, first:last]
                piece.view(ranks, -1)[:rows].copy_(filled)
                rest = flat[rows * bucket.part :][first:last]
                if len(rest):
                    piece.view(ranks, -1)[rows, : len(rest)].copy_(rest)
            if last == bucket.part:
                del gradient
                self._taken(m)
            self._send(bucket, [[part] for part in piece.chunk(ranks)], first, last, piece)

    def _send(self, bucket: Bucket, parts: Sequence[Part], first: int, last: int, whole: Tensor | None = None) -> None:
        """Start the reduction of elements [first, last) of every rank's part; `whole` holds the `parts`."""
        if whole is not None:
            received = whole.nbytes if self.comm.exchanges(whole.dtype) else whole.nbytes // self.comm.size
            self._make_room(whole.nbytes + received)
        reduction = self.comm.reduce_scatter(parts)
        self._flying.append(_InFlight(bucket, reduction, first, last, whole))
        self._flying_bytes += reduction.held_bytes()
        self._note_peak(0)

    def _message(self, message: Message, gradients: dict[int, Tensor], wire: torch.dtype) -> Tensor:
        if len(message.pieces) == 1:
            m, first, last, _ = message.pieces[0]
            gradient = gradients.get(m.index)
            alone = last - first == message.length
            if gradient is not None and alone and gradient.dtype == wire and gradient.is_contiguous():
                return gradient.view(-1)[first:last]  # sent from where autograd left it
        return self._pack_message(message, gradients, wire)

    def _pack_message(self, message: Message, gradients: dict[int, Tensor], dtype: torch.dtype) -> Tensor:
        packed = torch.zeros(message.length, dtype=dtype, device=self.params[0].device)
        for m, first, last, at in message.pieces:
            if (gradient := gradients.get(m.index)) is not None:
                packed[at : at + last - first].copy_(gradient.reshape(-1)[first:last])
        return packed

    def _complete(self) -> None:
        sent = self._flying.popleft()
        index, reduction = sent.bucket.index, sent.reduction
        with record_function(f"zero: add {index}"):
            gradient = self.flat.gradients[index]
            if sent.first == 0:
                self._norms: list[Tensor] = []
                if index in self._replicated:  # and more comes: what is there is already the sum over replicas
                    self._replicated.discard(index)
                    if self.replicate.rank > 0:
                        gradient.zero_()
            try:
                norm = reduction.finish(gradient[sent.first : sent.last], self.rounds > 0, self.scale)
                self._norms.append(norm)
                # On a GPU looking would stall the stream; the agreement before the step finds it there.
                if gradient.device.type == "cpu" and not math.isfinite(norm.item()):
                    self.blame[index] = sorted({*self.blame.get(index, ()), *reduction.not_finite()})
                reduction.release()
            except PeerError as error:
                raise PeerError(f"{sent.bucket}: {error}") from error
            self._flying_bytes -= reduction.held_bytes()
            if sent.whole is not None:
                self._spare.append(sent.whole)
            if sent.last == sent.bucket.part:
                self.norms[index] = torch.linalg.vector_norm(torch.stack(self._norms))
                if self.is_last:
                    self._replicating.append(self._replicate(index))

    def _replicate(self, index: int) -> Callable[[], None]:
        """Start to sum a bucket over replicas; returns the function that waits for it."""
        self._replicated.add(index)
        return self.replicate.start_sum(self.flat.gradients[index], f"{self.buckets[index]}: the sum over replicas")

    def replicate_rest(self) -> None:
        """Sum over replicas what has not been summed yet. A collective."""
        for wait in [self._replicate(b.index) for b in self.buckets if b.index not in self._replicated]:
            wait()
