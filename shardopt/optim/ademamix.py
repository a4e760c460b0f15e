"""AdEMAMix as a torch optimizer: hyper-parameters and state. plan.py lays out a step, the kernels take it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from shardopt.errors import InputError
from shardopt.optim import kernels, precision, reference, states
from shardopt.optim.kernels import TYPES, Entry
from shardopt.optim.plan import Plan, make_entry, placed_ranges, scalars_of
from shardopt.optim.schedules import alpha_at, beta3_at
from shardopt.slices import Layout, layout_of, local_tensor, name_key

StateDtype = str | Mapping[str, str]
_STATE_KEYS = {"step", "schedule_step", "m1", "m2", "nu", "master", "master_low", "weight_ema"}
_STATE_KEYS |= {"m1_scale", "m2_scale", "nu_scale", "weight_ema_scale"}
_TILE = 1 << 20  # elements that a temporary may have, where a pass outside the kernels needs one


class AdEMAMix(Optimizer):
    """AdEMAMix: AdamW with a second, slow average of the gradient.

    Source: Pagliardini, Ablin, Grangier, "The AdEMAMix Optimizer", arXiv 2409.03137, algorithm 1. Step t counts from
    1 for each parameter; see optim/reference.py for the update and docs/optimizer.md for a longer account.

    Args:
        params: tensors, (name, tensor) pairs or parameter groups of them; every argument up to `weight_ema`,
            `capturable` and `seed` may be given for a group. Without names, a parameter's position stands for it.
        lr: learning rate, a number or a 0-d tensor. With 0 the averages move and no weight does.
        betas: decays of the fast average m1, the second moment nu and the slow average m2. beta1 = 0 keeps no m1.
        alpha: weight of the slow average in the update.
        eps: added to the denominator outside the square root; `eps_root` inside it.
        weight_decay: decoupled, times lr.
        alpha_warmup, beta3_warmup: steps over which alpha rises from 0 and beta3 from beta1; None for no warm-up.
        second_moment: "adam", or "yogi" (nu <- nu - (1 - beta2) sign(nu - g^2) g^2).
        maximize: ascend.
        state_dtype: "fp32", "bf16", "block16" or "block8", or a mapping from m1, m2, nu and weight_ema to one of them
            (those not named are fp32). All but fp32 are rounded stochastically. docs/precision.md has the errors.
        master_weights: for 16-bit weights: None rounds bf16 weights stochastically; "fp32" keeps an fp32 copy;
            "split" keeps the 16 bits that a bf16 weight lacks, and equals "fp32" bit for bit.
        weight_ema: keep an exponential moving average of the weights with this decay (see use_weight_ema).
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
        weight_ema: float | None = None,
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
            "weight_ema": weight_ema,
            "capturable": capturable,
            "seed": seed,
        }
        _check_hyper_parameters(defaults)
        if kernel not in kernels.KERNELS:
            raise InputError(f"kernel must be one of {', '.join(kernels.KERNELS)}, got {kernel!r}")
        self.explicit_layouts: dict[Tensor, Layout | Sequence[Layout]] = {}
        self._kernel_choice = kernel
        self._plan: Plan | None = None
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
        for entry, _, ranges in self._current_plan().held():
            step = int(entry.state["step"])
            if not step:
                continue
            s = scalars_of(self.param_groups[entry.group], step, int(entry.state.get("schedule_step", step)))
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
    def use_weight_ema(self) -> Iterator[None]:
        """Swap the averaged weights into the parameters for evaluation or export, and back on leaving.

        Parameters that have not made a step keep their weights. No step may be taken inside.

        Raises:
            InputError: no group has an `weight_ema`, or this is already inside another such block.
        """
        if all(group["weight_ema"] is None for group in self.param_groups):
            raise InputError("use_weight_ema() needs an optimizer built with weight_ema, such as 0.999")
        if self._averaged:
            raise InputError("use_weight_ema() is already in force")
        kept: list[tuple[Tensor, Tensor]] = []
        self._averaged = True
        try:
            with torch.no_grad():
                for entry, weight, ranges in self._current_plan().held():
                    if "weight_ema" not in entry.tensors or not entry.state["step"]:
                        continue
                    kept.append((weight, weight.clone()))
                    flat = weight.reshape(-1)
                    for local, scale, length in ranges:
                        value = _decoded(entry, "weight_ema", local, scale, length)
                        assert value is not None
                        flat.narrow(0, local, length).copy_(value)
                    if flat.data_ptr() != weight.data_ptr():  # a strided weight has no flat view
                        weight.copy_(flat.view(weight.shape))
            yield
        finally:
            with torch.no_grad():
                for target, value in kept:
                    target.copy_(value)
            self._averaged = False

    @classmethod
    def from_adamw(cls, adamw: Optimizer, **options: Any) -> AdEMAMix:
        """Go on from a torch AdamW (or Adam with decoupled decay) in mid-run.

        exp_avg, exp_avg_sq and the step are taken over (fp32 tensors without a copy: drop the old optimizer); m2
        starts at zero. The bias corrections go on counting, the schedules of alpha and beta3 start at the switch.
        lr, weight decay, eps, beta1, beta2 and maximize come from `adamw`'s groups: change them there before, or
        in the new groups after.

        Args:
            options: AdEMAMix's other arguments. `betas` may be given for its beta3, which else is 0.9999.

        Raises:
            InputError: an amsgrad optimizer (its maximum has no counterpart), or another kind of optimizer.
        """
        if any(group.get("amsgrad") for group in adamw.param_groups):
            raise InputError("from_adamw cannot take over an amsgrad optimizer: its running maximum has no counterpart")
        if not isinstance(adamw, AdamW) and not (
            all("betas" in group for group in adamw.param_groups)
            and all({"exp_avg", "exp_avg_sq", "step"} <= set(state) for state in adamw.state.values() if state)
        ):
            raise InputError(f"from_adamw takes a torch.optim.AdamW, got {type(adamw).__name__}")
        if any(group.get("decoupled_weight_decay") is False and group["weight_decay"] for group in adamw.param_groups):
            raise InputError("from_adamw cannot take over Adam's L2 weight decay: AdEMAMix decays as AdamW does")
        if taken := sorted({"lr", "eps", "weight_decay", "maximize"} & set(options)):
            raise InputError(f"from_adamw takes {', '.join(taken)} from the AdamW: set them in its groups before")
        betas = options.pop("betas", None)
        if betas is not None and len(betas) != 3:
            raise InputError(f"betas must be three numbers, got {betas!r}")
        beta3 = 0.9999 if betas is None else betas[2]
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
            entry = make_entry(param, 0, state)
            for layout, r, scale in placed_ranges(layouts):
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
        for key in ("m1", "m2", "nu", "weight_ema"):
            if (key == "m1" and group["betas"][0] == 0.0) or (key == "weight_ema" and group["weight_ema"] is None):
                continue
            dtype = precision.storage_dtype(formats[key], key, local.dtype)
            values = torch.zeros(local.shape, dtype=dtype, device=local.device)
            state[key] = _like(param, values)
            if formats[key] in precision.BLOCK_FORMATS:
                layouts = self._layouts(param, states.parameter_names(self)[param])
                count = sum(precision.blocks(r.length) for layout in layouts for r in layout.ranges)
                state[f"{key}_scale"] = torch.zeros(count, dtype=torch.float32, device=local.device)
            elif key == "weight_ema":
                values.copy_(local)
        if master == "fp32":
            state["master"] = _like(param, local.float().contiguous())
        elif master == "split":
            state["master_low"] = _like(param, torch.zeros(local.shape, dtype=torch.int16, device=local.device))
        self.state[param] = state
        self._plan = None
        return state

    def _current_plan(self, params: list[Tensor] | None = None) -> Plan:
        if params is None:
            params = [param for group in self.param_groups for param in group["params"]]
        if self._plan is None or self._plan.groups is not self.param_groups or not self._plan.holds(params, self.state):
            names = states.parameter_names(self)
            self._plan = Plan(self.param_groups, params, names, self.state, self._layouts, self._kernel_choice)
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
            raise InputError("no step may be taken inside use_weight_ema()")
        if not self.state and self._only_creates_state():
            self.init_state()
            return loss
        params = [param for group in self.param_groups for param in group["params"]]
        grads = [param.grad for param in params]
        plan = self._current_plan(params)
        missing = [i for i in plan.absent if grads[i] is not None]
        if missing:
            for i in missing:
                self._create_state(params[i], self._group_of(i))
            plan = self._current_plan(params)
        plan.step(grads)
        return loss

    def _group_of(self, position: int) -> dict[str, Any]:
        for group in self.param_groups:
            if position < len(group["params"]):
                return group
            position -= len(group["params"])
        raise IndexError(position)

    def _only_creates_state(self) -> bool:
        """torch.distributed.checkpoint makes state by a step without state, lr = 0 and zero gradients."""
        if any(float(group["lr"]) != 0.0 for group in self.param_groups):
            return False
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return bool(grads) and not any(bool(local_tensor(g).any()) for g in grads if not g.is_sparse)


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
    if group["weight_ema"] is not None:
        number("weight_ema", group["weight_ema"], below=1.0)
    seed = group["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise InputError(f"seed must be a whole number >= 0 and < 2^64, got {seed!r}")
