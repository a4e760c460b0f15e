"""The flat parameters: weights as views of the buckets, and what this rank owns of weights and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from shardopt.engines.zero.buckets import Bucket, Member
from shardopt.engines.zero.round import Round, RoundState
from shardopt.engines.zero.transports import Communicator, PeerError
from shardopt.errors import InputError
from shardopt.optim.precision import follow_weight
from shardopt.slices import Layout, Slice

_LARGEST_REUSED = 2**25 - 2**14  # bytes: glibc's 32 MiB, less what it puts around an allocation


def reuse_freed_memory() -> None:
    """Have gradients, which come and go at every step, lie in memory that was freed before instead of new pages.

    glibc gives freed memory back to the system, so that every page of it costs a fault at the next step, if it was
    mapped for an allocation larger than any mapped and freed before, of at most 32 MiB, or if twice that is free at the
    heap's end (mallopt(3)). What that was is chance, and whether a step has thousands of faults with it. So 32 MiB are
    allocated here and freed untouched: up to 64 MiB then stay with the process. Other allocators do not notice.
    """
    torch.empty(_LARGEST_REUSED, dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class FlatParameter:
    """A parameter of the model, and what this rank owns of it."""

    name: str  # canonical
    param: nn.Parameter  # the model's own, a view of the bucket
    bucket: Bucket
    weight: Tensor  # the view that `param` was made
    layout: Layout  # the elements that this rank owns
    shard: nn.Parameter  # those of the weight or of its fp32 master, 1-D: the inner optimizer's parameter
    gradient: Tensor  # those of the reduced gradient, 1-D, fp32 or wider


def needs_masters(optimizer: type[Optimizer]) -> bool:
    """Whether ZeRO keeps fp32 masters of 16-bit weights, since the optimizer does not look after them itself."""
    return not hasattr(optimizer, "set_layout")


class FlatParameters:
    """Flat buckets that the model's parameters become views of, and this rank's equal part of each.

    Args:
        named: canonical names and parameters in registration order.
        buckets: their layout.
        rank: of the ranks that the buckets are cut over.
        with_masters: keep fp32 masters of narrower parameters.
    """

    def __init__(
        self, named: Sequence[tuple[str, nn.Parameter]], buckets: Sequence[Bucket], rank: int, with_masters: bool
    ) -> None:
        device = named[0][1].device
        if device.type == "cpu":
            reuse_freed_memory()
        self.buckets, self.rank = buckets, rank
        self.flats = [torch.zeros(b.numel, dtype=b.dtype, device=device) for b in buckets]  # the weights
        # This rank's parts, of the reduced gradients and (by bucket) of the masters.
        self.gradients = [torch.zeros(b.part, dtype=b.wide, device=device) for b in buckets]
        narrow = [b for b in buckets if with_masters and b.dtype != b.wide]
        self.masters = {b.index: torch.zeros(b.part, dtype=b.wide, device=device) for b in narrow}
        records = {m.index: self._attach(*named[m.index], b, m) for b in self.buckets for m in b.members}
        self.parameters = [records[index] for index in range(len(named))]  # in registration order

    @torch.no_grad()
    def _attach(self, name: str, param: nn.Parameter, bucket: Bucket, member: Member) -> FlatParameter:
        weight = self.flats[bucket.index][member.offset : member.offset + member.numel].view(member.shape)
        weight.copy_(param)
        param.data = weight
        layout, at = bucket.owned(member, self.rank)
        owned = slice(at, at + layout.local_numel)
        gradient = self.gradients[bucket.index][owned]
        shard = nn.Parameter(self.masters.get(bucket.index, self.own(bucket.index))[owned])
        if shard.dtype != gradient.dtype:
            shard.grad_dtype = gradient.dtype
        return FlatParameter(name, param, bucket, weight, layout, shard, gradient)

    @torch.no_grad()
    def start_alike(self, model: nn.Module | None, comms: Sequence[Communicator]) -> None:
        """Take rank 0's weights, frozen ones and buffers of `model` included. A collective."""
        if not self.flats[0].is_meta:  # simulated ranks do not answer
            tensors = list(self.flats)
            if model is not None:
                trained = {p.param for p in self.parameters}
                tensors += [p.data for p in model.parameters() if p not in trained] + list(model.buffers())
            for comm in comms:
                if comm.size > 1:
                    for tensor in tensors:
                        dist.broadcast(tensor, group=comm.group, group_src=0)
        self.refresh_masters({})

    def own(self, bucket: int) -> Tensor:
        """This rank's part of a bucket's weights."""
        return self.flats[bucket].view(-1, self.buckets[bucket].part)[self.rank]

    def slices(self) -> list[Slice]:
        """Whole weights, and this rank's masters: the live tensors."""
        whole = [Slice(p.name, "weight", Layout.whole(p.name, p.param.shape), (p.weight,)) for p in self.parameters]
        mastered = [p for p in self.parameters if p.bucket.index in self.masters]
        return whole + [Slice(p.name, "master", p.layout, (p.shard.detach(),)) for p in mastered]

    def verify(self) -> None:
        """Raise InputError naming the first parameter that is no longer the view of its bucket that it was made."""
        for p in self.parameters:
            now, made = p.param, p.weight
            alike = now.dtype == made.dtype and now.shape == made.shape and now.is_contiguous()
            if not alike or now.data_ptr() != made.data_ptr():
                instead = "call .to(), .half() and load_state_dict(assign=True) before it, close() before another"
                raise InputError(f"{p.name} was moved or replaced after ZeroOptimizer was built: {instead}")

    @torch.no_grad()
    def reattach(self) -> None:
        """Make parameters that a host has copied since (same device and dtype) views of the buckets again."""
        for p in self.parameters:
            same = (p.param.device.type, p.param.dtype) == (p.weight.device.type, p.weight.dtype)
            if same and p.param.data_ptr() != p.weight.data_ptr():
                p.weight.copy_(p.param)
                p.param.data = p.weight

    def drop_gradients(self) -> None:
        """Set `.grad` of the model's parameters to None."""
        for p in self.parameters:
            p.param.grad = None

    @torch.no_grad()
    def store_masters(self) -> None:
        """Round this rank's masters to its weights."""
        for bucket, master in self.masters.items():
            self.own(bucket).copy_(master)

    @torch.no_grad()
    def refresh_masters(self, state: dict[Tensor, dict[str, Tensor]]) -> None:
        """Take over weights that somebody else has set: masters that no longer round to their weight follow it.

        So do the masters in `state`, the inner optimizer's.
        """
        pairs = [(self.own(bucket), master) for bucket, master in self.masters.items()]
        held = ((p.shard.detach(), state.get(p.shard, {}).get("master")) for p in self.parameters)
        pairs += [(w, master) for w, master in held if master is not None and w.dtype.itemsize <= 2]
        for weight, master in pairs:
            # On a GPU asking would stall the stream; what is alike stays as it is anyway.
            if weight.is_cuda or not torch.equal(master.to(weight.dtype), weight):
                follow_weight(master, weight)


class WeightGather:
    """Updated weights in flight from their owners into the buckets; GATHERING ends with the last arrival."""

    def __init__(self, flat: FlatParameters, comm: Communicator, round_: Round) -> None:
        self.flat, self.comm, self.round = flat, comm, round_
        # The embedding, first in forward, is registered first and lies in the last bucket.
        self.order = list(range(len(flat.buckets)))[::-1]
        self.in_flight: dict[int, Callable[[], None]] = {}  # by bucket, what waits for it

    def start(self) -> None:
        """All-gather every bucket. A collective."""
        for index in self.order:
            self.in_flight[index] = self.comm.all_gather(self.flat.flats[index])

    def wait(self, buckets: Iterable[int] | None = None) -> None:
        """Wait for all buckets, or for some. Raises PeerError if another rank failed."""
        for index in list(self.in_flight) if buckets is None else buckets:
            if (finish := self.in_flight.pop(index, None)) is not None:
                try:
                    finish()
                except PeerError as error:
                    failure = PeerError(f"updated weights of {self.flat.buckets[index]}: {error}")
                    self.round.fail(failure)
                    raise failure from error
        if self.round.state is RoundState.GATHERING and not self.in_flight:
            self.round.state = RoundState.IDLE

    def give_up(self) -> None:
        """Wait for the last time, as the optimizer goes: nobody would send or receive the rest."""
        if self.round.state is not RoundState.FAILED:
            self.wait()
