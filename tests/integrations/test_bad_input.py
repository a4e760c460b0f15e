"""User errors with Trainer and accelerate: each message names the thing to change."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra shardopt[transformers]")
from accelerate.utils import DistributedType
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from shardopt.engines.deepspeed.config import check_client_config
from shardopt.errors import InputError, MissingExtraError, NonFiniteError
from shardopt.integrations.accelerate import sharded_ademamix
from shardopt.integrations.arguments import parse_optim_args
from shardopt.integrations.transformers import (
    AdEMAMixArguments,
    AdEMAMixTrainer,
    shardopt_optimizer,
)
from tests.distributed.pool import on_ranks
from tests.integrations.hosts import new_job
from tests.integrations.training import arguments, build, data, difference, model, refused, train

OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.fixture(autouse=True)
def _new_job() -> None:
    new_job()


def test_optim_args_strings() -> None:
    given = parse_optim_args(
        "alpha = 8, betas=(0.9, 0.999,0.99),state_dtype=bf16,alpha_warmup=none,eps=1e-9,maximize=False,"
        "beta3_warmup=total"
    )
    assert given == {
        "alpha": 8,
        "betas": (0.9, 0.999, 0.99),
        "state_dtype": "bf16",
        "alpha_warmup": None,
        "eps": 1e-9,
        "maximize": False,
        "beta3_warmup": "total",
    }
    assert parse_optim_args("state_dtype={'m1': 'bf16', 'm2': 'fp32'}")["state_dtype"]["m1"] == "bf16"
    assert parse_optim_args(None) == parse_optim_args("") == {}


@pytest.mark.parametrize("text", ["alpha", "alpha=", "betas=(0.9,0.999", "alpha=8,alpha=9", "=8"])
def test_optim_args_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="optim_args"):
        parse_optim_args(text)


def test_a_script_with_hf_argument_parser(tmp_path: Path) -> None:
    line = f"--output_dir {tmp_path} --use_cpu --max_steps 7 --learning_rate 0.02 --weight_decay 0.3 --adam_beta1 0.8"
    line += " --alpha 8 --beta3 0.999 --alpha_warmup none --state_dtype bf16 --optim_args alpha=3,eps_root=1e-6"
    line += " --adam_epsilon 1e-7"
    args, settings = HfArgumentParser((TrainingArguments, AdEMAMixArguments)).parse_args_into_dataclasses(line.split())
    trainer = Trainer(
        model=model(),
        args=args,
        train_dataset=data(),
        optimizer_cls_and_kwargs=shardopt_optimizer(args, settings),
    )
    decaying, exempt = trainer.create_optimizer().param_groups
    for group in (decaying, exempt):
        assert group["lr"] == 0.02
        assert group["betas"] == (0.8, 0.999, 0.999)
        assert group["alpha"] == 3  # the command line's string goes first
        assert group["alpha_warmup"] is None
        assert group["beta3_warmup"] == 7
        assert group["state_dtype"] == "bf16"
        assert group["eps"] == 1e-7
        assert group["eps_root"] == 1e-6
        assert group["seed"] == args.seed
    assert (decaying["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    assert all("norm" in name for name in exempt["param_names"])
    assert not any("norm" in name for name in decaying["param_names"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alhpa": 3}, "no 'alhpa'; did you mean alpha.;"),
        ({"beta_3": 0.99}, "no 'beta_3'; did you mean beta3.;"),
        ({"lr": 1e-3}, "set learning_rate"),
        ({"weight_decay": 0.1}, "set weight_decay"),
        ({"alpha_warmup": "all"}, "alpha_warmup must be a number of steps, 'total' or none"),
        ({"beta3": 0.99, "betas": (0.9, 0.99, 0.999)}, "not both"),
        ({"state_dtype": "fp8"}, "state_dtype"),
        ({"alpha": -1}, "alpha must be"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        shardopt_optimizer(arguments(tmp_path, 1), **settings)


def test_what_is_no_settings_and_no_arguments_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, 1)
    with pytest.raises(InputError, match=r"ademamix is a dict of settings, such as \{'alpha': 8\.0\}, got 8\.0"):
        AdEMAMixTrainer(model=model(), args=args, ademamix=8.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"args is the Trainer's TrainingArguments, got None"):
        shardopt_optimizer(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"keywords, such as alpha=8\.0; got \{'alpha': 8\.0\}"):
        shardopt_optimizer(args, {"alpha": 8.0})  # type: ignore[arg-type]


@pytest.mark.parametrize("optim", ["ademamix", "paged_ademamix_8bit", "adafactor", "adamw_torch"])
def test_another_optim_beside_ours(optim: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"optim='{optim}' would be ignored.*leave `optim` out"):
        shardopt_optimizer(arguments(tmp_path, 1, optim=optim))


def test_slices_on_each_nodes_own_disk_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"save_on_each_node.*which all nodes see; leave it out"):
        shardopt_optimizer(arguments(tmp_path, 1, save_on_each_node=True, save_strategy="steps"))
    shardopt_optimizer(arguments(tmp_path, 1, save_on_each_node=True))
    shardopt_optimizer(arguments(tmp_path, 1, save_on_each_node=True, save_strategy="steps", save_only_model=True))


def test_both_optimizers_and_ours(tmp_path: Path) -> None:
    args, net = arguments(tmp_path, 1), model()
    adamw = torch.optim.AdamW(net.parameters())
    with pytest.raises(InputError, match="leave it out of `optimizers`"):
        AdEMAMixTrainer(model=net, args=args, optimizers=(adamw, None))
    with pytest.raises(InputError, match="leave out optimizer_cls_and_kwargs"):
        AdEMAMixTrainer(model=net, args=args, optimizer_cls_and_kwargs=(torch.optim.AdamW, {}))
    with pytest.raises(RuntimeError, match="both `optimizers` and `optimizer_cls_and_kwargs`"):  # Trainer's own
        Trainer(model=net, args=args, optimizers=(adamw, None), optimizer_cls_and_kwargs=shardopt_optimizer(args))


def test_other_arguments_than_the_trainers(tmp_path: Path) -> None:
    trainer = build(arguments(tmp_path, 1), "Trainer", {})
    trainer.optimizer_cls_and_kwargs = shardopt_optimizer(arguments(tmp_path, 1, learning_rate=1.0))
    with pytest.raises(InputError, match="different TrainingArguments"):
        trainer.create_optimizer()


def test_outside_a_trainer(tmp_path: Path) -> None:
    comm, kwargs = shardopt_optimizer(arguments(tmp_path, 1))
    with pytest.raises(InputError, match="belongs in Trainer"):
        comm()(model(), **kwargs)


def test_a_length_that_is_not_known(tmp_path: Path) -> None:
    trainer = build(arguments(tmp_path, 1, max_steps=-1, num_train_epochs=1), "Trainer", {})
    with pytest.raises(InputError, match=r"length of the training is not known here.*set max_steps"):
        trainer.create_optimizer()


def test_nothing_to_train(tmp_path: Path) -> None:
    trainer = build(arguments(tmp_path, 1), "Trainer", {})
    trainer.model.requires_grad_(False)
    with pytest.raises(InputError, match="no trainable parameter"):
        trainer.create_optimizer()


def test_a_resume_that_comes_too_late(tmp_path: Path) -> None:
    trainer = build(arguments(tmp_path, 1, save_strategy="steps", save_steps=3), "Trainer", {})
    trainer.train()
    trainer = build(arguments(tmp_path, 1), "Trainer", {})
    trainer.create_optimizer()
    with pytest.raises(InputError, match="let train"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


class Diverge(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            next(kwargs["model"].parameters()).data.fill_(float("nan"))


def test_a_training_that_diverged_says_so_at_its_save_and_leaves_the_one_before(tmp_path: Path) -> None:
    trainer = build(arguments(tmp_path, 1, max_steps=4, save_strategy="steps", save_steps=2), "Trainer", {})
    trainer.add_callback(Diverge())
    advice = (
        f"lower learning_rate or max_grad_norm in TrainingArguments, and resume from {tmp_path}/checkpoint-2, which"
    )
    with pytest.raises(NonFiniteError, match=advice):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_offload_with_a_forced_cpu_adam(tmp_path: Path) -> None:
    message = 'puts its own CPU Adam.*"zero_force_ds_cpu_optimizer": false'
    with pytest.raises(InputError, match=message):
        check_client_config(OFFLOAD)
    for told in on_ranks(2, refused, tmp_path, host="zero2", config=OFFLOAD):
        assert re.search(message, told)


def test_offload_with_our_own_kernel(tmp_path: Path) -> None:
    alone = on_ranks(1, train, tmp_path / "alone")[0]
    config = OFFLOAD | {"zero_force_ds_cpu_optimizer": False}
    two = on_ranks(2, train, tmp_path / "two", host="zero2", config=config)[0]
    assert difference(alone["weights"], two["weights"]) < 1e-5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            "the DeepSpeed config: optimizer cannot be .*instead of the program's own.*remove it",
        ),
        (
            {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
            "bf16_optimizer_states cannot be true: .*state_dtype bf16 does it right",
        ),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow"),
        (
            {
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            },
            "offload_optimizer.ratio cannot be 0.5: .*AdamW of its own",
        ),
    ],
)
def test_deepspeed_configs(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_client_config(config)


def test_an_optimizer_block_is_refused_before_the_trainer_is_made(tmp_path: Path) -> None:
    block = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}}
    for told in on_ranks(2, refused, tmp_path, host="zero2", config=block):
        assert "the DeepSpeed config: optimizer cannot be" in told


def test_deepspeed_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingExtraError, match=r"shardopt\[deepspeed\]"):
        check_client_config({})


def test_blocks_in_flat_partitions(tmp_path: Path) -> None:
    for told in on_ranks(2, refused, tmp_path, host="zero2", ademamix={"state_dtype": {"m2": "block8"}}):
        assert "state_dtype: block8 has scales for blocks" in told
        assert "use bf16, or another engine than DeepSpeed" in told


def test_fp16_where_gradients_are_not_the_optimizers(tmp_path: Path) -> None:
    for told in on_ranks(2, refused, tmp_path, fp16=True):
        assert "use bf16 instead of fp16" in told


@pytest.mark.parametrize(("kind", "message"), [("FSDP", "fsdp_version: 2"), ("MEGATRON_LM", "change distributed_type")])
def test_hosts_that_would_not_do(kind: str, message: str) -> None:
    plugin = SimpleNamespace(fsdp_version=1)  # accelerate makes no FSDP1 plug-in without a GPU
    accelerator = SimpleNamespace(
        distributed_type=DistributedType[kind], state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no"
    )
    with pytest.raises(InputError, match=message):
        sharded_ademamix(accelerator, torch.nn.Linear(2, 2))
