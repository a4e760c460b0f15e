"""Go on from AdamW in mid-run: its averages, its step count and its settings as AdEMAMix's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Adam, Optimizer

from shardopt.errors import InputError
from shardopt.optim.checked import placed_like
from shardopt.optim.schema import DEFAULTS, HYPER_PARAMETERS
from shardopt.slices import local_tensor

if TYPE_CHECKING:
    from shardopt.optim.ademamix import AdEMAMix

STATE_FROM_ADAMW: dict[str, str | None] = {"m1": "exp_avg", "m2": None, "nu": "exp_avg_sq"}
"""Each state tensor of AdEMAMix, and AdamW's that it goes on from; None begins with zeros."""
SETTINGS = ("lr", "initial_lr", "eps", "weight_decay", "maximize")
"""The hyper-parameters that mean the same to both; beside them there are the betas, of which AdEMAMix has one more."""


def settings_from_adamw(group: Mapping[str, Any], beta3: float = DEFAULTS["betas"][2]) -> dict[str, Any]:
    """AdEMAMix's hyper-parameters of a parameter group of AdamW's; of those that it has.

    Raises:
        InputError: a setting of AdamW or Adam that has no counterpart.
    """
    if group.get("amsgrad"):
        raise InputError("AdEMAMix cannot go on from an amsgrad optimizer: its running maximum has no counterpart")
    if not group.get("decoupled_weight_decay", True) and group["weight_decay"]:
        raise InputError("AdEMAMix cannot go on from Adam's L2 weight decay: it decays as AdamW does")
    betas = {"betas": (*group["betas"], beta3)} if "betas" in group else {}
    return {key: group[key] for key in SETTINGS if key in group} | betas


@torch.no_grad()
def take_over(cls: type[AdEMAMix], adamw: Optimizer, options: dict[str, Any]) -> AdEMAMix:
    """`AdEMAMix.from_adamw`, which says more."""
    if not isinstance(adamw, Adam):  # AdamW is an Adam; NAdam and RAdam have its state keys and another update
        raise InputError(f"from_adamw takes a torch.optim.AdamW, got {type(adamw).__name__}")
    if taken := sorted({"lr", "eps", "weight_decay", "maximize"} & set(options)):
        raise InputError(
            f"from_adamw takes {', '.join(taken)} from the AdamW: change its groups before, or the new one's after"
        )
    default, check = HYPER_PARAMETERS["betas"]
    given = "betas" in options
    betas = check("betas", options.pop("betas", default))
    of_adamw = [tuple(group["betas"]) for group in adamw.param_groups]
    if given and betas[:2] not in of_adamw:
        raise InputError(
            f"from_adamw takes beta3 alone from betas, which are {betas}, the others from the AdamW, whose betas are "
            f"{of_adamw[0]}: give betas={(*of_adamw[0], betas[2])}, or change the AdamW's groups before"
        )
    groups = []
    for old in adamw.param_groups:
        names = old.get("param_names")
        params = list(zip(names, old["params"], strict=True)) if names else list(old["params"])
        groups.append({**settings_from_adamw(old, betas[2]), "params": params})
    new = cls(groups, **options)
    for group in new.param_groups:
        for param in group["params"]:
            if not (held := adamw.state.get(param)):
                continue
            state = new._create_state(group, param)
            for key, theirs in STATE_FROM_ADAMW.items():
                if theirs is None or key not in state:
                    continue
                source = local_tensor(held[theirs])
                if source.dtype == state[key].dtype and source.is_contiguous():
                    state[key] = placed_like(param, source)
                else:
                    new._store(group, param, key, source)
            state["step"] = new._counter(int(held["step"]), group, param)
            state["schedule_step"] = new._counter(0, group, param)
    return new
