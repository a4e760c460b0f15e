"""FSDP2: `fully_shard` on each transformer block and on the root; parameters are DTensors sharded by rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from shardopt.engines.base import DTYPES, Config, DtypeName, EngineInputs, ModuleEngine, compute_dtype, replicated_mesh
from shardopt.engines.held_gradients import fsdp_groups
from shardopt.engines.state import ModuleState
from shardopt.errors import InputError


@dataclass(frozen=True)
class FsdpConfig(Config):
    """torch's FSDP2: weights, gradients and optimizer state are all sharded."""

    name: Literal["fsdp"] = "fsdp"
    replicate: int = 1
    """Groups of ranks that hold the same shards (HSDP); the ranks are cut into this many. 1 is plain FSDP."""
    reshard_after_forward: bool = True
    """Free the gathered weights of a block after its forward and gather them again in backward: less memory."""
    compute_dtype: DtypeName = "auto"
    """Forward and backward; "auto" is bf16 on a GPU, fp32 on the CPU. The sharded weights keep their own."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Gradients on the wire."""
    reduce_every: Literal["micro_batch", "step"] = "micro_batch"
    """Reduce the gradients of every micro-batch into this rank's shards (with `replicate`, what can wait for the last
    one waits); or keep them whole on every rank and reduce once a step: fewer bytes sent, 4 bytes a parameter held."""


class FsdpState(ModuleState):
    """The shards of an FSDP2 module, whose gradients are whole between micro-batches where `whole_gradients`."""

    whole_gradients = False
    waits = False
    """For the all-reduce of earlier micro-batches' gradients over the replicas."""

    def drop_gradients(self) -> None:
        super().drop_gradients()
        self.waits = False

    def gradient_bytes(self) -> int:
        if not self.whole_gradients:
            return super().gradient_bytes()
        return sum(p.numel() * p.element_size() for group in self.optimizer.param_groups for p in group["params"])


class FsdpEngine(ModuleEngine):
    name = "fsdp"
    state_class = FsdpState
    state: FsdpState

    def __init__(self, config: FsdpConfig, inputs: EngineInputs) -> None:
        ranks, model = inputs.ranks, inputs.model
        mesh = replicated_mesh(ranks, config.replicate)
        compute = compute_dtype(config.compute_dtype, ranks.device, model)
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=DTYPES[config.reduce_dtype])
        for block in inputs.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=config.reshard_after_forward, mp_policy=policy)
        # The root is needed again as soon as backward starts, so it stays gathered.
        fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        inputs.initialise(model)
        self.model = model
        super().__init__(inputs, "fp32")
        self._every = config.reduce_every == "micro_batch"
        self.state.whole_gradients = not self._every
        # FSDP2 adds up in the dtype of the wire what waits for its all-reduce.
        self._defers = self._every and config.replicate > 1 and config.reduce_dtype == "fp32"

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(self._every or last)
        self.model.set_requires_all_reduce(last or (self._every and not self._defers))
        self.model.set_is_last_backward(self._every or last)
        yield
        if self._defers:
            if not last or self.state.waits:
                self._refuse_missing_gradients(last)
            self.state.waits = not last

    def _refuse_missing_gradients(self, last: bool) -> None:
        """Raise InputError naming a module of which a parameter got no gradient in one of several micro-batches.

        FSDP2 adds up the reduced gradients of a module's micro-batches as one flat tensor of those parameters that
        have one, whichever they are: other experts in the next micro-batch, and sums of different weights come out.
        """
        for name, module in self.model.named_modules():
            for group in fsdp_groups(module):
                trained = [p for p in group.fsdp_params if p.sharded_param.requires_grad]
                waiting = group._partial_reduce_output
                held = 0 if waiting is None else waiting.numel()
                expected = 0 if last else sum(p.padded_sharded_param_size.numel() for p in trained)
                if held != expected or (last and any(p.sharded_param.grad is None for p in trained)):
                    raise InputError(
                        f"engine.replicate: a parameter of {name or 'the root module'} got no gradient in a "
                        f"micro-batch: set engine.reduce_every=step, or train.micro_batch for one micro-batch a step"
                    )
