"""The optimizers that a host (accelerate, HF Trainer) steps, one class for each way in which it spreads a model.

Hosts that save rank 0's `state_dict()` alone would lose the other ranks' state. So the classes for those (all but
FSDP2's) put plain data into it, and the state itself is saved from every rank with `checkpoint.save`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardopt import checkpoint
from shardopt.engines.deepspeed.state import DeepspeedState
from shardopt.engines.state import ModuleState, ShardedState, refuse_steps
from shardopt.engines.zero import ZeroOptimizer, ZeroState
from shardopt.errors import InputError
from shardopt.optim.ademamix import AdEMAMix

_POINTER = "shardopt"


def _step(state: Mapping[Any, Mapping[str, Any]]) -> int:
    return max((int(entry["step"]) for entry in state.values() if "step" in entry), default=0)


class _BesideSlices:
    """An optimizer that a state_dict with slices beside it can be loaded into."""

    param_groups: list[dict[str, Any]]
    state: Any
    slices_at: Path | None = None
    """The checkpoint that goes with the next state_dict to be loaded, which then brings the state by itself."""

    def _load_slices(self, state_dict: Mapping[str, Any]) -> None:
        """Load what lies beside `state_dict`; where nothing does, and it only stands for a state, refuse to step."""
        assert isinstance(self, torch.optim.Optimizer)
        folder, self.slices_at = self.slices_at, None
        pointer = state_dict.get(_POINTER)
        step = _step(state_dict["state"]) if pointer is None else pointer["step"]
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if "initial_lr" in group and "initial_lr" in saved:  # a scheduler's own file does not bring it
                group["lr"] = saved["lr"]
        if folder is not None:
            checkpoint.load(folder, self.sharded_state())  # type: ignore[attr-defined]
            if (loaded := _step(self.state)) != step:
                mixed = f"{folder} is of step {loaded}, and the files beside it are of step {step}: load another"
                refuse_steps(self, mixed)
                raise InputError(mixed)
        elif pointer is not None and step > 0:
            refuse_steps(
                self,
                "the optimizer's state has not been loaded, only the file that stands for it: call "
                "shardopt.checkpoint.load(folder, sharded_state(optimizer)) on every rank",
            )


class _Pointing(_BesideSlices):
    """An optimizer whose state_dict is plain data, since its state is saved from every rank elsewhere.

    After such a state_dict has been loaded the optimizer will not step until `checkpoint.load` has brought the state.
    """

    def state_dict(self) -> dict[str, Any]:
        """The step count and the groups' hyper-parameters; no tensor."""
        groups, at = [], 0
        for group in self.param_groups:
            numbers = list(range(at, at + len(group["params"])))
            lr: dict[str, Any] = {key: float(group[key]) for key in ("lr", "initial_lr") if key in group}
            groups.append({**group, **lr, "params": numbers})
            at += len(numbers)
        return {"state": {}, "param_groups": groups, _POINTER: {"step": _step(self.state)}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse to step until the state comes; hyper-parameters are the program's, but for a scheduler's lr.

        Raises:
            InputError: another optimizer's state, or one of another step than the slices beside it.
        """
        if _POINTER not in state_dict and self.slices_at is None:
            raise InputError(
                "this optimizer state was not saved by shardopt: start a new run from the checkpoint's weights, or "
                "resume with the optimizer that wrote it"
            )
        self._load_slices(state_dict)


class HostedAdEMAMix(_BesideSlices, AdEMAMix):
    """AdEMAMix on the module's own parameters, in one process or under FSDP2, which saves every rank's shards itself.

    As in all classes here, `groups` have (name, parameter) pairs, and `model` is the module before it is wrapped.
    """

    def __init__(self, groups: list[dict[str, Any]], model: nn.Module, **kwargs: Any) -> None:
        super().__init__(groups, **kwargs)
        self._model = model

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load this class's own state, or what DDP's ranks saved, with the slices beside it."""
        if _POINTER not in state_dict:
            super().load_state_dict(dict(state_dict))
        self._load_slices(state_dict)

    def sharded_state(self) -> ShardedState:
        """The trained weights and the optimizer state that this process holds, once the host has placed them."""
        return ModuleState(self, self._model, trained_only=True)


class FileAdEMAMix(_Pointing, HostedAdEMAMix):
    """AdEMAMix for one process, whose checkpoints more processes can read."""


class ZeroAdEMAMix(_Pointing, ZeroOptimizer):
    """AdEMAMix with its state cut over the ranks of DistributedDataParallel, which has reduced the gradients.

    The model is on its device already.
    """

    def __init__(self, groups: list[dict[str, Any]], model: nn.Module, **kwargs: Any) -> None:
        super().__init__(groups, AdEMAMix, stage=1, gradients="host", model=model, **kwargs)
        self._settled = False

    @torch.no_grad()
    def settle(self) -> None:
        """Make the parameters views of the buckets again, if the host has copied them since construction.

        accelerate moves a model to "cpu:0", which copies what is on "cpu". Before the first step only: whoever
        replaces parameters later is refused.
        """
        if self._settled:
            return
        self._settled = True
        self.flat.reattach()

    def sharded_state(self) -> ShardedState:
        self.settle()
        return ZeroState(self, trained_only=True)

    def step(self, closure: Any = None) -> Any:
        """As AdEMAMix, and all-gather the new weights. A collective."""
        self.settle()
        return super().step(closure)


class DeepspeedAdEMAMix(_Pointing, AdEMAMix):
    """AdEMAMix as DeepSpeed's client optimizer, which learns at its first step what the flat partitions hold.

    The `prepare` of `accelerator` will make the DeepSpeed engine.
    """

    def __init__(self, groups: list[dict[str, Any]], model: nn.Module, accelerator: Any, **kwargs: Any) -> None:
        super().__init__(groups, **kwargs)
        self._made_from: Any = (accelerator, model)
        self._sharded: DeepspeedState | None = None

    def sharded_state(self) -> ShardedState:
        """See HostedAdEMAMix.

        Raises:
            InputError: `prepare` has not been called, or the partitions cannot be found.
        """
        if self._sharded is None:
            accelerator, model = self._made_from
            if (wrapped := accelerator.deepspeed_engine_wrapped) is None:
                raise InputError("accelerator.prepare(model, optimizer) has not been called on this optimizer")
            self._sharded = DeepspeedState(wrapped.engine, self, model, trained_only=True)
            self._made_from = None
        return self._sharded

    def step(self, closure: Any = None) -> Any:
        """As AdEMAMix. Not a collective: DeepSpeed has reduced the gradients and all-gathers the weights."""
        self.sharded_state()
        return super().step(closure)
