"""Figures that are measured within a step, on request: by layer, and the gradient noise scale."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardopt.engines import gradient_hooks
from shardopt.engines.base import Engine
from shardopt.engines.state import ShardedState, sum_of_squares
from shardopt.errors import InputError
from shardopt.optim.states import weight_slices
from shardopt.pretrain.config import Config
from shardopt.slices import Slice

# Of the running means of the noise scale's two parts, which are noisy themselves: about 20 steps.
_DECAY = 0.95


class Probes:
    """What `tracking.layers_every` and `tracking.noise_scale` ask for. Every rank has it, and calls all of it.

    Raises:
        InputError: the noise scale cannot be measured with this engine or batch.
    """

    def __init__(self, config: Config, engine: Engine) -> None:
        self._every, self._clip = config.tracking.layers_every, config.train.grad_clip
        self._layers = LayerProbe(engine.state) if self._every is not None else None
        self._noise = NoiseProbe(engine, config) if config.tracking.noise_scale else None
        self._measured: dict[str, float] = {}

    def begin(self, step: int) -> None:
        """Before the forward of `step`, counted from 1."""
        if self._layers is not None and self._every is not None:
            self._layers.armed = step % self._every == 0

    def end(self, norm: float, taken: bool, batch: int) -> None:
        """After the step.

        Args:
            norm: of the whole gradient before clipping.
            taken: false where the step was skipped.
            batch: sequences of the step.
        """
        if self._noise is not None:
            self._noise.end(norm, taken, batch)
        if self._layers is not None and self._layers.armed and taken:
            clipped = self._clip is not None and norm > self._clip
            self._measured = self._layers.read(norm / self._clip if clipped and self._clip else 1.0)

    def read(self) -> dict[str, float]:
        """The figures of the last measured step since the last call, and the noise scale as it is now."""
        measured, self._measured = self._measured, {}
        scale = None if self._noise is None else self._noise.scale
        return measured | ({} if scale is None else {"noise_scale": scale})


class LayerProbe:
    """Gradient norm and update-to-weight ratio of each layer in one step of the optimizer, under any engine.

    Both come from the tensors that the optimizer itself steps, by their layouts: masters where a framework hands those
    over, else the weights. Memory: a copy of them while an armed step runs.

    Attributes:
        armed: whether the next step is measured.
    """

    def __init__(self, state: ShardedState) -> None:
        self._state, self.armed = state, False
        self._before: list[Slice] = []
        self._sums: dict[str, dict[str, float]] = {}
        self._groups: list[str] | None = None
        state.inner.register_step_pre_hook(self._begin)
        state.inner.register_step_post_hook(self._end)

    @torch.no_grad()
    def _begin(self, *_: Any) -> None:
        if not self.armed:
            return
        layouts = self._state.layouts()
        self._before = [_copy(piece) for piece in weight_slices(layouts)]
        gradients: dict[Tensor, Any] = {p.grad: where for p, where in layouts.items() if p.grad is not None}
        self._sums = {"gradient": _sums(weight_slices(gradients)), "weight": _sums(self._before)}

    @torch.no_grad()
    def _end(self, *_: Any) -> None:
        if not self._before:
            return
        for before, after in zip(self._before, weight_slices(self._state.layouts()), strict=True):
            before.tensors[0].sub_(after.tensors[0].view_as(before.tensors[0]))
        self._sums["update"], self._before = _sums(self._before), []

    def read(self, unclip: float) -> dict[str, float]:
        """The figures of the step that has been measured. A collective.

        Args:
            unclip: what the gradient was divided by to clip it.
        """
        if self._groups is None:  # a rank may hold nothing of a layer
            held = self._state.ranks.gather(list(self._sums["weight"]))
            self._groups = list(dict.fromkeys(group for groups in held for group in groups))
        kinds = ("gradient", "weight", "update")
        totals = iter(self._state.total([self._sums[kind].get(g, 0.0) for kind in kinds for g in self._groups]))
        norms = {kind: {group: next(totals) ** 0.5 for group in self._groups} for kind in kinds}
        figures = {f"grad_norm/{group}": unclip * norm for group, norm in norms["gradient"].items()}
        ratios = {g: norms["update"][g] / w for g, w in norms["weight"].items() if w > 0}
        return figures | {f"update_ratio/{group}": ratio for group, ratio in ratios.items()}


def layer_of(name: str) -> str:
    """The layer of a parameter, for figures by layer.

    >>> [layer_of(f"model.{name}.weight") for name in ("layers.3.mlp.experts.0.up", "embed_tokens", "norm")]
    ['layers.3', 'embed_tokens', 'norm']
    """
    if numbered := re.match(r"(?:.*?\.)?([A-Za-z_]\w*\.\d+)\.", name):
        return numbered[1]
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


def _copy(piece: Slice) -> Slice:
    values = piece.tensors[0]
    wide = torch.promote_types(values.dtype, torch.float32)
    return Slice(piece.name, piece.kind, piece.layout, (values.to(wide, copy=True),))


def _sums(pieces: list[Slice]) -> dict[str, float]:
    """The sum of squares of each layer's elements held here."""
    of: dict[str, list[Tensor]] = defaultdict(list)
    for piece in pieces:
        of[layer_of(piece.name)].append(piece.tensors[0])
    return {group: sum_of_squares(tensors) for group, tensors in of.items()}


class _LocalNorms(gradient_hooks.GradientHook):
    """Sum of squares of what this rank sends, and how often it sends a whole gradient; alone, of each micro-batch's."""

    def __init__(self) -> None:
        self.squares, self.sent = torch.zeros((), dtype=torch.float64), defaultdict[int, int](int)

    def before_reduce(self, bucket: int, flat: Tensor) -> None:
        self._add(bucket, torch.linalg.vector_norm(flat).double().square().cpu())  # by now: streams differ

    def watch(self, model: nn.Module) -> None:
        """See the gradient that each backward gives, before it is added to those of the micro-batches before."""
        for number, param in enumerate(param for param in model.parameters() if param.requires_grad):
            param.register_hook(partial(self._on_gradient, number))

    def _on_gradient(self, number: int, gradient: Tensor) -> None:
        self._add(number, torch.linalg.vector_norm(gradient).double().square())

    def _add(self, bucket: int, square: Tensor) -> None:
        self.squares = square + self.squares
        self.sent[bucket] += 1

    def reset(self) -> None:
        self.squares.zero_()
        self.sent.clear()


class NoiseProbe:
    """The gradient noise scale B = tr(Σ) / |G|² in sequences (McCandlish et al., arXiv 1812.06162, appendix A.1).

    From the squared norms of the gradient over the global batch and, on average, over what a rank reduces at once (on
    one process: over a micro-batch); both parts are averaged over about 20 steps before they are divided. Cost: a norm
    of every bucket before it is sent (of every gradient), and a small all-reduce a step.

    Raises:
        InputError: an engine without gradient hooks, or a rank alone; or one micro-batch on the engine single.
    """

    def __init__(self, engine: Engine, config: Config) -> None:
        (key, batch), micro_batch = (
            min(config.stages.batches.items(), key=lambda item: item[1]),
            config.train.micro_batch,
        )
        alone = engine.name == "single" and batch >= 2 * micro_batch
        if not alone and (engine.name not in ("zero", "ddp", "fsdp") or engine.ranks.world_size < 2):
            raise InputError(
                f"tracking.noise_scale: needs engine.name zero, ddp or fsdp and at least 2 ranks, or single with a "
                f"train.micro_batch of at most half of every batch, to see gradients of parts of the batch; this run "
                f"has engine.name {engine.name} on {engine.ranks.world_size} rank(s), train.micro_batch {micro_batch} "
                f"and {key} {batch}"
            )
        self._ranks, self._hook = engine.ranks, _LocalNorms()
        # What ranks average is each one's gradient of the mean over its own part; what they sum is less by as much.
        self._gain = engine.ranks.world_size if engine.name == "zero" else 1
        self._trace = self._square = 0.0
        if alone:
            self._hook.watch(engine.model)
        else:
            gradient_hooks.attach(self._hook, engine.optimizer if engine.name == "zero" else engine.model)  # type: ignore[arg-type]

    def end(self, norm: float, taken: bool, batch: int) -> None:
        """After a step over `batch` sequences whose gradient had this norm. A collective."""
        squares, parts = self._hook.squares.item(), max(self._hook.sent.values(), default=0)
        self._hook.reset()
        (squares,) = self._ranks.sum([squares])
        if not taken or not parts:
            return
        pieces = parts * self._ranks.world_size  # of which each is sent for its own share of the mean
        small, big = squares / pieces * (parts * self._gain) ** 2, norm**2
        few = batch / pieces
        square = (batch * big - few * small) / (batch - few)
        trace = (small - big) / (1 / few - 1 / batch)
        self._trace, self._square = (
            _DECAY * old + (1 - _DECAY) * new for old, new in ((self._trace, trace), (self._square, square))
        )

    @property
    def scale(self) -> float | None:
        """Sequences; None while the mean gradient cannot be told from noise."""
        return self._trace / self._square if self._square > 0 else None
