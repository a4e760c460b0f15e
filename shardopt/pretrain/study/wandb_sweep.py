"""A W&B sweep of a study's runs, for `wandb sweep` and `wandb agent` on any number of machines."""

from __future__ import annotations

import json
import math
import shlex
from typing import Any

import yaml

from shardopt.pretrain.study.plan import Study

_HEAD = """\
# The runs of this study as a W&B sweep. `wandb sweep {path}`
# prints the `wandb agent` command; every machine runs it where the config's own paths are right.
"""


def sweep(study: Study) -> dict[str, Any] | None:
    """The sweep's configuration: a grid over the settings of the variants and over the seeds.

    None where the variants are some points of a grid alone: W&B would run them all.

    The shell puts in the id of the agent's run, which makes its run folder: wandb's own macros are filled in before it
    is known.
    """
    tracking = study.base.tracking.wandb
    keys = list(study.variants[0].settings)
    points = {key: [variant.settings[key] for variant in study.variants] for key in keys}
    parameters = {key: {"values": _distinct(values)} for key, values in points.items()}
    if math.prod(len(one["values"]) for one in parameters.values()) != len(study.variants):
        return None
    if len(study.seeds) > 1:
        parameters["run.seed"] = {"values": study.seeds}
    fixed = [study.path, *study.overrides, f"engine={json.dumps(study.engine)}"]
    command = f'exec "$0" -m shardopt pretrain {shlex.join(fixed)} run.name={study.name}-"$WANDB_RUN_ID" "$@"'
    owner = {"project": tracking.project} | ({"entity": tracking.entity} if tracking.entity else {})
    return owner | {
        "name": study.name,
        "program": "shardopt",
        "method": "grid",
        "metric": {"name": "eval_loss", "goal": "minimize"},
        "parameters": parameters,
        "command": ["sh", "-c", command, "${interpreter}", "${args_no_hyphens}"],
    }


def write(study: Study) -> str:
    """Write wandb-sweep.yaml in the study's folder; its path, or why there is none."""
    if (made := sweep(study)) is None:
        return "none, the variants are no grid"
    path = study.folder / "wandb-sweep.yaml"
    text = yaml.safe_dump(made, sort_keys=False, allow_unicode=True, width=1000)
    path.write_text(_HEAD.format(path=path) + text, encoding="utf-8")
    return str(path)


def _distinct(values: list[Any]) -> list[Any]:
    """Each once, in order; what is no scalar as the text that `shardopt pretrain` reads as it."""
    plain = [json.dumps(value) if isinstance(value, dict | list) or value is None else value for value in values]
    return list(dict.fromkeys(plain))
