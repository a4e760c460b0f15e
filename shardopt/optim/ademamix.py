"""AdEMAMix as a torch optimizer: hyper-parameters, state and bookkeeping. The arithmetic is in the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from shardopt.errors import InputError
from shardopt.optim import kernels, precision, reference, states
from shardopt.optim.kernels import MAXIMIZE, SEGMENT, SKIP, TYPES, YOGI, Entry, Table
from shardopt.optim.reference import Scalars, scalars_at
from shardopt.optim.schedules import alpha_at, beta3_at
from shardopt.slices import Layout, PlacementError, Range, layout_of, local_tensor, name_key

StateDtype = str | Mapping[str, str]
# Doubles of a row that change from step to step, in the order of Scalars.
_STEP_FIELDS = Scalars._fields[:11]
_HYPER: tuple[str, ...] = ("betas", "alpha", "eps", "weight_decay", "alpha_warmup", "beta3_warmup", "eps_root")
_HYPER += ("second_moment", "maximize", "average_decay")
_STATE_KEYS = {"step", "schedule_step", "m1", "m2", "nu", "master", "master_low", "average"}
_STATE_KEYS |= {"m1_scale", "m2_scale", "nu_scale", "average_scale"}
_TILE = 1 << 20  # elements that a temporary may have, where a pass outside the kernels needs one


class AdEMAMix(Optimizer):
    """AdEMAMix: AdamW with a second, slow average of the gradient.

    Source: Pagliardini, Ablin, Grangier, "The AdEMAMix Optimizer", arXiv 2409.03137, algorithm 1. Step t counts from
    1 for each parameter; see optim/reference.py for the update and docs/optimizer.md for a longer account.

    Args:
        params: tensors, (name, tensor) pairs or parameter groups of them; every argument up to `average_decay`,
            `capturable` and `seed` may be given for a group. Without names, a parameter's position stands for it.
        lr: learning rate, a number or a 0-d tensor. With 0 the averages move and no weight does.
        betas: decays of the fast average m1, the second moment nu and the slow average m2. beta1 = 0 keeps no m1.
        alpha: weight of the slow average in the update.
        eps: added to the denominator outside the square root; `eps_root` inside it.
        weight_decay: decoupled, times lr.
        alpha_warmup, beta3_warmup: steps over which alpha rises from 0 and beta3 from beta1; None for no warm-up.
        second_moment: "adam", or "yogi" (nu <- nu - (1 - beta2) sign(nu - g^2) g^2).
        maximize: ascend.
        state_dtype: "fp32", "bf16", "bf16_block" or "int8", or a mapping from m1, m2, nu and average to one of them
            (those not named are fp32). All but fp32 are rounded stochastically. docs/precision.md has the errors.
        master_weights: for 16-bit weights: None rounds bf16 weights stochastically; "fp32" keeps an fp32 copy;
            "split" keeps the 16 bits that a bf16 weight lacks, and equals "fp32" bit for bit.
        average_decay: keep an exponential moving average of the weights with this decay (see averaged_weights).
        kernel: "auto", or "c", "triton", "torch" to force one.
        capturable: keep the step on the device, for CUDA graphs.
        seed: of the stochastic rounding. Saved in the state_dict.

    Raises:
        InputError: a hyper-parameter out of its range, a parameter or gradient of a kind that is not supported.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        alpha_warmup: int | None = None,
        beta3_warmup: int | None = None,
        eps_root: float = 0.0,
        second_moment: str = "adam",
        maximize: bool = False,
        state_dtype: StateDtype = "fp32",
        master_weights: str | None = None,
        average_decay: float | None = None,
        kernel: str = "auto",
        capturable: bool = False,
        seed: int = 0,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha_warmup": alpha_warmup,
            "beta3_warmup": beta3_warmup,
            "eps_root": eps_root,
            "second_moment": second_moment,
            "maximize": maximize,
            "state_dtype": state_dtype,
            "master_weights": master_weights,
            "average_decay": average_decay,
            "capturable": capturable,
            "seed": seed,
        }
        _check_hyper_parameters(defaults)
        if kernel not in kernels.KERNELS:
            raise InputError(f"kernel must be one of {', '.join(kernels.KERNELS)}, got {kernel!r}")
        self.explicit_layouts: dict[Tensor, Layout | Sequence[Layout]] = {}
        self._kernel_choice = kernel
        self._plan: _Plan | None = None
        self._averaged = False
        super().__init__(params, defaults)

    # -- what hosts and engines ask ---------------------------------------------------------------------------

    @property
    def kernel(self) -> str:
        """The kernel in use: "c", "triton" or "torch"; several joined by "+" where parameters differ."""
        found: dict[str, None] = {}
        seen = set()
        for group in self.param_groups:
            for param in group["params"]:
                kind = (param.device.type, param.dtype)
                if kind not in seen:
                    seen.add(kind)
                    found[kernels.choose(self._kernel_choice, local_tensor(param.detach())).name] = None
        return "+".join(found)

    def set_layout(self, param: Tensor, layout: Layout | Sequence[Layout]) -> None:
        """Say which elements of which parameter the local tensor `param` holds.

        Ordinary tensors and row-sharded DTensors need no word. A flat partition of several parameters takes a
        sequence of layouts, whose local starts count in `param`; elements that no layout names (padding) are not
        updated. To be called before the first step: the random bits of later steps depend on it.
        """
        self.explicit_layouts[param] = layout
        self._plan = None

    def schedule_values(self) -> dict[str, float]:
        """alpha and beta3 as the latest step used them (those of the first group that has state)."""
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state.get(param)
                if state:
                    step = max(1, int(state.get("schedule_step", state["step"])))
                    return {
                        "alpha": alpha_at(step, group["alpha"], group["alpha_warmup"]),
                        "beta3": beta3_at(step, group["betas"][2], group["betas"][0], group["beta3_warmup"]),
                    }
        group = self.param_groups[0]
        return {
            "alpha": alpha_at(1, group["alpha"], group["alpha_warmup"]),
            "beta3": beta3_at(1, group["betas"][2], group["betas"][0], group["beta3_warmup"]),
        }

    @torch.no_grad()
    def init_state(self) -> None:
        """Create the state of every parameter that requires grad. Counts no step, leaves existing state alone."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.requires_grad and not self.state.get(param):
                    self._create_state(param, group)

    @torch.no_grad()
    def statistics(self) -> dict[str, Tensor]:
        """LOCAL sums of squares (0-d float64, on the CPU) of m1, m2 and the update u of the state as it stands.

        u is before lr and weight decay. With beta1 = 0 there is no m1: its sum is 0, and u takes the gradient in
        its place where that is still there.
        """
        sums = {key: torch.zeros((), dtype=torch.float64) for key in ("m1", "m2", "update")}
        for entry, ranges in self._current_plan().held():
            group = self.param_groups[entry.group]
            if not entry.state["step"]:
                continue
            s = _scalars(group, entry.state)
            grad = None if entry.param.grad is None else local_tensor(entry.param.grad)
            for local, scale, length in ranges:
                for done in range(0, length, _TILE):
                    count = min(_TILE, length - done)
                    m1, m2, nu = (
                        _decoded(entry, key, local + done, scale + done // precision.BLOCK, count)
                        for key in ("m1", "m2", "nu")
                    )
                    assert m2 is not None
                    assert nu is not None
                    fast = m1
                    if m1 is None and grad is not None:
                        fast = grad.reshape(-1).narrow(0, local + done, count).to(m2.dtype)
                        fast = -fast if s.maximize else fast
                    u = reference.direction(torch.zeros_like(m2) if fast is None else fast, m2, nu, s)
                    for key, value in (("m1", m1), ("m2", m2), ("update", u)):
                        if value is not None:
                            sums[key] += value.double().square().sum().cpu()
        return sums

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Swap the averaged weights into the parameters for evaluation or export, and back on leaving.

        Parameters that have not made a step keep their weights. No step may be taken inside.

        Raises:
            InputError: no group has an `average_decay`, or this is already inside another such block.
        """
        if all(group["average_decay"] is None for group in self.param_groups):
            raise InputError("averaged_weights() needs an optimizer built with average_decay, such as 0.999")
        if self._averaged:
            raise InputError("averaged_weights() is already in force")
        kept: list[tuple[Tensor, Tensor]] = []
        self._averaged = True
        try:
            with torch.no_grad():
                for entry, ranges in self._current_plan().held():
                    if "average" not in entry.tensors or not entry.state["step"]:
                        continue
                    kept.append((entry.weight, entry.weight.clone()))
                    flat = entry.weight.reshape(-1)
                    for local, scale, length in ranges:
                        value = _decoded(entry, "average", local, scale, length)
                        assert value is not None
                        flat.narrow(0, local, length).copy_(value)
                    if flat.data_ptr() != entry.weight.data_ptr():
                        entry.weight.copy_(flat.view(entry.weight.shape))
            yield
        finally:
            with torch.no_grad():
                for weight, value in kept:
                    weight.copy_(value)
            self._averaged = False

    @classmethod
    def from_adamw(cls, adamw: Optimizer, **options: Any) -> AdEMAMix:
        """Go on from a torch AdamW (or Adam with decoupled decay) in mid-run.

        exp_avg, exp_avg_sq and the step are taken over (fp32 tensors without a copy: drop the old optimizer); m2
        starts at zero. The bias corrections go on counting, the schedules of alpha and beta3 start at the switch.
        lr, weight decay, eps, beta1, beta2 and maximize come from `adamw`'s groups.

        Args:
            options: AdEMAMix's other arguments. `betas` may be given; else beta3 is 0.9999.

        Raises:
            InputError: an amsgrad optimizer (its maximum has no counterpart), or another kind of optimizer.
        """
        if any(group.get("amsgrad") for group in adamw.param_groups):
            raise InputError("from_adamw cannot take over an amsgrad optimizer: its running maximum has no counterpart")
        if not isinstance(adamw, AdamW) and not all(
            {"exp_avg", "exp_avg_sq", "step"} <= set(state) for state in adamw.state.values() if state
        ):
            raise InputError(f"from_adamw takes a torch.optim.AdamW, got {type(adamw).__name__}")
        beta3 = options.pop("betas", (0.0, 0.0, 0.9999))[2]
        groups = []
        for old in adamw.param_groups:
            group: dict[str, Any] = {key: old[key] for key in ("lr", "eps", "weight_decay", "initial_lr") if key in old}
            group["maximize"] = bool(old.get("maximize", False))
            group["betas"] = (*old["betas"], beta3)
            names = old.get("param_names")
            group["params"] = list(zip(names, old["params"], strict=True)) if names else list(old["params"])
            groups.append(group)
        new = cls(groups, **options)
        with torch.no_grad():
            for added in new.param_groups:
                for param in added["params"]:
                    old_state = adamw.state.get(param)
                    if old_state:
                        new._take_over(param, added, old_state)
        return new

    def _take_over(self, param: Tensor, group: dict[str, Any], old: dict[str, Any]) -> None:
        state = self._create_state(param, group)
        step = int(old["step"])
        for key, value in (("m1", old["exp_avg"]), ("nu", old["exp_avg_sq"])):
            if key not in state:
                continue
            source, held = local_tensor(value), local_tensor(state[key])
            if source.dtype == held.dtype and source.is_contiguous():
                state[key] = _like(param, source)
                continue
            layouts = self._layouts(param, states.parameter_names(self)[param])
            base = precision.base_key(group["seed"], name_key(layouts[0].name))
            entry = _entry(param, 0, state)
            for layout, r, scale in _ranges(layouts):
                base = precision.base_key(group["seed"], name_key(layout.name))
                bits = precision.random_bits(key, base, step, r.global_start, r.length, source.device)
                scales = entry.tensors.get(f"{key}_scale")
                precision.encode(
                    key,
                    source.reshape(-1).narrow(0, r.local_start, r.length).float(),
                    bits,
                    entry.tensors[key].view(-1).narrow(0, r.local_start, r.length),
                    None if scales is None else scales.narrow(0, scale, precision.blocks(r.length)),
                )
        state["step"] = _counter(step, param, group)
        state["schedule_step"] = _counter(0, param, group)
        self._plan = None

    # -- state --------------------------------------------------------------------------------------------------

    def _layouts(self, param: Tensor, name: str) -> tuple[Layout, ...]:
        layout = self.explicit_layouts.get(param)
        if layout is None:
            return (layout_of(param, name),)
        return (layout,) if isinstance(layout, Layout) else tuple(layout)

    def _create_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        local = local_tensor(param)
        if local.dtype not in TYPES:
            raise InputError(f"AdEMAMix takes float64, float32, bfloat16 and float16 weights, not {local.dtype}")
        master = group["master_weights"] if local.dtype in (torch.bfloat16, torch.float16) else None
        if local.dtype == torch.float16 and master != "fp32":
            raise InputError(
                "float16 weights are too coarse near zero to be updated in place: give master_weights='fp32' (split "
                "masters are for bfloat16)"
            )
        formats = precision.formats_of(group["state_dtype"])
        state: dict[str, Any] = {"step": _counter(0, param, group)}
        for key in ("m1", "m2", "nu", "average"):
            if (key == "m1" and group["betas"][0] == 0.0) or (key == "average" and group["average_decay"] is None):
                continue
            dtype = precision.storage_dtype(formats[key], key, local.dtype)
            values = torch.zeros(local.shape, dtype=dtype, device=local.device)
            state[key] = _like(param, values)
            if formats[key] in precision.BLOCK_FORMATS:
                layouts = self._layouts(param, states.parameter_names(self)[param])
                count = sum(precision.blocks(r.length) for layout in layouts for r in layout.ranges)
                state[f"{key}_scale"] = torch.zeros(count, dtype=torch.float32, device=local.device)
            elif key == "average":
                values.copy_(local)
        if master == "fp32":
            state["master"] = _like(param, local.float().contiguous())
        elif master == "split":
            state["master_low"] = _like(param, torch.zeros(local.shape, dtype=torch.int16, device=local.device))
        self.state[param] = state
        self._plan = None
        return state

    def _current_plan(self) -> _Plan:
        params = [param for group in self.param_groups for param in group["params"]]
        if self._plan is None or not self._plan.holds(params, self.state):
            self._plan = _Plan(self, params)
        return self._plan

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group (see the class for what it may set).

        Raises:
            InputError: a hyper-parameter out of its range or a complex parameter.
        """
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        try:
            _check_hyper_parameters(added)
            for i, param in enumerate(added["params"]):
                if param.is_complex():
                    name = added.get("param_names", {i: f"number {i} of its group"})[i]
                    raise InputError(f"parameter {name} is complex: optimise torch.view_as_real of it")
        except InputError:
            self.param_groups.pop()
            raise
        added["betas"] = tuple(added["betas"])
        if isinstance(added["state_dtype"], Mapping):
            added["state_dtype"] = dict(added["state_dtype"])
        self._plan = None

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__[key] for key in ("explicit_layouts", "_kernel_choice")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        held = self.__dict__.get("state", {})
        copies: list[tuple[Tensor, Tensor]] = []  # made last, so that a refusal changes nothing
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":
                    group.setdefault(key, value)
            group["betas"] = tuple(group["betas"])
            for param in group["params"]:
                saved = self.state.get(param)
                if isinstance(saved, _Box):
                    self.state[param] = self._adopt(param, group, saved.state, held.get(param, {}), copies)
        with torch.no_grad():
            for target, source in copies:
                target.copy_(source)
        self._plan = None
        self._averaged = False

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; every state tensor keeps the dtype it was saved in.

        Named parameters are matched by name. The saved hyper-parameters, seed included, replace the present ones.

        Raises:
            InputError: names, shapes or state keys that do not fit, saying which.
        """
        before = self.state, self.param_groups
        handle = self.register_load_state_dict_pre_hook(_box_states)
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self.state, self.param_groups = before  # nothing has been copied yet
            raise
        finally:
            handle.remove()

    @staticmethod
    def _adopt(
        param: Tensor,
        group: dict[str, Any],
        saved: dict[str, Any],
        held: dict[str, Any],
        copies: list[tuple[Tensor, Tensor]],
    ) -> dict[str, Any]:
        """A parameter's saved state as this process's own, in the storage it has already where that fits."""
        unknown = sorted(set(saved) - _STATE_KEYS)
        if unknown:
            hint = "; AdEMAMix.from_adamw takes over an AdamW" if "exp_avg" in unknown else ""
            raise InputError(f"the saved state has {', '.join(map(repr, unknown))}: it is another optimizer's{hint}")
        state: dict[str, Any] = {}
        local = local_tensor(param.detach())
        for key, value in saved.items():
            if key in ("step", "schedule_step"):
                state[key] = _counter(int(value), param, group)
                continue
            tensor = local_tensor(value)
            if type(value) is type(tensor) and tensor.shape == param.shape != local.shape:
                whole, tensor = tensor, torch.empty(local.shape, dtype=tensor.dtype, device=tensor.device)
                layout_of(param, key).copy_from_whole(tensor, whole)  # the whole was saved, a shard is held
            if not key.endswith("_scale") and tensor.numel() != local.numel():
                raise InputError(
                    f"the saved {key} has {tensor.numel()} elements, the parameter of shape {tuple(param.shape)} "
                    f"has {local.numel()} here"
                )
            old = held.get(key)
            old_local = None if old is None else local_tensor(old)
            if old_local is not None and (old_local.dtype, old_local.shape) == (tensor.dtype, tensor.shape):
                if old_local.data_ptr() != tensor.data_ptr():
                    copies.append((old_local, tensor))
                state[key] = old
            else:
                copied = torch.empty(tensor.shape, dtype=tensor.dtype, device=local.device).copy_(tensor)
                state[key] = copied if key.endswith("_scale") else _like(param, copied.view(local.shape))
        return state

    # -- the step -----------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient; returns the closure's loss.

        Raises:
            InputError: a sparse gradient, or one placed otherwise than its parameter. Nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._averaged:
            raise InputError("no step may be taken inside averaged_weights()")
        if not self.state and self._only_creates_state():
            self.init_state()
            return loss
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param not in self.state:
                    self._create_state(param, group)
        self._current_plan().step()
        return loss

    def _only_creates_state(self) -> bool:
        """torch.distributed.checkpoint makes state by a step without state, lr = 0 and zero gradients."""
        if any(float(group["lr"]) != 0.0 for group in self.param_groups):
            return False
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return bool(grads) and not any(bool(local_tensor(g).any()) for g in grads if not g.is_sparse)


class _Plan:
    """Tables for the kernels, good for as long as the same tensors hold the parameters and their state.

    Storage may move under a tensor at any time (`.data`, offloading): pointers are read anew at every step.
    """

    def __init__(self, optimizer: AdEMAMix, params: list[Tensor]) -> None:
        self.optimizer = optimizer
        self.params = params
        names = states.parameter_names(optimizer)
        self.entries: list[Entry] = []
        self.layouts: list[tuple[Layout, ...]] = []
        self.kernels: list[kernels.Kernel] = []
        seen: set[Tensor] = set()
        for index, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                state = optimizer.state.get(param)
                if param in seen or not state:  # tied weights in the list twice make one step
                    continue
                seen.add(param)
                entry = _entry(param, index, state)
                self.entries.append(entry)
                self.layouts.append(self._resolve(optimizer, entry, names[param]))
                self.kernels.append(kernels.choose(optimizer._kernel_choice, entry.weight))
        self.states = [entry.state for entry in self.entries]
        self.stored = [value for state in self.states for value in state.values() if isinstance(value, Tensor)]
        self.entry_params = [entry.param for entry in self.entries]
        self.types = [entry.weight.dtype for entry in self.entries]
        self.tables: list[tuple[kernels.Kernel, Table]] | None = None
        self.strided: frozenset[int] = frozenset()

    @staticmethod
    def _resolve(optimizer: AdEMAMix, entry: Entry, name: str) -> tuple[Layout, ...]:
        try:
            layouts = optimizer._layouts(entry.param, name)
        except PlacementError as e:
            rounded = any(
                t.dtype not in (torch.float32, torch.float64)
                for k, t in entry.tensors.items()
                if k in precision.ROUNDED
            ) or (entry.weight.dtype == torch.bfloat16 and "master" not in entry.tensors)
            if rounded and "master_low" not in entry.tensors:
                raise InputError(f"stochastic rounding cannot place {name}: {e}; use state_dtype='fp32'") from e
            count = entry.weight.numel()  # nothing is rounded: where the elements belong does not matter
            return (Layout.contiguous(name, (count,), 0, count),)
        end = max((r.local_start + r.length for layout in layouts for r in layout.ranges), default=0)
        if end > entry.weight.numel():
            raise InputError(
                f"the layout of {layouts[0].name} ends at element {end}, the local tensor has {entry.weight.numel()}"
            )
        return layouts

    def holds(self, params: list[Tensor], state: Mapping[Tensor, Any]) -> bool:
        """Whether the parameters and the tensors of their state are still the very same objects."""
        if len(params) != len(self.params) or not all(map(_same, params, self.params)):
            return False
        found = [state.get(param) for param in self.entry_params]
        if not all(map(_same, found, self.states)) or sum(map(bool, state.values())) != len(found):
            return False
        stored = [value for held in self.states for value in held.values() if isinstance(value, Tensor)]
        if len(stored) != len(self.stored) or not all(map(_same, stored, self.stored)):
            return False
        return [param.dtype for param in self.entry_params] == self.types

    def held(self) -> Iterator[tuple[Entry, list[tuple[int, int, int]]]]:
        """Each entry with its ranges as (first local element, first block, length)."""
        for entry, layouts in zip(self.entries, self.layouts, strict=True):
            entry.weight = local_tensor(entry.param)
            yield entry, [(r.local_start, scale, r.length) for _, r, scale in _ranges(layouts)]

    def step(self) -> None:
        entries = self.entries
        active, strided = self._gather()
        if not active:
            return
        if self.tables is None or strided != self.strided:
            self.strided = strided
            self.tables = self._tables(strided)
        self._count([entries[i] for i in active])
        # one row of scalars for each group and step count: nearly always as many as there are groups
        combos: dict[tuple[int, int, int], int] = {}
        rows: list[Scalars] = []
        which = np.full(len(entries), -1, dtype=np.int64)
        captured = [group["capturable"] for group in self.optimizer.param_groups]
        for i in active:
            entry = entries[i]
            state = entry.state
            if captured[entry.group] and entry.weight.device.type != "cpu":
                key = (entry.group, -1, -1)
            else:
                step = int(state["step"])
                key = (entry.group, step, int(state["schedule_step"]) if "schedule_step" in state else step)
            at = combos.get(key)
            if at is None:
                at = combos[key] = len(rows)
                rows.append(_scalars(self.optimizer.param_groups[entry.group], key[1:]))
            which[i] = at
        steps = np.array([key[1] for key in combos], dtype=np.int64)
        flags = np.array([MAXIMIZE * s.maximize | YOGI * s.yogi for s in rows], dtype=np.uint8)
        values = np.array([s[: len(_STEP_FIELDS)] for s in rows], dtype=np.float64)
        for kernel, table in self.tables:
            combo = which[table.cache["entry_index"]]
            _refresh_pointers(table)
            _set_scalars(table, combo, values, steps, flags)
            kernel.run(table)
        for i in sorted(strided):
            if which[i] >= 0:
                self._step_strided(i, values, steps, flags, which[i])

    def _gather(self) -> tuple[list[int], frozenset[int]]:
        """Weights and gradients as they are now; the entries that have one, and those not laid out in order."""
        active = []
        strided = []
        for i, entry in enumerate(self.entries):
            param = entry.param
            grad = param.grad
            weight = entry.weight = param if entry.plain else local_tensor(param)
            if grad is not None:
                if grad.layout is not torch.strided:
                    raise InputError(
                        f"the gradient of {self.layouts[i][0].name} is sparse: AdEMAMix needs dense ones "
                        f"(nn.Embedding(sparse=False))"
                    )
                if not entry.plain:
                    if getattr(grad, "placements", None) != param.placements:  # type: ignore[attr-defined]
                        raise InputError(
                            f"the gradient of {self.layouts[i][0].name} is placed as "
                            f"{getattr(grad, 'placements', None)}, the parameter as {param.placements}: "  # type: ignore[attr-defined]
                            f"redistribute it first"
                        )
                    grad = local_tensor(grad)
                if grad.dtype not in TYPES or (grad.dtype == torch.float64) != (weight.dtype == torch.float64):
                    grad = grad.to(weight.dtype)
                active.append(i)
            entry.grad = grad
            if not weight.is_contiguous() or (grad is not None and not grad.is_contiguous()):
                strided.append(i)
        return active, frozenset(strided)

    @staticmethod
    def _count(entries: list[Entry]) -> None:
        on_device: list[Tensor] = []
        for entry in entries:
            state = entry.state
            for key in ("step", "schedule_step") if "schedule_step" in state else ("step",):
                if isinstance(state[key], Tensor):
                    on_device.append(state[key])
                else:
                    state[key] += 1
        if on_device:
            torch._foreach_add_(on_device, 1.0)

    def _tables(self, strided: frozenset[int]) -> list[tuple[kernels.Kernel, Table]]:
        members: dict[tuple[str, torch.device, bool], list[int]] = {}
        for i, entry in enumerate(self.entries):
            if i not in strided:
                captured = bool(self.optimizer.param_groups[entry.group]["capturable"])
                key = (self.kernels[i].name, entry.weight.device, captured and entry.weight.device.type != "cpu")
                members.setdefault(key, []).append(i)
        return [
            (self.kernels[indices[0]], self._table(indices, [self.layouts[i] for i in indices], captured=key[2]))
            for key, indices in members.items()
        ]

    def _table(
        self,
        indices: list[int],
        layouts: list[tuple[Layout, ...]],
        *,
        entries: list[Entry] | None = None,
        captured: bool = False,
    ) -> Table:
        entries = [self.entries[i] for i in indices] if entries is None else entries
        seeds = [self.optimizer.param_groups[entry.group]["seed"] for entry in entries]
        segments = [(i, layout, r, scale) for i, where in enumerate(layouts) for layout, r, scale in _ranges(where)]
        rows = np.zeros(len(segments), dtype=SEGMENT)
        owner = np.array([i for i, *_ in segments], dtype=np.int64)
        rows["length"] = [r.length for *_, r, _ in segments]
        rows["start"] = [r.global_start for *_, r, _ in segments]
        keys = {(i, layout.name): precision.base_key(seeds[i], name_key(layout.name)) for i, layout, *_ in segments}
        rows["key"] = np.array([keys[i, layout.name] for i, layout, *_ in segments], dtype=np.uint64)
        codes = [_codes(entry) for entry in entries]
        for name in ("weight_type", "m1_format", "m2_format", "nu_format", "average_format", "master_kind"):
            rows[name] = np.array([code[name] for code in codes], dtype=np.uint8)[owner] if len(owner) else 0
        table = Table(
            device=entries[0].weight.device,
            entries=entries,
            rows=rows,
            row_entry=owner,
            row_local=np.array([r.local_start for *_, r, _ in segments], dtype=np.int64),
            row_scale=np.array([scale for *_, scale in segments], dtype=np.int64),
            capturable=captured,
        )
        table.cache["entry_index"] = np.array(indices, dtype=np.int64)
        return table

    def _step_strided(self, index: int, values: np.ndarray, steps: np.ndarray, flags: np.ndarray, combo: int) -> None:
        """A weight or gradient that is not laid out in order: contiguous copies of some rows at a time."""
        entry, layouts = self.entries[index], self.layouts[index]
        weight, grad = entry.weight, entry.grad
        assert grad is not None
        whole = any(key.endswith("_scale") for key in entry.tensors) or weight.dim() == 0
        row_numel = weight.numel() // weight.shape[0] if weight.dim() and weight.shape[0] else 1
        some = weight.shape[0] if whole and weight.dim() else max(1, _TILE // max(1, row_numel))
        for first in range(0, weight.shape[0] if weight.dim() else 1, max(1, some)):
            part = weight if whole else weight[first : first + some]
            copy = part.contiguous().clone() if part.is_contiguous() else part.contiguous()
            start = 0 if whole else first * row_numel
            clipped = tuple(_clipped(layout, start, copy.numel()) for layout in layouts)
            piece = Entry(
                entry.param,
                entry.group,
                copy,
                (grad if whole else grad[first : first + some]).contiguous(),
                entry.state,
                {
                    key: tensor if key.endswith("_scale") else tensor.view(-1).narrow(0, start, copy.numel())
                    for key, tensor in entry.tensors.items()
                },
            )
            table = self._table([index], [clipped], entries=[piece])
            _refresh_pointers(table)
            _set_scalars(table, np.array([combo]), values, steps, flags)
            self.kernels[index].run(table)
            if values[combo][0] != 0.0:  # lr
                part.copy_(copy)


class _Box:
    """Hides a saved state from torch's load_state_dict, which would cast it to the parameter's dtype."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state


def _box_states(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The last of the pre-hooks: match saved parameters to ours by name, where both have names."""
    saved_groups = [dict(group) for group in state_dict["param_groups"]]
    for number, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=False)):
        if "param_names" not in group or "param_names" not in saved:
            continue
        ours = [states.canonical_name(name) for name in group["param_names"]]
        ids = dict(zip(map(states.canonical_name, saved["param_names"]), saved["params"], strict=True))
        missing, extra = sorted(set(ours) - set(ids)), sorted(set(ids) - set(ours))
        if missing or extra:
            raise InputError(
                f"parameter group {number} of the saved optimizer state does not fit: "
                f"it lacks {missing[:5] or 'nothing'} and has {extra[:5] or 'nothing'} besides"
            )
        saved["params"], saved["param_names"] = [ids[name] for name in ours], list(group["param_names"])
    return {
        **state_dict,
        "param_groups": saved_groups,
        "state": {key: _Box(value) for key, value in state_dict["state"].items()},
    }


def _same(a: object, b: object) -> bool:
    return a is b


def _counter(step: int, param: Tensor, group: dict[str, Any]) -> int | Tensor:
    """A step count: a number, or an fp32 scalar on the parameter's device for capturable groups."""
    if not group["capturable"]:
        return step
    return torch.full((), float(step), dtype=torch.float32, device=local_tensor(param.detach()).device)


def _like(param: Tensor, local: Tensor) -> Tensor:
    """`local` as a DTensor of `param`'s placement where `param` is one, so that hosts treat the two alike."""
    from torch.distributed.tensor import DTensor

    if not isinstance(param, DTensor):
        return local
    stride = tuple(math.prod(param.shape[i + 1 :]) for i in range(param.dim()))
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=stride
    )


def _entry(param: Tensor, group: int, state: dict[str, Any]) -> Entry:
    tensors = {
        key: local_tensor(value)
        for key, value in state.items()
        if isinstance(value, Tensor) and key not in ("step", "schedule_step")
    }
    weight = local_tensor(param.detach())
    return Entry(param, group, weight, None, state, tensors, plain=not hasattr(param, "placements"))


def _ranges(layouts: tuple[Layout, ...]) -> Iterator[tuple[Layout, Range, int]]:
    """Each range with its layout and the number of its first block."""
    scale = 0
    for layout in layouts:
        for r in layout.ranges:
            yield layout, r, scale
            scale += precision.blocks(r.length)


def _clipped(layout: Layout, start: int, length: int) -> Layout:
    """The part of a layout that lies in the local elements start .. start + length, counted from `start`."""
    ranges = []
    for r in layout.ranges:
        first, last = max(r.local_start, start), min(r.local_start + r.length, start + length)
        if first < last:
            ranges.append(Range(r.global_start + first - r.local_start, first - start, last - first))
    return Layout(layout.name, layout.shape, tuple(ranges))


def _codes(entry: Entry) -> dict[str, int]:
    codes = {"weight_type": TYPES[entry.weight.dtype], "master_kind": 0}
    for key in precision.ROUNDED:
        stored = entry.tensors.get(key)
        codes[f"{key}_format"] = (
            kernels.NONE
            if stored is None
            else precision.FORMATS[precision.format_of(key, stored, f"{key}_scale" in entry.tensors)]
        )
    for kind, key in (("fp32", "master"), ("split", "master_low")):
        if key in entry.tensors:
            codes["master_kind"] = kernels.MASTERS[kind]
    return codes


_POINTERS = ("m1", "m2", "nu", "average", "m1_scale", "m2_scale", "nu_scale", "average_scale")


def _refresh_pointers(table: Table) -> None:
    rows, entries, owner = table.rows, table.entries, table.row_entry

    def put(field: str, tensors: list[Tensor | None], offset: np.ndarray) -> None:
        base = np.array([0 if t is None else t.data_ptr() for t in tensors], dtype=np.uint64)
        if base.any():
            size = np.array([0 if t is None else t.element_size() for t in tensors], dtype=np.int64)
            rows[field] = base[owner] + (offset * size[owner]).astype(np.uint64)

    put("weight", [entry.weight for entry in entries], table.row_local)
    grads = [entry.grad for entry in entries]
    put("grad", grads, table.row_local)
    rows["grad_type"] = np.array([0 if g is None else TYPES[g.dtype] for g in grads], dtype=np.uint8)[owner]
    for key in _POINTERS:
        put(key, [e.tensors.get(key) for e in entries], table.row_scale if "scale" in key else table.row_local)
    put("master", [e.tensors.get("master", e.tensors.get("master_low")) for e in entries], table.row_local)


def _set_scalars(table: Table, combo: np.ndarray, values: np.ndarray, steps: np.ndarray, flags: np.ndarray) -> None:
    rows, of_row = table.rows, combo[table.row_entry]
    rows["flags"] = np.where(of_row < 0, SKIP, flags[of_row])
    rows["step"] = steps[of_row]
    for i, name in enumerate(_STEP_FIELDS):
        rows[name] = values[of_row, i]


def _scalars(group: dict[str, Any], counts: Any) -> Scalars:
    """A group's scalars at (step, schedule step), or at those of a parameter's state."""
    if isinstance(counts, dict):
        step = int(counts["step"])
        counts = (step, int(counts.get("schedule_step", step)))
    step, schedule_step = (max(1, count) for count in counts)
    lr = group["lr"]
    return scalars_at(step, schedule_step, lr=float(lr), **{key: group[key] for key in _HYPER})


def _decoded(entry: Entry, key: str, local: int, scale: int, count: int) -> Tensor | None:
    stored = entry.tensors.get(key)
    if stored is None:
        return None
    scales = entry.tensors.get(f"{key}_scale")
    part = None if scales is None else scales.narrow(0, scale, precision.blocks(count))
    return precision.decode(key, stored.view(-1).narrow(0, local, count), part)


def _check_hyper_parameters(group: Mapping[str, Any]) -> None:
    """Refuse a value out of its range, with the value and the range.

    Raises:
        InputError: the first one found.
    """

    def number(name: str, value: Any, low: float = 0.0, below: float = math.inf) -> None:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not ok or not low <= value < below:
            upper = "" if below == math.inf else f" and < {below:g}"
            raise InputError(f"{name} must be a finite number >= {low:g}{upper}, got {value!r}")

    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise InputError(f"lr must be a number or a tensor of one element, got shape {tuple(lr.shape)}")
        if lr.device.type == "cpu":
            number("lr", lr.item())
    else:
        number("lr", lr)
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 3:
        raise InputError(f"betas must be three numbers (beta1, beta2, beta3), got {betas!r}")
    for i, beta in enumerate(betas):
        number(f"beta{i + 1}", beta, below=1.0)
    for name in ("alpha", "eps", "eps_root", "weight_decay"):
        number(name, group[name])
    for name in ("alpha_warmup", "beta3_warmup"):
        warmup = group[name]
        if warmup is not None and (isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 1):
            raise InputError(f"{name} must be None or a whole number of steps >= 1, got {warmup!r}")
    if group["beta3_warmup"] is not None and betas[2] == 0.0:
        raise InputError("beta3 must be > 0 and < 1 when beta3_warmup is given, got 0.0")
    if group["second_moment"] not in ("adam", "yogi"):
        raise InputError(f"second_moment must be 'adam' or 'yogi', got {group['second_moment']!r}")
    for name in ("maximize", "capturable"):
        if not isinstance(group[name], bool):
            raise InputError(f"{name} must be True or False, got {group[name]!r}")
    precision.formats_of(group["state_dtype"])
    if group["master_weights"] not in (None, "fp32", "split"):
        raise InputError(f"master_weights must be None, 'fp32' or 'split', got {group['master_weights']!r}")
    if group["average_decay"] is not None:
        number("average_decay", group["average_decay"], below=1.0)
    seed = group["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise InputError(f"seed must be a whole number >= 0 and < 2^64, got {seed!r}")
