"""Memory that forward and backward of a micro-batch take beside weights and gradients, without doing them.

The model's own forward and backward run on fake tensors, which have shapes and no data, and what is alive is added up
tensor by tensor. Of equal blocks one is run, and what it leaves for its backward counts once for each of them.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, masking_utils

from shardopt.errors import InputError
from shardopt.pretrain.loss import loss_in_forward
from shardopt.pretrain.model import blocks_of, checkpoint_activations, give_storage

Computing = Literal["fp32", "autocast", "bf16"]
"""autocast: in bf16 with fp32 weights, of which it makes copies; bf16: the weights that are computed with are bf16."""


_LOG = logging.getLogger("torch._subclasses.fake_tensor")
# transformers looks for rows of several sequences, and takes rows of fake positions for such, whose masks are large.
_ONE_SEQUENCE_A_ROW = mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None, create=True)


class Activations(NamedTuple):
    """Bytes of a micro-batch: `fixed`, whatever it holds, and `per_sequence`."""

    fixed: int
    per_sequence: int

    def of(self, sequences: int) -> int:
        return self.fixed + self.per_sequence * sequences


class Simulation:
    """A model on fake tensors of the CPU, whose kernels save what a GPU's save. Changes the model for good.

    Args:
        model: from `meta_model`.
        block_size: tokens of a sequence.
        loss_chunks, activation_checkpointing: see TrainConfig.
    """

    def __init__(
        self, model: PreTrainedModel, block_size: int, loss_chunks: int = 1, activation_checkpointing: bool = False
    ) -> None:
        self.model, self.block_size = model, block_size
        self.counts = _keep_one_of_each(model)
        loss_in_forward(model, loss_chunks)
        if activation_checkpointing:
            checkpoint_activations(model)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            give_storage(model, torch.device("cpu"))

    def measure(self, sequences: int, computing: Computing) -> Activations:
        """Of micro-batches of about so many sequences; a larger one is taken to grow by as much a sequence.

        Raises:
            InputError: the model cannot run without data, as one whose routers decide how large tensors are.
        """
        once, twice = (self.peak(n * sequences, computing) for n in (1, 2))
        per_sequence = (twice - once) // sequences
        return Activations(once - per_sequence * sequences, per_sequence)

    def peak(self, sequences: int, computing: Computing) -> int:
        """The most bytes that are alive at a time in forward and backward of a micro-batch.

        With what a gradient takes until it is added to the others, and without weights, gradients and buffers.

        Raises:
            InputError: see `measure`.
        """
        with self.mode, self._weights(torch.bfloat16 if computing == "bf16" else torch.float32):
            alive = _Alive([*self.model.parameters(), *self.model.buffers()])
            tokens = torch.zeros(sequences, self.block_size + 1, dtype=torch.int64)
            autocast = torch.autocast("cpu", torch.bfloat16) if computing == "autocast" else nullcontext()
            _LOG.disabled = True  # what it would print is in the error
            hooks = [hook for block, count in self.counts.items() for hook in alive.count_for(block, count)]
            try:
                with alive:
                    with autocast, _ONE_SEQUENCE_A_ROW:
                        loss, router = self.model(input_ids=tokens[:, :-1], targets=tokens[:, 1:], use_cache=False)
                        loss = loss if router is None else loss + router
                    while hooks:  # a block that is checkpointed runs again in backward, by itself
                        hooks.pop().remove()
                    loss.backward()
            except Exception as error:  # whatever a model's forward, or a kernel without data, raises
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                raise InputError(f"{type(self.model).__name__} does not run without data ({reason[:160]})") from error
            finally:
                _LOG.disabled = False
                while hooks:
                    hooks.pop().remove()
        return alive.peak

    @contextmanager
    def _weights(self, dtype: torch.dtype) -> Iterator[None]:
        """The model with weights of `dtype`, whose gradients go as they come."""
        made: dict[Tensor, nn.Parameter] = {}
        places = [(m._parameters, name) for m in self.model.modules() for name in m._parameters]
        for parameters, name in places:
            param = parameters[name]
            if param is not None and param not in made:
                made[param] = nn.Parameter(torch.empty_like(param, dtype=dtype), param.requires_grad)
                if param.requires_grad:
                    made[param].register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        before = {(id(parameters), name): parameters[name] for parameters, name in places}
        for parameters, name in places:
            if (param := parameters[name]) is not None:
                parameters[name] = made[param]
        try:
            yield
        finally:
            for parameters, name in places:
                parameters[name] = before[id(parameters), name]


class _Alive(TorchDispatchMode):
    """Adds up the storages that are made and not yet freed, without those of `known` tensors."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {id(tensor.untyped_storage()) for tensor in known}
        self._block: set[int] | None = None  # storages made in the block that runs
        self._sizes: dict[int, int] = {}  # what each counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._seen:
            return
        self._seen.add(key)
        self._sizes[key] = storage.nbytes()
        self._add(storage.nbytes())
        if self._block is not None:
            self._block.add(key)
        weakref.finalize(storage, self._free, key)

    def _add(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self._seen.discard(key)
        self.now -= self._sizes.pop(key)
        if self._block is not None:
            self._block.discard(key)

    def count_for(self, block: nn.Module, count: int) -> list[Any]:
        """Let what is still there when `block` has run count `count` times; returns the hooks."""

        def begin(*_: Any) -> None:
            self._block = set()

        def end(*_: Any) -> None:
            kept, self._block = self._block or set(), None
            for key in kept:
                more = (count - 1) * self._sizes[key]
                self._sizes[key] += more
                self._add(more)

        return [block.register_forward_pre_hook(begin), block.register_forward_hook(end)]


def _keep_one_of_each(model: PreTrainedModel) -> dict[nn.Module, int]:
    """Leave one block of each kind, and the last; returns for how many each stands."""
    blocks = blocks_of(model)
    kinds = [_kind(block) for block in blocks]
    last = len(blocks) - 1
    counts = Counter(kinds[:last])
    kept = [i for i, kind in enumerate(kinds) if kinds.index(kind) == i and i < last] + [last]
    inside = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and list(m) == blocks)
    inside._modules = {str(number): blocks[i] for number, i in enumerate(kept)}
    return {blocks[i]: counts[kinds[i]] if i < last else 1 for i in kept}


def _kind(block: nn.Module) -> tuple[object, ...]:
    """What two blocks that take as much memory have alike."""
    attends = [getattr(m, name, None) for m in block.modules() for name in ("attention_type", "sliding_window")]
    return (*((name, tuple(param.shape)) for name, param in block.named_parameters()), *map(str, attends))
