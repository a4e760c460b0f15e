"""AdEMAMix under Lightning's DDP with its state cut over the ranks; docs/recipes/lightning.md has a whole example.

    def configure_optimizers(self):
        return zero_ademamix(self, lr=1e-3, alpha=8.0)

    Trainer(strategy=ZeroDDPStrategy(), ...)

A plain AdEMAMix needs nothing of this, under any strategy.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from shardopt import checkpoint
from shardopt.errors import InputError
from shardopt.integrations.hosted import ZeroAdEMAMix


def zero_ademamix(
    module: LightningModule, groups: Sequence[dict[str, Any]] | None = None, **settings: Any
) -> ZeroAdEMAMix:
    """What `configure_optimizers` returns: AdEMAMix, of whose state each rank has its share. A collective.

    Args:
        groups: parameter groups of (name, parameter) pairs; None is all of the module's that require grad.
        **settings: AdEMAMix's hyper-parameters.
    """
    named = [(name, param) for name, param in module.named_parameters() if param.requires_grad]
    return ZeroAdEMAMix(list(groups or [{"params": named}]), module, **settings)


class ZeroDDPStrategy(DDPStrategy):
    """DDP, whose checkpoints have every rank's share of the optimizer's state in a folder beside the file.

    The slices of `step=3.ckpt` are in `step=3.ckpt.shardopt`, which any number of ranks reads. Arguments are
    DDPStrategy's.
    """

    _resumed: Path | None = None

    def setup(self, trainer: Trainer) -> None:
        """As DDP's.

        Raises:
            InputError: Lightning would clip gradients that it does not find.
        """
        super().setup(trainer)
        module = self.lightning_module
        assert module is not None
        own = type(module).configure_gradient_clipping is not LightningModule.configure_gradient_clipping
        if self._sharded() and trainer.gradient_clip_val and not own:
            raise InputError(
                "gradient_clip_val: Lightning finds no gradients in a sharded optimizer: override "
                "configure_gradient_clipping in the LightningModule, and call "
                "optimizer.clip_grad_norm_(gradient_clip_val) there"
            )

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """As DDP's, and every rank's slices first: a file without its folder is never left. A collective."""
        filepath = self.broadcast(filepath)
        if "optimizer_states" in checkpoint:
            for optimizer in self._sharded():
                _save(filepath, optimizer, checkpoint["global_step"])
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            shutil.rmtree(_slices(filepath), ignore_errors=True)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._resumed = _slices(checkpoint_path)
        return super().load_checkpoint(checkpoint_path, *args, **kwargs)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer in self._sharded():
            optimizer.slices_at = self._resumed
        super().load_optimizer_state_dict(checkpoint)

    def _sharded(self) -> list[ZeroAdEMAMix]:
        found = [optimizer for optimizer in self.optimizers if isinstance(optimizer, ZeroAdEMAMix)]
        if len(found) > 1:
            raise InputError("ZeroDDPStrategy saves one sharded optimizer: give it all parameters, in groups")
        return found


def _save(filepath: Any, optimizer: ZeroAdEMAMix, step: int) -> None:
    checkpoint.save(_slices(filepath), optimizer.sharded_state(), {"host": "lightning", "step": step})


def _slices(filepath: Any) -> Path:
    """Beside the file itself, where `filepath` is a link to it (last.ckpt)."""
    return Path(f"{os.path.realpath(filepath)}.shardopt")
