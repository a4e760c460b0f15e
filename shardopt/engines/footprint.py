"""What a rank of each engine holds and sends, by arithmetic: before there are ranks, weights or a GPU.

The engines themselves are what this is compared with, on real ranks and on simulated ones
(tests/engines/test_footprint.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shardopt.engines import EngineConfig
from shardopt.engines.base import DTYPES
from shardopt.engines.ddp import DdpConfig
from shardopt.engines.deepspeed.config import DeepspeedConfig
from shardopt.engines.fsdp import FsdpConfig
from shardopt.engines.single import SingleConfig
from shardopt.engines.zero.buckets import bucket_bytes, budget, lay_out
from shardopt.engines.zero.engine import ZeroConfig
from shardopt.engines.zero.transports import Communicator
from shardopt.engines.zero.transports.backends import NativeCommunicator, SocketsCommunicator
from shardopt.optim import states
from shardopt.optim.registry import OptimizerSpec

_FP32 = 4  # bytes
# Defaults of DeepSpeed's stage 3, in elements: smaller parameters stay whole, and so many more may be gathered.
_PERSISTENT = 100_000
_MOST_GATHERED = 1_000_000_000


class Parameter(NamedTuple):
    """A trained parameter; `block` is the number of its transformer block, None outside of them."""

    name: str
    shape: tuple[int, ...]
    block: int | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Footprint:
    """Bytes on the rank that holds most, and bytes that a rank sends in a step.

    Attributes:
        weights: what forward reads: whole, or this rank's shards of them.
        masters: fp32 copies that the optimizer steps, where it does not step the weights themselves.
        gradients: when backward has ended, or between micro-batches where more is held then.
        buckets: gradients and gathered weights on their way, beside those of the other attributes.
        shards: shapes of the parameters that the optimizer is given.
        reduce, gather: sent for gradients and for weights; of a ring, where the library does not say how.
        offloaded: whether masters, gradients and the optimizer's state lie in the CPU's memory.
    """

    weights: int
    gradients: int
    shards: Sequence[tuple[int, ...]]
    masters: int = 0
    buckets: int = 0
    reduce: int = 0
    gather: int = 0
    offloaded: bool = False


def footprint(
    config: EngineConfig,
    parameters: Sequence[Parameter],
    world_size: int,
    micro_batches: int,
    compute: torch.dtype,
    native: bool = True,
    weights: torch.dtype = torch.float32,
    masters: bool = False,
) -> Footprint:
    """The footprint of a model's trained parameters.

    Args:
        config: of the engine.
        parameters: in registration order.
        world_size: ranks that `config` may run on (see engines.check).
        micro_batches: of a rank in a step.
        compute: dtype of forward and backward.
        native: on NCCL or its like, and not on gloo.
        weights: dtype of the trained weights, and so of the gradients that autograd leaves.
        masters: our ZeRO keeps fp32 masters of the weights (see `needs_masters`).
    """
    size = weights.itemsize * sum(p.numel for p in parameters)
    if isinstance(config, SingleConfig):
        return Footprint(size, size, [p.shape for p in parameters])
    if isinstance(config, DdpConfig):
        return Footprint(size, size, [p.shape for p in parameters], reduce=2 * _leg(size, world_size))
    if isinstance(config, ZeroConfig):
        return _zero(config, parameters, world_size, micro_batches, native, weights, masters)
    if isinstance(config, FsdpConfig):
        return _fsdp(config, parameters, world_size, micro_batches, compute, weights)
    return _deepspeed(config, parameters, world_size, micro_batches, compute)


def state_bytes(
    spec: OptimizerSpec, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> dict[str, int]:
    """Bytes of the state that the optimizer keeps for weights of these shapes, by key; a scale is its tensor's."""
    counts, held = Counter(shapes), Counter[str]()
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in counts]
        optimizer = spec.cls([(str(i), param) for i, param in enumerate(params)], **spec.kwargs)
        states.init_state(optimizer)
        for param, count in zip(params, counts.values(), strict=True):
            for key, value in optimizer.state[param].items():
                if isinstance(value, Tensor) and not states.is_scalar(key, value, param):
                    held[key.removesuffix("_scale")] += count * value.nbytes
    return dict(held)


def _leg(nbytes: int, ranks: int) -> int:
    """What a rank sends of so many bytes in a reduce-scatter or an all-gather; an all-reduce is two."""
    return nbytes * (ranks - 1) // ranks


def _zero(
    config: ZeroConfig,
    parameters: Sequence[Parameter],
    world_size: int,
    micro_batches: int,
    native: bool,
    weights: torch.dtype,
    masters: bool,
) -> Footprint:
    ranks = world_size // config.replicate
    transport: type[Communicator] = NativeCommunicator if native and ranks > 1 else SocketsCommunicator
    own = weights.itemsize
    wire = min(own, DTYPES[config.reduce_dtype].itemsize)
    size = bucket_bytes(config.bucket_mb, transport.depth, ranks, wire / own)
    buckets = lay_out([(p.name, p.shape, weights) for p in parameters], ranks, size)
    owned = [bucket.owned(member, 0)[0].local_numel for bucket in buckets for member in bucket.members]
    padded = sum(bucket.numel for bucket in buckets)
    whole = own * padded if config.stage == 1 and micro_batches > 1 else 0
    reductions = 1 if config.stage == 1 else micro_batches
    return Footprint(
        weights=own * padded,
        masters=_FP32 * padded // ranks if masters else 0,
        gradients=_FP32 * padded // ranks + whole,  # sums are fp32
        shards=[(length,) for length in owned],
        buckets=int(budget(buckets, transport.depth, transport.takes_messages, size)),
        reduce=reductions * _leg(wire * padded, ranks) + 2 * _leg(_FP32 * padded // ranks, config.replicate),
        gather=_leg(own * padded, ranks),
    )


def _fsdp(
    config: FsdpConfig,
    parameters: Sequence[Parameter],
    world_size: int,
    micro_batches: int,
    compute: torch.dtype,
    weights: torch.dtype,
) -> Footprint:
    ranks = world_size // config.replicate
    shards = [(-(-p.shape[0] // ranks), *p.shape[1:]) for p in parameters]
    padded = [ranks * math.prod(shard) for shard in shards]
    units: Counter[int | None] = Counter()  # elements that are gathered together
    for p, length in zip(parameters, padded, strict=True):
        units[p.block] += length
    total, root = sum(padded), units.pop(None, 0)
    blocks = sorted(units.values(), reverse=True)
    largest = blocks[0] if blocks else 0
    wire = DTYPES[config.reduce_dtype].itemsize
    # A block and the next one, and the buffer that the next one is gathered in.
    gathered = root + (sum(blocks[:2]) if config.reshard_after_forward else sum(blocks)) + largest
    by_micro_batch = config.reduce_every == "micro_batch"
    reductions = micro_batches if by_micro_batch else 1
    # With fp32 on the wire what can wait for the last micro-batch waits.
    sums = 1 if config.reduce_dtype == "fp32" else reductions
    gathers = total + (total - root if config.reshard_after_forward else 0)
    return Footprint(
        weights=weights.itemsize * total // ranks,
        gradients=weights.itemsize * (total // ranks if by_micro_batch else sum(p.numel for p in parameters)),
        shards=shards,
        # A block's gradients as they come, and copied to be sent.
        buckets=compute.itemsize * gathered + (compute.itemsize + wire) * largest if world_size > 1 else 0,
        reduce=reductions * _leg(wire * total, ranks) + sums * 2 * _leg(wire * total // ranks, config.replicate),
        gather=micro_batches * _leg(compute.itemsize * gathers, ranks),
    )


def _deepspeed(
    config: DeepspeedConfig, parameters: Sequence[Parameter], ranks: int, micro_batches: int, compute: torch.dtype
) -> Footprint:
    numel, wire = sum(p.numel for p in parameters), DTYPES[config.reduce_dtype].itemsize
    if config.stage == 3:
        lengths = [-(-p.numel // ranks) for p in parameters]
        partitions = _by_group(parameters, lengths)
        persistent = sum(p.numel for p in parameters if p.numel < _PERSISTENT)
        gathered = min(numel, _MOST_GATHERED)
    else:
        partitions = [-(-length // ranks) for length in _by_group(parameters, [p.numel for p in parameters])]
        persistent = gathered = 0
    own = sum(partitions)
    bucket = int(config.bucket_mb * 2**18) * (2 if config.overlap_comm and compute != torch.float32 else 1)
    if config.stage > 1:
        gradients = _FP32 * own
    elif compute == torch.float32:
        gradients = _FP32 * numel
    else:  # fp32 sums of all micro-batches, and those of the last as autograd has left them
        gradients = (_FP32 + compute.itemsize) * numel
    reductions = micro_batches if config.stage > 1 else 1
    # Stages 1 and 2 all-reduce their buckets (use_multi_rank_bucket_allreduce).
    legs = 1 if config.stage == 3 else 2
    gathers = 2 * micro_batches if config.stage == 3 else 1
    return Footprint(
        weights=compute.itemsize * (own + persistent if config.stage == 3 else numel),
        masters=_FP32 * own,
        gradients=gradients,
        shards=[(length,) for length in partitions],
        buckets=compute.itemsize * (min(bucket, numel) + gathered) if ranks > 1 else 0,
        reduce=reductions * legs * _leg(wire * numel, ranks),
        gather=gathers * _leg(compute.itemsize * numel, ranks),
        offloaded=config.offload_optimizer,
    )


def _by_group(parameters: Sequence[Parameter], lengths: Iterable[int]) -> list[int]:
    """Elements of the parameters that decay, and of those that do not."""
    groups: Counter[bool] = Counter()
    for p, length in zip(parameters, lengths, strict=True):
        groups[len(p.shape) < 2] += length
    return [groups[key] for key in sorted(groups)]
