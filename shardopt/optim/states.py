"""The state of any torch optimizer as slices and plain numbers: what engines report and checkpoints write."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from shardopt.errors import InputError
from shardopt.optim.precision import Format, blocks, round_to_weight, split_fp32
from shardopt.optim.schema import LOW_HALF, format_of, formats_of
from shardopt.slices import Layout, Slice, canonical_name, layout_of, local_tensor

Layouts = Layout | Sequence[Layout]
# torch keeps these as 0-dim tensors; a 0-dim parameter has 0-dim state tensors too, hence the names.
_SCALARS = ("step", "schedule_step", "eta", "mu", "mu_product")


def parameter_names(optimizer: Optimizer) -> dict[Tensor, str]:
    """Canonical name of every parameter: from named parameters, else its position ("0", "1", ...).

    Positions are not portable between engines. A host that replaced a group's parameters by flat ones (their
    number no longer fits the names) also falls back to positions.

    Raises:
        InputError: two parameters of one name, or parameters that were moved between groups without their names.
    """
    names: dict[Tensor, str] = {}
    owners: dict[str, Tensor] = {}
    known: Mapping[Tensor, str] = getattr(optimizer, "given_names", {})  # ours remember what each parameter is called
    moved = "parameters were moved between parameter groups: move their entries of 'param_names' along"
    groups = [(group["params"], group.get("param_names")) for group in optimizer.param_groups]
    sizes = [(len(params), len(params if given is None else given)) for params, given in groups]
    if any(a != b for a, b in sizes) and sum(a for a, _ in sizes) == sum(b for _, b in sizes):
        raise InputError(moved)
    position = 0
    for params, given in groups:
        if given is None or len(given) != len(params):
            given = [str(position + i) for i in range(len(params))]
        elif any(known.get(param, name) != name for param, name in zip(params, given, strict=True)):
            raise InputError(moved)
        for param, name in zip(params, map(canonical_name, given), strict=True):
            name = names.setdefault(param, name)
            if owners.setdefault(name, param) is not param:
                raise InputError(
                    f"two parameters are named {name!r} (without the prefixes of wrappers): give each its own "
                    f"(of submodules, named_parameters(prefix=...) does)"
                )
        position += len(params)
    return names


def layouts_of(
    optimizer: Optimizer, layouts: Mapping[Tensor, Layouts] | None = None
) -> dict[Tensor, tuple[Layout, ...]]:
    """The elements that each parameter stands for: `layouts`, else what the optimizer was told, else the tensor's own.

    A flat partition stands for several parameters: it has several layouts, whose local starts count in it.
    """
    if layouts is None:
        told: Mapping[Tensor, Layouts] = getattr(optimizer, "layouts", {})
        layouts = {p: told[p] if p in told else layout_of(p, name) for p, name in parameter_names(optimizer).items()}
    return {p: (where,) if isinstance(where, Layout) else tuple(where) for p, where in layouts.items()}


def _pieces(tensor: Tensor, layouts: Sequence[Layout]) -> Iterator[tuple[Layout, Tensor]]:
    """Each layout with its own elements of the local `tensor` (a view), from whose first its local starts count."""
    for layout in layouts:
        first = layout.ranges[0].local_start if layout.ranges else 0
        last = layout.ranges[-1].local_start + layout.ranges[-1].length if layout.ranges else 0
        rebased = replace(layout, ranges=tuple(r._replace(local_start=r.local_start - first) for r in layout.ranges))
        whole = (first, last) == (0, tensor.numel()) or not tensor.numel()
        yield rebased, tensor if whole else tensor.view(-1).narrow(0, first, last - first)


def is_scalar(key: str, value: object, param: Tensor) -> bool:
    """True for a count or another number; false for a tensor of one value per element."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and (key in _SCALARS or param.dim() > 0)
    return isinstance(value, (int, float))


def weight_slices(layouts: Mapping[Tensor, Sequence[Layout]]) -> list[Slice]:
    """The live parameters as slices."""
    parts = ((layouts[param], local_tensor(param.detach())) for param in layouts)
    return [Slice(w.name, "weight", w, (piece,)) for where, local in parts for w, piece in _pieces(local, where)]


def state_slices(optimizer: Optimizer, layouts: Mapping[Tensor, Layouts] | None = None) -> list[Slice]:
    """The live state tensors as slices; `kind` is the state key.

    Args:
        layouts: what each parameter holds, where the optimizer cannot know it (flat partitions); else `layouts_of`.

    Raises:
        InputError: a state tensor that does not hold one value per element: the optimizer is not elementwise.
    """
    refuse = getattr(optimizer, "refuse_weight_ema", None)
    if refuse is not None:
        refuse("a checkpoint or a report of the state")
    slices = []
    given = {p: g["state_dtype"] for g in optimizer.param_groups if "state_dtype" in g for p in g["params"]}
    for param, where in layouts_of(optimizer, layouts).items():
        state = optimizer.state.get(param, {})
        elements = local_tensor(param).numel()
        formats = formats_of(given[param]) if param in given else {}
        in_blocks = {key: fmt.name for key, fmt in formats.items() if fmt.in_blocks}
        scales = {f"{key}_scale" for key in in_blocks}
        for key, value in state.items():
            if key in scales or value is None or is_scalar(key, value, param):
                continue
            values = local_tensor(value) if isinstance(value, Tensor) else None
            if values is not None and values.numel() == elements:
                if key in in_blocks:
                    slices.append(_block_slice(where, key, in_blocks[key], values, state[f"{key}_scale"]))
                else:
                    slices += [Slice(w.name, key, w, (piece,)) for w, piece in _pieces(values, where)]
            elif values is not None and len(where) == 1 and where[0].is_whole:
                # not elementwise (Adafactor's rows and columns): a tensor of its own, whole where the parameter is
                own = Layout.whole(f"{where[0].name}.{key}", values.shape)
                slices.append(Slice(own.name, key, own, (values,)))
            else:
                raise InputError(
                    f"{type(optimizer).__name__} keeps state {key!r} of {where[0].name} that is not one value per "
                    f"element: only elementwise optimizers can be sharded and saved in slices"
                )
    return slices


def _block_slice(where: Sequence[Layout], key: str, fmt: str, codes: Tensor, scale: Tensor) -> Slice:
    if len(where) > 1:
        raise InputError(f"{where[0].name}: block formats need one parameter a tensor, not a flat partition")
    used = sum(blocks(r.length) for r in where[0].ranges)  # a smaller shard leaves some unused
    return Slice(where[0].name, key, where[0], (codes, local_tensor(scale).view(-1).narrow(0, 0, used)), fmt)


def step_counts(
    optimizer: Optimizer, layouts: Mapping[Tensor, Layouts] | None = None
) -> dict[str, dict[str, int | float]]:
    """Counts and other numbers in the state, by parameter name; plain JSON. Args: see `state_slices`."""
    counts: dict[str, dict[str, int | float]] = {}
    for param, where in layouts_of(optimizer, layouts).items():
        scalars = {k: v for k, v in optimizer.state.get(param, {}).items() if is_scalar(k, v, param)}
        held = {k: v.item() if isinstance(v, Tensor) else v for k, v in scalars.items()}
        if held := {k: int(number) if "step" in k else number for k, number in held.items()}:
            counts |= {layout.name: dict(held) for layout in where}
    return counts


def load_step_counts(
    optimizer: Optimizer,
    mapping: Mapping[str, Mapping[str, int | float]],
    layouts: Mapping[Tensor, Layouts] | None = None,
) -> None:
    """Set what `step_counts` returned, in place; the state exists already (`init_state`). Args: see `state_slices`.

    Raises:
        InputError: a parameter that has state here and none in `mapping`.
    """
    for param, where in layouts_of(optimizer, layouts).items():
        state = optimizer.state.get(param)
        if not state:
            continue
        scalars = {key for key, value in state.items() if is_scalar(key, value, param)}  # none in SGD's
        saved = next((mapping[layout.name] for layout in where if layout.name in mapping), None if scalars else {})
        if saved is None:
            raise InputError(f"the saved optimizer state has no step for parameter {where[0].name!r}")
        for key in scalars - saved.keys():
            del state[key]
        for key, number in saved.items():
            held = state.get(key)
            if isinstance(held, Tensor):
                held.fill_(number)
            elif isinstance(state.get("step"), Tensor) and "step" in key:
                state[key] = torch.full_like(state["step"], number)
            else:
                state[key] = number


def group_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The names and hyper-parameters of each parameter group, as JSON has them; what JSON cannot hold is left out."""
    names, groups = parameter_names(optimizer), []
    for group in optimizer.param_groups:
        settings: dict[str, Any] = {"names": [names[param] for param in group["params"]]}
        for key, value in group.items():
            plain = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            if key in ("params", "param_names"):
                continue
            try:
                json.dumps(plain, allow_nan=False)
            except (TypeError, ValueError):
                continue
            settings[key] = plain
        groups.append(settings)
    return groups


@torch.no_grad()
def init_state(optimizer: Optimizer) -> None:
    """Create the state of every parameter that requires grad, without moving a weight or counting a step.

    An optimizer's own `init_state` is used where it has one. Otherwise its own code makes the state, in a step on a
    stand-in of each parameter (zeros, with a zero gradient). State that exists is left alone.

    Raises:
        InputError: SGD with dampening, whose momentum begins with the first gradient and not with zeros.
    """
    own = getattr(optimizer, "init_state", None)
    if own is not None:
        own()
        return
    if any(group.get("dampening") for group in optimizer.param_groups):
        raise InputError(
            f"{type(optimizer).__name__} with dampening begins its momentum with the first gradient undamped: no state "
            f"made before it gives the same run. Set dampening=0"
        )
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.requires_grad and not optimizer.state.get(param):
                optimizer.state[param] = _state_of_stand_in(optimizer, group, param)


def _state_of_stand_in(optimizer: Optimizer, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """The state that `optimizer` makes for a parameter like `param`, as it is before the first step."""
    stand_in = torch.zeros_like(param).requires_grad_()
    stand_in.grad = torch.zeros_like(param)
    group = {**group, "params": [stand_in]}
    if prepare := getattr(optimizer, "_init_group", None):  # where torch's optimizers make state, and fill lists
        prepare(group, *([] for _ in list(inspect.signature(prepare).parameters)[1:]))
    if not optimizer.state.get(stand_in):  # made in the step itself (SGD's momentum): a zero gradient leaves zeros
        groups, optimizer.param_groups = optimizer.param_groups, [group]
        try:
            inspect.unwrap(type(optimizer).step)(optimizer)  # without its hooks
        finally:
            optimizer.param_groups = groups
        if (step := optimizer.state.get(stand_in, {}).get("step")) is not None:
            optimizer.state[stand_in]["step"] = step * 0
    return optimizer.state.pop(stand_in, {})


# -- slices: what checkpoints read and write ------------------------------------------------------------------


def read_slice(piece: Slice) -> Tensor:
    """The values of a slice as a flat fp32 (or fp64) tensor of `layout.local_numel` elements, in global order."""
    fmt = _format_of(piece)
    parts = [fmt.decode(codes, scale) for codes, scale in _slice_ranges(piece)]
    return torch.cat(parts) if parts else torch.empty(0)


def write_slice(piece: Slice, values: Tensor) -> None:
    """Store what `read_slice` returned, in the slice's own format, rounded to nearest.

    Of fp32 values bf16 weights and "master_low" take the two halves, which together are those values bit for bit.
    """
    fmt, done = _format_of(piece), 0
    if piece.kind == LOW_HALF:
        values = split_fp32(values)[1]
    elif piece.kind == "weight":
        values = round_to_weight(values, piece.tensors[0].dtype)
    for codes, scale in _slice_ranges(piece):
        fmt.encode(values[done : done + codes.numel()].to(codes.device), None, codes, scale)
        done += codes.numel()


def _format_of(piece: Slice) -> Format:
    return format_of(piece.kind, piece.format or "fp32")  # of which bf16 rounded to nearest is no other


def _slice_ranges(piece: Slice) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Codes and scales (views) of each range; a block format's blocks start anew in every range."""
    values = local_tensor(piece.tensors[0]).view(-1)
    block = 0
    for r in piece.layout.ranges:
        scale = None
        if len(piece.tensors) > 1:
            scale = local_tensor(piece.tensors[1]).narrow(0, block, blocks(r.length))
            block += blocks(r.length)
        yield values.narrow(0, r.local_start, r.length), scale
