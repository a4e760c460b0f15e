"""Which elements of which parameter lie where in DeepSpeed's flat partitions, and how to get at them.

DeepSpeed hands its client optimizer one flat fp32 tensor a parameter group (stages 1 and 2) or a sub-group
(stage 3), which holds this rank's elements of many parameters and some padding. `attach_layouts` tells an
optimizer of ours which; `Partitions` is the same for an engine that also saves, loads and clips.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from shardopt.errors import InputError
from shardopt.optim import states
from shardopt.slices import Layout, Range, Slice, named_parameters


class Flat(NamedTuple):
    """One flat partition: the client optimizer's parameter group that it belongs to, and what it holds."""

    group: int
    tensor: Tensor
    layouts: tuple[Layout, ...]


class UnknownPartitions(InputError):
    """A DeepSpeed optimizer whose flat partitions cannot be mapped to parameters."""


def attach_layouts(host: Any, optimizer: Optimizer, model: nn.Module) -> dict[Tensor, tuple[Layout, ...]]:
    """Tell `optimizer` what DeepSpeed's flat partitions hold, so that its random bits are those of any other engine.

    To be called after deepspeed.initialize (or Accelerator.prepare) and before the first step.

    Args:
        host: the DeepSpeed engine, its ZeRO optimizer, or accelerate's wrapper of either.
        optimizer: the client optimizer inside it.
        model: the module that was given to DeepSpeed, for its parameters' names.

    Returns:
        The layouts by flat partition; empty where they cannot be found and nothing needs them.

    Raises:
        UnknownPartitions: they cannot be found and the optimizer rounds stochastically.
    """
    try:
        return Partitions(host, optimizer, model).layouts
    except UnknownPartitions:
        if rounds_stochastically(optimizer):
            raise
        return {}


def rounds_stochastically(optimizer: Optimizer) -> bool:
    """Whether some state (masters are fp32 under DeepSpeed) is kept in fewer bits than fp32."""
    kept = [group.get("state_dtype", "fp32") for group in optimizer.param_groups]
    return any(dtype != "fp32" for k in kept for dtype in (k.values() if isinstance(k, Mapping) else (k,)))


class Partitions:
    """The flat partitions of one DeepSpeed optimizer. Arguments and errors: see `attach_layouts`."""

    def __init__(self, host: Any, optimizer: Optimizer, model: nn.Module) -> None:
        self.optimizer = optimizer
        self.named = named_parameters(model)
        self.stage = _stage_of(host, {param: name for name, param in self.named})
        self.flats = self.stage.flats()
        self.layouts = {flat.tensor: flat.layouts for flat in self.flats}
        # Another optimizer than ours does not ask, but `states` does.
        self.explicit: dict[Tensor, Any] = optimizer.__dict__.setdefault("explicit_layouts", {})
        for tensor, layouts in self.layouts.items():
            self.tell(tensor, layouts)

    def tell(self, tensor: Tensor, layouts: tuple[Layout, ...]) -> None:
        """Let the optimizer know what `tensor` holds."""
        set_layout = getattr(self.optimizer, "set_layout", self.explicit.__setitem__)
        set_layout(tensor, layouts)

    @contextmanager
    def in_groups(self, present: bool = True) -> Iterator[None]:
        """The partitions in the client's parameter groups, or not: stage 3 wants to put each there for its own step."""
        kept = [group["params"] for group in self.optimizer.param_groups]
        if present or self.stage.empties_groups:
            self.fill_groups(present)
        try:
            yield
        finally:
            for group, params in zip(self.optimizer.param_groups, kept, strict=True):
                group["params"] = params

    def fill_groups(self, present: bool = True) -> None:
        """Put the partitions into the client's parameter groups, or take them out."""
        for i, group in enumerate(self.optimizer.param_groups):
            group["params"] = [flat.tensor for flat in self.flats if flat.group == i and present]

    def weight_slices(self) -> list[Slice]:
        """The fp32 masters held here, and the frozen parameters in the dtype that they have."""
        slices = []
        for flat in self.flats:
            for layout in flat.layouts:
                (r,) = layout.ranges
                piece = flat.tensor.detach().narrow(0, r.local_start, r.length)
                where = Layout.contiguous(layout.name, layout.shape, r.global_start, r.length)
                slices.append(Slice(layout.name, "weight", where, (piece,)))
        for name, param in self.named:
            if not param.requires_grad:
                layout, tensor = self.stage.frozen(name, param)
                slices.append(Slice(name, "weight", layout, (tensor,)))
        return slices

    def slices(self) -> list[Slice]:
        """Weights and optimizer state held here; see Engine.slices."""
        with self.in_groups():
            return self.weight_slices() + states.state_slices(self.optimizer, self.layouts)

    @torch.no_grad()
    def full(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's name and whole value (masters in fp32), one at a time. A collective."""
        held: dict[str, list[Slice]] = {}
        for s in self.weight_slices():
            held.setdefault(s.name, []).append(s)
        device = self.stage.device
        for name, param in self.named:
            mine = held.get(name, [])
            if any(s.layout.is_whole for s in mine) and not param.requires_grad:
                yield name, mine[0].tensors[0]
                continue
            shape = tuple(getattr(param, "ds_shape", param.shape))
            # Integers: adding zero to the bits keeps -0.0 and NaN what they are.
            dtype = torch.float32 if param.requires_grad else param.dtype
            whole = torch.zeros(shape, dtype=dtype, device=device)
            for s in mine:
                s.layout.copy_to_whole(s.tensors[0].to(device), whole)
            bits = whole.view(torch.int32) if dtype == torch.float32 else whole
            dist.all_reduce(bits)
            yield name, whole


class _Stage(abc.ABC):
    """Where one class of DeepSpeed's ZeRO optimizers keeps its things."""

    empties_groups = False  # whether the client has parameters only while it steps

    def __init__(self, zero: Any, names: Mapping[Tensor, str]) -> None:
        self.zero, self.names = zero, names

    @property
    def device(self) -> torch.device:
        """Where collectives work."""
        from deepspeed.accelerator import get_accelerator

        return torch.device(get_accelerator().current_device_name())

    @abc.abstractmethod
    def flats(self) -> list[Flat]:
        """The flat partitions with what they hold."""

    @abc.abstractmethod
    def gradients(self) -> list[Tensor]:
        """The reduced gradients of this rank's elements after the last backward, as they will be stepped with."""

    @abc.abstractmethod
    def clear(self) -> None:
        """Forget all gradients, those of earlier steps included."""

    @abc.abstractmethod
    def refresh(self) -> None:
        """Write the masters to the working weights on all ranks. A collective."""

    @abc.abstractmethod
    def gradient_bytes(self) -> int:
        """Bytes that gradients take when backward has ended."""

    def frozen(self, name: str, param: Tensor) -> tuple[Layout, Tensor]:
        """What is held here of a parameter that is not trained."""
        return Layout.whole(name, param.shape), param.detach()

    def name(self, param: Tensor) -> str:
        if param not in self.names:
            raise UnknownPartitions(f"a parameter of shape {tuple(param.shape)} in DeepSpeed is none of the model's")
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
                raise UnknownPartitions(f"{self.name(param)} is not in DeepSpeed's flat buffer of its group")
            start, stop = max(offset, first), min(offset + param.numel(), first + size)
            if start < stop:
                r = Range(start - offset, start - first, stop - start)
                layouts.append(Layout(self.name(param), tuple(param.shape), (r,)))
        return tuple(sorted(layouts, key=lambda layout: layout.ranges[0].local_start))


class _Stage12(_Stage):
    """DeepSpeedZeroOptimizer."""

    def flats(self) -> list[Flat]:
        z = self.zero
        return [
            Flat(i, flat, self.cut(z.bit16_groups[i], z.bit16_groups_flat[i], z.real_dp_process_group[i]))
            for i, flat in enumerate(z.single_partition_of_fp32_groups)
        ]

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

    def refresh(self) -> None:
        self.zero.update_lp_params()

    def gradient_bytes(self) -> int:
        z = self.zero
        shards = 1 if z.partition_gradients else dist.get_world_size(z.dp_process_group)
        return shards * sum(flat.nbytes for flat in z.single_partition_of_fp32_groups)


class _Bf16(_Stage):
    """BF16_Optimizer: stage 1 with bf16 weights and fp32 accumulation, whole on every rank."""

    def flats(self) -> list[Flat]:
        z = self.zero
        return [
            Flat(i, flat, self.cut(z.bf16_groups[i], z.bf16_groups_flat[i], z.real_dp_process_group[i]))
            for i, flat in enumerate(z.fp32_groups_flat_partition)
        ]

    def gradients(self) -> list[Tensor]:
        return list(self.zero.fp32_groups_gradient_flat_partition)

    def clear(self) -> None:
        self.zero.zero_grad(set_to_none=True)

    def refresh(self) -> None:
        self.zero.update_lp_params()

    def gradient_bytes(self) -> int:
        return sum(g.nbytes for g in self.zero.fp32_groups_gradients_flat) * 3 // 2  # and bf16 ones from autograd


class _Stage3(_Stage):
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
                raise UnknownPartitions(f"sub-group {i} of DeepSpeed holds {flat.numel()} elements, not {position}")
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


def _stage_of(host: Any, names: Mapping[Tensor, str]) -> _Stage:
    """What knows the ZeRO optimizer in `host`, which accelerate may have wrapped."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    # Subclasses (ZenFlow, SuperOffload) keep things elsewhere.
    known: dict[type, type[_Stage]] = {
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
    raise UnknownPartitions(
        f"cannot find out which elements {type(host).__name__} holds: it is not DeepSpeed's ZeRO-1, 2 or 3 (stage 0, "
        f"ZenFlow and SuperOffload are not supported); choose one of these, or state_dtype: fp32"
    )
