"""The parameter groups and settings that a ZeroOptimizer is given: checked here, and compared between ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from shardopt.distributed import all_gather_objects
from shardopt.engines.base import DTYPES
from shardopt.engines.zero.guards import refuse_owned
from shardopt.errors import InputError
from shardopt.slices import canonical_name, is_packed, named_parameters

# (canonical name, parameter)
Pairs = list[tuple[str, nn.Parameter]]


def check_settings(prefix: str, *, stage: object, bucket_mb: float | None, reduce_dtype: object) -> None:
    """Raise InputError naming `prefix`KEY for a value that ZeRO does not take."""
    _refuse(
        (stage not in (1, 2), f"{prefix}stage: {stage!r} is not 1 or 2 (for stage 3 use the fsdp engine)"),
        (bucket_mb is not None and not bucket_mb > 0, f"{prefix}bucket_mb: {bucket_mb} must be greater than 0"),
        (reduce_dtype not in DTYPES, f"{prefix}reduce_dtype: {reduce_dtype!r} is not one of fp32, bf16"),
    )


def _refuse(*cases: tuple[bool, str]) -> None:
    """Raise InputError with the message of the first case that is true."""
    for is_wrong, message in cases:
        if is_wrong:
            raise InputError(message)


def checked(
    params: Any,
    model: nn.Module | None,
    optimizer_class: type[Optimizer],
    options: dict[str, Any],
    optimizer_kwargs: dict[str, Any],
    overlap_gather: Sequence[nn.Module],
    process_groups: Sequence[dist.ProcessGroup | None],
) -> tuple[list[tuple[dict[str, Any], Pairs]], Pairs]:
    """ZeroOptimizer's arguments: groups of named parameters, and all of them in registration order. A collective.

    Raises:
        InputError: on every rank, where something cannot work on one, or differs between two.
    """
    settings = {"optimizer_class": optimizer_class, **options, **optimizer_kwargs}
    error: Exception | None = None
    try:
        check_settings("", **{key: options[key] for key in ("stage", "bucket_mb", "reduce_dtype")})
        gradients, wrapped = options["gradients"], isinstance(model, DistributedDataParallel)
        is_class = isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)
        are_modules = isinstance(overlap_gather, Sized) and all(isinstance(m, nn.Module) for m in overlap_gather)
        _refuse(
            (gradients not in ("own", "host"), f"gradients must be 'own' or 'host', got {gradients!r}"),
            (gradients == "host" and options["stage"] == 2, "gradients='host' needs stage=1: a host's are whole"),
            (wrapped, "give ZeroOptimizer the module inside DistributedDataParallel, and train without DDP"),
            (not is_class, f"optimizer_class must be a class such as AdEMAMix, got {optimizer_class!r:.80}"),
            (not are_modules, f"overlap_gather must be a sequence of modules, got {overlap_gather!r:.80}"),
            (bool(overlap_gather) and model is None, "overlap_gather needs the model: give model="),
        )
        groups = _named_groups(params)
        named = _in_order(groups, model)
        refuse_owned(named)
        refuse_unless_elementwise(optimizer_class, optimizer_kwargs)
        settings["parameters"] = [(name, p.shape, p.dtype) for name, p in named]
        for number, (entries, pairs) in enumerate(groups):
            settings |= {f"{key} of group {number}": value for key, value in entries.items()}
            settings[f"members of group {number}"] = [name for name, _ in pairs]
    except Exception as refusal:  # the other ranks wait for this one
        error = refusal
    _agree_on_settings(process_groups, settings, error)
    return groups, named


def _named_groups(params: Any) -> list[tuple[dict[str, Any], Pairs]]:
    """Options and trainable parameters of every group: of a module, parameters (named or not) or groups of them."""
    entries: list[Any] = named_parameters(params) if isinstance(params, nn.Module) else list(params)
    seen: set[Tensor] = set()
    groups = []
    for group in entries if entries and isinstance(entries[0], dict) else [{"params": entries}]:
        options = dict(group)
        held, names = options.pop("params"), options.pop("param_names", None)
        members = [held] if isinstance(held, Tensor) else list(held)
        pairs: Pairs = []
        for entry in members if names is None else zip(names, members, strict=True):
            name, param = entry if isinstance(entry, tuple) else (str(len(seen)), entry)
            if param in seen:
                raise InputError(f"parameter {name} is given twice")
            seen.add(param)
            if param.requires_grad:
                pairs.append((canonical_name(name), param))
        groups.append((options, pairs))
    if not any(pairs for _, pairs in groups):
        raise InputError("nothing to train: no parameter given requires a gradient")
    return groups


def _in_order(groups: list[tuple[dict[str, Any], Pairs]], model: nn.Module | None) -> Pairs:
    """All pairs in registration order where the model is known, else as given. InputError if one cannot lie flat."""
    from torch.distributed.tensor import DTensor

    pairs = [pair for _, members in groups for pair in members]
    if model is not None:
        place = {p: i for i, p in enumerate(model.parameters())}
        for name, param in pairs:
            if param not in place:
                raise InputError(f"{name} is not a parameter of the model")
        pairs.sort(key=lambda pair: place[pair[1]])
    device = pairs[0][1].device
    for name, param in pairs:
        dense = param.is_floating_point() and param.layout == torch.strided
        _refuse(
            (isinstance(param, DTensor), f"{name} is a DTensor, sharded by its host already: use the fsdp engine"),
            (param.device != device, f"{name} is on {param.device}, others on {device}: zero needs one device a rank"),
            (is_packed(param), f"{name} is a {type(param).__name__}: zero needs ordinary tensors, FSDP2 can take it"),
            (not dense, f"{name} is {param.dtype}, {param.layout}: zero needs dense floating-point parameters"),
        )
    return pairs


def process_groups(
    where: dist.ProcessGroup | DeviceMesh | None,
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """The ranks to shard over, and those that hold the same slices; None is this process alone."""
    if isinstance(where, DeviceMesh):
        if where.ndim > 2:
            raise InputError(f"process_group: a mesh of {where.ndim} dimensions; give (replicate, shard) or (shard,)")
        return where.get_group(where.ndim - 1), where.get_group(0) if where.ndim == 2 else None
    if where is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD, None
    return where, None


def _agree_on_settings(
    groups: Sequence[dist.ProcessGroup | None], settings: Mapping[str, Any], error: Exception | None
) -> None:
    """Raise on every rank where the ranks were given different settings, or one of them has an error. A collective."""
    mine = {} if error is not None else {name: _describe(value) for name, value in settings.items()}
    reports = all_gather_objects((dist.get_rank() if groups[0] is not None else 0, str(error), mine), *groups)
    if error is not None:
        raise error
    for rank, message, theirs in reports:
        if not theirs:
            raise InputError(f"rank {rank} cannot build its ZeroOptimizer: {message}")
        for name in mine.keys() | theirs.keys():
            if mine.get(name) != theirs.get(name):
                (low, a), (high, b) = sorted([(dist.get_rank(), mine.get(name)), (rank, theirs.get(name))])
                found = f"{name} is {a} on rank {low} and {b} on rank {high}; give all the same, frozen parameters too"
                raise InputError(f"the ranks were given different parameters or settings: {found}")


def _describe(value: Any) -> str:
    """`value` in words that are alike on all ranks exactly if it is; a hash where they would be long."""
    if isinstance(value, Tensor):
        text = f"{value.dtype} {value.detach().cpu().tolist()}"
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(sorted(f"{_describe(k)}: {_describe(v)}" for k, v in value.items())) + "}"
    elif isinstance(value, set | frozenset):
        text = "{" + ", ".join(sorted(map(_describe, value))) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(map(_describe, value)) + "]"
    elif value is None or isinstance(value, bool | int | float | str | torch.dtype):
        text = repr(value)
    else:  # an address would differ
        text = getattr(value, "__qualname__", type(value).__qualname__)
    if len(text) <= 200:
        return text
    return f"{text[:40]}... (hash {hashlib.blake2b(text.encode(), digest_size=8).hexdigest()})"


@torch.no_grad()
def refuse_unless_elementwise(cls: type[Optimizer], kwargs: dict[str, Any]) -> None:
    """Raise InputError if `cls` does not move a small matrix and flat pieces of it alike, as elementwise ones do."""
    if hasattr(cls, "set_layout"):
        return  # made for slices, and its random bits depend on where they lie
    generator = torch.Generator().manual_seed(0)
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    whole = nn.Parameter(torch.randn(4, 6, generator=generator, **fp32))
    start = whole.detach().clone()
    pieces = [nn.Parameter(p.clone()) for p in start.view(-1).split([7, 17])]
    plain = {k: v for k, v in kwargs.items() if k != "lr"} | ({"lr": 0.1} if "lr" in kwargs else {})
    try:
        optimizers = cls([("whole", whole)], **plain), cls([("a", pieces[0]), ("b", pieces[1])], **plain)
        for _ in range(2):
            gradient = torch.randn(4, 6, generator=generator, **fp32) * torch.logspace(-2, 1, 6, **fp32)
            whole.grad = gradient
            for piece, g in zip(pieces, gradient.view(-1).split([7, 17]), strict=True):
                piece.grad = g.clone()
            for optimizer in optimizers:
                optimizer.step()
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise InputError(f"{cls.__name__} cannot be sharded: on flat slices it raises {error!r}") from error
    moved, expected = torch.cat([p.view(-1) for p in pieces]), whole.view(-1)
    if not torch.allclose(moved - start.view(-1), expected - start.view(-1), rtol=1e-3, atol=1e-7):
        reason = "its update of an element depends on other elements: it moves a matrix and slices of it differently"
        raise InputError(f"{cls.__name__} cannot be sharded: {reason}; take an elementwise optimizer")
