"""DeepSpeed's flat partitions, and the parameters that each of them holds.

DeepSpeed hands its client optimizer one flat fp32 tensor per parameter group (stages 1 and 2) or per sub-group
(stage 3), which holds this rank's elements of many parameters and some padding. One class here for each of its ZeRO
optimizers knows where that one keeps them.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from shardopt.errors import InputError
from shardopt.slices import Layout, Range


class Flat(NamedTuple):
    """One flat partition: the client optimizer's parameter group that it belongs to, and what it holds."""

    group: int
    tensor: Tensor
    layouts: tuple[Layout, ...]


class Stage(abc.ABC):
    """Places of weights, gradients and state in one class of DeepSpeed's ZeRO optimizers."""

    empties_groups = False  # whether the client has parameters only while it steps

    def __init__(self, zero: Any, names: Mapping[Tensor, str]) -> None:
        self.zero, self.names = zero, names

    @abc.abstractmethod
    def flats(self) -> list[Flat]:
        """The flat partitions with what they hold."""

    @abc.abstractmethod
    def gradients(self) -> list[Tensor]:
        """The reduced gradients of this rank's elements after the last backward, as they will be stepped with."""

    @abc.abstractmethod
    def clear(self) -> None:
        """Forget all gradients, those of earlier steps included."""

    def refresh(self) -> None:
        """Write the masters to the working weights on all ranks. A collective."""
        self.zero.update_lp_params()

    @abc.abstractmethod
    def gradient_bytes(self) -> int:
        """Bytes that gradients take when backward has ended."""

    def frozen(self, name: str, param: Tensor) -> tuple[Layout, Tensor]:
        """The part held here of a parameter that is not trained."""
        return Layout.whole(name, param.shape), param.detach()

    def name(self, param: Tensor) -> str:
        if param not in self.names:
            raise InputError(f"a parameter of shape {tuple(param.shape)} in DeepSpeed is none of the model's")
        return self.names[param]

    def cut(self, params: Sequence[Tensor], flat: Tensor, group: Any) -> tuple[Layout, ...]:
        """This rank's equal part of a flat buffer into which the whole `params` are views.

        DeepSpeed's own map (`_hp_mapping`) is wrong under round_robin_gradients, as it counts in the order of the
        parameter group; the storage itself cannot be.
        """
        size = flat.numel() // dist.get_world_size(group)
        first = dist.get_rank(group) * size
        layouts = []
        for param in params:
            offset, rest = divmod(param.data_ptr() - flat.data_ptr(), flat.element_size())
            if rest or not 0 <= offset <= flat.numel() - param.numel():
                raise InputError(f"{self.name(param)} is not in DeepSpeed's flat buffer of its group")
            start, stop = max(offset, first), min(offset + param.numel(), first + size)
            if start < stop:
                r = Range(start - offset, start - first, stop - start)
                layouts.append(Layout(self.name(param), tuple(param.shape), (r,)))
        return tuple(sorted(layouts, key=lambda layout: layout.ranges[0].local_start))


class _Stage12(Stage):
    """DeepSpeedZeroOptimizer."""

    # By group: the parameters, the buffer that they are views of, this rank's masters, and the ranks.
    places = "bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups", "real_dp_process_group"

    def flats(self) -> list[Flat]:
        groups = zip(*(getattr(self.zero, place) for place in self.places), strict=True)
        return [Flat(i, own, self.cut(params, flat, ranks)) for i, (params, flat, own, ranks) in enumerate(groups)]

    def gradients(self) -> list[Tensor]:
        z = self.zero
        if z.cpu_offload:
            return [flat.grad for flat in z.single_partition_of_fp32_groups]
        return [grad for grads in z.averaged_gradients.values() for grad in grads or ()]

    def clear(self) -> None:
        z = self.zero
        z.zero_grad(set_to_none=True)
        z.micro_step_id = -1
        for grads in (z.averaged_gradients, z.all_grad_tensors):
            for i in grads:
                grads[i] = None
        if z.cpu_offload:
            z.reset_cpu_buffers()
            z._offload_accumulated_param_ids = set()
            # What a parameter left here would be its gradient again in a step that does not use it.
            for flat in z.single_partition_of_fp32_groups:
                flat.grad.zero_()
            for grad in z.accumulated_grads_in_cpu.values():
                grad.zero_()

    def gradient_bytes(self) -> int:
        z = self.zero
        shards = 1 if z.partition_gradients else dist.get_world_size(z.dp_process_group)
        return shards * sum(flat.nbytes for flat in z.single_partition_of_fp32_groups)


class _Bf16(_Stage12):
    """BF16_Optimizer: stage 1 with bf16 weights and fp32 accumulation, whole on every rank."""

    places = "bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition", "real_dp_process_group"

    def gradients(self) -> list[Tensor]:
        return list(self.zero.fp32_groups_gradient_flat_partition)

    def clear(self) -> None:
        self.zero.zero_grad(set_to_none=True)

    def gradient_bytes(self) -> int:
        return sum(g.nbytes for g in self.zero.fp32_groups_gradients_flat) * 3 // 2  # and bf16 ones from autograd


class _Stage3(Stage):
    """DeepSpeedZeroOptimizer_Stage3: each parameter is cut by itself, and padded to the world size."""

    empties_groups = True

    def _layout(self, param: Any, local_start: int) -> Layout:
        size = param.ds_tensor.ds_numel
        start = min(dist.get_rank(param.ds_process_group) * size, param.ds_numel)
        length = min(size, param.ds_numel - start)
        ranges = (Range(start, local_start, length),) if length else ()
        return Layout(self.name(param), tuple(param.ds_shape), ranges)

    def flats(self) -> list[Flat]:
        z = self.zero
        flats = []
        for i, (flat, params) in enumerate(zip(z.fp32_partitioned_groups_flat, z.fp16_groups, strict=True)):
            layouts, position = [], 0
            for param in params:
                layouts.append(self._layout(param, position))
                position += param.ds_tensor.ds_numel
            if position != flat.numel():
                raise InputError(f"sub-group {i} of DeepSpeed holds {flat.numel()} elements, not {position}")
            flats.append(Flat(z.sub_group_to_group_id[i], flat, tuple(w for w in layouts if w.ranges)))
        return flats

    def gradients(self) -> list[Tensor]:
        z = self.zero
        if z.offload_optimizer:
            return [flat.grad for flat in z.fp32_partitioned_groups_flat]
        return [
            grad.view(-1).narrow(0, 0, self._layout(param, 0).local_numel)
            for i, params in enumerate(z.fp16_groups)
            for param, grad in zip(params, z.averaged_gradients.get(i) or (), strict=False)
        ]

    def clear(self) -> None:
        z = self.zero
        z.zero_grad(set_to_none=True)
        z.averaged_gradients = {}
        # A parameter that the next step does not use would be stepped with what it left here.
        z.grad_partitions_flat_buffer.zero_()
        if z.offload_optimizer:
            z.reset_cpu_buffers()
            z._offload_boundary_param_ids = set()
            for flat in z.fp32_partitioned_groups_flat:
                flat.grad.zero_()

    def refresh(self) -> None:
        z = self.zero
        z._partition_all_parameters()
        for i in range(len(z.fp16_groups)):
            z._reassign_or_swap_out_partitioned_parameters(i)
        if len(z.persistent_parameters):
            z.persistent_parameters[0].all_gather(z.persistent_parameters)

    def gradient_bytes(self) -> int:
        return int(self.zero.grad_partitions_flat_buffer.nbytes)

    def frozen(self, name: str, param: Any) -> tuple[Layout, Tensor]:
        layout = self._layout(param, 0)
        return layout, param.ds_tensor.detach().view(-1).narrow(0, 0, layout.local_numel)


def stage_of(host: Any, names: Mapping[Tensor, str]) -> Stage:
    """The stage of the ZeRO optimizer in `host`, which accelerate may have wrapped."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    # Subclasses (ZenFlow, SuperOffload) keep their state elsewhere.
    known: dict[type, type[Stage]] = {
        DeepSpeedZeroOptimizer: _Stage12,
        BF16_Optimizer: _Bf16,
        DeepSpeedZeroOptimizer_Stage3: _Stage3,
    }
    found = host
    for _ in range(4):
        if type(found) in known:
            return known[type(found)](found, names)
        inner = getattr(found, "optimizer", None)
        found = getattr(found, "engine", None) if inner is None else inner
    raise InputError(
        f"cannot find out which elements {type(host).__name__} holds: it is not DeepSpeed's ZeRO-1, 2 or 3, without "
        f"ZenFlow and SuperOffload: choose one of these"
    )
