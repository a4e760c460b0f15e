"""AdEMAMix as a torch optimizer: hyper-parameters and state. plan.py lays out a step, the kernels take it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim import Optimizer

from shardopt.errors import InputError
from shardopt.optim import kernels, precision, reference, schema, states
from shardopt.optim.checked import CheckedOptimizer, Stored, check_state
from shardopt.optim.kernels.table import Entry
from shardopt.optim.plan import Plan
from shardopt.optim.schema import STATE_TENSORS, HyperParameters
from shardopt.slices import Layout, PlacementError, layout_of, local_tensor, local_values

_TILE = 1 << 20  # elements that a temporary may have, where a pass outside the kernels needs one
_unnamed = count()  # a number for each optimizer of this process whose parameters have no names


@lru_cache(maxsize=1024)  # asked for each parameter, twice; models have few shapes
def _of_elements(
    settings: schema.Deciding, weight: torch.dtype, shape: torch.Size
) -> tuple[Mapping[str, Stored], list[str]]:
    """The state tensors of a value per element, in the order in which they are made, and those with scales beside."""
    dtypes = schema.stored_dtypes(settings, weight)
    return {k: Stored(dtype, shape) for k, (dtype, _) in dtypes.items()}, [k for k in dtypes if dtypes[k][1]]


class AdEMAMix(CheckedOptimizer):
    """AdEMAMix: AdamW with a second, slow average of the gradient.

    Source: Pagliardini, Ablin, Grangier, "The AdEMAMix Optimizer", arXiv 2409.03137, algorithm 1. Step t counts from
    1 for each parameter; see optim/reference.py for the update and docs/optimizer.md for a longer account.

    Args:
        params: tensors, (name, tensor) pairs or parameter groups of them; every argument up to `weight_ema`,
            `capturable` and `seed` may be given for a group. Without names, a parameter's position stands for it, and
            a count of the optimizers that this process has made without names keeps their random bits apart: make them
            in the same order on every rank and in every run. The count is in the state_dict.
        lr: learning rate, a number or a 0-d tensor. With 0 the averages move and no weight does.
        betas: decays of the fast average m1, the second moment nu and the slow average m2. beta1 = 0 keeps no m1.
        alpha: weight of the slow average in the update.
        eps: added to the denominator, outside the square root.
        eps_root: added inside the square root.
        weight_decay: decoupled weight decay, times lr.
        alpha_warmup: steps over which alpha rises from 0; None for no warm-up.
        beta3_warmup: steps over which beta3 rises from beta1; None for no warm-up.
        second_moment: "adam", or "yogi" (nu <- nu - (1 - beta2) sign(nu - g^2) g^2).
        maximize: ascend instead of descending.
        state_dtype: "fp32", "bf16", "block16" or "block8", or a mapping from m1, m2, nu and weight_ema to one of them
            (those not named are fp32). All but fp32 are rounded stochastically. docs/precision.md has the errors.
        master_weights: for 16-bit weights: None rounds bf16 weights stochastically; "fp32" keeps an fp32 copy;
            "split" keeps the 16 bits that a bf16 weight lacks, and equals "fp32" bit for bit.
        weight_ema: keep an exponential moving average of the weights with this decay (see use_weight_ema).
        kernel: "auto", or "c", "triton", "torch" to force one.
        capturable: keep the step on the device, for CUDA graphs.
        seed: seeds the stochastic rounding; saved in the state_dict.

    Raises:
        InputError: a hyper-parameter out of its range, a parameter or gradient of a kind that is not supported, two
            parameters of one name.

    Example:
        >>> import torch, shardopt
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = shardopt.AdEMAMix(
        ...     model.named_parameters(), lr=1e-3, alpha=8.0, alpha_warmup=100, beta3_warmup=100, state_dtype="bf16"
        ... )
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> optimizer.state[model.weight]["step"], optimizer.state[model.weight]["m2"].dtype
        (3, torch.bfloat16)
        >>> optimizer.schedule_values()["alpha"]
        0.24

        Go on from AdamW in mid-run:

        >>> adamw = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
        >>> optimizer = shardopt.AdEMAMix.from_adamw(adamw, alpha=8.0, alpha_warmup=100)
    """

    hyper_parameters = schema.HYPER_PARAMETERS

    def __init__(
        self, params: Any, *positional: Any, kernel: str = "auto", **hyper_parameters: Unpack[HyperParameters]
    ) -> None:
        if kernel not in kernels.KERNELS:
            raise InputError(f"kernel must be one of {', '.join(kernels.KERNELS)}, got {kernel!r}")
        self.layouts: dict[Tensor, states.Layouts] = {}
        self._kernel_choice = kernel
        self._plan: Plan | None = None
        self._averaged = False
        self._decisive: list[schema.Deciding] = []
        super().__init__(params, *positional, **hyper_parameters)
        states.parameter_names(self)  # refuses two parameters of one name

    @property
    def kernel(self) -> str:
        """The kernel in use: "c", "triton" or "torch"; several joined by "+" where parameters differ."""
        kinds = {(param.device, param.dtype): param for group in self.param_groups for param in group["params"]}
        chosen = (kernels.choose(self._kernel_choice, local_tensor(param.detach())) for param in kinds.values())
        return "+".join(dict.fromkeys(kernel.name for kernel in chosen))

    def set_layout(self, param: Tensor, layout: states.Layouts | None) -> None:
        """Say which elements of which parameter the local tensor `param` holds.

        Ordinary tensors and DTensors need no word. A flat partition of several parameters takes a
        sequence of layouts, whose local starts count in `param`; elements that no layout names (padding) are not
        updated. To be called before the first step: the random bits of later steps depend on it. None forgets.
        """
        self.layouts.pop(param, None)
        if layout is not None:
            self.layouts[param] = layout
        self._plan = None

    def schedule_values(self) -> dict[str, float]:
        """alpha and beta3 as the latest step used them (those of the first group that has state)."""
        found = ((group, self.state[p]) for group in self.param_groups for p in group["params"] if self.state.get(p))
        group, state = next(found, (self.param_groups[0], {"step": 1}))
        scalars = reference.scalars_of(group, 1, int(state.get("schedule_step", state["step"])))
        return {"alpha": scalars.alpha, "beta3": scalars.beta3}

    @torch.no_grad()
    def statistics(self, share: Callable[[Tensor], float] = lambda param: 1.0) -> dict[str, Tensor]:
        """LOCAL sums of squares (0-d float64, on the CPU) of m1, m2 and the update u of the state as it stands.

        u is before lr and weight decay. With beta1 = 0 there is no m1: its sum is 0, and u takes the gradient in
        its place where that is still there.

        Args:
            share: what a parameter's squares count, for sums over ranks of which some hold the same elements.
        """
        sums = {key: torch.zeros((), dtype=torch.float64) for key in ("m1", "m2", "update")}
        for entry in self._current_plan().entries:
            if not (step := int(entry.state["step"])):
                continue
            schedule_step = int(entry.state.get("schedule_step", step))
            s = reference.scalars_at(self.param_groups[entry.group], step, schedule_step, lr=1.0)
            grad = None if entry.param.grad is None else local_tensor(entry.param.grad)
            for where in entry.tiles(_TILE):
                m2, nu = (entry.decoded(key, where) for key in ("m2", "nu"))
                fast = m1 = entry.decoded("m1", where) if "m1" in entry.formats else torch.zeros_like(m2)
                if "m1" not in entry.formats and grad is not None:
                    fast = grad.reshape(-1).narrow(0, where.local, where.numel).to(m2.dtype)
                    fast = -fast if s.maximize else fast
                for key, value in (("m1", m1), ("m2", m2), ("update", reference.direction(fast, m2, nu, s))):
                    sums[key] += value.double().square().sum().cpu() * share(entry.param)
        return sums

    @contextmanager
    def use_weight_ema(self) -> Iterator[None]:
        """Swap the averaged weights into the parameters for evaluation or export, and back on leaving.

        Parameters that have not made a step keep their weights. Inside, `step`, `state_dict`, `load_state_dict` and
        our checkpoints are refused: they would take the averaged weights for the trained ones.

        Raises:
            InputError: no group has a `weight_ema`, or this is already inside another such block. On leaving: a
                weight was changed inside; the trained one is back then.
        """
        if all(group["weight_ema"] is None for group in self.param_groups):
            raise InputError("use_weight_ema() needs an optimizer built with weight_ema, such as 0.999")
        self.refuse_weight_ema("use_weight_ema()")
        entries = [e for e in self._current_plan().entries if "weight_ema" in e.tensors and e.state["step"]]
        trained = [(entry, local_tensor(entry.param.detach()).clone()) for entry in entries]
        self._averaged = True
        try:
            for entry, value in trained:
                local_tensor(entry.param.detach()).copy_(self._averaged_weight(entry, value))
            yield
            for entry, value in trained:
                now = local_tensor(entry.param.detach()).to(value)
                if not torch.allclose(now, self._averaged_weight(entry, value), 0.0, 0.0, equal_nan=True):
                    raise InputError(
                        f"the weight {entry.name} was changed inside use_weight_ema(), and is the trained one again: "
                        f"set or load weights outside"
                    )
        finally:
            for entry, value in trained:
                local_tensor(entry.param.detach()).copy_(value)
            self._averaged = False

    def _averaged_weight(self, entry: Entry, weight: Tensor) -> Tensor:
        flat = weight.clone().reshape(-1)
        for where in entry.tiles(_TILE):
            flat.narrow(0, where.local, where.numel).copy_(entry.decoded("weight_ema", where))
        return flat.view(weight.shape)

    def refuse_weight_ema(self, what: str) -> None:
        """Raise an InputError inside `use_weight_ema()`; `what` is what cannot be done there."""
        if self._averaged:
            raise InputError(f"{what} inside use_weight_ema(): the averaged weights are in force, leave it first")

    @classmethod
    def from_adamw(cls, adamw: Optimizer, **options: Any) -> AdEMAMix:
        """Go on from a torch AdamW (or an Adam without L2 weight decay) in mid-run.

        exp_avg, exp_avg_sq and the step are taken over (fp32 tensors without a copy: drop the old optimizer); m2
        starts at zero, an average of the weights at the weights. The bias corrections go on counting, the schedules
        of alpha and beta3 start at the switch. lr, weight decay, eps, beta1, beta2 and maximize come from `adamw`'s
        groups: change them there before, or in the new groups after.

        Args:
            adamw: the optimizer to go on from, with or without state.
            options: AdEMAMix's other arguments. `betas` may be given for its beta3, which else is 0.9999; the other
                two must be `adamw`'s.

        Returns:
            A new optimizer over the same parameters and groups.

        Raises:
            InputError: an amsgrad optimizer (its maximum has no counterpart), another kind of optimizer, or an option
                that comes from `adamw`.
        """
        from shardopt.optim.from_adamw import take_over

        return take_over(cls, adamw, options)

    # -- state --------------------------------------------------------------------------------------------------

    def _layouts(self, group: Mapping[str, Any], param: Tensor, name: str = "a parameter") -> tuple[Layout, ...]:
        """What the local tensor of `param` holds."""
        weight, found = local_values(param), self.layouts.get(param) if self.layouts else None
        try:
            found = layout_of(param, name) if found is None else found
        except PlacementError as e:
            formats, settings = schema.formats_of(group["state_dtype"]), schema.Deciding.of(group)
            rounded = any(formats[tensor.key].name != "fp32" for tensor in STATE_TENSORS if tensor.kept(settings))
            if rounded or (weight.dtype == torch.bfloat16 and group["master_weights"] is None):
                raise InputError(f"stochastic rounding cannot place {name}: {e}; use state_dtype='fp32'") from e
            # nothing is rounded: where the elements belong does not matter
            found = Layout.whole(name, (weight.numel(),))
        layouts = (found,) if isinstance(found, Layout) else tuple(found)
        end = max((r.local_start + r.length for layout in layouts for r in layout.ranges), default=0)
        if end > weight.numel():
            raise InputError(f"the layout of {name} ends at element {end}, the local tensor has {weight.numel()}")
        return layouts

    def _stored(self, group: Mapping[str, Any], param: Tensor) -> Mapping[str, Stored]:
        local, settings = local_values(param), schema.Deciding.of(group)
        stored, in_blocks = _of_elements(settings, local.dtype, local.shape)
        if not in_blocks:
            return stored
        scales = Stored(torch.float32, self._scale_shape(group, param))
        return dict(stored) | {f"{key}_scale": scales for key in in_blocks}

    def _scale_shape(self, group: Mapping[str, Any], param: Tensor) -> torch.Size:
        """(blocks held here); of a DTensor (1, blocks of the largest shard), as every shard is a row of the whole."""
        layouts = self._layouts(group, param)
        if not hasattr(param, "placements"):
            return torch.Size([sum(precision.blocks(r.length) for layout in layouts for r in layout.ranges)])
        first = layout_of(param, "the first shard", [0] * len(param.placements))  # none is larger
        return torch.Size([1, sum(precision.blocks(r.length) for r in first.ranges)])

    def _create_state(self, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
        self._plan, state = None, super()._create_state(group, param)
        for key in {"master", "weight_ema"} & state.keys():
            self._store(group, param, key, local_tensor(param.detach()))
        return state

    def _store(self, group: Mapping[str, Any], param: Tensor, key: str, values: Tensor) -> None:
        """Encode the local `values` as the state tensor `key`, rounded to nearest."""
        state = self.state[param]
        if f"{key}_scale" not in state:
            local_tensor(state[key]).copy_(values)
            return
        entry, flat = self._entry(key, group, param), values.reshape(-1).float()
        for where in entry.tiles(_TILE):
            part = flat.narrow(0, where.local, where.numel)
            entry.formats[key].encode(part, None, *entry.stored(key, where))

    def _entry(self, name: str, group: Mapping[str, Any], param: Tensor) -> Entry:
        """The local tensors of `param` and its state, all of which are what they should be."""
        state, weight = self.state[param], local_values(param)
        layouts = self._layouts(group, param, name)
        check_state(name, state, weight, self._stored(group, param))
        index = next(i for i, other in enumerate(self.param_groups) if other is group)
        tensors = {k: local_tensor(v) for k, v in state.items() if isinstance(v, Tensor) and k not in schema.COUNTS}
        for key in tensors.keys() & schema.SCALES:
            tensors[key] = tensors[key].view(-1)  # a row of a DTensor
        formats = {key: fmt for key, fmt in schema.formats_of(group["state_dtype"]).items() if key in tensors}
        kernel = kernels.choose(self._kernel_choice, weight)
        return Entry(name, param, index, state, tensors, formats, layouts, kernel)

    def _names(self) -> dict[Tensor, str]:
        """Names that key the random bits of each parameter; unnamed ones say which optimizer they belong to."""
        names = states.parameter_names(self)
        for group in self.param_groups:
            if group.get("stream") and "param_names" not in group:
                names.update((param, f"{names[param]} of optimizer {group['stream']}") for param in group["params"])
        return names

    def _is_planned(self) -> bool:
        """True while the plan fits the parameters, their groups and their state."""
        plan = self._plan
        if plan is None or plan.groups is not self.param_groups or self._decisive != self._decisions():
            return False
        return plan.holds(self.state)

    def _decisions(self) -> list[schema.Deciding]:
        """The settings that decide which state there is."""
        return [schema.Deciding.of(group) for group in self.param_groups]

    def _current_plan(self) -> Plan:
        if not self._is_planned():
            self._plan, self._decisive = None, self._decisions()
            names = self._names()
            for key, state in self.state.items():
                if not isinstance(key, Tensor) or not isinstance(state, dict):
                    name = names.get(key, key) if isinstance(key, Tensor) else key
                    raise InputError(f"optimizer.state[{name!r}] is {state!r}, no parameter's state: delete it")
            self._plan = Plan(
                self.param_groups, self.state, lambda group, param: self._entry(names[param], group, param)
            )
        assert self._plan is not None
        return self._plan

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        first, added = self.param_groups[0], self.param_groups[-1]
        if "param_names" not in added and "stream" not in added:
            added["stream"] = next(_unnamed) if added is first else first.get("stream", 0)
        self._plan = None

    def _check_settings(self, group: dict[str, Any]) -> None:
        super()._check_settings(group)
        if group["beta3_warmup"] is not None and group["betas"][2] == 0.0:
            raise InputError("beta3 must be > 0 and < 1 when beta3_warmup is given, got 0.0")

    def _check_parameter(self, group: Mapping[str, Any], param: Tensor, name: str) -> None:
        if param.is_complex():
            raise InputError(f"parameter {name} is complex: optimise torch.view_as_real of it")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "layouts": self.layouts, "_kernel_choice": self._kernel_choice}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan, self._averaged = None, False

    def state_dict(self) -> dict[str, Any]:
        """The state and the settings, as torch's; refused inside `use_weight_ema`."""
        self.refuse_weight_ema("state_dict()")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.refuse_weight_ema("load_state_dict()")
        if self._plan is not None and self._plan.captured:
            for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
                for key in schema.DEFAULTS:
                    if not isinstance(group[key], Tensor) and saved.get(key, group[key]) != group[key]:
                        raise InputError(
                            f"a CUDA graph holds a step of this optimizer with {key}={group[key]!r}, and the saved "
                            f"state has {saved[key]!r}: load it before capturing"
                        )
        super().load_state_dict(state_dict)

    # -- the step -----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step (see CheckedOptimizer.step); refused inside `use_weight_ema`."""
        self.refuse_weight_ema("step()")
        return super().step(closure)

    def _repeat(self) -> bool:
        plan = self._plan
        return plan is not None and plan.by_address and self._is_planned() and plan.repeat()

    def _update(self) -> None:
        params = [param for group in self.param_groups for param in group["params"]]
        grads = [param.grad for param in params]
        plan = self._plan if self._is_planned() else None
        absent = range(len(params)) if plan is None else plan.absent
        if missing := [i for i in absent if grads[i] is not None and not self.state.get(params[i])]:
            groups = [group for group in self.param_groups for _ in group["params"]]
            for i in missing:
                self._create_state(groups[i], params[i])
            plan = None
        if not self.state and all(grad is None for grad in grads):
            warnings.warn(
                "no parameter of the optimizer has a gradient, so this step does nothing: make the optimizer after "
                "fully_shard, to(device) and the like, which may give the model other parameters, and step after "
                "backward",
                stacklevel=7,  # past torch's wrappers
            )
        if not (plan or self._current_plan()).step(grads):
            self._plan = None
            self._current_plan().step(grads)
