"""A .pt file of {"model": ..., "optimizer": ...}: AdamW's and AdEMAMix's state dicts, in the names of each code.

A model's state_dict alone is read as weights without state.

torch           the optimizer's own keys: exp_avg, exp_avg_sq of torch.optim.AdamW; m1, m2, nu of shardopt.AdEMAMix
paper           exp_avg_fast, exp_avg_slow, exp_avg_sq, of the paper's authors
bitsandbytes    state1 (m1 and m2 stacked), state2 (nu); its 8-bit state is read, and fp32 is written
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardopt.checkpoint.convert.state import Scratch, TrainingState, Whole, check_zip, reading
from shardopt.errors import InputError, few
from shardopt.optim import schema
from shardopt.slices import canonical_name

_MODEL = ("model", "model_state_dict", "state_dict")
_OPTIMIZER = ("optimizer", "optimizer_state_dict", "optim")
_BNB_WRAP, _BNB_BLOCK = "__bnb_optimizer_quant_state__", 256
_PAPER = {"exp_avg_fast": "m1", "exp_avg_slow": "m2", "exp_avg_sq": "nu"}
# Hyper-parameters under the names of each code, with its defaults.
_TORCH_GROUP = dict(schema.DEFAULTS)
_PAPER_GROUP = {
    "lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "eps": 1e-8, "alpha": 2.0, "beta3_warmup": None, "alpha_warmup": None,
    "weight_decay": 0.0,
}  # fmt: skip
_BNB_GROUP = {
    "lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "eps": 1e-8, "weight_decay": 1e-2, "alpha": 5.0, "t_alpha": None,
    "t_beta3": None,
}  # fmt: skip
_NO_SETTINGS = ("params", "param_names", "step")  # bitsandbytes' reference counts in the group
_BNB_NAMES = {"t_alpha": "alpha_warmup", "t_beta3": "beta3_warmup"}


def holds(path: Path) -> bool:
    return path.is_file() and path.suffix in (".pt", ".pth", ".bin")


def read(path: Path) -> TrainingState:
    """Raises InputError where the file holds more than tensors and plain data, or names and state do not fit."""
    content = load(path)
    if isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values()):
        content = {_MODEL[0]: content}
    model = next((content[key] for key in _MODEL if isinstance(content, dict) and key in content), None)
    if not isinstance(model, Mapping):
        raise InputError(
            f"{path} is no dict with the model's state_dict under {' or '.join(map(repr, _MODEL))}, and no state_dict"
        )
    saved = next((content[key] for key in _OPTIMIZER if key in content), None)
    weights: dict[str, Tensor] = {}
    seen = set()
    for name, value in model.items():
        place = (value.data_ptr(), value.shape)  # tied weights lie there once and have several names
        if place not in seen or not value.numel():
            weights[canonical_name(name)] = value
        seen.add(place)
    return from_state_dict(weights, saved, str(path))


def load(path: Path) -> Any:
    """A file of torch.save, memory-mapped; what is not plain data is refused and not run."""
    with reading(path):
        check_zip(path)
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            if objects := torch.serialization.get_unsafe_globals_in_checkpoint(path):
                raise InputError(
                    f"{path} holds pickled objects ({few(objects)}), which may run code and are refused: "
                    f"save state_dicts, torch.save({{'model': model.state_dict(), 'optimizer': ...}}, ...)"
                ) from error
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"cannot read {path} as tensors and plain data: {reason}") from error


def from_state_dict(
    weights: dict[str, Tensor], saved: Any, where: str, order: list[str] | None = None
) -> TrainingState:
    """A model's tensors and an optimizer's state_dict as one state.

    Args:
        weights: by canonical name, tied ones once, in the model's order.
        saved: the state_dict, or None.
        where: the file, for messages.
        order: the parameter of each number in `saved`, where its groups have no names.
    """
    if saved is None:
        return TrainingState({(name, "weight"): Whole.of(value) for name, value in weights.items()}, {}, source="torch")
    try:
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        names = dict(zip(numbers, order or _names(saved["param_groups"], weights, where), strict=True))
        tensors: dict[tuple[str, str], Whole] = {}
        counts: dict[str, dict[str, int | float]] = {}
        groups = []
        for group in saved["param_groups"]:
            settings = {_BNB_NAMES.get(k, k): v for k, v in group.items() if k not in _NO_SETTINGS}
            groups.append({"names": [names[number] for number in group["params"]], **settings})
        trained = set(names.values())
        for name, value in weights.items():
            tensors[name, "weight" if name in trained else "buffer"] = Whole.of(value)
        group_of = {number: group for group in saved["param_groups"] for number in group["params"]}
        for number, entry in saved["state"].items():
            name = names[number]
            for key, value in _canonical(name, entry, group_of[number], weights[name]).items():
                if isinstance(value, Whole):
                    tensors[name, key] = value
                else:
                    counts.setdefault(name, {})[key] = value
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: its optimizer's state does not fit its model ({error!r})") from error
    steps = [int(entry["step"]) for entry in counts.values() if "step" in entry]
    return TrainingState(tensors, counts, groups, max(steps, default=None), source="torch")


def _names(groups: list[dict[str, Any]], weights: dict[str, Tensor], where: str) -> list[str]:
    """The parameters in the order of their numbers; by the groups' names, or by the model if that leaves no choice."""
    if all("param_names" in group for group in groups):
        return [canonical_name(name) for group in groups for name in group["param_names"]]
    if len(groups) == 1 and len(groups[0]["params"]) == len(weights):
        return list(weights)  # the shapes of the state are compared with the weights'
    raise InputError(
        f"{where}: its optimizer numbers its parameters and does not name them, and they are not all the model's in "
        f"one group: save it from an optimizer over named_parameters(), or add 'param_names' to its param_groups"
    )


def _canonical(name: str, entry: Mapping[str, Any], group: Mapping[str, Any], weight: Tensor) -> dict[str, Any]:
    """One parameter's state under our names: Whole tensors, and numbers."""
    state = {k: v for k, v in entry.items() if k != _BNB_WRAP} | entry.get(_BNB_WRAP, {})
    found: dict[str, Any] = {}
    if "m1_m2" in state:  # bitsandbytes' reference in plain torch, which counts by group
        state |= {"m1": state["m1_m2"][0], "m2": state.pop("m1_m2")[1], "step": group.get("step", 0)}
    if "exp_avg_fast" in state:
        state = {_PAPER.get(key, key): value for key, value in state.items() if value is not None}
    if "state1" in state:
        first, second = state.pop("state1"), state.pop("state2")
        if first.shape != (2, *weight.shape):
            raise InputError(f"{name}: bitsandbytes' state1 is {tuple(first.shape)}: only its AdEMAMix can be read")
        if first.dtype == torch.uint8:
            tables = {key: state.pop(key) for key in ("qmap1", "qmap2", "absmax1", "absmax2")}
            found = {
                "m1": _dequantized(first[0], tables["qmap1"], tables["absmax1"][0]),
                "m2": _dequantized(first[1], tables["qmap1"], tables["absmax1"][1]),
                "nu": _dequantized(second, tables["qmap2"], tables["absmax2"]),
            }
        else:
            state |= {"m1": first[0], "m2": first[1], "nu": second}
        if group.get("betas", (1,))[0] == 0.0:  # kept by bitsandbytes alone, and overwritten by every step
            found.pop("m1", None)
            state.pop("m1", None)
    for key, value in state.items():
        if isinstance(value, Tensor) and (value.dim() or key not in schema.COUNTS):
            if value.shape != weight.shape:
                raise InputError(f"{name}: its state {key} is {tuple(value.shape)}, its weight {tuple(weight.shape)}")
            found[key] = Whole.of(value)
        else:
            number = value.item() if isinstance(value, Tensor) else value
            if type(number) not in (int, float):
                raise InputError(f"{name}: its state {key} is neither a tensor nor a number: {number!r}")
            found[key] = int(number) if key in schema.COUNTS else number
    return found


def _dequantized(codes: Tensor, table: Tensor, absmax: Tensor) -> Whole:
    def read() -> Tensor:
        scale = absmax.repeat_interleave(_BNB_BLOCK)[: codes.numel()].view(codes.shape)
        return table[codes.long()] * scale

    return Whole(tuple(codes.shape), torch.float32, read)


# -- writing --------------------------------------------------------------------------------------------------


def write(path: Path, state: TrainingState, scratch: Scratch, names: str = "torch") -> None:
    """Raises InputError where the code of these `names` has no place for a part of the state."""
    model = {name: scratch.keep(whole) for (name, kind), whole in state.tensors.items() if kind in ("weight", "buffer")}
    saved = {"model": model} | ({"optimizer": to_state_dict(state, scratch, names)} if state.stateful else {})
    torch.save(saved, path)


def to_state_dict(state: TrainingState, scratch: Scratch, names: str = "torch") -> dict[str, Any]:
    """The optimizer's state_dict, its parameters numbered in the order of the groups and named in them."""
    if names != "torch":
        if state.optimizer != "ademamix":
            raise InputError(f"{names} has AdEMAMix alone, the state is of {state.optimizer}: add --optimizer ademamix")
        state.check_fits(names, _PAPER.values())
    groups = state.full_groups()
    numbers = {name: number for number, name in enumerate(n for group in groups for n in group["names"])}
    entries: dict[int, dict[str, Any]] = {}
    held = state.by_parameter()
    for name, number in numbers.items():
        entry: dict[str, Any] = dict(state.counts.get(name, {}))
        wholes = held[name]
        if state.optimizer == "adamw":
            entry = {k: torch.tensor(float(v)) if k == "step" else v for k, v in entry.items()}
        if names == "bitsandbytes":
            nu = wholes["nu"].to(torch.float32, f"{name}/nu")
            entry[_BNB_WRAP] = {"state1": scratch.keep(_stacked(wholes)), "state2": scratch.keep(nu)}
        elif names == "paper":
            entry |= {k: scratch.keep(wholes[kind]) if kind in wholes else None for k, kind in _PAPER.items()}
        else:
            entry |= {kind: scratch.keep(whole) for kind, whole in wholes.items()}
        entries[number] = entry
    settings = [_settings(state, group, names) for group in groups]
    return {
        "state": entries,
        "param_groups": [
            {**own, "params": [numbers[name] for name in group["names"]], "param_names": list(group["names"])}
            for own, group in zip(settings, groups, strict=True)
        ],
    }


def _stacked(wholes: Mapping[str, Whole]) -> Whole:
    m1, m2 = wholes.get("m1"), wholes["m2"]

    def read() -> Tensor:
        slow = m2.read().float()
        return torch.stack([torch.zeros_like(slow) if m1 is None else m1.read().float(), slow])

    return Whole((2, *m2.shape), torch.float32, read)


def _settings(state: TrainingState, group: dict[str, Any], names: str) -> dict[str, Any]:
    """The hyper-parameters of a group under the names of a code: the state's own, and defaults for the others."""
    given = {key: value for key, value in group.items() if key != "names"}
    if names == "torch" and state.optimizer == "adamw":
        defaults = torch.optim.AdamW([torch.zeros(1)]).param_groups[0]
        known = {key: value for key, value in defaults.items() if key != "params"}
    elif names == "torch" and state.optimizer == "other":
        return given
    else:
        known = {"torch": _TORCH_GROUP, "paper": _PAPER_GROUP, "bitsandbytes": _BNB_GROUP}[names]
    return {key: given.get(_BNB_NAMES.get(key, key), default) for key, default in known.items()}
