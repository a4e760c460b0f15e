"""What the commands that load a trained model have in common."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which model, and how it is loaded."""
    parser.add_argument("model", metavar="RUN|CHECKPOINT|EXPORT", help="a folder, on this machine or in a store")
    parser.add_argument("--step", type=int, help="of a run's checkpoints; by default the newest")
    parser.add_argument(
        "--raw", action="store_true", help="the weights themselves, not the weight EMA that the run kept of them"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="by default a GPU if any")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that comes with the model, if it needs it"
    )


def add_dtype(parser: argparse.ArgumentParser, help: str) -> None:
    """Declare --dtype, of the weights; see `dtype`."""
    parser.add_argument("--dtype", choices=_DTYPES, help=help)


def dtype(arguments: argparse.Namespace) -> torch.dtype | None:
    """What --dtype says; None where it is not given."""
    import torch

    return getattr(torch, _DTYPES[arguments.dtype]) if arguments.dtype else None
