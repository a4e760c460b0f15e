"""ZeroOptimizer: any elementwise optimizer, with its state and gradients sharded over ranks."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from shardopt.engines.zero.buckets import Bucket, fingerprint, lay_out
from shardopt.engines.zero.reducer import Reducer
from shardopt.engines.zero.transports import PeerError, communicator
from shardopt.errors import InputError
from shardopt.optim import states
from shardopt.slices import Layout, Slice, canonical_name, named_parameters

if TYPE_CHECKING:
    from shardopt.engines.gradient_hooks import GradientHook

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class NonFiniteGradientError(ArithmeticError):
    """A gradient is infinite or NaN. Raised on every rank, before any of them has changed anything."""


class _Hook:
    """A method as a hook of the model, which must not keep the optimizer alive; in a copy of the model it is idle."""

    def __init__(self, method: Callable[..., None], *args: Any) -> None:
        self.method, self.args = weakref.WeakMethod(method), args

    def __call__(self, *_: Any) -> None:
        if (method := self.method()) is not None:
            method(*self.args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _IdleHook, ()


class _IdleHook:
    def __call__(self, *_: Any) -> None:
        pass


class _ZeroGrad:
    """A model's `zero_grad` that also drops what its ZeroOptimizer has taken; a copy of the model has the plain one."""

    def __init__(self, model: nn.Module, optimizer: ZeroOptimizer) -> None:
        self.model, self.optimizer = weakref.ref(model), weakref.ref(optimizer)
        model.zero_grad = self  # type: ignore[method-assign]

    def __call__(self, set_to_none: bool = True) -> None:
        model, optimizer = self.model(), self.optimizer()
        assert model is not None
        type(model).zero_grad(model, set_to_none)
        if optimizer is not None:
            optimizer.zero_grad()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.model(), "zero_grad")  # a copy has its class's, until its own attributes are set

    def remove(self) -> None:
        model = self.model()
        if model is not None and model.__dict__.get("zero_grad") is self:
            del model.zero_grad


class ZeroOptimizer(Optimizer):
    """Shards `optimizer_class` over ranks: ZeRO stage 1 (state) or 2 (state and gradients).

        optimizer = ZeroOptimizer(model, AdEMAMix, stage=2, lr=1e-3, alpha=5.0, state_dtype="bf16")
        for i, micro in enumerate(batches):
            with optimizer.accumulate(last=i == len(batches) - 1):
                loss(model(micro)).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    Parameters become views of flat buckets (Rajbhandari et al., arXiv 1910.02054), so do not move or replace
    them afterwards (`.to()`, `.half()`). Gradients are averaged over ranks, as DistributedDataParallel does, and
    live in this optimizer: `.grad` is None after the last micro-batch. A parameter that got no gradient on any
    rank is skipped. Ranks start from rank 0's parameters (frozen ones too) and buffers; buffers are not kept in
    step afterwards.

    Every method but `zero_grad` and `add_hook` is a collective: all ranks call it, in the same order.

    Args:
        params: the model, named parameters, parameters, or parameter groups of either.
        optimizer_class: any elementwise torch optimizer; it gets a 1-D slice of every parameter, in the same
            groups. bf16 and fp16 parameters have fp32 master slices here, unless the class looks after them
            itself (AdEMAMix's `master_weights`).
        stage: 1 keeps this rank's gradients whole over micro-batches and reduces once, 2 reduces every
            micro-batch into the owned slice and keeps nothing else.
        bucket_mb: MiB of a bucket. Stage 2 holds gradients of twice the largest bucket besides its slice.
        reduce_dtype: "fp32" or "bf16" on the wire; sums are fp32 anyway. Narrower gradients travel as they are.
        process_group: the ranks to shard over; None is all of them. A two-dimensional DeviceMesh
            (replicate, shard) shards over its second dimension and keeps replicas over the first.
        model: registration order, buffers and module hooks, where `params` is not the model itself.
        gradients: "own" watches autograd and reduces; "host" takes `.grad` as some host (DDP) has already reduced
            it; "delivered" reduces what `deliver` is given (see shardopt.engines.gradient_hooks.reduce_scatter_into).
        overlap_gather: modules (transformer blocks) that are alone in using their own weights. `step` then returns
            while updated weights are on their way; the forward of each waits for its own, the model's for the
            rest. To read weights otherwise, between a step and the next forward, call `wait` first;
            `state_dict` and this class do. Needs the model. Without effect where `transport` is "memory".
        timeout: of every wait; None is the process group's own.
        **optimizer_kwargs: hyper-parameters of `optimizer_class`.

    Raises:
        InputError: a parameter or class that cannot be sharded, or ranks that were given different models.
    """

    def __init__(
        self,
        params: Any,
        optimizer_class: type[Optimizer],
        *,
        stage: Literal[1, 2] = 2,
        bucket_mb: float = 25,
        reduce_dtype: Literal["fp32", "bf16"] = "fp32",
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        model: nn.Module | None = None,
        gradients: Literal["own", "host", "delivered"] = "own",
        overlap_gather: Sequence[nn.Module] = (),
        timeout: timedelta | None = None,
        **optimizer_kwargs: Any,
    ) -> None:
        check_settings("", stage=stage, bucket_mb=bucket_mb, reduce_dtype=reduce_dtype)
        if gradients not in ("own", "host", "delivered"):
            raise InputError(f"gradients must be 'own', 'host' or 'delivered', got {gradients!r}")
        if gradients == "host" and stage == 2:
            raise InputError("gradients='host' needs stage=1: the host keeps whole gradients on every rank")
        self.stage, self.gradients, self.timeout = stage, gradients, timeout
        self.model = params if isinstance(params, nn.Module) else model
        groups = _named_groups(params)
        self._named = _in_order(groups, self.model)
        refuse_unless_elementwise(optimizer_class, optimizer_kwargs)
        device = self._named[0][1].device

        shard, replicate = _groups(process_group)
        world = dist.get_world_size(shard) if shard is not None else 1
        self.buckets = lay_out([(n, tuple(p.shape), p.dtype) for n, p in self._named], world, bucket_mb * 2**20)
        self._shard = communicator(shard, device, timeout, in_flight=len(self.buckets))
        self._replicate = communicator(replicate, device, timeout)
        settings = [optimizer_class.__name__, stage, reduce_dtype, gradients, _plain(optimizer_kwargs)]
        self._agree_on_layout(device, settings + [_plain(options) for options, _ in groups])
        self._flats = [self._flatten(b) for b in self.buckets]
        self._start_alike()

        self._members = {m.index: (b, m) for b in self.buckets for m in b.members}
        self._makes_masters = not hasattr(optimizer_class, "set_layout")
        self._masters: dict[int, Tensor] = {}
        self._slices: list[nn.Parameter] = []
        self._layouts: list[Layout] = []
        for index in range(len(self._named)):
            self._slices.append(self._slice(index))
        self._index_of: dict[Tensor, int] = {param: i for i, (_, param) in enumerate(self._named)}
        self.inner = optimizer_class(
            [
                {**group, "params": [(name, self._slices[self._index_of[p]]) for name, p in pairs]}
                for group, pairs in groups
            ],
            **optimizer_kwargs,
        )
        self.explicit_layouts: dict[Tensor, states.Layouts] = dict(zip(self._slices, self._layouts, strict=True))
        if not self._makes_masters:
            for param, layout in self.explicit_layouts.items():
                self.inner.set_layout(param, layout)  # type: ignore[attr-defined]

        average = 1.0 / (world * self._replicate.size)
        self.reducer = Reducer(self.buckets, [p for _, p in self._named], self._shard, _DTYPES[reduce_dtype], average)
        self._handles: list[Any] = []
        if gradients == "own":
            for index, (_, param) in enumerate(self._named):
                self._handles.append(param.register_post_accumulate_grad_hook(_Hook(self._on_gradient, index)))
        self._context: bool | None = None  # the running accumulate's `last`
        self._callback_queued = False
        self._norm: float | None = None  # agreed by all ranks on the gradients held now
        self._clip = 1.0  # what the gradients held now are still to be multiplied by
        self._failure: BaseException | None = None
        self._gathers: dict[int, Callable[[], None]] = {}  # by bucket
        # The embedding, first in forward, is registered first and lies in the last bucket.
        self._gather_order = list(range(len(self.buckets)))[::-1]
        self.overlap_gather = bool(overlap_gather)
        if self.model is not None:
            self._guard(self.model, overlap_gather)
        elif overlap_gather:
            raise InputError("overlap_gather needs the model: give model=")
        super().__init__([{"params": self._slices}], self.inner.defaults)

    # The groups and the state are the inner optimizer's, so that a scheduler's lr reaches it and both can be
    # replaced by loading. torch's constructor sets empty ones, which are not wanted.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        pass

    @property
    def state(self) -> Any:
        return self.inner.state

    @state.setter
    def state(self, value: Any) -> None:
        pass

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the buckets are laid out at construction."""
        if [id(p) for p in param_group["params"]] != [id(p) for p in self._slices]:
            raise InputError("ZeroOptimizer cannot take another parameter group: give it all of them at construction")

    # Construction

    def _agree_on_layout(self, device: torch.device, settings: list[Any]) -> None:
        if device.type == "meta":  # simulated ranks do not answer
            return
        mark = float(fingerprint(self.buckets, repr(settings)))
        for comm in (self._shard, self._replicate):
            total = comm.sum(torch.tensor([mark], dtype=torch.float64, device=device))
            if total.item() != mark * comm.size:
                raise InputError(
                    "the ranks were given different parameters or settings: build the same model, with the same "
                    "frozen parameters, groups, hyper-parameters and stage, on every rank"
                )

    @torch.no_grad()
    def _flatten(self, bucket: Bucket) -> Tensor:
        flat = torch.zeros(bucket.numel, dtype=bucket.dtype, device=self._named[0][1].device)
        for m in bucket.members:
            param = self._named[m.index][1]
            view = flat[m.offset : m.offset + m.numel].view(m.shape)
            view.copy_(param)
            param.data = view
        return flat

    @torch.no_grad()
    def _start_alike(self) -> None:
        if self._flats[0].is_meta:
            return
        rest: list[Tensor] = []
        if self.model is not None:
            trained = {param for _, param in self._named}
            rest = [p.data for p in self.model.parameters() if p not in trained] + list(self.model.buffers())
        for comm in (self._replicate, self._shard):
            if comm.size > 1:
                for tensor in (*self._flats, *rest):
                    dist.broadcast(tensor, group=comm.group, group_src=0)

    def _slice(self, index: int) -> nn.Parameter:
        bucket, member = self._members[index]
        layout, at = bucket.owned(member, self._shard.rank)
        own = self._own(bucket)[at : at + layout.local_numel]
        self._layouts.append(layout)
        wide = torch.promote_types(bucket.dtype, torch.float32)
        if self._makes_masters and wide != bucket.dtype:
            if bucket.index not in self._masters:
                self._masters[bucket.index] = self._own(bucket).to(wide)
            own = self._masters[bucket.index][at : at + layout.local_numel]
        param = nn.Parameter(own)
        if param.dtype != wide:
            param.grad_dtype = wide
        return param

    def _own(self, bucket: Bucket) -> Tensor:
        """This rank's part of the weights."""
        return self._flats[bucket.index][self._shard.rank * bucket.part : (self._shard.rank + 1) * bucket.part]

    # Gradients

    def _on_gradient(self, index: int) -> None:
        if self._context is None and not self._callback_queued:
            self._may_reduce()
            self._callback_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
        if self._reduces:
            self._ready(index)

    def _ready(self, index: int, gradient: Tensor | None = None) -> None:
        try:
            self.reducer.ready(index, gradient)
        except BaseException as error:
            self._failure = error
            raise

    def deliver(self, param: Tensor, gradient: Tensor) -> None:
        """Take one micro-batch's gradient of `param` from a host; every rank delivers every parameter.

        `gradient` must not change until the last of the micro-batch's gradients has been delivered.
        """
        self._may_reduce()
        self._ready(self._index_of[param], gradient)
        if self.reducer.all_sent:
            self._finish_round()

    @property
    def _reduces(self) -> bool:
        return self.stage == 2 or self._context is not False

    def _end_of_backward(self) -> None:
        self._callback_queued = False
        self._finish_round()

    def _finish_round(self) -> None:
        self._norm = None
        try:
            self._verify()
            self.reducer.finish_round()
        except BaseException as error:
            self._failure = error
            raise

    @contextmanager
    def accumulate(self, last: bool = True) -> Iterator[None]:
        """Around forward and backward of one micro-batch; `last` is true for a step's last one.

        Without it every backward counts as a step's last micro-batch.

        Raises:
            PeerError: another rank failed; names the bucket and the rank.
        """
        self._may_reduce()
        if self._context is not None:
            raise InputError("optimizer.accumulate() does not nest")
        self._context = last
        try:
            yield
        except BaseException as error:
            # The other ranks wait for buckets that this one will never send.
            self._failure = error
            raise
        finally:
            self._context = None
        self._context = last
        try:
            if self._reduces and self.gradients == "own":
                self._finish_round()
        finally:
            self._context = None

    @torch.no_grad()
    def _agree(self) -> float:
        """The norm of the reduced gradient (after averaging), and which parameters have one anywhere."""
        self._usable()
        if self._norm is not None:
            return self._norm
        reducer = self.reducer
        try:
            if self.gradients == "host":
                self._take_from_host()
            elif not reducer.rounds or not reducer.idle:
                self._finish_round()
            fresh = self.gradients != "host"
            if self._replicate.size > 1:
                for storage in reducer.storage.values():
                    self._replicate.sum(storage)
                fresh = False
            self._clip = 1.0
            if reducer.hooks:
                for bucket in self.buckets:
                    for hook in reducer.hooks:
                        hook.after_reduce(bucket.index, reducer.reduced[bucket.index])
                fresh = False
            norms = reducer.norms if fresh else [torch.linalg.vector_norm(r) for r in reducer.reduced]
            square = torch.stack([n.double() for n in norms if n is not None]).square().sum()
            if not math.isfinite(square.item()):  # or the squares alone overflowed
                wide = [torch.linalg.vector_norm(r, dtype=torch.float64) for r in reducer.reduced]
                square = torch.stack(wide).square().sum()
            present = torch.tensor(reducer.present, dtype=torch.float64, device=square.device)
            # Replicas hold the same slices: each contributes an equal share of the norm.
            agreed = torch.cat([(square / self._replicate.size).reshape(1), present])
            self._shard.sum(agreed)
            self._replicate.sum(agreed)
            values = agreed.tolist()
        except BaseException as error:
            self._failure = error
            raise
        self._has_gradient = [count > 0 for count in values[1:]]
        self._norm = math.sqrt(values[0]) if values[0] >= 0 else math.nan
        return self._norm

    def _take_from_host(self) -> None:
        """Copy the owned ranges out of gradients that a host has reduced."""
        reducer = self.reducer
        reducer.clear()
        for index, (_, param) in enumerate(self._named):
            bucket, member = self._members[index]
            layout, at = bucket.owned(member, self._shard.rank)
            target = reducer.reduced[bucket.index][at : at + layout.local_numel]
            if param.grad is None:
                target.zero_()
            else:
                reducer.present[index] = True
                layout.copy_from_whole(target, param.grad)
        reducer.rounds = 1

    def clip_grad_norm_(self, max_norm: float | None) -> float:
        """The L2 norm of the whole gradient, the same double on every rank; scaled down to `max_norm` above it.

        A norm that is not finite leaves the gradients alone. None only measures.
        """
        norm = self._agree()
        if max_norm is not None and max_norm < norm < math.inf:
            self._clip *= max_norm / norm
            self._norm = max_norm
        return norm

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update this rank's slice and hand the new weights round.

        Consumes the gradients that were reduced: what comes next replaces them, whether or not `zero_grad` is
        called, since a model's own `zero_grad` cannot reach them.

        Raises:
            NonFiniteGradientError: on every rank alike, with no weight or state changed and the gradients dropped.
            PeerError: another rank failed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        norm = self._agree()
        if not math.isfinite(norm):
            explanation = self._explain()
            self._consume()
            raise NonFiniteGradientError(explanation)
        self.wait()
        try:
            self._verify()
            if self._clip != 1.0:
                for storage in self.reducer.storage.values():
                    storage.mul_(self._clip)
            if not self.inner.state:
                # Not left to the first step: what a rank sees of its own slices (lr = 0, zero gradients) must not
                # decide whether that step counts.
                self.init_state()
            for index, param in enumerate(self._slices):
                param.grad = self._slice_gradient(index) if self._has_gradient[index] else None
            self.inner.step()
            for bucket_index, master in self._masters.items():
                self._own(self.buckets[bucket_index]).copy_(master)
            for param in self._slices:
                param.grad = None
            self._consume()
            self._gather()
            if not (self.overlap_gather and self._shard.in_background):
                self.wait()
        except BaseException as error:
            self._failure = error
            raise
        return loss

    def _slice_gradient(self, index: int) -> Tensor:
        bucket, member = self._members[index]
        layout, at = bucket.owned(member, self._shard.rank)
        return self.reducer.reduced[bucket.index][at : at + layout.local_numel]

    def _explain(self) -> str:
        """Which parameters and ranks brought what is not finite, told by everyone to everyone."""
        found = []
        blame = dict(self.reducer.blame)
        for index, (name, _) in enumerate(self._named):
            if self._has_gradient[index] and not self._slice_gradient(index).isfinite().all():
                found.append((name, self._members[index][0].index))
        mine = [(name, bucket, blame.get(bucket, [])) for name, bucket in found]
        reports: list[Any] = [mine]
        if self._shard.size > 1:
            reports = [None] * self._shard.size
            dist.all_gather_object(reports, mine, group=self._shard.group)
        lines = sorted({(b, n, tuple(r)) for report in reports for n, b, r in report})
        shown = [
            f"{name} (bucket {bucket}{', from rank ' + ' and '.join(map(str, ranks)) if ranks else ''})"
            for bucket, name, ranks in lines[:3]
        ]
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        return f"the gradient is not finite in {', '.join(shown)}{more}; no rank has taken the step"

    def _consume(self) -> None:
        self.reducer.clear()
        self._norm = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, reduced and not."""
        self._consume()
        for _, param in self._named:
            param.grad = None

    # Reading the weights

    def wait(self, buckets: Iterable[int] | None = None) -> None:
        """Wait for updated weights that are on their way, all of them or those of some buckets."""
        for index in list(self._gathers) if buckets is None else buckets:
            finish = self._gathers.pop(index, None)
            if finish is None:
                continue
            try:
                finish()
            except PeerError as error:
                self._failure = PeerError(f"updated weights of {self.buckets[index]}: {error}")
                raise self._failure from error

    def _guard(self, model: nn.Module, overlapped: Sequence[nn.Module]) -> None:
        """Make what reads or replaces the weights by way of the module wait for them."""
        self._handles.append(model.register_state_dict_pre_hook(_Hook(self.wait)))
        self._handles.append(model.register_load_state_dict_pre_hook(_Hook(self.wait)))
        self._handles.append(model.register_load_state_dict_post_hook(_Hook(self.refresh_masters)))
        self._handles.append(_ZeroGrad(model, self))
        if not overlapped:
            return
        bucket_of: dict[Tensor, int] = {p: self._members[i][0].index for i, (_, p) in enumerate(self._named)}

        def buckets_of(params: Iterable[Tensor]) -> list[int]:
            return sorted({bucket_of[p] for p in params if p in bucket_of}, reverse=True)

        covered = {m for module in overlapped for m in module.modules()}
        others = [m for m in model.modules() if m not in covered]
        needs = [(model, buckets_of(p for m in others for p in m.parameters(recurse=False)))]
        needs += [(m, buckets_of(m.parameters())) for m in overlapped]
        self._gather_order = list(dict.fromkeys(b for _, buckets in needs for b in buckets))
        # Also by itself, where a part of the model is called and not the whole.
        needs += [(m, buckets_of(m.parameters(recurse=False))) for m in others if m is not model]
        for module, buckets in needs:
            if buckets:
                self._handles.append(module.register_forward_pre_hook(_Hook(self.wait, buckets)))

    @torch.no_grad()
    def refresh_masters(self) -> None:
        """Take the fp32 master slices from the weights, after something else has set the weights."""
        for index, master in self._masters.items():
            master.copy_(self._own(self.buckets[index]))

    # State

    def init_state(self) -> None:
        """Create the optimizer's state without counting a step."""
        states.init_state(self.inner)

    def slices(self) -> list[Slice]:
        """Whole weights, and this rank's slices of masters and state: the live tensors."""
        self._usable()
        self.wait()
        held = [Slice(n, "weight", Layout.whole(n, p.shape), (p.detach(),)) for n, p in self._named]
        for index, layout in enumerate(self._layouts):
            if self._members[index][0].index in self._masters:
                held.append(Slice(layout.name, "master", layout, (self._slices[index].detach(),)))
        return held + states.state_slices(self.inner, self.explicit_layouts)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state_dict over this rank's slices, and which slices they are.

        Every rank has its own; to change the world size, save `slices()` instead.
        """
        self._usable()
        self.wait()
        place = {"fingerprint": fingerprint(self.buckets), "rank": self._shard.rank}
        return {**self.inner.state_dict(), "zero": place, "masters": dict(self._masters)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned on the same rank of the same layout.

        Raises:
            InputError: it came from another rank or layout.
        """
        given = dict(state_dict)
        place, masters = given.pop("zero", None), given.pop("masters", {})
        if place != {"fingerprint": fingerprint(self.buckets), "rank": self._shard.rank}:
            raise InputError(
                "this state_dict was made on another rank, world size or bucket_mb: load the same layout, or use "
                "a checkpoint of slices"
            )
        self.inner.load_state_dict(given)
        for index, master in masters.items():
            self._masters[index].copy_(master)

    @property
    def kernel(self) -> str:
        """The inner optimizer's kernel; "torch" for one that does not say."""
        return getattr(self.inner, "kernel", "torch")

    @contextmanager
    def use_weight_ema(self) -> Iterator[None]:
        """The inner optimizer's averaged weights in the model, on every rank, until the block is left."""
        self._usable()
        self.wait()
        with self.inner.use_weight_ema():  # type: ignore[attr-defined]
            self._gather()
            self.wait()
            yield
        self._gather()
        self.wait()

    def _gather(self) -> None:
        for index in self._gather_order:
            self._gathers[index] = self._shard.all_gather(self._flats[index])

    def gradient_bytes(self) -> int:
        """Bytes of gradients held now: the owned slices, and any whole ones."""
        whole = sum(p.grad.nbytes for _, p in self._named if p.grad is not None)
        return whole + sum(s.nbytes for s in self.reducer.storage.values())

    @property
    def wire_bytes(self) -> dict[str, int]:
        """Bytes that this rank has sent since construction, by leg."""
        return {"reduce": self._shard.reduce_bytes, "gather": self._shard.gather_bytes}

    @property
    def trained(self) -> set[Tensor]:
        """The model's parameters that this optimizer updates."""
        return set(self._index_of)

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """The ranks over which state and gradients are cut; None for one process alone."""
        return self._shard.group

    @property
    def transport(self) -> str:
        """How gradients and weights travel: "native" collectives of the backend, or, where that is gloo, "memory"
        between the ranks of one host that may read each other's, else "sockets"."""
        return self._shard.name

    def add_hook(self, hook: GradientHook) -> None:
        """Let `hook` change gradients before they are sent and after they are reduced; on every rank alike."""
        self.reducer.hooks.append(hook)

    def close(self) -> None:
        """Take the hooks off the model. The parameters stay where they are."""
        if self._failure is None:
            self.wait()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # Refusals

    def _usable(self) -> None:
        if self._failure is not None:
            raise RuntimeError(
                f"this optimizer stopped at an earlier failure and its ranks may differ: start again from a "
                f"checkpoint ({type(self._failure).__name__}: {self._failure})"
            ) from self._failure

    def _may_reduce(self) -> None:
        self._usable()
        if self._norm is not None and self.gradients != "host":
            raise InputError(
                "the gradients were clipped or measured, and neither stepped nor dropped: call optimizer.step() or "
                "optimizer.zero_grad() before the next backward"
            )

    def _verify(self) -> None:
        """Notice parameters that are no longer the views of the buckets that they were made."""
        for bucket in self.buckets:
            base, size = self._flats[bucket.index].data_ptr(), bucket.dtype.itemsize
            for m in bucket.members:
                param = self._named[m.index][1]
                if param.dtype != bucket.dtype or (base and m.numel and param.data_ptr() != base + m.offset * size):
                    raise InputError(
                        f"{m.name} was moved or replaced after ZeroOptimizer was built: call .to(), .half() and "
                        f"load_state_dict(assign=True) before, and close() before building another ZeroOptimizer"
                    )


def check_settings(prefix: str, *, stage: object, bucket_mb: float, reduce_dtype: object) -> None:
    """Raise InputError naming `prefix`KEY for a value that ZeRO does not take."""
    if stage not in (1, 2):
        raise InputError(f"{prefix}stage: {stage!r} is not 1 or 2 (for stage 3 use the fsdp engine)")
    if not bucket_mb > 0:
        raise InputError(f"{prefix}bucket_mb: {bucket_mb} must be greater than 0")
    if reduce_dtype not in _DTYPES:
        raise InputError(f"{prefix}reduce_dtype: {reduce_dtype!r} is not one of fp32, bf16")


def _plain(options: dict[str, Any]) -> list[tuple[str, Any]]:
    """Those options that read alike on every rank if they are alike."""
    return sorted((k, v) for k, v in options.items() if isinstance(v, bool | int | float | str | tuple))


Pairs = list[tuple[str, nn.Parameter]]


def _named_groups(params: Any) -> list[tuple[dict[str, Any], Pairs]]:
    """Options and trainable (canonical name, parameter) pairs of every group, however they were given."""
    if isinstance(params, nn.Module):
        groups: list[tuple[dict[str, Any], Any]] = [({}, named_parameters(params))]
    else:
        entries = list(params)
        if entries and isinstance(entries[0], dict):
            groups = [
                ({k: v for k, v in e.items() if k not in ("params", "param_names")}, _members_of(e)) for e in entries
            ]
        else:
            groups = [({}, entries)]
    position, seen = 0, set()
    result = []
    for options, members in groups:
        pairs: Pairs = []
        for entry in members:
            name, param = entry if isinstance(entry, tuple) else (str(position), entry)
            position += 1
            if param in seen:
                raise InputError(f"parameter {name} is given twice")
            seen.add(param)
            if param.requires_grad:
                pairs.append((canonical_name(name), param))
        result.append((options, pairs))
    if not any(pairs for _, pairs in result):
        raise InputError("nothing to train: no parameter given requires a gradient")
    return result


def _members_of(group: dict[str, Any]) -> list[Any]:
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else list(params)
    names = group.get("param_names")
    return list(zip(names, params, strict=True)) if names is not None else params


def _in_order(groups: list[tuple[dict[str, Any], Pairs]], model: nn.Module | None) -> Pairs:
    """All pairs in registration order where the model is known, else as given; refuses what cannot be flat."""
    from torch.distributed.tensor import DTensor

    pairs = [pair for _, members in groups for pair in members]
    if model is not None:
        place = {p: i for i, p in enumerate(model.parameters())}
        for name, param in pairs:
            if param not in place:
                raise InputError(f"{name} is not a parameter of the model")
        pairs.sort(key=lambda pair: place[pair[1]])
    device = pairs[0][1].device
    for name, param in pairs:
        if isinstance(param, DTensor):
            raise InputError(f"{name} is a DTensor, sharded by its host already: use its engine (fsdp), not zero")
        if param.device != device:
            raise InputError(f"{name} is on {param.device}, others on {device}: zero needs one device a rank")
        if not param.is_floating_point() or param.layout != torch.strided:
            raise InputError(f"{name} is {param.dtype}, {param.layout}: zero needs dense floating-point parameters")
    return pairs


def _groups(
    where: dist.ProcessGroup | DeviceMesh | None,
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """The ranks to shard over, and those that hold the same slices."""
    shard: dist.ProcessGroup | None
    replicate: dist.ProcessGroup | None = None
    if isinstance(where, DeviceMesh):
        if where.ndim > 2:
            raise InputError(f"process_group: a mesh of {where.ndim} dimensions; give (replicate, shard) or (shard,)")
        shard = where.get_group(where.ndim - 1)
        replicate = where.get_group(0) if where.ndim == 2 else None
    else:
        shard = where
        if shard is None and dist.is_available() and dist.is_initialized():
            shard = dist.group.WORLD
    return shard, replicate


@torch.no_grad()
def refuse_unless_elementwise(cls: type[Optimizer], kwargs: dict[str, Any]) -> None:
    """Try `cls` on a small matrix, whole and in flat pieces: an elementwise optimizer moves both alike.

    Raises:
        InputError: it does not, or takes no flat slice at all.
    """
    if hasattr(cls, "set_layout"):
        return  # made for slices, and its random bits depend on where they lie
    generator = torch.Generator().manual_seed(0)
    whole = nn.Parameter(torch.randn(4, 6, generator=generator))
    start = whole.detach().clone()
    pieces = [nn.Parameter(p.clone()) for p in start.view(-1).split([7, 17])]
    plain = {k: v for k, v in kwargs.items() if k != "lr"} | ({"lr": 0.1} if "lr" in kwargs else {})
    try:
        optimizers = cls([("whole", whole)], **plain), cls([("a", pieces[0]), ("b", pieces[1])], **plain)
        for _ in range(2):
            gradient = torch.randn(4, 6, generator=generator) * torch.logspace(-2, 1, 6)
            whole.grad = gradient
            for piece, g in zip(pieces, gradient.view(-1).split([7, 17]), strict=True):
                piece.grad = g.clone()
            for optimizer in optimizers:
                optimizer.step()
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise InputError(f"{cls.__name__} cannot be sharded: on flat slices it raises {error!r}") from error
    moved, expected = torch.cat([p.view(-1) for p in pieces]), whole.view(-1)
    if not torch.allclose(moved - start.view(-1), expected - start.view(-1), rtol=1e-3, atol=1e-7):
        raise InputError(
            f"{cls.__name__} cannot be sharded: its update of an element depends on other elements (it moves a "
            f"matrix and flat slices of the same matrix differently); take an elementwise optimizer"
        )
