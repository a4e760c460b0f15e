"""What a raw pointer rests on: where tensors lie, how many elements they have, and of which kind they are.

Asked in Python, these cost more than the step of a small tensor. With a C compiler, cpu.c asks for all tensors in one
call, through torch's C shim (its stable interface for compiled models); without one each tensor is asked in turn.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from shardopt.errors import InputError
from shardopt.optim import kernels

# The answers of torch's C shim, in the order of `Shim` in cpu.c.
_QUESTIONS = (
    *("get_data_ptr", "get_numel", "get_storage_numel", "get_storage_offset"),
    *("get_dtype", "get_layout", "get_device_type", "get_device_index", "is_contiguous"),
)
_UNTOLD = -1  # the kind of a tensor about which the shim says nothing, such as a sparse one
_kinds: dict[tuple[object, ...], int] = {}  # numbers below that, for those asked about in Python


class Facts:
    """Facts about some tensors that stay and others that are new at every step.

    The shim takes pointers to at::Tensor. Those of `kept` own a reference, which goes with this object. Those of the
    others point into `_impls`, are filled in from the tensors at hand and used in the same call only.

    Args:
        kept: tensors that stay, whatever their `.data` becomes.
        others: number of the others.
    """

    def __init__(self, kept: Sequence[Tensor], others: int) -> None:
        self._kept, self._shim = list(kept), _shim()
        if self._shim is None:
            return
        self._impls = np.array([*(tensor._cdata for tensor in kept), *[0] * others], dtype=np.int64)
        handles = self._impls.ctypes.data + self._impls.itemsize * np.arange(len(self._impls))
        handles[: len(kept)] = owned = list(map(self._shim.own, handles[: len(kept)].tolist()))
        weakref.finalize(self, self._shim.release, owned).atexit = False
        self._handles, self._facts = handles, np.zeros((3, len(handles)), dtype=np.int64)
        # numpy takes longer to give an address than torch to describe a tensor
        self._describe = partial(self._shim.describe, handles.ctypes.data, len(handles), self._facts.ctypes.data)

    def read(self, others: Sequence[Tensor | None]) -> np.ndarray:
        """An int64 column for each tensor, those kept first: address, number of elements, number of its kind.

        The kind is dtype, layout, device, and whether the tensor is contiguous and has storage for every element.
        Zeros stand for None. The array is good until the next call.
        """
        if self._shim is None:
            return np.array(list(map(_ask, [*self._kept, *others])), dtype=np.int64).reshape(-1, 3).T
        self._impls[len(self._kept) :] = [0 if tensor is None else tensor._cdata for tensor in others]
        if self._describe():
            for i in np.flatnonzero(self._facts[2] == _UNTOLD):
                self._facts[:, i] = _ask([*self._kept, *others][i])
        return self._facts


def has_room(kind: int) -> bool:
    """True for the kind of a tensor that has storage for every element, where it was told by the shim."""
    return kind > 0 and bool(kind >> 2 & 1)


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
    """torch's C shim, and the function of cpu.c that asks it.

    Raises:
        AttributeError: a torch without it.
    """

    def __init__(self, describe: Callable[..., int]) -> None:
        library = ctypes.PyDLL(torch._C.__file__)  # finds what it is linked with, too
        ask = [getattr(library, f"aoti_torch_{question}") for question in _QUESTIONS]
        self._ask = (ctypes.c_void_p * len(ask))(*(ctypes.cast(f, ctypes.c_void_p).value for f in ask))
        self._new, self._delete = library.aoti_torch_new_tensor_handle, library.aoti_torch_delete_tensor_object
        self._new.argtypes, self._delete.argtypes = [ctypes.c_void_p, ctypes.c_void_p], [ctypes.c_void_p]
        self.describe = partial(describe, self._ask)  # addresses of handles and of facts, and their number between

    def own(self, handle: int) -> int:
        """A handle of its own to the same tensor, which keeps it."""
        new = ctypes.c_void_p()
        if self._new(handle, ctypes.byref(new)) or not new.value:
            raise RuntimeError("torch's C shim gives no handle to a tensor")
        return new.value

    def release(self, handles: list[int]) -> None:
        for handle in handles:
            self._delete(handle)


@cache
def _shim() -> _Shim | None:
    """None where there is no C compiler, or a torch without the shim."""
    describe = getattr(kernels._load("c"), "describe", None)
    try:
        return None if describe is None else _Shim(describe)
    except (AttributeError, OSError):
        return None
