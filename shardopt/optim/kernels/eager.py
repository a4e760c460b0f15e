"""The torch path: reference.update over tiles of every segment, for any device that torch knows.

In the usual case its operations are done in place, on tiles that stay in the cache with all of their temporaries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shardopt.optim import precision, reference
from shardopt.optim.kernels import Kernel
from shardopt.optim.kernels.table import Entry, Table, Tile
from shardopt.optim.schema import FLAG_BITS, SKIP, WORDS, Scalars

# Temporaries are tiles, never as large as a large parameter. Multiples of precision.BLOCK.
_TILE = 1 << 22
_TILE_OF_A_THREAD = 3 << 16  # on a CPU: large enough to hide what a call of torch costs, and no larger
_NUMPY_LENGTH = 1 << 15  # torch gives no thread less; what one thread takes costs numpy half
_EXACT = ({torch.float32}, {torch.float64})  # where all is of one of these, nothing is converted


class EagerKernel(Kernel):
    name = "torch"

    @np.errstate(all="ignore")  # torch says nothing of infinities either
    def run(self, table: Table) -> None:
        size = _TILE_OF_A_THREAD * torch.get_num_threads() if table.device.type == "cpu" else _TILE
        temporaries = _Temporaries()
        names = ("flags", "start", "length", "row", "stride", "key", "step")
        fields = [table.rows[name].tolist() for name in names]  # numpy's own numbers are slow
        fields += [table.doubles.tolist(), table.row_entry.tolist(), table.row_local.tolist(), table.row_block.tolist()]
        for flags, start, length, row, stride, key, step, doubles, owner, local, block in zip(*fields, strict=True):
            if flags & SKIP:
                continue
            entry, weight, grad = table.entries[owner], table.weights[owner], table.grads[owner]
            assert grad is not None
            scalars = Scalars._make([*doubles, *(bool(flags & bit) for bit in FLAG_BITS.values())])
            tensors = [weight, grad, *entry.tensors.values()]
            plain = [*entry.tensors] == ["m1", "m2", "nu"] and {t.dtype for t in tensors} in _EXACT
            if plain and _is_usual(scalars):
                ours = table.device.type == "cpu" and length <= _NUMPY_LENGTH
                whole = [t.detach().numpy() for t in tensors] if ours else tensors
                flat = [t.reshape(-1)[local : local + length] for t in whole]
                for done in range(0, length, size):
                    parts = [t[done : done + size] for t in flat]
                    _update_in_place(parts, scalars, temporaries.like(parts[0]))
                continue
            for where in Tile(start, local, block, length, row, stride).tiles(size):
                _step(entry, weight, grad, (key, step), scalars, where, temporaries)


class _Operations(NamedTuple):
    """Of two arguments, a tensor and a tensor or number, into `out`; the root is of one.

    `add_scaled(x, y, factor, spare)` adds factor * y to x, rounded in between; it may overwrite `spare`, even if that
    is y.
    """

    subtract: Callable[..., Any]
    multiply: Callable[..., Any]
    add: Callable[..., Any]
    divide: Callable[..., Any]
    smaller: Callable[..., Any]
    root: Callable[..., Any]
    add_scaled: Callable[..., None]


def _add_scaled(multiply: Callable[..., Any], add: Callable[..., Any]) -> Callable[..., None]:
    def add_scaled(x: Any, y: Any, factor: float, spare: Any) -> None:
        add(x, multiply(y, factor, out=spare), out=x)

    return add_scaled


def _add_scaled_at_once(x: Tensor, y: Tensor, factor: float, spare: Tensor) -> None:
    # (factor * y) * 1 is rounded before it is added, even in a fused multiply-add; y * factor would not be.
    torch.addcmul(x, y, _ONE, value=factor, out=x)


_ONE = torch.ones((), device="cpu")
_NUMPY = _Operations(
    *(np.subtract, np.multiply, np.add, np.divide, np.minimum, np.sqrt),
    _add_scaled(np.multiply, np.add),
)
_TORCH = _Operations(
    *(torch.sub, torch.mul, torch.add, torch.div, torch.clamp_max, precision.square_root),
    _add_scaled(torch.mul, torch.add),
)
_TORCH_ON_CPU = _TORCH._replace(add_scaled=_add_scaled_at_once)  # other devices multiply in another order


class _Temporaries:
    """Three arrays or tensors of each kind, as large as the largest asked for."""

    def __init__(self) -> None:
        self._held: dict[Any, list[Any]] = {}

    def like(self, x: Any) -> list[Any]:
        kind, empty = (type(x), x.dtype), np.empty_like if isinstance(x, np.ndarray) else torch.empty_like
        held = self._held.get(kind)
        if held is None or len(held[0]) < len(x):
            held = self._held[kind] = [empty(x) for _ in range(3)]
        return held if len(held[0]) == len(x) else [t[: len(x)] for t in held]


def _is_usual(s: Scalars) -> bool:
    """True where `_update_in_place` does what reference.update does."""
    return s.lr != 0.0 and not s.yogi and min(s.beta1, s.beta2, s.beta3) >= 0.5


def _step(
    entry: Entry,
    whole_weight: Tensor,
    grad: Tensor,
    key_and_step: tuple[int, int],
    s: Scalars,
    where: Tile,
    temporaries: _Temporaries,
) -> None:
    def part(tensor: Tensor) -> Tensor:
        return tensor.view(-1).narrow(0, where.local, where.numel)

    def bits(key: str) -> Tensor:
        if where.row:
            return precision.random_bits_at(WORDS[key], *key_and_step, where.indices(weight.device))
        return precision.random_bits(WORDS[key], *key_and_step, where.start, where.numel, weight.device)

    weight = part(whole_weight)
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    master, low = (part(entry.tensors[key]) if key in entry.tensors else None for key in ("master", "master_low"))
    exact = weight.to(compute) if master is None else master
    if low is not None:
        exact = precision.join_fp32(weight, low)
    stored = {key: entry.stored(key, where) for key in entry.formats}
    state = {key: fmt.decode(*stored[key]).to(compute) for key, fmt in entry.formats.items()}
    if _is_usual(s) and state.keys() == {"m1", "m2", "nu"}:
        moved, g = exact, part(grad).to(compute)
        _update_in_place([moved, g, *(state[key] for key in ("m1", "m2", "nu"))], s, temporaries.like(moved))
    else:
        moved, state = reference.update(exact, part(grad).to(compute), state, s)
    for key, fmt in entry.formats.items():
        if state[key] is not stored[key][0]:  # or it was updated in place
            fmt.encode(state[key], None if fmt.name == "fp32" else bits(key), *stored[key])
    if s.lr == 0.0:
        return
    if low is not None:
        for half, value in zip((weight, low), precision.split_fp32(moved), strict=True):
            half.copy_(value)
    elif master is not None:
        if moved is not master:
            master.copy_(moved)
        weight.copy_(precision.round_to_weight(moved, weight.dtype))
    elif weight.dtype == torch.bfloat16:
        weight.copy_(precision.round_bf16(moved, bits("weight")))
    elif moved is not weight:
        weight.copy_(moved)


def _update_in_place(tensors: Sequence[Any], s: Scalars, temporaries: Sequence[Any]) -> None:
    """reference.update in place, operation for operation, where no beta is below a half and the weight moves.

    Args:
        tensors: weight, gradient, m1, m2 and nu, of one dtype, all of torch or all of numpy.
    """
    weight, g, m1, m2, nu = tensors
    a, b, c = temporaries
    do = _NUMPY if isinstance(a, np.ndarray) else _TORCH_ON_CPU if a.device.type == "cpu" else _TORCH
    if s.maximize:
        g = do.multiply(g, -1.0, out=c)
    for x, beta in ((m1, s.beta1), (m2, s.beta3)):
        do.add_scaled(x, do.subtract(g, x, out=a), 1.0 - beta, a)
    do.multiply(g, g, out=a)
    if a.dtype in (torch.float32, np.float32):
        do.smaller(a, reference.LARGEST_SQUARE, out=a)
    do.add_scaled(nu, do.subtract(a, nu, out=a), 1.0 - s.beta2, a)
    do.root(do.add(nu, s.eps_root, out=a) if s.eps_root else nu, out=a)
    do.add(a, s.eps, out=a)
    do.add_scaled(do.multiply(m1, s.m1_factor, out=b), m2, s.m2_factor, c)
    do.add_scaled(do.divide(b, a, out=b), weight, s.decay, c)
    do.subtract(weight, b, out=weight)
