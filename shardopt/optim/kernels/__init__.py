"""Kernels: what one step does to a table of segments. The arithmetic is optim/reference.py's, everywhere.

The interface
-------------
The optimizer hands a kernel one `Table` a step, with everything on one device:

* `table.rows`, a numpy array of `SEGMENT`, one row a range of one parameter, contiguous in the local tensor. Pointers
  are to the row's FIRST element (not to the tensor's), `start` is that element's index in the whole parameter (the
  counter of the random bits), that of element k is `start + k`, or, where `row` is not 0 (a part of the columns),
  `start + k // row * stride + k % row`. `key` is `precision.base_key(seed, name_key)`. A block format's
  blocks of 128 are of the local elements from the row's first one on, whose scale its scale pointer is to. Rows with
  `flags & SKIP` are left alone.
* For kernels that take tensors: `table.entries[table.row_entry[i]]` has the state tensors that row i points into,
  `table.weights` and `table.grads` (in the order of the entries, contiguous; None where there is no gradient) the
  local weight and gradient, `table.row_local` the place of the row's first element in them, `table.row_block` that
  of its first block in the scales. Weights and gradients are there during `run` only.
* `table.cache` is a kernel's own, under keys that start with the kernel's name. Tables are kept from step to step
  for as long as the layout of the rows is the same.

A kernel is an object with
    name        what `optimizer.kernel` shows
    refusal(weight)   why it cannot take this parameter (a clause for a message), or None
    takes_strides     whether a weight and gradient may be laid out otherwise than in order. Their rows' pointers are
                      then to the tensors' first elements, `weight_shape` and `grad_shape` to int64 numbers (that of
                      the dimensions, then size and stride of each; else 0), `local` is the row's first element
    takes_addresses   whether `run` needs no tensors of rows whose weight and gradient are contiguous
    check(table)      raises InputError where `run` could not take a step now; nothing has been counted yet
    run(table)        one step, in place

`run` does, for every row that is not skipped: decode the state (formats and master as in precision.py), the update
of reference.py in fp32 with the row's doubles rounded to fp32 once (`1.0 - beta` is formed in double first),
encode with the row's random bits. With lr = 0 neither the weight nor its master is written. Where there is no m1
(`m1_format` NONE), the gradient takes its place.

Capturable tables (`table.capturable`) are for replayed CUDA graphs. Host scalars that depend on the step (`lr`,
`beta3`, `alpha`, `m1_factor` to `decay`, `weight_ema_rate`, `step`) are then stale; the kernel
computes them itself, in double, from
    step_pointer      int64 scalar on the device, already counted up for this step
    schedule_pointer  the same for the schedules, 0 where the step itself is meant
    lr_pointer        float32 scalar on the device, or 0: then `lr` holds (a host number cannot change in a graph)
    alpha_final, beta3_final, alpha_warmup, beta3_warmup (0: none), beta1, beta2, group_eps, group_eps_root,
    group_weight_decay, weight_ema_rate (of steps after the first)
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Protocol

from torch import Tensor

from shardopt.errors import InputError
from shardopt.optim.kernels.table import Entry, Table

__all__ = ["KERNELS", "Entry", "Kernel", "Table", "choose"]


class Kernel(Protocol):
    name: str
    takes_strides: bool = False
    takes_addresses: bool = False

    def refusal(self, weight: Tensor) -> str | None:
        return None

    def check(self, table: Table) -> None:
        return None

    def run(self, table: Table) -> None: ...


KERNELS = ("auto", "c", "triton", "torch")


@cache
def _load(name: str) -> Kernel | InputError:
    """A kernel, or why it cannot be had; tried once a process."""
    try:
        if name == "torch":
            from shardopt.optim.kernels.eager import EagerKernel

            return EagerKernel()
        if name == "c":
            from shardopt.optim.kernels.cpu import CpuKernel

            return CpuKernel()
        from shardopt.optim.kernels.triton import TritonKernel  # type: ignore[import-not-found,unused-ignore]

        return TritonKernel()
    except InputError as e:
        return e
    except ImportError as e:
        return InputError(f"{name} cannot be imported: {e}")


def choose(name: str, weight: Tensor) -> Kernel:
    """The kernel for a parameter: the one asked for, or the fastest that can take it.

    Raises:
        InputError: a kernel that was asked for by name cannot take the parameter or be built.
    """
    if name != "auto":
        kernel = _load(name)
        reason = str(kernel) if isinstance(kernel, InputError) else kernel.refusal(weight)
        if isinstance(kernel, InputError) or reason is not None:
            raise InputError(f"kernel={name!r} cannot be used: {reason}; kernel='auto' takes another")
        return kernel
    fastest = {"cpu": "c", "cuda": "triton"}.get(weight.device.type, "torch")
    kernel = _load(fastest)
    if isinstance(kernel, InputError):
        _warn_once(fastest, str(kernel))
    elif kernel.refusal(weight) is None:
        return kernel
    plain = _load("torch")
    assert not isinstance(plain, InputError)
    return plain


@cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(f"shardopt's {name} kernel is not available, using plain torch: {reason}", stacklevel=2)
