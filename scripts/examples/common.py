"""Shared by the examples: command line, optimizer, and the result as an exit status."""

import argparse
import sys

import torch

from shardopt.optim import registry

# Both schedules warm up over the whole run, as in the paper; so short a run wants a slow average of 100 steps.
SETTINGS = {"ademamix": lambda steps: {"betas": (0.9, 0.999, 0.99), "alpha_warmup": steps, "beta3_warmup": steps}}


def arguments(description: str, *, steps: int, lr: float) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--optimizer", choices=registry.names(), default="ademamix")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # networks this small lose time to every further one
    return args


def optimizer_for(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    settings = SETTINGS.get(args.optimizer, lambda steps: {})(args.steps)
    return registry.spec(args.optimizer, lr=args.lr, **settings).build(model)


def verdict(metric: str, before: float, after: float, learned: bool) -> None:
    """Print one line and leave with status 0 if it learned, else 1."""
    print(f"{metric}: {before:.4f} -> {after:.4f} ({'learned' if learned else 'did not learn'})")
    sys.exit(0 if learned else 1)
