"""A run before it begins: memory of a rank, bytes on the wire, tokens, hours and checkpoint size. Nothing is allocated.

What a rank holds comes from engines.footprint, the optimizer's state from the optimizer itself on tensors without
data, and activations from `activations.Simulation`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from shardopt import engines
from shardopt.engines import DdpConfig, DeepspeedConfig, EngineConfig, FsdpConfig, SingleConfig, ZeroConfig
from shardopt.engines.base import DtypeName, settle_dtype
from shardopt.engines.deepspeed.config import check_state_dtype
from shardopt.engines.footprint import Footprint, Parameter, footprint, state_bytes
from shardopt.engines.zero.flat import needs_masters
from shardopt.errors import InputError
from shardopt.optim.precision import FORMATS
from shardopt.optim.registry import OptimizerSpec
from shardopt.pretrain.activations import Activations, Computing, Simulation
from shardopt.pretrain.config import Config
from shardopt.pretrain.data.config import BpeTokenizer, PathTokenizer
from shardopt.pretrain.data.tokenizers import load_path, vocab_size
from shardopt.pretrain.flops import flops_per_token
from shardopt.pretrain.hub import local
from shardopt.pretrain.model import blocks_of, meta_model, transformers_config
from shardopt.slices import named_parameters, persistent_buffers

USABLE = 0.92
"""Share of a device's memory that is planned with; CUDA, NCCL and what the allocator cannot use take the rest."""


@dataclass(frozen=True)
class Device:
    """What a rank runs on.

    Attributes:
        name: for the reader.
        memory: bytes; None where they are not known.
        peak: dense bf16 operations a second; None where they are not known.
        cuda: whether "auto" computes in bf16, and ranks talk by NCCL or its like.
    """

    name: str
    memory: float | None
    peak: float | None
    cuda: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that holds most, of an engine with an optimizer.

    Attributes:
        state: of the optimizer, by key (m1, m2, nu, weight_ema, ...), scales of block formats included.
        activations: None where they are not known.
        offloaded: whether all but weights, buckets and activations lies in the CPU's memory.
    """

    weights: int
    masters: int
    gradients: int
    buckets: int
    state: dict[str, int]
    activations: int | None
    offloaded: bool = False

    @property
    def total(self) -> int:
        """On the device."""
        elsewhere = 0 if self.offloaded else self.masters + self.gradients + sum(self.state.values())
        return self.weights + self.buckets + (self.activations or 0) + elsewhere


@dataclass(frozen=True)
class Row:
    """An engine with a format of the optimizer's state.

    Attributes:
        engine: with its stage, as "zero-2".
        state_dtype: None for an optimizer without such a choice, or for one of several formats.
        chosen: whether it is the config's own.
        largest_micro_batch: that fits into the device's memory and divides every global batch over the ranks; 0
            where none does, None where that is not known.
        reduce, gather: bytes that a rank sends in a step for gradients and for weights.
    """

    engine: str
    state_dtype: str | None
    chosen: bool
    memory: Memory
    largest_micro_batch: int | None
    reduce: int
    gather: int


class Stage(NamedTuple):
    """Steps of the run with as many micro-batches on a rank."""

    from_step: int
    steps: int
    tokens_per_step: int
    micro_batches: int


@dataclass(frozen=True)
class Forecast:
    """A run by its config, on ranks and devices that need not be there. Where the batch changes, memory and what is
    sent are those of the largest.

    Attributes:
        rows: engines and state formats, those of the config first among the formats.
        refused: by engine that cannot run this, why.
        unknown_activations: why activations of some rows are not known; None where they are.
        checkpoint_bytes: of one checkpoint, by state format as in the rows.
        hours: at `mfu` of the device's peak; None where that is not known.
    """

    name: str
    device: Device
    world_size: int
    micro_batch: int
    stages: Sequence[Stage]
    parameters: int
    rows: Sequence[Row]
    refused: dict[str, str]
    unknown_activations: str | None
    checkpoint_bytes: dict[str | None, int]
    checkpoints_kept: int
    flops: float
    mfu: float
    hours: float | None

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def tokens(self) -> int:
        return sum(stage.steps * stage.tokens_per_step for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as JSON has it; bytes, tokens, operations and hours are numbers."""
        rows = [
            {
                "engine": row.engine,
                "state_dtype": row.state_dtype,
                "chosen": row.chosen,
                "bytes": {
                    "weights": row.memory.weights,
                    "masters": row.memory.masters,
                    "gradients": row.memory.gradients,
                    **row.memory.state,
                    "buckets": row.memory.buckets,
                    "activations": row.memory.activations,
                    "total": row.memory.total,
                },
                "offloaded": row.memory.offloaded,
                "wire_bytes_per_step": {"reduce": row.reduce, "gather": row.gather},
                "largest_micro_batch": row.largest_micro_batch,
                "checkpoint_bytes": self.checkpoint_bytes[row.state_dtype],
            }
            for row in self.rows
        ]
        return {
            "run": self.name,
            "device": self.device.name,
            "device_bytes": self.device.memory,
            "usable_share": USABLE,
            "world_size": self.world_size,
            "micro_batch": self.micro_batch,
            "parameters": self.parameters,
            "steps": self.steps,
            "tokens": self.tokens,
            "stages": [stage._asdict() for stage in self.stages],
            "flops": self.flops,
            "mfu": self.mfu,
            "hours": self.hours,
            "checkpoints_kept": self.checkpoints_kept,
            "refused": self.refused,
            "unknown_activations": self.unknown_activations,
            "rows": rows,
        }


def forecast(config: Config, world_size: int, device: Device, mfu: float = 0.4) -> Forecast:
    """What a run of `config` on `world_size` ranks will hold, send and take.

    Args:
        mfu: share of the device's peak that the run is taken to use.

    Raises:
        InputError: the config cannot run on so many ranks.
    """
    config.check_ranks(world_size)
    model = model_of(config)
    named, blocks = named_parameters(model), blocks_of(model)
    number_of = {param: number for number, block in enumerate(blocks) for param in block.parameters()}
    parameters = [Parameter(name, tuple(p.shape), number_of.get(p)) for name, p in named]
    buffers = sum(buffer.nbytes for _, buffer in persistent_buffers(model))
    train, spec = config.train, config.optimizer.spec(config.train.steps, config.run.seed)
    stages = [
        Stage(
            s.from_step, n, s.global_batch * config.data.block_size, s.global_batch // world_size // train.micro_batch
        )
        for s, n in config.stages.between(0, train.steps)
    ]
    tokens = sum(stage.steps * stage.tokens_per_step for stage in stages)
    flops = tokens * flops_per_token(model, config.data.block_size)
    specs = _by_state_dtype(spec)
    candidates = _engines(config.engine, world_size)
    refused: dict[str, str] = {}
    activations = _Activations(config, model)
    rows = []
    for engine in candidates:
        try:
            engines.check(engine, spec, world_size, True, config.model.weights)
        except InputError as error:
            refused[label(engine)] = str(error)
            continue
        compute, weights = _compute(engine, device, config.model.weights), config.model.weights
        batches, taken = list(config.stages.batches.values()), activations.of(engine, compute)
        masters = weights != torch.float32 and needs_masters(spec.cls)
        planned = _Planned(engine, parameters, buffers, world_size, batches, compute, weights, masters, device, taken)
        sent = planned.placed(train.micro_batch)
        for state_dtype, each in specs.items():
            if isinstance(engine, DeepspeedConfig) and not _takes(each):
                continue
            state = state_bytes(each, sent.shards, torch.float32 if masters else weights)
            chosen = engine is candidates[0] and each.kwargs == spec.kwargs
            memory, largest = planned.memory(train.micro_batch, state), planned.largest(state)
            rows.append(Row(label(engine), state_dtype, chosen, memory, largest, sent.reduce, sent.gather))
    kept = torch.float32 if needs_masters(spec.cls) else config.model.weights  # with masters beside bf16 weights
    whole = sum(p.numel for p in parameters) * (kept.itemsize + 2 * (kept != config.model.weights)) + buffers
    checkpoints = {
        state_dtype: whole + sum(state_bytes(each, [p.shape for p in parameters], kept).values())
        for state_dtype, each in specs.items()
    }
    return Forecast(
        name=config.run.name,
        device=device,
        world_size=world_size,
        micro_batch=train.micro_batch,
        stages=stages,
        parameters=sum(p.numel for p in parameters),
        rows=sorted(rows, key=lambda row: list(specs).index(row.state_dtype)),
        refused=refused,
        unknown_activations=activations.unknown,
        checkpoint_bytes=checkpoints,
        checkpoints_kept=config.checkpoint.keep,
        flops=flops,
        mfu=mfu,
        hours=None if device.peak is None else flops / (world_size * device.peak * mfu) / 3600,
    )


def model_of(config: Config) -> PreTrainedModel:
    """The config's model on the meta device; the tokenizer is asked only where nothing else tells the vocabulary."""
    tokenizer, vocabulary = config.data.tokenizer, 257
    if isinstance(tokenizer, BpeTokenizer):
        vocabulary = tokenizer.vocab_size
    elif isinstance(tokenizer, PathTokenizer):
        told = "vocab_size" in (config.model.model_extra or {}) or config.model.path is not None
        vocabulary = 257 if told else vocab_size(load_path(tokenizer))
    section = transformers_config(
        local(config.model, weights=False), vocabulary, vocabulary - 1, config.data.block_size
    )
    return meta_model(section, config.model.trust_remote_code, config.model.attention)


def label(engine: EngineConfig) -> str:
    """The engine's name, with its stage where it has several."""
    stage = getattr(engine, "stage", None)
    return engine.name if stage is None else f"{engine.name}-{stage}"


def _engines(own: EngineConfig, world_size: int) -> list[EngineConfig]:
    """The config's engine, and the others with its dtypes."""
    others: list[EngineConfig] = [DdpConfig(), *(ZeroConfig(stage=s) for s in (1, 2)), FsdpConfig()]
    others += [DeepspeedConfig(stage=s) for s in (1, 2, 3)]
    if world_size == 1:
        others = [SingleConfig(), *others]
    dtypes = {key: value for key in ("compute_dtype", "reduce_dtype") if (value := getattr(own, key, None))}
    alike = [replace(e, **{k: v for k, v in dtypes.items() if hasattr(e, k)}) for e in others]
    return [own, *(e for e in alike if label(e) != label(own))]


def _by_state_dtype(spec: OptimizerSpec) -> dict[str | None, OptimizerSpec]:
    """The optimizer as given, and with each format of its state where it has the choice."""
    if "state_dtype" not in getattr(spec.cls, "hyper_parameters", {}):
        return {None: spec}
    own = spec.kwargs.get("state_dtype", "fp32")
    given = own if isinstance(own, str) else None
    others: dict[str | None, OptimizerSpec] = {
        name: replace(spec, kwargs=spec.kwargs | {"state_dtype": name}) for name in FORMATS if name != given
    }
    return {given: spec, **others}


def _takes(spec: OptimizerSpec) -> bool:
    """Whether DeepSpeed takes the optimizer's format of state."""
    try:
        check_state_dtype("optimizer.state_dtype", spec.kwargs.get("state_dtype", "fp32"))
    except InputError:
        return False
    return True


def _compute(engine: EngineConfig, device: Device, weights: torch.dtype) -> torch.dtype:
    name: DtypeName = engine.dtype_name() if isinstance(engine, DeepspeedConfig) else engine.compute_dtype
    return settle_dtype(name, weights, device.cuda)


@dataclass
class _Planned:
    """An engine with micro-batches of any size."""

    engine: EngineConfig
    parameters: Sequence[Parameter]
    buffers: int  # bytes
    world_size: int
    batches: Sequence[int]  # sequences of a step, in each stage
    compute: torch.dtype
    weights: torch.dtype
    masters: bool  # see `footprint`
    device: Device
    activations: Activations | None
    _placed: dict[int, Footprint] = field(default_factory=dict)

    def placed(self, micro_batch: int) -> Footprint:
        micro_batches = max(self.batches) // (self.world_size * micro_batch)
        if micro_batches not in self._placed:
            self._placed[micro_batches] = footprint(
                self.engine, self.parameters, self.world_size, micro_batches, self.compute, self.device.cuda,
                self.weights, self.masters,
            )  # fmt: skip
        return self._placed[micro_batches]

    def memory(self, micro_batch: int, state: dict[str, int]) -> Memory:
        p = self.placed(micro_batch)
        taken = None if self.activations is None else self.activations.of(micro_batch)
        return Memory(p.weights + self.buffers, p.masters, p.gradients, p.buckets, state, taken, p.offloaded)

    def largest(self, state: dict[str, int]) -> int | None:
        """See Row.largest_micro_batch."""
        if self.device.memory is None or self.activations is None:
            return None
        usable, of_rank = USABLE * self.device.memory, math.gcd(*self.batches) // self.world_size
        sizes = (size for size in range(of_rank, 0, -1) if of_rank % size == 0)
        return next((size for size in sizes if self.memory(size, state).total <= usable), 0)


class _Activations:
    """Activations of a model by how an engine computes, simulated once for each."""

    def __init__(self, config: Config, model: PreTrainedModel) -> None:
        train = config.train
        self.sequences, self.narrow = train.micro_batch, config.model.weights != torch.float32
        self.unknown: str | None = None
        """Why those of an engine are not known."""
        self._simulation = Simulation(model, config.data.block_size, train.loss_chunks, train.activation_checkpointing)
        self._found: dict[Computing, Activations | None] = {}

    def of(self, engine: EngineConfig, compute: torch.dtype) -> Activations | None:
        computing: Computing = "fp32"
        if compute != torch.float32:
            computing = "bf16" if self.narrow or isinstance(engine, FsdpConfig | DeepspeedConfig) else "autocast"
        if computing not in self._found:
            try:
                self._found[computing] = self._simulation.measure(self.sequences, computing)
            except InputError as error:
                self._found[computing], self.unknown = None, str(error)
        return self._found[computing]
