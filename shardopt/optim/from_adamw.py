"""Go on from AdamW in mid-run: its averages, its step count and its settings as AdEMAMix's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Adam, Optimizer

from shardopt.errors import InputError
from shardopt.optim.checked import placed_like
from shardopt.optim.schema import HYPER_PARAMETERS
from shardopt.slices import local_tensor

if TYPE_CHECKING:
    from shardopt.optim.ademamix import AdEMAMix


@torch.no_grad()
def take_over(cls: type[AdEMAMix], adamw: Optimizer, options: dict[str, Any]) -> AdEMAMix:
    """`AdEMAMix.from_adamw`, which says more."""
    if not isinstance(adamw, Adam):  # AdamW is an Adam; NAdam and RAdam have its state keys and another update
        raise InputError(f"from_adamw takes a torch.optim.AdamW, got {type(adamw).__name__}")
    if any(group["amsgrad"] for group in adamw.param_groups):
        raise InputError("from_adamw cannot take over an amsgrad optimizer: its running maximum has no counterpart")
    if any(not group["decoupled_weight_decay"] and group["weight_decay"] for group in adamw.param_groups):
        raise InputError("from_adamw cannot take over Adam's L2 weight decay: AdEMAMix decays as AdamW does")
    if taken := sorted({"lr", "eps", "weight_decay", "maximize"} & set(options)):
        raise InputError(f"from_adamw takes {', '.join(taken)} from the AdamW: set them in its groups before")
    default, check = HYPER_PARAMETERS["betas"]
    betas = check("betas", options.pop("betas", default))
    groups = []
    for old in adamw.param_groups:
        group: dict[str, Any] = {key: old[key] for key in ("lr", "eps", "weight_decay", "initial_lr") if key in old}
        names = old.get("param_names")
        params = list(zip(names, old["params"], strict=True)) if names else list(old["params"])
        groups.append({**group, "params": params, "maximize": old["maximize"], "betas": (*old["betas"], betas[2])})
    new = cls(groups, **options)
    for group in new.param_groups:
        for param in group["params"]:
            if not (held := adamw.state.get(param)):
                continue
            state = new._create_state(group, param)
            for key, value in (("m1", held["exp_avg"]), ("nu", held["exp_avg_sq"])):
                source = local_tensor(value)
                if key in state and source.dtype == state[key].dtype and source.is_contiguous():
                    state[key] = placed_like(param, source)
                elif key in state:
                    new._store(group, param, key, source)
            state["step"] = new._counter(int(held["step"]), group, param)
            state["schedule_step"] = new._counter(0, group, param)
    return new
