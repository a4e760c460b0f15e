"""AdEMAMix under accelerate: the optimizer that fits the host, and its sharded state for checkpoints and logs.

    accelerator = Accelerator()
    optimizer = sharded_ademamix(accelerator, model, lr=1e-3, alpha=5.0, state_dtype="bf16")
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ...
    checkpoint.save(folder, sharded_state(optimizer), {"step": step})      # every rank

`accelerator.save_state` and `load_state` do the same, with all that accelerate keeps beside it.

What the host has already spread (FSDP2, DeepSpeed) is left to it; under DDP, where every rank has whole gradients,
our ZeRO-1 spreads the state.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from shardopt.engines.deepspeed.config import check_client_config, check_state_dtype
from shardopt.engines.state import ShardedState
from shardopt.errors import InputError
from shardopt.integrations.accelerate_states import follow_states
from shardopt.integrations.hosted import DeepspeedAdEMAMix, FileAdEMAMix, HostedAdEMAMix, ZeroAdEMAMix
from shardopt.optim import registry
from shardopt.slices import named_parameters

Host = Literal["single", "ddp", "fsdp", "deepspeed"]


def host_of(accelerator: Any) -> Host:
    """The host that `accelerator` will give a model to.

    Raises:
        InputError: FSDP1, or a back end that shardopt does not know.
    """
    from accelerate.utils import DistributedType

    kind = accelerator.distributed_type
    if kind == DistributedType.NO:
        return "single"
    if kind == DistributedType.DEEPSPEED:
        return "deepspeed"
    if kind == DistributedType.FSDP:
        if getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
            raise InputError(
                "FSDP1 flattens parameters in a way that shardopt does not follow: set fsdp_version: 2 in the "
                "accelerate config, or fsdp_config={'version': 2} in TrainingArguments"
            )
        return "fsdp"
    if str(kind.value).startswith("MULTI_"):
        return "ddp"
    raise InputError(f"shardopt works under DDP, FSDP2 and DeepSpeed, not under {kind.value}: change distributed_type")


def sharded_ademamix(accelerator: Any, model: nn.Module, **kwargs: Any) -> Optimizer:
    """The optimizer to hand to `accelerator.prepare`, together with the model.

    Args:
        accelerator: an accelerate.Accelerator.
        model: not yet prepared. Matrices decay, norms and biases do not.
        **kwargs: of AdEMAMix, such as lr, alpha, state_dtype.

    Raises:
        InputError: a hyper-parameter, or a host that would not use this optimizer as it is; says what to change.
        MissingExtraError: deepspeed is asked for and not installed.
    """
    spec = registry.spec("ademamix", **kwargs)
    optimizer = build(accelerator, model, spec.groups(named_parameters(model)), spec.kwargs)
    follow_states(accelerator, optimizer, host_of(accelerator))
    return optimizer


def build(
    accelerator: Any, model: nn.Module, groups: list[dict[str, Any]], kwargs: dict[str, Any], *, pointing: bool = False
) -> ZeroAdEMAMix | HostedAdEMAMix | DeepspeedAdEMAMix:
    """The optimizer for `accelerator`'s host over named groups.

    Args:
        pointing: also for one process keep the state out of `state_dict` (see hosted.py).
    """
    host = host_of(accelerator)
    if host == "ddp":
        if accelerator.mixed_precision == "fp16":
            raise InputError(
                "fp16 loss scaling looks for gradients where a sharded optimizer has none: use bf16 instead of fp16"
            )
        # prepare() would move the parameters later, away from the buffers that they are views of.
        return ZeroAdEMAMix(groups, model.to(accelerator.device), **kwargs)
    if host == "deepspeed":
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        check_client_config(config)
        check_state_dtype("state_dtype", kwargs.get("state_dtype", "fp32"))
        # Else bf16 gradients are added up in bf16.
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        return DeepspeedAdEMAMix(groups, model, accelerator, **kwargs)
    # Under FSDP2 accelerate saves every rank's shards itself, and insists on finding some.
    return (FileAdEMAMix if pointing and host == "single" else HostedAdEMAMix)(groups, model, **kwargs)


def sharded_state(optimizer: Optimizer) -> ShardedState:
    """The trained weights and the optimizer state that this process holds, for checkpoints and logs.

    Call it after `accelerator.prepare`; `checkpoint.load` before the first step. Hyper-parameters stay the program's.

    Args:
        optimizer: what `accelerator.prepare` returned, or what went into it.

    Raises:
        InputError: `sharded_ademamix` did not make it, or `prepare` is still to come.
    """
    inner: Any = optimizer
    while not hasattr(inner, "sharded_state"):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise InputError(f"{type(optimizer).__name__} does not hold an optimizer that sharded_ademamix made")
    return inner.sharded_state()
