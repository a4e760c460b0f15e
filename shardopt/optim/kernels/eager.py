"""The torch path: reference.update over tiles of every segment, for any device that torch knows.

In the usual case its operations are done in place, on tiles that stay in the cache with all of their temporaries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardopt.optim import precision, reference
from shardopt.optim.kernels import Kernel
from shardopt.optim.kernels.table import Entry, Table, Tile
from shardopt.optim.schema import FLAG_BITS, SKIP, WORDS, Scalars

# Temporaries are tiles, never as large as a large parameter. Multiples of precision.BLOCK.
_TILE = 1 << 22
_EXACT = (
    {torch.float32},
    {torch.float64},
)  # where weight, gradient and state are of the one dtype, nothing is converted
_TILE_OF_A_THREAD = 1 << 15  # on a CPU: torch gives no thread less, and as much fits a core's cache


class EagerKernel(Kernel):
    name = "torch"

    def run(self, table: Table) -> None:
        size = _TILE_OF_A_THREAD * torch.get_num_threads() if table.device.type == "cpu" else _TILE
        temporaries = _Temporaries()
        rows, places = table.rows, (table.row_entry, table.row_local, table.row_block)
        fields = [
            rows[name].tolist() for name in ("flags", "start", "length", "key", "step")
        ]  # numpy's numbers are slow
        for flags, start, length, key, step, doubles, owner, local, block in zip(
            *fields, table.doubles.tolist(), *(place.tolist() for place in places), strict=True
        ):
            if flags & SKIP:
                continue
            entry, weight, grad = table.entries[owner], table.weights[owner], table.grads[owner]
            assert grad is not None
            scalars = Scalars._make([*doubles, *(bool(flags & bit) for bit in FLAG_BITS.values())])
            tensors = [weight, grad, *entry.tensors.values()]
            plain = [*entry.tensors] == ["m1", "m2", "nu"] and {t.dtype for t in tensors} in _EXACT
            if plain and _is_usual(scalars):
                ranges = (tensor.view(-1).narrow(0, local, length) for tensor in tensors)
                for w, g, m1, m2, nu in zip(*(tensor.split(size) for tensor in ranges), strict=True):
                    _update_in_place(w, g, m1, m2, nu, scalars, temporaries.like(w))
                continue
            for where in Tile(start, local, block, length).tiles(size):
                _step(entry, weight, grad, (key, step), scalars, where, temporaries)


class _Temporaries:
    """Three tensors for each dtype, as large as the largest asked for."""

    def __init__(self) -> None:
        self._held: dict[torch.dtype, list[Tensor]] = {}

    def like(self, tensor: Tensor) -> list[Tensor]:
        held = self._held.get(tensor.dtype)
        if held is None or held[0].numel() < tensor.numel():
            held = self._held[tensor.dtype] = [torch.empty_like(tensor) for _ in range(3)]
        return held if held[0].numel() == tensor.numel() else [t.narrow(0, 0, tensor.numel()) for t in held]


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
        moved = exact
        _update_in_place(
            exact, part(grad).to(compute), state["m1"], state["m2"], state["nu"], s, temporaries.like(exact)
        )
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


def _update_in_place(
    weight: Tensor, g: Tensor, m1: Tensor, m2: Tensor, nu: Tensor, s: Scalars, temporaries: list[Tensor]
) -> None:
    """reference.update in place, operation for operation, where no beta is below a half and the weight moves."""
    a, b, c = temporaries
    if s.maximize:
        g = torch.neg(g, out=c)
    for x, beta in ((m1, s.beta1), (m2, s.beta3)):
        x.add_(torch.sub(g, x, out=a).mul_(1.0 - beta))
    torch.mul(g, g, out=a)
    if a.dtype == torch.float32:
        a.clamp_(max=reference.LARGEST_SQUARE)
    nu.add_(a.sub_(nu).mul_(1.0 - s.beta2))
    torch.mul(nu, s.bias_correction2, out=a)
    if s.eps_root:
        a.add_(s.eps_root)
    precision.square_root(a, out=a).add_(s.eps)
    torch.mul(m1, s.bias_correction1, out=b).add_(torch.mul(m2, s.alpha, out=c)).div_(a)
    weight.sub_(b.add_(torch.mul(weight, s.weight_decay, out=c)).mul_(s.lr))
