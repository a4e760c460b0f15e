"""The torch path: reference.update over tiles of every segment, for any device that torch knows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shardopt.optim import precision, reference
from shardopt.optim.kernels import Kernel
from shardopt.optim.kernels.table import Entry, Table, Tile
from shardopt.optim.schema import DOUBLES, FLAG_BITS, SKIP, WORDS, Scalars

# Temporaries are tiles, never as large as a large parameter; a CPU's fit its cache. Multiples of precision.BLOCK.
_TILE = {"cpu": 1 << 17}
_TILE_ELSEWHERE = 1 << 22


class EagerKernel(Kernel):
    name = "torch"

    def run(self, table: Table) -> None:
        size = _TILE.get(table.device.type, _TILE_ELSEWHERE)
        for row, owner, local, block in zip(table.rows, table.row_entry, table.row_local, table.row_block, strict=True):
            if int(row["flags"]) & SKIP:
                continue
            entry, weight, grad = table.entries[owner], table.weights[owner], table.grads[owner]
            assert grad is not None
            scalars = _scalars(row)
            for where in Tile(int(row["start"]), int(local), int(block), int(row["length"])).tiles(size):
                _step(entry, weight, grad, row, scalars, where)


def _scalars(row: np.void) -> Scalars:
    flags = int(row["flags"])
    values = [*(float(row[name]) for name in DOUBLES), *(bool(flags & bit) for bit in FLAG_BITS.values())]
    return Scalars._make(values)


def _step(entry: Entry, whole_weight: Tensor, grad: Tensor, row: np.void, s: Scalars, where: Tile) -> None:
    def part(tensor: Tensor) -> Tensor:
        return tensor.view(-1).narrow(0, where.local, where.numel)

    def bits(key: str) -> Tensor:
        key_and_step = int(row["key"]), int(row["step"])
        return precision.random_bits(WORDS[key], *key_and_step, where.start, where.numel, weight.device)

    weight = part(whole_weight)
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    master, low = (part(entry.tensors[key]) if key in entry.tensors else None for key in ("master", "master_low"))
    exact = weight.to(compute) if master is None else master
    if low is not None:
        exact = precision.join_fp32(weight, low)
    state = {key: entry.decoded(key, where).to(compute) for key in entry.formats}
    moved, state = reference.update(exact, part(grad).to(compute), state, s)
    for key, fmt in entry.formats.items():
        fmt.encode(state[key], None if fmt.name == "fp32" else bits(key), *entry.stored(key, where))
    if s.lr == 0.0:
        return
    if low is not None:
        for half, value in zip((weight, low), precision.split_fp32(moved), strict=True):
            half.copy_(value)
    elif master is not None:
        master.copy_(moved)
        weight.copy_(precision.round_to_weight(moved, weight.dtype))
    elif weight.dtype == torch.bfloat16:
        weight.copy_(precision.round_bf16(moved, bits("weight")))
    else:
        weight.copy_(moved)
