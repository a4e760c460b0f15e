"""The base class of our optimizers: settings are checked wherever they come from, and state is loaded whole or not."""

from __future__ import annotations

import abc
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from shardopt.errors import InputError, did_you_mean
from shardopt.optim import states
from shardopt.optim.schema import ALIASES, COUNTS, STATE_KEYS, HyperParameter, signature
from shardopt.slices import canonical_name, is_packed, is_shard, layout_of, local_tensor, local_values, shards_of


class Stored(NamedTuple):
    """The local tensor that a state key stands for."""

    dtype: torch.dtype
    shape: torch.Size


class CheckedOptimizer(Optimizer, abc.ABC):
    """A torch optimizer that refuses wrong settings and foreign state by name; subclasses add the update.

    A class with `hyper_parameters` has an `__init__(self, params, *positional, **hyper_parameters)`, whose signature
    they become.
    """

    hyper_parameters: ClassVar[Mapping[str, HyperParameter]]
    given_names: WeakTensorKeyDictionary  # what each parameter was called when it was added
    _settings: ClassVar[itemgetter[Any]]  # of a group, all but lr
    _checked: Sequence[Any] = ()  # each group's settings as they were when last checked
    _sizes: Sequence[int] = ()  # and how many keys it had

    def __init_subclass__(cls) -> None:
        if "hyper_parameters" in vars(cls):
            cls.__init__.__signature__ = signature(cls.__init__, cls.hyper_parameters)  # type: ignore[attr-defined]
            cls._settings = itemgetter(*(key for key in cls.hyper_parameters if key != "lr"))

    def __init__(self, params: Any, *positional: Any, **given: Any) -> None:
        known = self.hyper_parameters
        try:
            bound = signature(CheckedOptimizer.__init__, known).bind(self, params, *positional, **given)
        except TypeError as error:
            strange = [ALIASES.get(key, key) for key in given if key not in known]
            hint = did_you_mean(strange[0], known, cutoff=0.7) if strange else ""
            raise TypeError(f"{type(self).__name__}: {error}{hint}") from None
        bound.apply_defaults()
        defaults = {name: bound.arguments[name] for name in known}
        self._check_settings(defaults)
        super().__init__(params, defaults)

    def _check_keys(self, group: Mapping[str, Any]) -> None:
        """Refuse a key that is nearly a setting's, with an InputError; schedulers and hosts have keys of their own."""
        for key in sorted(group.keys() - self.defaults.keys(), key=str):
            if hint := did_you_mean(ALIASES.get(key, str(key).lower()), self.defaults, cutoff=0.85):
                raise InputError(f"a parameter group has no setting {key!r}{hint}")

    def _check_settings(self, group: dict[str, Any]) -> None:
        """Refuse hyper-parameters out of range, with an InputError; bring them into the form that the group keeps."""
        group.update({name: entry.check(name, group[name]) for name, entry in self.hyper_parameters.items()})

    @abc.abstractmethod
    def _check_parameter(self, group: Mapping[str, Any], param: Tensor, name: str) -> None:
        """Refuse a parameter of a kind that the optimizer cannot update, with an InputError."""

    @abc.abstractmethod
    def _stored(self, group: Mapping[str, Any], param: Tensor) -> Mapping[str, Stored]:
        """The state tensors of `param` beside its counts, in the order in which they are made."""

    def _counter(self, step: int, group: Mapping[str, Any], param: Tensor) -> int | Tensor:
        """A step count: a number, or an int64 scalar on the parameter's device for capturable groups."""
        if not group.get("capturable"):
            return step
        return torch.full((), step, dtype=torch.int64, device=local_tensor(param.detach()).device)

    @abc.abstractmethod
    def _update(self) -> None:
        """One step of every parameter that has a gradient, all settings being right."""

    def _repeat(self) -> bool:
        """One step where all is as at the one before, without tensor operations; else False, and nothing is done."""
        return False

    # -- the step -------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient; returns the closure's loss.

        Raises:
            InputError: a setting changed to one out of its range, or a tensor that does not fit its state. Nothing has
                moved then.
            RuntimeError: a sparse gradient, as torch's own optimizers have it. Nothing has moved then either.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_changes()
        if not self._repeat():
            with torch.no_grad():
                if self._only_creates_state():
                    self.init_state()
                else:
                    self._update()
        return loss

    @torch.no_grad()
    def init_state(self) -> None:
        """Create the state of every parameter that requires grad. Counts no step, leaves existing state alone."""
        self._check_changes()
        for group in self.param_groups:
            for param in group["params"]:
                if param.requires_grad and not self.state.get(param):
                    self._create_state(group, param)

    def _create_state(self, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
        """State before the first step: all zeros."""
        stored = self._stored(group, param).items()
        self.state[param] = {"step": self._counter(0, group, param)} | {k: _zeros(param, k, want) for k, want in stored}
        return self.state[param]

    # -- settings -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group (see the class for what it may set).

        Raises:
            InputError: a hyper-parameter out of its range or misspelt, or a parameter that cannot be updated. The
                group is then not added.
        """
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        self.__dict__.setdefault("given_names", WeakTensorKeyDictionary())
        self.given_names.update(zip(added["params"], added.get("param_names", ()), strict=False))
        try:
            self._check_keys(added)
            self._check_settings(added)
            for i, param in enumerate(added["params"]):
                name = added.get("param_names", {i: f"number {i} of its group"})[i]
                if is_packed(local := local_tensor(param.detach())):
                    raise InputError(
                        f"parameter {name} is a {type(local).__name__}, whose elements no step can write one by one: "
                        f"give the optimizer float weights, or only what is trained beside the quantized ones"
                    )
                self._check_parameter(added, param, name)
        except Exception:
            self.param_groups.pop()
            raise
        self._sizes = [*map(len, self.param_groups)]

    def _check_changes(self) -> None:
        """Check the groups' settings where they are not those that were checked last; cheap where they are."""
        sizes = [*map(len, self.param_groups)]
        if sizes != self._sizes:
            for group in self.param_groups:
                self._check_keys(group)
            self._sizes = sizes
        now = [*map(self._settings, self.param_groups)]
        if now == self._checked and all(_is_usual(group["lr"]) for group in self.param_groups):
            return
        for i, group in enumerate(self.param_groups):
            if not (_is_usual(group["lr"]) and self._checked[i : i + 1] == now[i : i + 1]):
                self._check_settings(group)
        self._checked = now

    # -- loading --------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; every state tensor keeps the dtype it was saved in.

        Named parameters are matched by name. The saved hyper-parameters, seed included, replace the present ones;
        those that an older state dict lacks stay. A parameter without saved state, as one that never had a gradient,
        starts at its first gradient here. A refusal leaves everything as it was.

        Raises:
            InputError: names, settings, state keys, dtypes or shapes that do not fit, saying which.
        """
        handle = self.register_load_state_dict_pre_hook(_prepare)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        before: dict[str, Any] = {key: self.__dict__[key] for key in ("state", "param_groups") if key in self.__dict__}
        held = before.get("state", {})
        copies: list[tuple[Tensor, Tensor]] = []  # made last, so that a refusal changes nothing
        super().__setstate__(state)
        self._checked = ()
        try:
            for group in self.param_groups:
                self._check_settings(group)
                for param in group["params"]:
                    saved = self.state.get(param)
                    if isinstance(saved, _Box):
                        self.state[param] = self._adopt(group, param, saved, held.get(param, {}), copies)
        except Exception:
            self.__dict__.update(before)
            raise
        with torch.no_grad():
            for target, source in copies:
                target.copy_(source)

    def _adopt(
        self, group: dict[str, Any], param: Tensor, box: _Box, held: dict[str, Any], copies: list[tuple[Tensor, Tensor]]
    ) -> dict[str, Any]:
        """A parameter's saved state as this process's own, in the storage it has already where that fits."""
        saved, name, stored = box.state, box.name, self._stored(group, param)
        if misfit := _misfit(saved, {"step", *stored}, saved.keys() - {"schedule_step"}):
            raise InputError(
                f"the saved state of parameter {name} {misfit}: it is another optimizer's, or of other settings"
            )
        state: dict[str, Any] = {}
        local = local_tensor(param.detach())
        for key, value in saved.items():
            if key in COUNTS:
                count = float(value)
                if count < 0 or count != int(count):
                    raise InputError(f"the saved {key} of parameter {name} must be a count, got {value!r}")
                state[key] = self._counter(int(count), group, param)
                if isinstance(held.get(key), Tensor) and isinstance(state[key], Tensor):
                    copies.append((held[key], state[key]))  # a captured graph reads the one that is held
                    state[key] = held[key]
                continue
            want = stored[key]
            tensor = local_tensor(value)
            whole = type(value) is type(tensor) and tensor.shape == param.shape != local.shape == want.shape
            if whole and f"{key}_scale" not in stored:  # blocks of a whole are not those of a shard
                tensor = torch.empty(local.shape, dtype=value.dtype, device=value.device)
                layout_of(param, name).copy_from_whole(tensor, value)
            placements = getattr(value, "placements", None)
            fitting = (None, _placements(param, per_shard=key.endswith("_scale")))
            if (tensor.dtype, tensor.shape) != want or placements not in fitting:
                placed = "" if placements is None else f", placed as {placements}"
                raise InputError(
                    f"the saved {key} of parameter {name} is {tensor.dtype} of shape {tuple(tensor.shape)}{placed}; "
                    f"here it is {want.dtype} of shape {tuple(want.shape)}"
                )
            state[key] = held.get(key)
            if state[key] is None or (local_tensor(state[key]).dtype, local_tensor(state[key]).shape) != want:
                state[key] = _zeros(param, key, want)
            copies.append((local_tensor(state[key]), tensor))
        return state

    def _only_creates_state(self) -> bool:
        """True for the first step by which torch.distributed.checkpoint or torchtitan creates state: it must not count.

        Its gradients are zeros and lr is 0. But so may be those of a true first step where this rank's shards are
        empty or have met no token yet, and then the other ranks count it: only the caller tells the two apart.
        """
        if self.state or any(float(group["lr"]) != 0.0 for group in self.param_groups):
            return False
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_name not in _CREATE_STATE:
            frame = frame.f_back  # type: ignore[assignment]
        return frame is not None


def _is_usual(lr: Any) -> bool:
    return type(lr) is float and 0.0 <= lr < math.inf


_CREATE_STATE = {"_init_optim_state", "init_optim_state"}  # of torch.distributed.checkpoint, of torchtitan 0.3


class _Box:
    """Hides a saved state from torch's load_state_dict, which would cast it to the parameter's dtype."""

    def __init__(self, name: str, state: dict[str, Any]) -> None:
        self.name, self.state = name, state


def _prepare(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The last of the pre-hooks: match saved parameters by name where both have names, keep settings not saved."""
    saved_groups = [dict(group) for group in state_dict["param_groups"]]
    for number, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=False)):
        if "foreach" in saved or ("alpha" in group) != ("alpha" in saved):  # torch's own all have foreach
            hint = "; AdEMAMix.from_adamw takes over an AdamW" if "alpha" in group else ""
            raise InputError(f"parameter group {number} of the saved state is another optimizer's{hint}")
        if "param_names" in group and "param_names" in saved:
            ours = [canonical_name(name) for name in group["param_names"]]
            theirs = [canonical_name(name) for name in saved["param_names"]]
            if misfit := _misfit(theirs, ours, theirs):
                raise InputError(f"parameter group {number} of the saved optimizer state does not fit: it {misfit}")
            # A host (DeepSpeed) that has put flat partitions in the parameters' place has their names still.
            if len(theirs) == len(saved["params"]) and len(ours) == len(group["params"]):
                ids = dict(zip(theirs, saved["params"], strict=True))
                saved["params"], saved["param_names"] = [ids[name] for name in ours], list(group["param_names"])
        for key, value in group.items():
            saved.setdefault(key, value)
    names = states.parameter_names(optimizer)
    of_id = {
        key: names[param]
        for group, saved in zip(optimizer.param_groups, saved_groups, strict=False)
        for key, param in zip(saved["params"], group["params"], strict=False)
    }
    if strangers := [key for key in state_dict["state"] if key not in of_id]:
        raise InputError(f"the saved state has an entry {strangers[0]!r} that belongs to none of its parameters")
    boxes = {key: _Box(of_id[key], state) for key, state in state_dict["state"].items()}
    return {**state_dict, "param_groups": saved_groups, "state": boxes}


def _misfit(found: Iterable[str], wanted: Iterable[str], known: Iterable[str]) -> str:
    """What is lacking among the names `found`, and which of the `known` are there besides; "" where all is right."""
    lacking, extra = sorted({*wanted} - {*found}), sorted(({*known} & {*found}) - {*wanted}, key=str)
    parts = [f"lacks {lacking[:5]}"] if lacking else []
    return " and ".join([*parts, f"has {extra[:5]} besides"] if extra else parts)


def check_state(name: str, state: Mapping[str, Any], weight: Tensor, stored: Mapping[str, Stored]) -> None:
    """Refuse state that lacks a tensor, or has one of another dtype, device or size than the kernels take it for."""
    advice = (
        "state_dtype, master_weights, weight_ema and whether beta1 is 0 must be what they were when the state was "
        "made, and the model the one it was saved from"
    )
    wanted_keys = {"step", *stored}
    # the comparison alone where all is right: this is asked for each parameter
    if state.keys() != wanted_keys and (misfit := _misfit(state, wanted_keys, STATE_KEYS - {"schedule_step"})):
        raise InputError(f"the state of {name} {misfit}, for {weight.dtype} weights: {advice}")
    for key in COUNTS:
        count = state.get(key, 0)
        if not (isinstance(count, int) or (isinstance(count, Tensor) and count.dtype == torch.int64)):
            raise InputError(f"state {key!r} of {name} must be a whole number, or an int64 tensor, got {count!r}")
    for key, want in stored.items():
        tensor = local_tensor(state[key])
        found, wanted = (tensor.dtype, tensor.shape, tensor.device), (*want, weight.device)
        if found != wanted or not tensor.is_contiguous():
            (a, b, c), (d, e, f) = found, wanted
            raise InputError(
                f"state {key!r} of {name} is {a} of shape {tuple(b)} on {c}, its {weight.dtype} weight needs {d} of "
                f"shape {tuple(e)} on {f}, contiguous: {advice}"
            )


def _placements(param: Tensor, *, per_shard: bool) -> tuple[Any, ...] | None:
    """Those of a state tensor of `param`: as its own or, of one that has a row for each shard, by these rows."""
    placements = getattr(param, "placements", None)
    if placements is None or not per_shard:
        return placements
    from torch.distributed.tensor import Shard

    return tuple(Shard(0) if is_shard(p) else p for p in placements)


def _zeros(param: Tensor, key: str, want: Stored) -> Tensor:
    zeros = torch.zeros(want.shape, dtype=want.dtype, device=local_values(param).device)
    return placed_like(param, zeros, per_shard=key.endswith("_scale"))


def placed_like(param: Tensor, local: Tensor, *, per_shard: bool = False) -> Tensor:
    """`local` as a DTensor where `param` is one, so that hosts and torch.distributed.checkpoint treat the two alike.

    Args:
        local: the local part of a tensor of `param`'s shape. With `per_shard`, a shard's own row, of shape (1, n) on
            every rank: the whole is then of shape (shards, n).
    """
    if not hasattr(param, "placements"):
        return local
    from torch.distributed.tensor import DTensor

    assert isinstance(param, DTensor)
    shape = torch.Size([shards_of(param), local.shape[1]]) if per_shard else param.shape
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    placements = _placements(param, per_shard=per_shard)
    return DTensor.from_local(local, param.device_mesh, placements, run_check=False, shape=shape, stride=stride)
