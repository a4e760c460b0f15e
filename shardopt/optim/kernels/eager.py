"""The torch path: reference.update over tiles of every segment, for any device that torch knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardopt.optim import precision, reference
from shardopt.optim.kernels import MASTERS, MAXIMIZE, SKIP, YOGI, Entry, Table
from shardopt.optim.reference import Scalars

# Temporaries are tiles, never as large as a large parameter; a CPU's fit its cache. Multiples of precision.BLOCK.
_TILE = {"cpu": 1 << 17}
_TILE_ELSEWHERE = 1 << 22
_STATES = ("m1", "m2", "nu", "weight_ema")


class EagerKernel:
    name = "torch"

    def refusal(self, weight: Tensor) -> str | None:
        return None

    def run(self, table: Table) -> None:
        tile = _TILE.get(table.device.type, _TILE_ELSEWHERE)
        for row, owner, local, block in zip(table.rows, table.row_entry, table.row_local, table.row_block, strict=True):
            if int(row["flags"]) & SKIP:
                continue
            entry, weight, grad = table.entries[owner], table.weights[owner], table.grads[owner]
            assert grad is not None
            scalars = _scalars(row)
            for done in range(0, int(row["length"]), tile):
                count = min(tile, int(row["length"]) - done)
                where = int(local) + done, int(block) + done // precision.BLOCK, done, count
                _tile(entry, weight, grad, row, scalars, *where)


def _scalars(row: np.void) -> Scalars:
    doubles = {name: float(row[name]) for name in Scalars._fields[:11]}
    flags = int(row["flags"])
    return Scalars(**doubles, yogi=bool(flags & YOGI), maximize=bool(flags & MAXIMIZE))


def _tile(
    entry: Entry,
    whole_weight: Tensor,
    grad: Tensor,
    row: np.void,
    s: Scalars,
    local: int,
    block: int,
    done: int,
    count: int,
) -> None:
    master = int(row["master_kind"])
    base, step, start = int(row["key"]), int(row["step"]), int(row["start"]) + done

    def part(tensor: Tensor) -> Tensor:
        return tensor.view(-1).narrow(0, local, count)

    def scale_of(kind: str) -> Tensor | None:
        scales = entry.tensors.get(f"{kind}_scale")
        return None if scales is None else scales.narrow(0, block, precision.blocks(count))

    def bits(kind: str) -> Tensor:
        return precision.random_bits(kind, base, step, start, count, weight.device)

    weight = part(whole_weight)
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if master == MASTERS["fp32"]:
        exact = part(entry.tensors["master"])
    elif master == MASTERS["split"]:
        exact = precision.join_fp32(weight, part(entry.tensors["master_low"]))
    else:
        exact = weight.to(compute)
    values: dict[str, Any] = {
        kind: precision.decode(kind, part(entry.tensors[kind]), scale_of(kind)).to(compute)
        for kind in _STATES
        if kind in entry.tensors
    }
    new_weight, m1, m2, nu, weight_ema = reference.update(
        exact,
        part(grad).to(compute),
        values.get("m1"),
        values["m2"],
        values["nu"],
        s,
        values.get("weight_ema"),
    )
    for kind, value in zip(_STATES, (m1, m2, nu, weight_ema), strict=True):
        if value is None:
            continue
        codes = part(entry.tensors[kind])
        exact_store = codes.dtype.is_floating_point and codes.dtype != torch.bfloat16
        precision.encode(
            kind,
            value if exact_store else value.float(),
            None if exact_store else bits(kind),
            codes,
            scale_of(kind),
        )
    if s.lr == 0.0:
        return
    if master == MASTERS["fp32"]:
        exact.copy_(new_weight)
        weight.copy_(precision.round_to_weight(new_weight, weight.dtype))
    elif master == MASTERS["split"]:
        high, low = precision.split_fp32(new_weight)
        weight.copy_(high)
        part(entry.tensors["master_low"]).copy_(low)
    elif weight.dtype == torch.bfloat16:
        weight.copy_(precision.round_bf16(new_weight, bits("weight")))
    else:
        weight.copy_(new_weight)
