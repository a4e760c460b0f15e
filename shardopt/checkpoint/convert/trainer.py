"""A checkpoint folder of HF Trainer: safetensors, optimizer.pt, and shardopt's slices where AdEMAMix wrote it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardopt.checkpoint.convert import native
from shardopt.checkpoint.convert.state import Scratch, TrainingState, Whole, reading
from shardopt.checkpoint.convert.state_dict import from_state_dict, load, to_state_dict
from shardopt.checkpoint.document import DOCUMENT
from shardopt.checkpoint.export import INDEX, WHOLE, export_safetensors, model_files
from shardopt.checkpoint.stored import SLICES
from shardopt.checkpoint.trainer_files import check_files
from shardopt.distributed import Ranks
from shardopt.errors import InputError, MissingExtraError, few
from shardopt.slices import named_parameters, persistent_buffers

_OPTIMIZER, _SCHEDULER, _STATE = "optimizer.pt", "scheduler.pt", "trainer_state.json"


def holds(path: Path) -> bool:
    return any((path / file).is_file() for file in (WHOLE, INDEX, f"{SLICES}/{DOCUMENT}"))


def read(path: Path) -> TrainingState:
    """Raises InputError where a file is not as Trainer wrote it, or where the optimizer's numbers cannot be told apart
    without the model's config.json.
    """
    check_files(path, Ranks.current())
    if not (path / WHOLE).is_file() and not (path / INDEX).is_file():
        raise InputError(
            f"{path} has no {WHOLE}: what HF Trainer and accelerate keep under FSDP2 or DeepSpeed is not read. Give "
            f"{path / SLICES}, which has the trained weights and the optimizer's state; frozen weights and buffers are "
            f"not in it"
        )
    saved = _weights(path)
    about = path / _STATE
    step = _json(about)["global_step"] if about.is_file() else None
    files = (*model_files(path / SLICES), *([about] if about.is_file() else []))
    if (path / SLICES / DOCUMENT).is_file():
        state = native.read(path / SLICES)
        if step not in (None, state.step):
            raise InputError(f"{about} is of step {step}, and the {SLICES} folder beside it of step {state.step}")
        kept = {name: value for name, value in saved.items() if (name, "weight") not in state.tensors}
        frozen = {name for name, _ in named_parameters(_model(path))} if kept else set()
        # What is not trained is Trainer's own.
        beside = {(n, "weight" if n in frozen else "buffer"): Whole.of(value) for n, value in kept.items()}
        return replace(state, tensors=state.tensors | beside, model_files=files, source="trainer")
    if not (path / _OPTIMIZER).is_file():
        if (path / _SCHEDULER).is_file():
            raise InputError(f"{path} has a {_SCHEDULER} and no {_OPTIMIZER}, so its optimizer's state is missing")
        return TrainingState({(n, "weight"): Whole.of(w) for n, w in saved.items()}, {}, [], step, files, "trainer")
    content = load(path / _OPTIMIZER)
    if SLICES in content:
        raise InputError(f"{path} has no {SLICES} folder with the state that its {_OPTIMIZER} stands for")
    model = _model(path)
    buffers = {n: saved[n] for n, _ in persistent_buffers(model) if n in saved}
    weights = {n: saved[n] for n, _ in named_parameters(model) if n in saved}
    order = [name for group in _groups(model) for name in group]
    state = from_state_dict(weights | buffers, content, str(path / _OPTIMIZER), order)
    return replace(state, step=step, model_files=files, source="trainer")


def write(path: Path, state: TrainingState, scratch: Scratch) -> None:
    """Raises InputError where the model's config is not known: Trainer's numbers follow its parameters."""
    config = next((file for file in state.model_files if file.name == "config.json"), None)
    if state.stateful and config is None:
        raise InputError(
            "a Trainer's checkpoint needs the model's config.json, in DIR/model where the source is "
            "DIR/checkpoints/NAME: model.config.save_pretrained('DIR/model') writes it. "
            "A source of another format, convert to that first"
        )
    named = _groups(_model(config.parent)) if state.stateful and config is not None else []

    def weights() -> Iterator[tuple[str, Tensor]]:
        for (name, kind), whole in state.tensors.items():
            if kind in ("weight", "buffer"):
                yield name, whole.read()

    def complete(folder: Path) -> None:
        for file in state.model_files:
            shutil.copyfile(file, folder / file.name)
        if not state.stateful:
            return
        groups: list[dict[str, Any]] = [{"names": names} for names in named if names]
        for group in groups:  # each with the settings of the group that its parameters are in
            own = next((g for g in state.groups if group["names"][0] in g["names"]), {})
            group |= {key: value for key, value in own.items() if key != "names"}
        placed = replace(state, groups=groups)
        step = state.step or 0
        if state.optimizer == "ademamix":
            native.write(folder / SLICES, replace(placed, source="single"), scratch)
            torch.save({"state": {}, "param_groups": [], SLICES: {"step": step}}, folder / _OPTIMIZER)
        else:
            torch.save(to_state_dict(placed, scratch), folder / _OPTIMIZER)
        schedule: dict[str, Any] = {
            "last_epoch": step,
            "_step_count": step + 1,
            "lr_lambdas": [None] * len(groups),
        }
        if all("lr" in group for group in groups):  # of the next step
            schedule["_last_lr"] = [float(group["lr"]) for group in groups]
        if all("initial_lr" in group for group in groups):  # else the schedule is over the program's lr
            schedule["base_lrs"] = [float(group["initial_lr"]) for group in groups]
        torch.save(schedule, folder / _SCHEDULER)
        if not (folder / _STATE).exists():  # that of the source is kept
            from transformers import TrainerControl, TrainerState

            # Trainer warns where its batch is another, and wants a number.
            trainer = TrainerState(global_step=step, train_batch_size=1, stateful_callbacks=[TrainerControl()])  # type: ignore[list-item]
            trainer.save_to_json(str(folder / _STATE))

    export_safetensors(path, weights(), Ranks.current(), complete=complete)


def _weights(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise MissingExtraError("safetensors", "pretrain") from error
    where: dict[str, str] = {} if (path / WHOLE).is_file() else _json(path / INDEX)["weight_map"]
    found: dict[str, Tensor] = {}
    for file in sorted({path / name for name in where.values()} or {path / WHOLE}):
        with reading(file), safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is a file
    if missing := where.keys() - found.keys():
        raise InputError(f"{path} has no {few(missing)}, which its {INDEX} names")
    return found


def _json(path: Path) -> Any:
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def _model(path: Path) -> Any:
    """The model that config.json describes, on the meta device."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "transformers") from error
    if not (path / "config.json").is_file():
        raise InputError(f"{path} has no config.json, by which the optimizer's numbers are told apart")
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is None:
        raise InputError(f"{path / 'config.json'}: transformers has no {config.architectures}")
    with torch.device("meta"):
        model = cls(config)
    model.tie_weights()
    return model


def _groups(model: Any) -> list[list[str]]:
    """The names in Trainer's two groups, those that decay first."""
    from transformers import Trainer

    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    names = [name for name, _ in named_parameters(model)]
    return [[n for n in names if n in decaying], [n for n in names if n not in decaying]]
