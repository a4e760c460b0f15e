"""What a raw pointer rests on: where tensors lie, how many elements they have, and of which kind they are.

Asked in Python, these cost more than the step of a small tensor. With a C compiler, cpu.c asks for all tensors in one
call, through torch's C shim (its stable interface for compiled models); without one each tensor is asked in turn.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache, partial
from itertools import chain
from operator import is_, or_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardopt.errors import InputError
from shardopt.optim import kernels

# The answers of torch's C shim, in the order of `Shim` in cpu.c.
_QUESTIONS = (
    *("get_data_ptr", "get_numel", "get_storage_numel", "get_storage_offset"),
    *("get_dtype", "get_layout", "get_device_type", "get_device_index", "is_contiguous", "is_defined"),
)
_GRADIENT = "_ZNK3c1010TensorImpl4gradEv"  # c10::TensorImpl::grad() const, for which the shim has no question
_OF_PYTHON = ("PyDict_Next", "PyDict_Size", "PyDict_SetItem", "PyList_GetItem", "PyList_Size")  # of `Python` there
_MOVED, _CHANGED, _UNTELLABLE = 1, 2, 4  # bits of shardopt_describe's answer
_UNTOLD = -1  # the kind of a tensor about which the shim says nothing, such as a sparse one
_kinds: dict[tuple[object, ...], int] = {}  # numbers below that, for those asked about in Python


class Facts:
    """Facts about state tensors, weights and gradients.

    The shim takes pointers to at::Tensor. Each Python tensor holds one, which is there as long as the tensor.

    Args:
        kept: state tensors, which stay, whatever their `.data` becomes.
        params: parameters, each of which stands for a weight and a gradient.

    Attributes:
        known: int64 [3, tensors], the caller's: what `read` is compared with.
        moved: whether addresses read last are not those in `known`.
        changed: whether the numbers of elements and the kinds are not.
    """

    def __init__(self, kept: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self._kept, self._params, self._shim = list(kept), list(params), _shim()
        count = len(params)
        self.known = np.zeros((3, len(kept) + 2 * count), dtype=np.int64)
        self.moved = self.changed = True
        if self._shim is None:
            return
        self._handles = np.array(self._shim.handles([*kept, *params, *[None] * count]), dtype=np.int64)
        self._own, self._facts = self._handles.copy(), np.zeros_like(self.known)
        # numpy takes longer to give an address than torch to describe a tensor
        size, facts, known = len(self._handles), self._facts.ctypes.data, self.known.ctypes.data
        self._describe = partial(self._shim.describe, self._handles.ctypes.data, size, 0, facts, known)
        self._describe_own = partial(self._shim.describe, self._own.ctypes.data, size, count, facts, known)

    def read(self, weights: Sequence[Tensor], grads: Sequence[Tensor | None]) -> np.ndarray:
        """An int64 column for each tensor, those kept first: address, number of elements, number of its kind.

        The kind is dtype, layout, device, and whether the tensor is contiguous and has storage for every element.
        Zeros stand for None. The array is good until the next call.
        """
        if self._shim is None:
            columns = list(map(_ask, [*self._kept, *weights, *grads]))
            return self._compared(np.array(columns, dtype=np.int64).reshape(-1, 3).T)
        self._handles[len(self._kept) :] = self._shim.handles([*weights, *grads])
        if self._told(self._describe()):
            return self._facts
        for i in np.flatnonzero(self._facts[2] == _UNTOLD):
            self._facts[:, i] = _ask([*self._kept, *weights, *grads][i])
        return self._compared(self._facts)

    def read_own(self) -> np.ndarray | None:
        """What `read` returns of the parameters and the gradients that they have now, without one look at them in
        Python; None where the shim cannot tell."""
        if self._shim is None or not self._shim.tells_gradients or not self._told(self._describe_own()):
            return None
        return self._facts

    def _told(self, found: int) -> bool:
        self.moved, self.changed = bool(found & _MOVED), bool(found & _CHANGED)
        return not found & _UNTELLABLE

    def _compared(self, facts: np.ndarray) -> np.ndarray:
        self.moved, self.changed = bool((facts[0] != self.known[0]).any()), bool((facts[1:] != self.known[1:]).any())
        return facts


class Held:
    """Whether dicts still hold the very objects that they held, in their order and no others.

    Args:
        dicts: of any sizes and keys.
        counts: keys of numbers; another object under one of them is no change.

    Attributes:
        counted: whether, when last looked at, the dicts had under those keys what `count` had put there.
    """

    def __init__(self, dicts: Sequence[dict[Any, Any]], counts: Sequence[str]) -> None:
        self._dicts, self.counted, self._shim = list(dicts), False, _shim()
        # Kept, as C has their addresses only; flat, as a tuple of each item would wake the garbage collector.
        self._keys = [key for held in dicts for key in held]
        self._values = [value for held in dicts for value in held.values()]
        self._apart = [type(key) is str and key in counts for key in self._keys]
        self._lengths, self._counted = [*map(len, dicts)], dict[str, int]()
        if self._shim is None:
            return
        columns = [*map(id, self._keys)], [*map(id, self._values)], self._apart
        self._table = np.array(columns, dtype=np.int64).T.copy()
        table, step = self._table.ctypes.data, self._table.strides[0]
        at, owners = [*map(id, dicts)], [id(held) for held in dicts for _ in held]
        self._look = partial(self._shim.holds, _addresses(at), _addresses(self._lengths), len(dicts), table)
        self._places = {}
        for key in counts:
            rows = [i for i, apart in enumerate(self._apart) if apart and self._keys[i] == key]
            places = _addresses(owners[i] for i in rows), _addresses(table + i * step for i in rows)
            self._places[key] = partial(self._shim.put, *places, len(rows), id(key))

    def unchanged(self) -> bool:
        if self._shim is not None:
            found = self._look()
            self.counted = found == 2
            return bool(found)
        if [*map(len, self._dicts)] != self._lengths:
            return False
        keys, values = chain.from_iterable(self._dicts), chain.from_iterable(held.values() for held in self._dicts)
        same = map(or_, map(is_, values, self._values), self._apart)
        return all(map(is_, keys, self._keys)) and all(same)

    def count(self, key: str, number: int) -> None:
        """Let all dicts that have one of the counts have this number there."""
        if self._shim is None:
            for held in self._dicts:
                if key in held:
                    held[key] = number
            return
        self._counted[key] = number  # kept, too
        self._places[key](id(number))


class Members:
    """Whether lists still have the very members that they had; the lists themselves may be others."""

    def __init__(self, lists: Sequence[list[Any]]) -> None:
        self._members, self._lengths, self._shim = [*chain.from_iterable(lists)], [*map(len, lists)], _shim()
        if self._shim is not None:
            self._lists, lengths = _addresses(self._lengths), _addresses(self._lengths)
            self._look = partial(self._shim.lists, self._lists, lengths, len(lists), _addresses(map(id, self._members)))

    def unchanged(self, lists: Sequence[Sequence[Any]]) -> bool:
        if len(lists) != len(self._lengths):
            return False
        if self._shim is not None and {*map(type, lists)} == {list}:
            self._lists[:] = [*map(id, lists)]
            return bool(self._look())
        return [*map(len, lists)] == self._lengths and all(map(is_, chain.from_iterable(lists), self._members))


def _addresses(numbers: Iterable[int | None]) -> ctypes.Array[ctypes.c_void_p]:
    numbers = list(numbers)
    return (ctypes.c_void_p * len(numbers))(*numbers)


def _functions(functions: Iterable[Any]) -> ctypes.Array[ctypes.c_void_p]:
    return _addresses(ctypes.cast(function, ctypes.c_void_p).value for function in functions)


def has_room(kinds: np.ndarray) -> np.ndarray:
    """True for the kinds of tensors that have storage for every element, where they were told by the shim."""
    return (kinds > 0) & (kinds >> 2 & 1 != 0)


def has_storage(tensor: Tensor) -> bool:
    """True where the storage of `tensor` is there, with room for every element."""
    needed = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    return not tensor.numel() or (tensor.data_ptr() != 0 and tensor.untyped_storage().nbytes() >= needed)


def check_storage(tensor: Tensor, device: torch.device, what: str) -> None:
    """
    Raises:
        InputError: the elements of `tensor` are not in memory, or not on `device`; `what` is its name.
    """
    if tensor.device != device:
        raise InputError(
            f"{what} is on {tensor.device}, the optimizer's state on {device}: move the state along, or build the "
            f"optimizer after moving the model"
        )
    if not has_storage(tensor):
        raise InputError(
            f"{what} has no storage behind it, or not for every element: it was freed, is on the meta device, or is an "
            f"expanded view (clone it)"
        )


def check_reach(tensor: Tensor, what: str) -> None:
    """
    Raises:
        InputError: the last of its elements lies behind the end of its storage; `what` is its name.
    """
    last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    if (last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(f"{what} reaches beyond the end of its storage: it was freed in part")


def _ask(tensor: Tensor | None) -> tuple[int, int, int]:
    """The column of one tensor, in Python."""
    if tensor is None:
        return 0, 0, 0
    strided = tensor.layout is torch.strided
    whole = strided and has_storage(tensor)
    kind = (tensor.dtype, tensor.layout, tensor.device, strided and tensor.is_contiguous(), whole)
    return tensor.data_ptr() if strided else 0, tensor.numel(), _kinds.setdefault(kind, _UNTOLD - 1 - len(_kinds))


class _Shim:
    """torch's C shim and Python's dicts, and the functions of cpu.c that ask them.

    Raises:
        AttributeError: a torch without it, or whose Python tensors are made otherwise.
    """

    def __init__(self, kernel: Any) -> None:
        library = ctypes.PyDLL(torch._C.__file__)  # finds what it is linked with, too
        ask = [getattr(library, f"aoti_torch_{question}") for question in _QUESTIONS]
        ask.append(getattr(library, _GRADIENT, None))
        self.tells_gradients = ask[-1] is not None
        self._ask = _functions(ask)
        self._place, self._nothing = _place_in_python(), ctypes.c_void_p()
        self._python = _functions([getattr(ctypes.pythonapi, name) for name in _OF_PYTHON])
        self.describe = partial(kernel.describe, self._ask)
        self.holds, self.lists, self.put = (partial(f, self._python) for f in (kernel.holds, kernel.lists, kernel.put))

    def handles(self, tensors: Iterable[Tensor | None]) -> list[int]:
        """Addresses of the at::Tensor in each tensor, good as long as the tensor is there."""
        place, nothing = self._place, ctypes.addressof(self._nothing)
        return [nothing if tensor is None else id(tensor) + place for tensor in tensors]


def _place_in_python() -> int:
    """
    Returns:
        Where a Python tensor holds its at::Tensor, a pointer: bytes from its start.

    Raises:
        AttributeError: not in one place.
    """
    places = []
    for tensor in (torch.empty(1), torch.nn.Parameter(torch.empty(1)), torch.empty(1, dtype=torch.int8).view(1, 1)):
        words = (ctypes.c_size_t * (Tensor.__basicsize__ // ctypes.sizeof(ctypes.c_size_t))).from_address(id(tensor))
        places.append([i for i, word in enumerate(words) if word == tensor._cdata])
    if len(places[0]) != 1 or places.count(places[0]) != len(places):
        raise AttributeError("a Python tensor holds no at::Tensor")
    return places[0][0] * ctypes.sizeof(ctypes.c_size_t)


@cache
def _shim() -> _Shim | None:
    """None where there is no C compiler, or a torch without the shim."""
    kernel = kernels._load("c")
    try:
        return None if isinstance(kernel, InputError) else _Shim(kernel)
    except (AttributeError, OSError):
        return None
