"""accelerate's save_state and load_state with every rank's slices: checked when they are loaded, for any world size.

Under DDP accelerate saves rank 0's optimizer alone, and takes parameters that are views of one bucket for copies of
each other, of which its safetensors files keep the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import SAFE_MODEL_NAME
from safetensors.torch import load_file
from torch import Tensor, nn

from shardopt import checkpoint
from shardopt.checkpoint.stored import SLICES
from shardopt.distributed import Ranks
from shardopt.engines.state import refuse_steps
from shardopt.errors import InputError, few
from shardopt.integrations.hosted import DeepspeedAdEMAMix, HostedAdEMAMix, ZeroAdEMAMix


def follow_states(accelerator: Any, optimizer: ZeroAdEMAMix | HostedAdEMAMix | DeepspeedAdEMAMix, host: str) -> None:
    """Let `accelerator` save every rank's slices of `optimizer` with its states, load them, and save whole models."""
    in_views = isinstance(optimizer, ZeroAdEMAMix)
    whole = accelerator.get_state_dict

    def get_state_dict(model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        return _apart(whole(model, unwrap=True))  # under the names that they have in one process, too

    def before_save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        checkpoint.save(Path(folder) / SLICES, optimizer.sharded_state(), {"host": host})

    def before_load(models: list[nn.Module], folder: str) -> None:
        slices = Path(folder) / SLICES
        if slices.is_dir():
            if (damage := checkpoint.find_damage(slices, Ranks.current())) is not None:
                raise InputError(f"{damage}: load another state")
            if host in ("single", "ddp"):  # whose optimizer accelerate loads after this
                optimizer.slices_at = slices
            else:
                _load_over(slices, optimizer)
        if not in_views:
            return
        files = [Path(folder) / f"{SAFE_MODEL_NAME}{f'_{i}' if i else ''}.safetensors" for i in range(len(models))]
        if all(file.exists() for file in files):
            for model, file in zip(models, files, strict=True):
                _load(accelerator.unwrap_model(model), file)
            models.clear()  # done: accelerate would not read them into views

    if in_views:
        accelerator.get_state_dict = get_state_dict
    accelerator.register_save_state_pre_hook(before_save)
    accelerator.register_load_state_pre_hook(before_load)


def _load_over(slices: Path, optimizer: ZeroAdEMAMix | HostedAdEMAMix | DeepspeedAdEMAMix) -> None:
    """Load the slices over what accelerate has loaded itself, which is the same unless the files are mixed."""
    state = optimizer.sharded_state()

    def steps() -> set[int | float]:
        return {entry["step"] for entry in state.step_counts().values()}

    here = steps() if isinstance(optimizer, HostedAdEMAMix) else None
    checkpoint.load(slices, state)
    if here is not None and here != steps():
        there, beside = max(steps()), max(here)
        mixed = f"{slices} is of step {there}, and the files beside it are of step {beside}: load another"
        refuse_steps(optimizer, mixed)
        raise InputError(mixed)


def _apart(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same values, none a view of another's memory; tied weights stay one tensor."""
    copies: dict[Any, Tensor] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        key = value.data_ptr(), value.shape, value.stride(), value.dtype
        return copies.setdefault(key, value.clone())

    return {name: copy(value) for name, value in state.items()}


def _load(model: nn.Module, file: Path) -> None:
    """Read all of `file`, and nothing else, into `model`; of tied weights the file has one."""
    stored = load_file(file)
    missing, unexpected = model.load_state_dict(stored, strict=False)
    here = model.state_dict()
    read = {here[name].data_ptr() for name in stored if name in here}
    lacking = [name for name in missing if here[name].data_ptr() not in read]
    if lacking or unexpected:
        raise InputError(
            f"{file} is of another model, or of one wrapped in another way: it lacks {few(lacking)}, and the model has "
            f"no {few(unexpected)}"
        )
