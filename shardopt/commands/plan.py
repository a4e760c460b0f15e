"""`shardopt plan`."""

from __future__ import annotations

import argparse
import json
import re
from typing import TYPE_CHECKING

from shardopt.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from shardopt.pretrain.forecast import Device

_UNITS = {"": 1, "k": 1, "m": 2, "g": 3, "t": 4}
_DEFAULT = "h100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, and the function that runs the command."""
    parser.add_argument("config", help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the file")
    parser.add_argument("--world-size", required=True, metavar="N", help="ranks, one for each GPU")
    parser.add_argument("--gpu", metavar="NAME", help=f"such as h100, a100, b200; by default {_DEFAULT}")
    parser.add_argument("--memory", metavar="SIZE", help="of a GPU, such as 80GiB, in place of what --gpu has")
    parser.add_argument("--mfu", default="0.4", metavar="SHARE", help="of the peak that the hours are for; %(default)s")
    parser.add_argument("--json", action="store_true", help="as JSON: bytes, tokens, operations, hours")
    parser.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    world_size = int(arguments.world_size) if arguments.world_size.isdecimal() else 0
    if world_size < 1:
        raise InputError(f"--world-size must be a whole number >= 1, got {arguments.world_size!r}")
    mfu = _share(arguments.mfu)
    memory = None if arguments.memory is None else _memory(arguments.memory)

    from shardopt.pretrain import config as configuration
    from shardopt.pretrain.forecast import forecast
    from shardopt.pretrain.forecast_text import as_text

    config = configuration.load(arguments.config, arguments.overrides)
    found = forecast(config, world_size, _device(arguments.gpu, memory, config.run.device == "cpu"), mfu)
    print(json.dumps(found.as_dict(), indent=1) if arguments.json else as_text(found))
    return 0


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InputError(f"--mfu: {text!r} is no share of the peak, such as 0.4")
    return share


def _memory(text: str) -> float:
    """Bytes of 80GiB, 80GB or a plain number."""
    found = re.fullmatch(r"(\d+\.?\d*)\s*([kmgt]?)(i?)b?", text.strip().lower())
    size = float(found[1]) * (1024 if found[3] else 1000) ** _UNITS[found[2]] if found else 0.0
    if size < 1e6:
        raise InputError(f"--memory: {text!r} is no size of a GPU's memory, such as 80GiB")
    return size


def _device(name: str | None, memory: float | None, is_cpu: bool) -> Device:
    from shardopt.pretrain.flops import GPUS
    from shardopt.pretrain.forecast import Device

    if name is None and is_cpu:  # run.device says so
        return Device("cpu", memory, None, cuda=False)
    known = {words.lower().replace(" ", "-"): gpu for words, gpu in GPUS.items()}
    if name is None and memory is not None:
        return Device(f"GPU of {memory / 2**30:.1f} GiB", memory, None)
    key = (name or _DEFAULT).lower()
    if key not in known:
        hint = did_you_mean(key, known) or f"; known: {', '.join(sorted(known))}"
        raise InputError(f"--gpu: no {name!r} in the list{hint} (of others, give --memory)")
    gpu = known[key]
    return Device(key.upper(), gpu.memory * 2**30 if memory is None else memory, gpu.peak * 1e12)
