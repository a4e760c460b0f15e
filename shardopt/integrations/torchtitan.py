"""AdEMAMix in torchtitan's optimizer container; docs/recipes/torchtitan.md has whole examples.

    optimizer=ademamix(lr=3e-4, alpha=8.0, alpha_warmup=10_000)                    # torchtitan 0.3: in a Trainer.Config
    TrainSpec(..., build_optimizers_fn=partial(build_optimizers, alpha=8.0))       # torchtitan 0.2

torchtitan spreads the model and saves the container's state_dict, by parameter name, with DCP.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torchtitan.components import optimizer as titan

from shardopt.errors import InputError
from shardopt.optim.ademamix import AdEMAMix
from shardopt.slices import named_parameters

NAME = "AdEMAMix"
# What is here under one version of torchtitan alone.
_NEEDS = {"ademamix": "0.3", "AdEMAMixContainer": "0.3", "build_optimizers": "0.2"}

if hasattr(titan.OptimizersContainer, "Config"):  # torchtitan 0.3

    class AdEMAMixContainer(titan.OptimizersContainer):
        """torchtitan's container, whose parameter groups may also name "AdEMAMix" as their optimizer.

        AdEMAMixContainer.Config(param_groups=[
            ParamGroupConfig(pattern="norm|bias", optimizer_name="AdEMAMix", optimizer_kwargs={"lr": 3e-4}),
            ParamGroupConfig(pattern=".*", optimizer_name="AdEMAMix", optimizer_kwargs={"lr": 3e-4, ...}),
        ])
        """

        @dataclass(kw_only=True, slots=True)
        class Config(titan.OptimizersContainer.Config):
            """As torchtitan's."""

        @staticmethod
        def _resolve_optimizer_factory(name: str) -> Any:
            return AdEMAMix if name == NAME else titan.OptimizersContainer._resolve_optimizer_factory(name)

        @staticmethod
        def _build_param_groups(*args: Any) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[str]]]:
            groups, patterns = titan.OptimizersContainer._build_param_groups(*args)
            for group in groups.get(NAME, ()):
                for key in ("fused", "foreach"):  # of torch's own optimizers
                    group.pop(key, None)
            return groups, patterns

    def ademamix(lr: float, **settings: Any) -> AdEMAMixContainer.Config:
        """A config of one group with all parameters, as torchtitan's `default_adamw`.

        Args:
            lr: of every step, times the schedule's factor.
            **settings: AdEMAMix's other hyper-parameters.
        """
        group = titan.ParamGroupConfig(pattern=".*", optimizer_name=NAME, optimizer_kwargs={"lr": lr, **settings})
        return AdEMAMixContainer.Config(param_groups=[group])

else:

    def build_optimizers(
        model_parts: list[nn.Module],
        optimizer_config: Any,
        parallel_dims: Any,
        ft_manager: Any = None,
        *,
        beta3: float = 0.9999,
        **settings: Any,
    ) -> titan.OptimizersContainer:
        """`TrainSpec.build_optimizers_fn`: torchtitan's container of one AdEMAMix for each part of the model.

        Args:
            optimizer_config: torchtitan's [optimizer] section: lr, beta1, beta2, eps and weight_decay are its; name
                is "AdEMAMix".
            beta3: decay of the slow average.
            **settings: AdEMAMix's other hyper-parameters (alpha, state_dtype, ...).

        Raises:
            InputError: another name, a setting that stands in the section, early_step_in_backward, torchft, or a
                model with experts that torchtitan's own factory balances.
        """
        if optimizer_config.name != NAME:
            raise InputError(
                f"optimizer.name is {optimizer_config.name!r}: set it to {NAME!r}, or take torchtitan's own "
                f"build_optimizers"
            )
        if twice := sorted(settings.keys() & {"lr", "betas", "eps", "weight_decay"}):
            raise InputError(f"{twice[0]} comes from torchtitan's [optimizer] section: set it there")
        if optimizer_config.early_step_in_backward:
            raise InputError("AdEMAMix steps all parameters at once: set optimizer.early_step_in_backward to false")
        if ft_manager is not None and ft_manager.enabled:
            raise InputError("AdEMAMix is not tried under torchft: set fault_tolerance.enable to false")
        if any(getattr(getattr(m, "moe", None), "load_balance_coeff", None) for p in model_parts for m in p.modules()):
            raise InputError(
                "torchtitan 0.2 balances experts in a factory of its own, which makes no AdEMAMix: set the model's "
                "load_balance_coeff to None, or take torchtitan 0.3"
            )
        names = {param: name for part in model_parts for name, param in named_parameters(part)}

        def with_names(params: list[nn.Parameter], **kwargs: Any) -> Optimizer:
            return AdEMAMix([(names[param], param) for param in params], **kwargs)

        given = {
            "lr": optimizer_config.lr,
            "betas": (optimizer_config.beta1, optimizer_config.beta2, beta3),
            "eps": optimizer_config.eps,
            "weight_decay": optimizer_config.weight_decay,
        }
        return titan.OptimizersContainer(model_parts, with_names, given | settings)


if not TYPE_CHECKING:  # for a type checker this would give the module every name

    def __getattr__(name: str) -> Any:
        if name in _NEEDS:
            raise ImportError(f"{name} needs torchtitan {_NEEDS[name]}; {version('torchtitan')} is installed")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
