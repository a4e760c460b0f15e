"""A whole training state, whatever file it lies in: what every outside format is read to and written from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardopt.checkpoint.flat import few
from shardopt.errors import InputError
from shardopt.optim import schema
from shardopt.optim.precision import join_fp32

BESIDE = ("weight", "buffer")  # the kinds that are no optimizer's
ADAMW = {"exp_avg": "m1", "exp_avg_sq": "nu"}
_AMSGRAD = "max_exp_avg_sq"


class Whole(NamedTuple):
    """A whole tensor that is read when it is asked for.

    Args:
        mapped: `read` gives a view of a file, which takes no memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    mapped: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> Whole:
        """One that lies in a memory-mapped file."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor, mapped=True)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> Whole:
        """The same in another dtype; reading it raises InputError where a value is beyond its range."""

        def read() -> Tensor:
            given = self.read()
            converted = given.to(dtype)
            if dtype.is_floating_point and bool((converted.isinf() & ~given.isinf()).any()):
                raise InputError(f"a value of a tensor of shape {self.shape} is beyond the range of {dtype}")
            return converted

        return self if dtype == self.dtype else Whole(self.shape, dtype, read)


@dataclass(frozen=True)
class TrainingState:
    """Weights, buffers and optimizer state of a model by name and kind, and the numbers beside them.

    Attributes:
        tensors: kinds are "weight", "buffer" and the optimizer's own state keys (m1, m2, nu; exp_avg, exp_avg_sq).
        counts: the numbers in the optimizer's state, by parameter name.
        groups: {"names": [...]} and hyper-parameters of each parameter group; empty where the source keeps none.
        step: of the training, if known.
        model_files: config and tokenizer of the model, where they lie beside the source.
        source: the format it was read from.
    """

    tensors: dict[tuple[str, str], Whole]
    counts: dict[str, dict[str, int | float]]
    groups: list[dict[str, Any]] = field(default_factory=list)
    step: int | None = None
    model_files: tuple[Path, ...] = ()
    source: str = ""

    def by_parameter(self) -> dict[str, dict[str, Whole]]:
        """The state tensors of each parameter by their key."""
        found: dict[str, dict[str, Whole]] = {}
        for (name, kind), whole in self.tensors.items():
            if kind not in BESIDE:
                found.setdefault(name, {})[kind] = whole
        return found

    @property
    def stateful(self) -> list[str]:
        """The parameters that have optimizer state, in their order."""
        return list(self.by_parameter())

    @property
    def optimizer(self) -> str | None:
        """ "ademamix", "adamw", "other", or None where there is no state at all."""
        kinds = {kind for _, kind in self.tensors if kind not in BESIDE}
        return "ademamix" if "m2" in kinds else "adamw" if "exp_avg_sq" in kinds else "other" if kinds else None

    @property
    def nbytes(self) -> int:
        return sum(whole.nbytes for whole in self.tensors.values())

    def full_groups(self) -> list[dict[str, Any]]:
        """`groups`, where they name the very parameters that have state; else one of all of them, without settings."""
        named = [name for group in self.groups for name in group["names"]]
        if sorted(named) == sorted(self.stateful):
            return self.groups
        return [{"names": self.stateful}] if self.stateful else []

    def without(self, keys: Iterable[str]) -> TrainingState:
        """Without state tensors and counts of these keys.

        Raises:
            InputError: there is none of a key, or it is the weights.
        """
        keys = set(keys)
        there = {kind for _, kind in self.tensors} - {"weight"} | {k for entry in self.counts.values() for k in entry}
        if strange := sorted(keys - there):
            raise InputError(f"--drop {strange[0]}: there is {few(there)} to drop")
        tensors = {key: whole for key, whole in self.tensors.items() if key[1] not in keys}
        counts = {name: {k: v for k, v in entry.items() if k not in keys} for name, entry in self.counts.items()}
        return replace(self, tensors=tensors, counts=counts)

    def check_fits(self, what: str, kinds: Iterable[str], counts: Iterable[str] = ("step",)) -> None:
        """Raise InputError where there are state tensors or counts that `what`, a format, has no place for."""
        there = {kind for _, kind in self.tensors if kind not in BESIDE}
        left = sorted(there - set(kinds)) + sorted({k for e in self.counts.values() for k in e} - set(counts))
        if left:
            advice = " ".join(f"--drop {key}" for key in left)
            raise InputError(f"{what} has no place for {', '.join(left)}: to leave it out, add {advice}")

    def for_optimizer(self, name: str | None) -> TrainingState:
        """As the state of AdamW or AdEMAMix: the first moments are each other's, m2 begins with zeros.

        Raises:
            InputError: neither of the two can be made of this state.
        """
        if name is None or name == self.optimizer:
            return self
        if name == "ademamix" and self.optimizer == "adamw":
            return self._ademamix()
        if name == "adamw" and self.optimizer == "ademamix":
            self.without(["m2"]).check_fits("AdamW", ADAMW.values(), ("step", "schedule_step"))
            if lacking := [n for n in self.stateful if (n, "m1") not in self.tensors]:
                raise InputError(f"AdamW needs m1, which beta1 = 0 does not keep, of {few(lacking)}")
            own = {kind: theirs for theirs, kind in ADAMW.items()}
            kept = {(n, own.get(k, k)): whole for (n, k), whole in self.tensors.items() if k != "m2"}
            counts = {n: {"step": entry["step"]} for n, entry in self.counts.items()}
            known = ("names", "lr", "eps", "weight_decay", "maximize")
            groups = [{k: g[k] for k in known if k in g} for g in self.groups]
            for group, old in zip(groups, self.groups, strict=True):
                group |= {"betas": old["betas"][:2]} if "betas" in old else {}
            return replace(self, tensors=kept, counts=counts, groups=groups)
        raise InputError(f"--optimizer {name}: the state is of {self.optimizer or 'no optimizer'} and cannot become it")

    def _ademamix(self) -> TrainingState:
        """See AdEMAMix.from_adamw: m2 and the schedules start here."""
        if any(kind == _AMSGRAD for _, kind in self.tensors):
            raise InputError("--optimizer ademamix: the running maximum of amsgrad has no counterpart")
        tensors: dict[tuple[str, str], Whole] = {}
        for (name, kind), whole in self.tensors.items():
            tensors[name, ADAMW.get(kind, kind)] = whole
            if kind == "exp_avg":
                zeros = Whole(whole.shape, torch.float32, lambda shape=whole.shape: torch.zeros(shape))  # type: ignore[misc]
                tensors[name, "m2"] = zeros
        counts: dict[str, dict[str, int | float]] = {
            name: {"step": int(entry["step"]), "schedule_step": 0} for name, entry in self.counts.items()
        }
        known = ("names", "lr", "eps", "weight_decay", "maximize")
        groups = [{k: g[k] for k in known if k in g} for g in self.groups]
        for group, old in zip(groups, self.groups, strict=True):
            group |= {"betas": (*old["betas"], schema.DEFAULTS["betas"][2])} if "betas" in old else {}
        return replace(self, tensors=tensors, counts=counts, groups=groups)

    def in_fp32(self) -> TrainingState:
        """All state in fp32, and the weights that have a master as that master: exact."""
        tensors: dict[tuple[str, str], Whole] = {}
        for (name, kind), whole in self.tensors.items():
            low, master = self.tensors.get((name, "master_low")), self.tensors.get((name, "master"))
            if kind == "weight" and master is not None:
                tensors[name, kind] = master
            elif kind == "weight" and low is not None:
                joined = lambda high=whole, low=low: join_fp32(high.read(), low.read())  # noqa: E731
                tensors[name, kind] = Whole(whole.shape, torch.float32, joined)
            elif kind not in ("master", "master_low"):
                tensors[name, kind] = whole.to(torch.float32) if kind != "buffer" else whole
        return replace(self, tensors=tensors)


def is_alone(tensor: Tensor) -> bool:
    """True where torch.save writes the tensor and nothing beside it."""
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


class Scratch:
    """Tensors in files of a folder, so that what is not mapped already takes disk and not memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._made = folder, 0

    def keep(self, whole: Whole) -> Tensor:
        """The tensor's values, contiguous, in a file's memory and with a storage of its own."""
        if whole.mapped and is_alone(tensor := whole.read()):
            return tensor
        if not math.prod(whole.shape):
            return torch.empty(whole.shape, dtype=whole.dtype)
        self._made += 1
        path = str(self.folder / f"{self._made}")
        kept = torch.from_file(path, shared=True, size=math.prod(whole.shape), dtype=whole.dtype).view(whole.shape)
        return kept.copy_(whole.read())
