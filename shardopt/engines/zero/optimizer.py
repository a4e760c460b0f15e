"""ZeroOptimizer: any elementwise optimizer, with its state and gradients sharded over ranks."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from shardopt.engines.base import DTYPES
from shardopt.engines.zero import groups as given
from shardopt.engines.zero.agreement import Agreement, NonFiniteGradientError
from shardopt.engines.zero.buckets import bucket_bytes, fingerprint, lay_out
from shardopt.engines.zero.flat import FlatParameters, WeightGather, needs_masters
from shardopt.engines.zero.guards import Guards
from shardopt.engines.zero.micro_batches import MicroBatches
from shardopt.engines.zero.reducer import Reducer
from shardopt.engines.zero.round import RESTING, Round, RoundState
from shardopt.engines.zero.transports import communicator
from shardopt.errors import InputError
from shardopt.optim import states
from shardopt.slices import Layout, Slice

if TYPE_CHECKING:
    from shardopt.engines.gradient_hooks import GradientHook


class ZeroOptimizer(Optimizer):
    """Shards `optimizer_class` over ranks: ZeRO stage 1 (state) or 2 (state and gradients).

    Parameters become views of flat buckets (Rajbhandari et al., arXiv 1910.02054), so do not move or replace them
    afterwards (`.to()`, `.half()`). Gradients are averaged over ranks, as DistributedDataParallel does, and live in
    this optimizer: `.grad` is None after the last micro-batch. A parameter that got no gradient on any rank is skipped.
    Ranks start from rank 0's parameters (frozen ones too) and buffers; buffers are not kept in step afterwards.

    Every method but `zero_grad` and `add_hook` is a collective: all ranks call it, in the same order. Methods are for
    the training loop, between micro-batches; inside `accumulate`, a backward, a gradient hook or `use_weight_ema` they
    raise InputError (see shardopt.engines.zero.round), except where they say otherwise. After a failure (PeerError, or
    any exception inside a micro-batch or step) all of them but `zero_grad` and `close` raise RuntimeError for good.

    Args:
        params: the model, named parameters, parameters, or parameter groups of either.
        optimizer_class: any elementwise torch optimizer; it gets a 1-D shard of every parameter, in the same groups.
            16-bit parameters have fp32 masters, unless the class looks after them (AdEMAMix's `master_weights`).
        stage: 1 keeps this rank's gradients whole over micro-batches and reduces once, 2 reduces every micro-batch
            into the owned shard and keeps nothing else.
        bucket_mb: MiB of a bucket. Stage 2 holds gradients of twice the largest bucket besides its shard (all of a
            backward, where the process has several of these optimizers). None: 25, and more from 100 ranks on,
            so that a rank's part of what is sent has 64 KiB.
        reduce_dtype: "fp32" or "bf16" on the wire; sums are fp32 anyway. Narrower gradients travel as they are.
        process_group: the ranks to shard over; None is all of them. A two-dimensional DeviceMesh (replicate, shard)
            shards over its second dimension and keeps replicas over the first.
        model: registration order, buffers and module hooks, where `params` is not the model itself.
        gradients: "own" watches autograd and reduces; "host" takes `.grad` as some host (DDP) has reduced it.
        overlap_gather: modules (transformer blocks) that are alone in using their own weights. `step` then returns
            while updated weights are in flight; the forward of each waits for its own, the model's for the rest. To
            read weights otherwise, between a step and the next forward, call `wait` first; `state_dict` and this
            class do. Needs the model. Without effect where `transport` is "memory".
        timeout: of every wait; None is the process group's own.
        **optimizer_kwargs: hyper-parameters of `optimizer_class`.

    Raises:
        InputError: a parameter or class that cannot be sharded, or ranks that were given different models.

    Example:
        >>> import torch, shardopt
        >>> model = torch.nn.Linear(4, 1)  # under torchrun, on every rank; also in one process alone
        >>> optimizer = shardopt.ZeroOptimizer(model, shardopt.AdEMAMix, lr=1e-3, alpha=5.0, state_dtype="bf16")
        >>> for i in range(2):
        ...     with optimizer.accumulate(last=i == 1):
        ...         model(torch.ones(2, 4)).square().mean().backward()
        >>> norm = optimizer.clip_grad_norm_(1.0)
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    def __init__(
        self,
        params: Any,
        optimizer_class: type[Optimizer],
        *,
        stage: Literal[1, 2] = 2,
        bucket_mb: float | None = None,
        reduce_dtype: Literal["fp32", "bf16"] = "fp32",
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        model: nn.Module | None = None,
        gradients: Literal["own", "host"] = "own",
        overlap_gather: Sequence[nn.Module] = (),
        timeout: timedelta | None = None,
        **optimizer_kwargs: Any,
    ) -> None:
        self.gradients = gradients
        self.model = params if isinstance(params, nn.Module) else model
        process_groups = given.process_groups(process_group)
        options = {"stage": stage, "bucket_mb": bucket_mb, "reduce_dtype": reduce_dtype, "gradients": gradients}
        groups, named = given.checked(
            params, self.model, optimizer_class, options, optimizer_kwargs, overlap_gather, process_groups
        )
        device = named[0][1].device
        shard_group, replica_group = process_groups
        world = dist.get_world_size(shard_group) if shard_group is not None else 1
        self._shard = communicator(shard_group, device, timeout, in_flight=len(named))
        replicate = communicator(replica_group, device, timeout)
        widest = max(p.dtype.itemsize for _, p in named)
        narrowing = min(1.0, DTYPES[reduce_dtype].itemsize / widest)
        size = bucket_bytes(bucket_mb, self._shard.depth, world, narrowing)
        self.buckets = lay_out([(n, tuple(p.shape), p.dtype) for n, p in named], world, size)
        with_masters = needs_masters(optimizer_class)
        self.flat = FlatParameters(named, self.buckets, self._shard.rank, with_masters)
        self.flat.start_alike(self.model, (replicate, self._shard))

        record_of: dict[Tensor, Any] = {p.param: p for p in self.flat.parameters}
        self.inner = optimizer_class(
            [{**options, "params": [(n, record_of[p].shard) for n, p in pairs]} for options, pairs in groups],
            **optimizer_kwargs,
        )
        self.layouts: dict[Tensor, Layout] = {p.shard: p.layout for p in self.flat.parameters}
        if not with_masters:
            for param, layout in self.layouts.items():
                self.inner.set_layout(param, layout)  # type: ignore[attr-defined]

        scale = 1.0 / (world * replicate.size)
        self.reducer = Reducer(self.flat, self._shard, replicate, DTYPES[reduce_dtype], scale, size)
        self.round = Round()
        self._place = {"fingerprint": fingerprint(self.buckets), "rank": self._shard.rank}
        self._gather = WeightGather(self.flat, self._shard, self.round)
        weakref.finalize(self, self._gather.give_up).atexit = False
        from_host = gradients == "host"
        self._micro_batches = MicroBatches(self.reducer, self._gather, stage == 1, from_host)
        self._agreement = Agreement(self.reducer, from_host)
        self._guards = Guards(self, self._micro_batches)
        self._overlaps = bool(overlap_gather) and self._shard.in_background
        if self._overlaps and self.model is not None:
            self._guards.wait_for_weights(self._gather, self.model, overlap_gather)
        super().__init__([{"params": list(self.layouts)}], self.inner.defaults)
        self._built = True

    # The groups and the state are the inner optimizer's, so that a scheduler's lr reaches it and both can be
    # replaced by loading. torch's constructor sets empty ones, which are not wanted.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self._refuse("ZeroOptimizer.param_groups cannot be replaced: change their entries, or call load_state_dict")

    @property
    def kernel(self) -> str:
        """The kernel that the inner optimizer uses; "torch" for one of torch's own."""
        return getattr(self.inner, "kernel", "torch")

    @property
    def state(self) -> Any:
        return self.inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self._refuse("ZeroOptimizer.state cannot be replaced: call load_state_dict")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the buckets are laid out at construction."""
        self._refuse("ZeroOptimizer cannot take another parameter group: give it all of them at construction")

    def _refuse(self, reason: str) -> None:
        if "_built" in self.__dict__:
            raise InputError(reason)

    def __getstate__(self) -> dict[str, Any]:
        raise InputError("a ZeroOptimizer cannot be copied or pickled: build another, and load this one's state_dict()")

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Refuse GradScaler.step, which asks this first."""
        raise InputError("GradScaler does not work with ZeroOptimizer: use torch.autocast(dtype=torch.bfloat16) alone")

    # Gradients

    def accumulate(self, last: bool = True) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch; `last` is true for a step's last one.

        Without it every backward counts as a step's last micro-batch.

        Raises:
            InputError: after `clip_grad_norm_` without a step, or inside another such block.
            PeerError: another rank failed; names the bucket and the rank.
        """
        return self._micro_batches.accumulate(last)

    @torch.no_grad()
    def _norm(self, call: str) -> float:
        self.round.require(call, *RESTING)
        if self.round.state is not RoundState.REDUCED:
            behind = not self.reducer.rounds or not self.reducer.idle or self.round.unsent
            if self.gradients == "own" and behind:
                self._micro_batches.finish()
            with self.round.during(RoundState.REDUCING, then=RoundState.REDUCED):
                self.round.norm = self._agreement.norm(self._guards.refuse_untrained, self.param_groups)
                self.round.clip = 1.0
        else:
            self._agreement.refuse_changed()
        return self.round.norm

    def clip_grad_norm_(self, max_norm: float | None) -> float:
        """The L2 norm of the whole gradient, the same double on every rank; scaled down to `max_norm` above it.

        A norm that is not finite leaves the gradients alone. None only measures. `step` or `zero_grad` comes next.
        """
        norm = self._norm("clip_grad_norm_()")
        if max_norm is not None and max_norm < norm < math.inf:
            self.round.clip *= max_norm / norm
            self.round.norm = max_norm
        return norm

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update this rank's shard and all-gather the new weights.

        Consumes the gradients: what comes next replaces them, whether or not `zero_grad` is called.

        Raises:
            NonFiniteGradientError: on every rank alike, with no weight or state changed and the gradients dropped.
            PeerError: another rank failed.
        """
        self.round.require("step()", *RESTING)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not math.isfinite(self._norm("step()")):
            explanation = self._agreement.explain()
            self.reducer.clear()
            self.round.drop()
            raise NonFiniteGradientError(explanation)
        with self.round.during(RoundState.STEPPING, then=RoundState.GATHERING):
            self.wait()
            self.flat.verify()
            self.flat.refresh_masters(self.inner.state)
            if self.round.clip != 1.0:
                torch._foreach_mul_(self.flat.gradients, self.round.clip)
            if not self.inner.state:  # the same on all ranks, whatever each sees of its own shards
                states.init_state(self.inner)
            for p, has_gradient in zip(self.flat.parameters, self._agreement.has_gradient, strict=True):
                p.shard.grad = p.gradient if has_gradient else None
            # Past torch's wrapper, which would call the global step hooks a second time.
            for hook in self.inner._optimizer_step_pre_hooks.values():
                hook(self.inner, (), {})
            type(self.inner).step.__wrapped__(self.inner)  # type: ignore[attr-defined]
            for hook in self.inner._optimizer_step_post_hooks.values():
                hook(self.inner, (), {})
            self.flat.store_masters()
            for p in self.flat.parameters:
                p.shard.grad = None
            self.reducer.clear()
            # A backward of an earlier forward raises, as with torch's optimizers.
            torch.autograd.graph.increment_version([p.param for p in self.flat.parameters])
            self._gather.start()
        if not self._overlaps:
            self.wait()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, reduced and not. Not inside a backward, nor inside `accumulate` after one."""
        if self.round.state is not RoundState.FAILED:
            self.round.require("zero_grad()", *RESTING, RoundState.ACCUMULATING)
            if self.round.begun or not self.reducer.idle:
                self.round.require("zero_grad()", *RESTING)
            if not self.reducer.idle:
                self._micro_batches.finish()
        self.reducer.skip()
        self.round.drop()
        self.flat.drop_gradients()

    # The weights

    def wait(self) -> None:
        """Wait for updated weights that are in flight. In any state.

        Raises:
            PeerError: another rank failed.
        """
        self._gather.wait()

    @contextmanager
    def use_weight_ema(self) -> Iterator[None]:
        """The inner optimizer's averaged weights in the model, on every rank, until the block is left.

        Only `wait` and `slices` may be called inside; the weights are then the averaged ones.

        Raises:
            InputError: the inner optimizer keeps no average.
        """
        self._ready("use_weight_ema()")
        if not hasattr(self.inner, "use_weight_ema"):
            raise InputError(f"{type(self.inner).__name__} keeps no average of the weights")
        before = self.round.state
        try:
            with self.inner.use_weight_ema():
                self._gather.start()
                self._gather.wait()
                self.round.state = RoundState.AVERAGED
                yield
        finally:
            if self.round.state is not RoundState.FAILED:
                self.round.state = before
                self._gather.start()  # also after an exception, which the other ranks may not have seen
                self._gather.wait()

    # State

    def _ready(self, call: str, *also: RoundState) -> None:
        """In a resting state: with all weights there, and masters that are theirs."""
        self.round.require(call, *RESTING, *also)
        self.wait()
        if self.round.state is not RoundState.AVERAGED:
            self.flat.refresh_masters(self.inner.state)

    def init_state(self) -> None:
        """Create the optimizer's state without counting a step."""
        self._ready("init_state()")
        states.init_state(self.inner)

    def weight_slices(self) -> list[Slice]:
        """Whole weights, and this rank's shards of their masters: the live tensors."""
        self._ready("slices()", RoundState.AVERAGED)
        return self.flat.slices()

    def slices(self) -> list[Slice]:
        """As `weight_slices`, and this rank's shards of the state."""
        return self.weight_slices() + states.state_slices(self.inner, self.layouts)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state_dict over this rank's shards alone; `slices()` suits any world size."""
        self._ready("state_dict()")
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict = {**self.inner.state_dict(), "zero": self._place, "masters": dict(self.flat.masters)}
        return self._passed_through(self._optimizer_state_dict_post_hooks, state_dict)

    def _passed_through(self, hooks: Mapping[int, Callable[..., Any]], state_dict: dict[str, Any]) -> dict[str, Any]:
        for hook in hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned on the same rank of the same layout.

        Raises:
            InputError: it came from another rank or layout.
        """
        self._ready("load_state_dict()")
        saved = dict(self._passed_through(self._optimizer_load_state_dict_pre_hooks, dict(state_dict)))
        place, masters = saved.pop("zero", None), saved.pop("masters", {})
        if place != self._place or masters.keys() != self.flat.masters.keys():
            raise InputError("this state_dict is of another rank, world size or bucket_mb: use a checkpoint of slices")
        self.inner.load_state_dict(saved)
        for index, master in masters.items():
            self.flat.masters[index].copy_(master)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def gradient_bytes(self) -> int:
        """Bytes of gradients held now: the owned shards, and any whole ones."""
        whole = sum(p.param.grad.nbytes for p in self.flat.parameters if p.param.grad is not None)
        return whole + sum(g.nbytes for g in self.flat.gradients)

    @property
    def wire_bytes(self) -> dict[str, int]:
        """Bytes that this rank has sent since construction, by leg."""
        return {"reduce": self._shard.reduce_bytes, "gather": self._shard.gather_bytes}

    @property
    def transport(self) -> str:
        """Transport of gradients and weights: "native", or on gloo "memory" (within a machine) or "sockets"."""
        return self._shard.name

    def add_hook(self, hook: GradientHook) -> None:
        """Run `hook` on gradients before they are sent and after they are reduced: what gradient_hooks.attach calls."""
        self.round.require("add_hook()", *RESTING)
        self.reducer.hooks.append(hook)

    def close(self) -> None:
        """Take the hooks off the model. The parameters stay where they are. In any state."""
        self._gather.give_up()
        self._guards.remove()
        self._micro_batches.close()
