"""Small trainings with HF Trainer, run on every rank of a pool: what they leave behind, as plain data."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from shardopt import checkpoint
from shardopt.errors import InputError
from shardopt.integrations.accelerate import sharded_ademamix, sharded_state
from shardopt.integrations.transformers import AdEMAMixTrainer, shardopt_optimizer
from shardopt.slices import canonical_name, local_tensor
from tests.integrations.hosts import fsdp_on_cpu, new_job, no_inference_extension

VOCABULARY, LENGTH, GLOBAL_BATCH = 61, 16, 12  # of 1, 2 or 3 ranks


def model() -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def data(rows: int = 72) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    start = torch.randint(VOCABULARY, (rows, 1), generator=generator)
    tokens = (start + torch.arange(LENGTH) * (1 + start % 3)) % VOCABULARY  # something to learn
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: Path, world_size: int, **options: Any) -> TrainingArguments:
    accumulate = options.pop("accumulate", 1)
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "per_device_train_batch_size": GLOBAL_BATCH // world_size // accumulate,
        "gradient_accumulation_steps": accumulate,
        "per_device_eval_batch_size": 2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    return TrainingArguments(**settings | options)


def deepspeed_config(stage: int, **extra: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage},
    } | extra


def train(
    rank: int,
    world_size: int,
    folder: Path,
    *,
    host: str = "ddp",
    resume: str | bool | None = None,
    ademamix: dict[str, Any] | None = None,
    trainer: str = "Trainer",
    environment: dict[str, str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train and tell: losses, whole weights, what this rank holds of each state, and the logs."""
    new_job(alone=world_size == 1 and host == "ddp")
    if host == "fsdp":
        version = options.pop("version", 2)
        options |= {"fsdp": True, "fsdp_config": {"version": version, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    elif host.startswith("zero"):
        no_inference_extension()
        options["deepspeed"] = deepspeed_config(int(host.removeprefix("zero")), **options.pop("config", {}))
    with fsdp_on_cpu(host == "fsdp"), mock.patch.dict(os.environ, environment or {}):
        made = build(arguments(folder, world_size, **options), trainer, {"alpha": 2.0} | (ademamix or {}))
        made.train(resume_from_checkpoint=resume)
        told = tell(made)
        told["evaluated"] = made.evaluate()["eval_loss"]
        if environment:
            import wandb

            told["wandb"] = dict(wandb.run.summary) if wandb.run is not None else None
            wandb.finish()
    del made
    new_job()  # transformers takes a DeepSpeed config that is still alive for every model's
    gc.collect()
    return told


def refused(rank: int, world_size: int, *args: Any, **options: Any) -> str:
    """The message with which `train` refuses; the ranks, which all do, can go on."""
    try:
        train(rank, world_size, *args, **options)
    except InputError as error:
        return str(error)
    raise AssertionError("not refused")


def build(args: TrainingArguments, trainer: str, settings: dict[str, Any]) -> Trainer:
    given: dict[str, Any] = {"model": model(), "args": args, "train_dataset": data(), "eval_dataset": data(12)}
    if trainer == "Trainer":
        return Trainer(**given, optimizer_cls_and_kwargs=shardopt_optimizer(args, **settings))
    return AdEMAMixTrainer(**given, ademamix=settings)


def loop(
    rank: int, world_size: int, folder: Path, *, host: str = "ddp", steps: int = 6, accumulate: int = 1, begin: int = 0
) -> dict[str, Any]:
    """Accelerate without Trainer: `begin` > 0 goes on from the slices of an earlier call."""
    new_job(alone=world_size == 1)
    micro = GLOBAL_BATCH // accumulate
    with fsdp_on_cpu(host == "fsdp"):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **plugins(host, accumulate))
        net = model()
        optimizer = sharded_ademamix(accelerator, net, lr=1e-2, alpha=2.0, alpha_warmup=6, weight_decay=0.1)
        batches = torch.utils.data.DataLoader(data(), batch_size=micro // world_size)
        net, optimizer, batches = accelerator.prepare(net, optimizer, batches)
        if begin:
            assert checkpoint.load(folder, sharded_state(optimizer))["step"] == begin
        for number, batch in enumerate(batches):
            if not begin * accumulate <= number < steps * accumulate:
                continue
            with accelerator.accumulate(net):
                accelerator.backward(net(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        if begin == 0:
            checkpoint.save(folder, sharded_state(optimizer), {"step": steps})
        ours = sharded_state(optimizer).optimizer
        told = {"weights": whole_weights(net), "held": held(ours), "class": type(ours).__name__}
        told["statistics"] = sharded_state(optimizer).statistics()
        told["parameters"] = {type(p).__name__ for p in net.parameters()}
    return told


def plugins(host: str, accumulate: int = 1) -> dict[str, Any]:
    """What an Accelerator is told of its host."""
    if host == "fsdp":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        return {"fsdp_plugin": plugin}
    if host == "ddp":
        return {}
    no_inference_extension()
    config = deepspeed_config(int(host.removeprefix("zero")), gradient_accumulation_steps=accumulate)
    config["gradient_clipping"] = 0.5
    return {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config)}


def tell(trainer: Trainer) -> dict[str, Any]:
    optimizer = sharded_state(trainer.optimizer).optimizer
    return {
        "logs": [row for row in trainer.state.log_history if "loss" in row],
        "weights": whole_weights(trainer.model_wrapped),
        "held": held(optimizer),
        "sums": {
            key: sum(t.double().abs().sum().item() for t in tensors(optimizer, key)) for key in ("m1", "m2", "nu")
        },
        "dtypes": {key: str(tensors(optimizer, key)[0].dtype) for key in ("m1", "m2", "nu")},
        "last_evaluated": [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row][-1:],
        "parameters": {type(p).__name__ for p in trainer.model.parameters()},
        "class": type(optimizer).__name__,
        "step": trainer.state.global_step,
        "best": trainer.state.best_metric,
    }


def tensors(optimizer: Any, key: str) -> list[torch.Tensor]:
    return [local_tensor(state[key]) for state in optimizer.state.values()]


def held(optimizer: Any) -> dict[str, int]:
    """Elements of every kind of state on this rank, from the tensors themselves."""
    return {key: sum(t.numel() for t in tensors(optimizer, key)) for key in ("m1", "m2", "nu")}


def whole_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    from torch.distributed.tensor import DTensor

    weights = {}
    for name, param in module.named_parameters():
        if hasattr(param, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([param]):
                whole = param.detach().clone()
        else:
            whole = param.full_tensor() if isinstance(param, DTensor) else param
        weights[canonical_name(name)] = whole.detach().float().cpu().clone()
    return weights


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
