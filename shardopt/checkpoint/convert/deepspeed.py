"""DeepSpeed's universal checkpoint: a folder of files for each parameter, in fp32.

    zero/NAME/fp32.pt                    the weight, or its master
    zero/NAME/exp_avg.pt, exp_avg_sq.pt  the optimizer's state, by its own keys
    zero/NAME/step.pt
    zero/optimizer_state.pt              hyper-parameters
    mp_rank_00_model_states.pt           shapes and buffers

`ds_to_universal.py` makes one of AdamW's state and DeepSpeed reads it under `checkpoint: {load_universal: true}`:
stages 1 and 2 whatever keys there are (m1, m2, nu with our AdEMAMix), stage 3 AdamW's alone.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardopt.checkpoint.convert.state import ADAMW, Scratch, TrainingState, Whole, check_zip, is_alone
from shardopt.checkpoint.convert.state_dict import load
from shardopt.errors import InputError, few
from shardopt.optim import schema
from shardopt.slices import canonical_name

_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")  # stages 1 and 2; stage 3
_ZERO = "zero"
_VERSION = "0.19.8"  # whose universal format this is


def holds(path: Path) -> bool:
    return (path / _ZERO).is_dir()


def read(path: Path) -> TrainingState:
    file = next((path / file for file in _MODEL_FILES if (path / file).is_file()), None)
    about: dict[str, Any] = {} if file is None else load(file)
    if file is None or "param_shapes" not in about:
        raise InputError(f"{file or path / _MODEL_FILES[0]} does not say what the model's parameters are")
    grouped = about["param_shapes"]
    shapes = {name: size for group in grouped for name, size in group.items()}
    buffers = {name: (about.get("module") or {})[name] for name in about.get("buffer_names") or ()}
    tensors: dict[tuple[str, str], Whole] = {}
    counts: dict[str, dict[str, int | float]] = {}
    folders = {p.name: p for p in sorted((path / _ZERO).iterdir()) if p.is_dir() and p.name not in buffers}
    if missing := shapes.keys() - folders.keys():
        raise InputError(f"{path / _ZERO} has no {few(missing)}, which {file.name} names")
    for given in [*shapes, *(name for name in folders if name not in shapes)]:
        folder = folders[given]
        name = canonical_name(given)
        values = {file.stem: load(file) for file in sorted(folder.glob("*.pt"))}
        if "fp32" not in values:
            raise InputError(f"{folder} has no fp32.pt: {path} is not DeepSpeed's universal checkpoint")
        for key, value in values.items():
            whole = value.get("param") if isinstance(value, dict) else value
            if not isinstance(whole, Tensor) or (isinstance(value, dict) and value.keys() - {"param", "cat_dim"}):
                raise InputError(f"{folder / key}.pt holds no plain tensor: cut over tensor-parallel ranks, or experts")
            if key in schema.COUNTS:
                counts.setdefault(name, {})[key] = int(whole)
            else:
                shape = shapes.get(given, whole.shape)  # stage 3 writes flat vectors
                tensors[name, "weight" if key == "fp32" else key] = Whole.of(whole.view(shape))
    if not counts and "global_steps" in about:  # stage 3 counts for all of them at once
        step = int(about["global_steps"]) - int(about["skipped_steps"])
        counts = {name: {"step": step} for name, kind in tensors if kind != "weight"}
    tensors |= {(canonical_name(name), "buffer"): Whole.of(value) for name, value in buffers.items()}
    names = [[canonical_name(name) for name in group] for group in grouped]
    groups = [{"names": n, **s} for n, s in zip(names, _settings(path, len(names)), strict=True)]
    return TrainingState(tensors, counts, groups, about.get("global_steps"), source="deepspeed")


def _settings(path: Path, count: int) -> list[dict[str, Any]]:
    """The hyper-parameters of each group; none where the file holds DeepSpeed's own objects, which are not loaded."""
    file = path / _ZERO / "optimizer_state.pt"
    groups: list[dict[str, Any]] = []
    check_zip(file)
    with contextlib.suppress(InputError):
        groups = load(file)["param_groups"]
    return [{k: v for k, v in group.items() if k != "params"} for group in groups[:count]] + [{}] * (
        count - len(groups)
    )


def write(path: Path, state: TrainingState, scratch: Scratch) -> None:
    state = state.in_fp32()
    allowed = ADAMW if state.optimizer == "adamw" else ("m1", "m2", "nu", "weight_ema")
    state.check_fits("DeepSpeed's universal checkpoint", allowed)
    groups = state.full_groups()
    zero = path / _ZERO
    zero.mkdir(parents=True)
    for (name, kind), whole in state.tensors.items():
        if kind == "buffer":
            continue
        folder = zero / name
        folder.mkdir(exist_ok=True)
        value = whole.read()
        torch.save(
            {"param": value if is_alone(value) else value.clone().contiguous()},
            folder / f"{'fp32' if kind == 'weight' else kind}.pt",
        )
    for name, entry in state.counts.items():
        step = int(entry["step"])
        torch.save(
            torch.tensor(float(step)) if state.optimizer == "adamw" else torch.tensor(step), zero / name / "step.pt"
        )
    settings = [{k: v for k, v in group.items() if k != "names"} for group in groups]
    # DeepSpeed loads as many of its own groups as there are here: all of them, whatever their number.
    settings += [{} for _ in state.stateful]
    step = max((int(entry["step"]) for entry in state.counts.values()), default=0)
    common: dict[str, Any] = {"ds_version": _VERSION, "param_groups": settings}
    common["optimizer_state_dict"] = {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": settings}
    torch.save(common, zero / "optimizer_state.pt")
    buffers = {name: whole.read() for (name, kind), whole in state.tensors.items() if kind == "buffer"}
    about = {
        "module": buffers,
        "buffer_names": list(buffers),
        "param_shapes": [
            OrderedDict((name, torch.Size(state.tensors[name, "weight"].shape)) for name in group["names"])
            for group in groups
        ],
        "global_steps": step if state.step is None else state.step,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "lr_scheduler": None,
        "optimizer": None,
        "ds_version": _VERSION,
    }
    for file in _MODEL_FILES:
        torch.save(about, path / file)
