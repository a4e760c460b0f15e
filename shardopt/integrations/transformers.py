"""AdEMAMix in HF Trainer: one line, or a thin subclass.

    trainer = Trainer(model=model, args=args, ..., optimizer_cls_and_kwargs=shardopt_optimizer(args, alpha=8.0))
    trainer = AdEMAMixTrainer(model=model, args=args, ..., ademamix={"alpha": 8.0})

Both work under plain torchrun, accelerate's FSDP2 and DeepSpeed ZeRO-1/2/3. docs/transformers.md tells the rest.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, get_last_checkpoint

from shardopt import checkpoint
from shardopt.checkpoint.stored import SLICES
from shardopt.engines.deepspeed.config import check_client_config
from shardopt.engines.state import refuse_steps
from shardopt.errors import InputError, did_you_mean
from shardopt.integrations import accelerate as hosts
from shardopt.integrations.arguments import AdEMAMixArguments, parse_optim_args, plain
from shardopt.integrations.trainer_folders import (
    beyond_trainer,
    load_beside_slices,
    newest_whole,
    refuse_damage,
    save_whole,
    scheduler_in,
)
from shardopt.optim import registry
from shardopt.optim.ademamix import AdEMAMix
from shardopt.slices import canonical_name

_FROM_ARGUMENTS = {"lr": "learning_rate", "weight_decay": "weight_decay"}
_WARMUPS = ("alpha_warmup", "beta3_warmup")


def shardopt_optimizer(
    args: TrainingArguments, settings: AdEMAMixArguments | None = None, **overrides: Any
) -> tuple[Any, dict[str, Any]]:
    """The value of `Trainer(optimizer_cls_and_kwargs=...)`.

        >>> import tempfile, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> from shardopt.integrations.transformers import shardopt_optimizer
        >>> size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **size))
        >>> data = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 8
        >>> args = TrainingArguments(tempfile.mkdtemp(), learning_rate=1e-3, max_steps=2, use_cpu=True, report_to=[])
        >>> chosen = shardopt_optimizer(args, alpha=8.0, state_dtype="bf16")
        >>> trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=chosen)
        >>> trainer.train().global_step
        {'train_runtime': ...}
        2

    lr and weight decay come from `args`, and so do beta1, beta2, eps and the seed unless given here (adam_beta1,
    adam_beta2, adam_epsilon, seed). Weight decay goes where the Trainer's `get_decay_parameter_names` says. alpha
    and beta3 warm up over the whole training, however its length was given, unless they are set.

    Args:
        args: the very object that the Trainer is given.
        settings: from HfArgumentParser.
        **overrides: of AdEMAMix (alpha, betas, state_dtype, ...); a warm-up is a number of steps, "total" or None.
            `args.optim_args` ("alpha=8,betas=(0.9,0.999,0.99)") goes before them, as the command line should.

    Raises:
        InputError: a setting that AdEMAMix does not have or take, one that TrainingArguments has, another `optim`
            that would be ignored, save_on_each_node, or a DeepSpeed config that puts another optimizer in our place.
        MissingExtraError: deepspeed is asked for and not installed.
    """
    if not isinstance(args, TrainingArguments):
        raise InputError(f"shardopt_optimizer(args, ...): args is the Trainer's TrainingArguments, got {args!r}")
    if args.optim != TrainingArguments.__dataclass_fields__["optim"].default:
        raise InputError(
            f"optim={getattr(args.optim, 'value', args.optim)!r} would be ignored beside shardopt's AdEMAMix: "
            f"leave `optim` out of TrainingArguments"
        )
    if args.save_on_each_node and args.save_strategy != SaveStrategy.NO and not args.save_only_model:
        raise InputError(
            "save_on_each_node: the ranks' slices go into one folder, which all nodes see; leave it out of "
            "TrainingArguments, or set save_only_model"
        )
    if settings is not None and not isinstance(settings, AdEMAMixArguments):
        raise InputError(
            f"shardopt_optimizer(args, settings): settings are HfArgumentParser's AdEMAMixArguments; give others as "
            f"keywords, such as alpha=8.0; got {settings!r}"
        )
    given = plain(settings) | overrides | parse_optim_args(args.optim_args)
    allowed = {*inspect.signature(AdEMAMix).parameters, "beta3"} - {"params"}
    for key in given:
        if key in _FROM_ARGUMENTS:
            raise InputError(f"{key} comes from TrainingArguments: set {_FROM_ARGUMENTS[key]} there")
        if key not in allowed:
            known = sorted(allowed)
            raise InputError(f"AdEMAMix has no {key!r}{did_you_mean(key, known)}; it has: {', '.join(known)}")
    if "beta3" in given and "betas" in given:
        raise InputError("give beta3, or betas=(beta1, beta2, beta3), not both")
    for key in _WARMUPS:
        if isinstance(given.setdefault(key, "total"), str) and given[key] != "total":
            raise InputError(f"{key} must be a number of steps, 'total' or none, got {given[key]!r}")
    registry.spec("ademamix", **_resolved(args, given, total=1))
    if args.deepspeed_plugin is not None:
        check_client_config(args.deepspeed_plugin.hf_ds_config.config)
    return _Factory, {"args": args, "given": given}


class AdEMAMixTrainer(Trainer):
    """HF Trainer with AdEMAMix; all arguments are Trainer's, but for one.

    Before another trainer it does the same for that: `class AdEMAMixSFTTrainer(AdEMAMixTrainer, SFTTrainer): pass`.

    Args:
        ademamix: AdEMAMix's settings: a dict, or what HfArgumentParser made. See `shardopt_optimizer`.

    Raises:
        InputError: see `shardopt_optimizer`; also an optimizer given beside ours.
    """

    def __init__(
        self,
        *positional: Any,
        ademamix: Mapping[str, Any] | AdEMAMixArguments | None = None,
        **kwargs: Any,
    ) -> None:
        given = inspect.signature(super().__init__).bind_partial(*positional, **kwargs).arguments
        if given.get("optimizers", (None, None))[0] is not None:
            raise InputError(
                "AdEMAMixTrainer makes its own optimizer: leave it out of `optimizers` (a scheduler may stay, as in "
                "optimizers=(None, scheduler)), or use Trainer"
            )
        if given.get("optimizer_cls_and_kwargs") is not None:
            raise InputError(
                "AdEMAMixTrainer makes its own optimizer: leave out optimizer_cls_and_kwargs, or use Trainer"
            )
        if not isinstance(ademamix, Mapping | AdEMAMixArguments | None):
            raise InputError(f"ademamix is a dict of settings, such as {{'alpha': 8.0}}, got {ademamix!r}")
        settings = (ademamix, {}) if isinstance(ademamix, AdEMAMixArguments) else (None, dict(ademamix or {}))
        if given.get("args") is not None:
            shardopt_optimizer(given["args"], settings[0], **settings[1])  # refuses before anything is built
        super().__init__(*positional, **kwargs)
        self.optimizer_cls_and_kwargs = shardopt_optimizer(self.args, settings[0], **settings[1])

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; `resume_from_checkpoint=True` takes the newest checkpoint that is whole.

        Raises:
            InputError: none is whole, or the one that is named is not.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(newest_whole(Path(self.args.output_dir or "")))
        elif resume_from_checkpoint:
            refuse_damage(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # What another host wrote, Trainer cannot load: the slices bring weights and state, these the rest.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._foreign(resume_from_checkpoint):
            load_beside_slices(Path(resume_from_checkpoint), self.model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._foreign(checkpoint):
            assert self.lr_scheduler is not None
            self.lr_scheduler.load_state_dict(scheduler_in(Path(checkpoint)))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if not (resume_from_checkpoint and self._foreign(resume_from_checkpoint)):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if hosts.host_of(self.accelerator) in ("fsdp", "deepspeed"):  # else `train` has done it
            self._load_from_checkpoint(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _foreign(self, folder: str | os.PathLike[str]) -> bool:
        return beyond_trainer(Path(folder), hosts.host_of(self.accelerator)) is not None


def _resolved(args: TrainingArguments, given: Mapping[str, Any], total: int) -> dict[str, Any]:
    """AdEMAMix's arguments for a training of `total` steps."""
    kwargs = {key: total if key in _WARMUPS and value == "total" else value for key, value in given.items()}
    beta3 = kwargs.pop("beta3", 0.9999)
    kwargs.setdefault("betas", (args.adam_beta1, args.adam_beta2, beta3))
    kwargs.setdefault("eps", args.adam_epsilon)
    kwargs.setdefault("seed", args.seed)
    return kwargs | {"lr": args.learning_rate, "weight_decay": args.weight_decay}


class _Factory:
    """Trainer calls what is not an Optimizer subclass as `factory()(model, **kwargs)`: the one place with names."""

    def __call__(self, model: nn.Module, *, args: TrainingArguments, given: dict[str, Any]) -> Optimizer:
        trainer, resume = _caller()
        if trainer.args is not args:
            raise InputError("shardopt_optimizer and the Trainer were given different TrainingArguments: pass the same")
        if trainer.state.is_hyper_param_search and args.save_strategy != SaveStrategy.NO:
            raise InputError("hyperparameter_search keeps no slices: set save_strategy='no' for the search")
        total = trainer.state.max_steps if trainer.state.max_steps > 0 else args.max_steps
        if total <= 0 and "total" in (given[key] for key in _WARMUPS):
            raise InputError(
                "the length of the training is not known here, so alpha and beta3 cannot warm up over it: set "
                "max_steps in TrainingArguments, or alpha_warmup and beta3_warmup (a number of steps, or None)"
            )
        kwargs = _resolved(args, given, total)
        decaying = set(trainer.get_decay_parameter_names(model))
        members: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
        for name, param in model.named_parameters():
            if param.requires_grad:
                members[name in decaying].append((canonical_name(name), param))
        groups = [
            {"params": pairs, "weight_decay": kwargs["weight_decay"] if decays else 0.0}
            for decays, pairs in members.items()
            if pairs
        ]
        if not groups:
            raise InputError("the model has no trainable parameter: set requires_grad on at least one")
        host = hosts.host_of(trainer.accelerator)
        if resume and not isinstance(trainer, AdEMAMixTrainer):
            refuse_damage(Path(resume))
            if (why := beyond_trainer(Path(resume), host)) is not None:
                raise InputError(
                    f"Trainer cannot resume from {resume}: {why}. Resume as it was written, or take AdEMAMixTrainer in "
                    f"place of Trainer: it reads shardopt's slices"
                )
        optimizer = hosts.build(trainer.accelerator, model, groups, kwargs, pointing=True)
        _attach(trainer, AdEMAMixCallback(optimizer, host, resume))
        return optimizer


def _caller() -> tuple[Trainer, str | None]:
    """The Trainer that called the factory, and the checkpoint that its `train` resumes from.

    Trainer hands the factory a model and nothing else, but slices have to be saved with its checkpoints and read from
    the one it resumes: so look who is calling. `Trainer.train` and its argument are public.
    """
    trainer: Trainer | None = None
    train = inspect.unwrap(Trainer.train).__code__
    frame = sys._getframe(2)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            trainer = trainer or caller
            if frame.f_code is train:
                resume = frame.f_locals["resume_from_checkpoint"]
                return caller, get_last_checkpoint(caller.args.output_dir) if resume is True else resume
        frame = frame.f_back  # type: ignore[assignment]
    if trainer is None:
        raise InputError(
            "shardopt_optimizer(...) belongs in Trainer(optimizer_cls_and_kwargs=...), and works nowhere else"
        )
    return trainer, None


def _attach(trainer: Trainer, callback: AdEMAMixCallback) -> None:
    """Put the callback right behind the one that decides when to log, so that reporters come after it.

    Its slices are written with Trainer's files, not in on_save: Trainer deletes older checkpoints (save_total_limit)
    in between, and a crash there would leave none with slices.
    """
    handler = trainer.callback_handler
    handler.callbacks = [c for c in handler.callbacks if not isinstance(c, AdEMAMixCallback)]
    at = next((i for i, c in enumerate(handler.callbacks) if isinstance(c, DefaultFlowCallback)), -1) + 1
    handler.callbacks.insert(at, callback)
    save = trainer._save_checkpoint
    if isinstance(save, partial) and save.func is save_whole:  # of an earlier train()
        save = save.args[0]
    trainer._save_checkpoint = partial(  # type: ignore[method-assign]
        save_whole, save, trainer, lambda folder: callback.save(folder, trainer.args, trainer.state)
    )


class AdEMAMixCallback(TrainerCallback):
    """Saves every rank's slices with the Trainer's checkpoints, reads them on resuming, and adds to the logs.

    `shardopt_optimizer` and `AdEMAMixTrainer` put it in place. The logs get alpha, beta3, m1_norm, m2_norm,
    update_norm (over the whole model) and state_bytes/rank_N.
    """

    def __init__(self, optimizer: Optimizer, host: hosts.Host, resume: str | os.PathLike[str] | None) -> None:
        self.optimizer, self.host = optimizer, host
        self.resume = Path(resume) if resume is not None else None
        self._values: tuple[int, dict[str, float]] | None = None
        self._saved: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The host has put everything in its place, and loaded what it saved itself."""
        if self.resume is None:
            if state.global_step > 0:
                raise InputError(
                    "the optimizer was made before Trainer.train(resume_from_checkpoint=...): let train() make it"
                )
            return
        resume, self.resume = self.resume, None
        document = checkpoint.load(resume / SLICES, hosts.sharded_state(self.optimizer))
        if document["step"] not in (None, state.global_step):
            raise InputError(
                f"{resume} is of step {state.global_step}, and its {SLICES} folder of step {document['step']}: these "
                f"are files of different checkpoints"
            )
        if (scheduler := kwargs.get("lr_scheduler")) is not None:
            # torch's schedulers load their own count, and leave lr to the optimizer's file, which has none.
            for group, lr in zip(self.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = lr
        if state.is_world_process_zero:
            _continue_wandb(args, document.get("wandb_run"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trainer has put the best weights into the model: masters, averages and counts of that step go with them."""
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            return
        best = Path(state.best_model_checkpoint)
        held = hosts.sharded_state(self.optimizer)
        if args.save_only_model:
            held.refresh()
            refuse_steps(
                held.optimizer,
                f"the model has the best weights, of {best}, and the optimizer the state of the last step, since "
                f"save_only_model keeps no state: make a new Trainer to train on from these weights",
            )
        else:
            checkpoint.load(best / SLICES, held)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Norms over all ranks are a collective: taken here, where every rank comes, not in on_log."""
        if not control.should_log:
            self._values = None
            return
        held = hosts.sharded_state(self.optimizer)
        sizes = {f"state_bytes/rank_{r}": float(n) for r, n in enumerate(held.ranks.gather(held.state_bytes()))}
        self._values = state.global_step, held.statistics() | sizes

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to the row that the reporters behind this callback are about to see."""
        if self._values is not None and self._values[0] == state.global_step and logs is not None and "loss" in logs:
            logs.update(self._values[1])
            state.log_history[-1].update(self._values[1])
            self._values = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Trainers that save in a way of their own still get their slices."""
        if not args.save_only_model and self._saved != state.global_step:
            self.save(Path(args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", args, state)

    def save(self, folder: str | Path, args: TrainingArguments, state: TrainerState) -> None:
        """Write every rank's slices into the Trainer's checkpoint `folder`. A collective."""
        document = {"host": self.host, "step": state.global_step, "wandb_run": _wandb_run(args, state)}
        checkpoint.save(Path(folder) / SLICES, hosts.sharded_state(self.optimizer), document)
        self._saved = state.global_step


def _reports_to_wandb(args: TrainingArguments) -> bool:
    return "wandb" in (args.report_to or [])


def _wandb_run(args: TrainingArguments, state: TrainerState) -> str | None:
    if not (_reports_to_wandb(args) and state.is_world_process_zero):
        return None
    import wandb

    return wandb.run.id if wandb.run is not None else None


def _continue_wandb(args: TrainingArguments, run: str | None) -> None:
    """Start the run that the checkpoint names; Trainer's reporter, which comes after this, takes what is there."""
    if run is None or not _reports_to_wandb(args):
        return
    import wandb

    if wandb.run is None:
        wandb.init(
            project=os.getenv("WANDB_PROJECT", "huggingface"), name=args.run_name or None, id=run, resume="allow"
        )
