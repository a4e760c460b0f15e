"""A whole training state, whatever file it lies in: what every outside format is read to and written from."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from shardopt.errors import InputError, MissingExtraError, few
from shardopt.optim.from_adamw import SETTINGS, STATE_FROM_ADAMW, settings_from_adamw
from shardopt.optim.precision import join_fp32

BESIDE = ("weight", "buffer")  # the kinds that are no optimizer's
ADAMW = {theirs: ours for ours, theirs in STATE_FROM_ADAMW.items() if theirs is not None}
# The state tensors that a parameter has all of, or none.
_NEEDED = {"adamw": {*ADAMW, "step"}, "ademamix": {*STATE_FROM_ADAMW, "step"}}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise what damage makes a reader raise, which may be anything, as an InputError that names the file."""
    try:
        yield
    except (InputError, MissingExtraError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read, and may be damaged: {type(error).__name__}: {reason}") from error


def check_zip(path: Path, file: IO[bytes] | None = None) -> None:
    """Compare the checksums in what torch.save wrote; torch.load does not.

    Args:
        file: its content, where it is a part of `path`.

    Raises:
        InputError: one differs, or it is no such file.
    """
    if not zipfile.is_zipfile(file or path):
        raise InputError(f"cannot read {path} as tensors and plain data: it is cut short, or no file of torch.save")
    with reading(path), zipfile.ZipFile(file or path) as records:
        if (bad := records.testzip()) is not None:
            raise InputError(f"{path} is damaged: its record {bad} does not have its checksum")


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

    def to(self, dtype: torch.dtype, name: str) -> Whole:
        """The same in another dtype; reading it raises InputError, with its `name`, for a value beyond its range."""

        def read() -> Tensor:
            given = self.read()
            converted = given.to(dtype)
            if dtype.is_floating_point and bool((converted.isinf() & ~given.isinf()).any()):
                raise InputError(f"a value of {name} is beyond the range of {dtype}")
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

    def checked(self) -> TrainingState:
        """The state itself, after a check that its parts fit together.

        Raises:
            InputError: they do not.
        """
        held = self.by_parameter()
        for (name, kind), whole in self.tensors.items():
            weight = self.tensors.get((name, "weight"))
            if kind not in BESIDE and weight is not None and whole.shape != weight.shape:
                raise InputError(f"{name}: its state {kind} is {tuple(whole.shape)}, its weight {tuple(weight.shape)}")
        for name, entry in self.counts.items():
            if any(type(number) not in (int, float) or number < 0 for number in entry.values()):
                raise InputError(f"{name}: its counts are no numbers: {entry!r}")
        if self.step is not None and (type(self.step) is not int or self.step < 0):
            raise InputError(f"its step is {self.step!r}")
        if self.optimizer not in _NEEDED:
            return self
        for group in self.groups:
            _check_settings(group)
        beta1 = {name: group["betas"][0] for group in self.groups if "betas" in group for name in group["names"]}
        for name, kinds in held.items():
            has = kinds.keys() | self.counts.get(name, {}).keys()
            if (name, "weight") not in self.tensors:
                raise InputError(f"there is {few(has)} of {name}, and no weight")
            # m1 is not kept where beta1 is 0; where that is not known, all parameters have it or none has.
            kept = beta1.get(name, any("m1" in other for other in held.values()))
            if lacking := _NEEDED[self.optimizer] - has - (set() if kept else {"m1"}):
                raise InputError(f"there is {few(has)} of {name}, and no {few(lacking)}")
        return self

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
            return self._of_adamw()
        if name == "adamw" and self.optimizer == "ademamix":
            self.without(["m2"]).check_fits("AdamW", ADAMW.values(), ("step", "schedule_step"))
            if lacking := [n for n in self.stateful if (n, "m1") not in self.tensors]:
                raise InputError(f"AdamW needs m1, which beta1 = 0 does not keep, of {few(lacking)}")
            own = {kind: theirs for theirs, kind in ADAMW.items()}
            kept = {(n, own.get(k, k)): whole for (n, k), whole in self.tensors.items() if k != "m2"}
            counts = {n: {"step": entry["step"]} for n, entry in self.counts.items()}
            groups = [{k: g[k] for k in ("names", *SETTINGS) if k in g} for g in self.groups]
            for group, old in zip(groups, self.groups, strict=True):
                group |= {"betas": old["betas"][:2]} if "betas" in old else {}
            return replace(self, tensors=kept, counts=counts, groups=groups)
        raise InputError(f"--optimizer {name}: the state is of {self.optimizer or 'no optimizer'} and cannot become it")

    def _of_adamw(self) -> TrainingState:
        """See AdEMAMix.from_adamw: m2 and the schedules start here."""
        groups = [{"names": group["names"], **settings_from_adamw(group)} for group in self.groups]
        self.check_fits("AdEMAMix", ADAMW)
        tensors = {key: whole for key, whole in self.tensors.items() if key[1] in BESIDE}
        for name, held in self.by_parameter().items():
            shape = self.tensors[name, "weight"].shape
            zeros = Whole(shape, torch.float32, partial(torch.zeros, shape))
            tensors |= {(name, ours): held[theirs] if theirs else zeros for ours, theirs in STATE_FROM_ADAMW.items()}
        counts: dict[str, dict[str, int | float]] = {
            name: {"step": entry["step"], "schedule_step": 0} for name, entry in self.counts.items()
        }
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
                tensors[name, kind] = whole if kind == "buffer" else whole.to(torch.float32, f"{name}/{kind}")
        return replace(self, tensors=tensors)


def _check_settings(group: dict[str, Any]) -> None:
    """Raise InputError where what AdamW and AdEMAMix compute with is no number."""
    numbers = [group[key] for key in ("lr", "eps", "weight_decay") if key in group]
    betas = group.get("betas", (0.9, 0.999))
    if not isinstance(betas, tuple | list) or not 2 <= len(betas) <= 3:
        raise InputError(f"the betas of {few(group['names'])} are {betas!r}")
    for number in (*numbers, *betas):
        if not isinstance(number, int | float) and not (isinstance(number, Tensor) and number.numel() == 1):
            raise InputError(f"a hyper-parameter of {few(group['names'])} is {number!r}, which is no number")


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
        path = self.folder / f"{self._made}"
        with path.open("wb") as file:  # a full disk is an OSError here, and the process's end in mapped memory
            os.posix_fallocate(file.fileno(), 0, whole.nbytes)
        size = math.prod(whole.shape)
        kept = torch.from_file(str(path), shared=True, size=size, dtype=whole.dtype).view(whole.shape)
        return kept.copy_(whole.read())
