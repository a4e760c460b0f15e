"""The training loss, made inside the model's forward; in chunks of the sequence where logits are too large to hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from shardopt.errors import InputError


def loss_in_forward(model: PreTrainedModel, chunks: int = 1, document_start: int | None = None) -> None:
    """Let `model(input_ids=..., targets=...)` return its losses: the sum of the cross-entropy, in nats, fp32; and in
    training, of a mixture of experts with `output_router_logits` in its config, what transformers adds to the mean of
    that, its load-balancing loss times `router_aux_loss_coef`, else None. Changes the model.

    They are made inside the model's forward, within the engine's hooks and autocast. With several `chunks` of the
    sequence the logits of one chunk exist at a time, and are made again in its backward. They come from the model's own
    forward with its base left out: its head, and what a family does after it (a scale, a soft cap).

    Args:
        model: on the meta device; not yet in the hands of an engine.
        chunks: 1 makes all logits at once.
        document_start: the token that a document begins with. Positions begin at 0 with each, from which transformers
            masks attention between documents. None: a sequence is one document.

    Raises:
        InputError: no chunks can be made of this model's head, or it takes no positions.
    """
    forward = model.forward
    if document_start is not None and "position_ids" not in inspect.signature(forward).parameters:
        raise InputError(
            f"data.document_mask: {type(model).__name__} takes no position_ids, by which documents are told apart; "
            f"leave it at false"
        )
    base = _base(model) if chunks > 1 else None
    routed = adds_router_loss(model)

    def forward_with_loss(*args: Any, targets: Tensor | None = None, **kwargs: Any) -> Any:
        if document_start is not None:
            kwargs["position_ids"] = document_positions(kwargs["input_ids"], document_start)
        if targets is None:
            return forward(*args, **kwargs)
        if routed:
            kwargs["output_router_logits"] = model.training
        if base is None:
            out = forward(*args, **kwargs)
            return _loss_sum(out.logits, targets), _router_loss(model, out)
        whole = base(*args, **kwargs)
        router = None
        if routed and model.training:  # made of the first token, because a head is part of the forward
            of_base = _Hidden(last_hidden_state=whole.last_hidden_state[:, :1], router_logits=whole.router_logits)
            router = _router_loss(model, _behind(model, forward, of_base, kwargs))
            kwargs["output_router_logits"] = False

        def of_chunk(hidden: Tensor, targets: Tensor) -> Tensor:
            return _loss_sum(_head(model, forward, hidden, kwargs), targets)

        hidden = whole.last_hidden_state
        total = torch.zeros((), device=hidden.device)
        for part, theirs in zip(hidden.chunk(chunks, dim=1), targets.chunk(chunks, dim=1), strict=True):
            total = total + cast(Tensor, checkpoint(of_chunk, part, theirs, use_reentrant=False))
        return total, router

    model.forward = forward_with_loss


def has_router_loss(model: PreTrainedModel) -> bool:
    """Whether transformers can compute a loss that balances the model's routers."""
    return "output_router_logits" in inspect.signature(model.forward).parameters


def adds_router_loss(model: PreTrainedModel) -> bool:
    """Whether transformers would add it to the model's own loss, as its config is."""
    return has_router_loss(model) and bool(getattr(model.config, "output_router_logits", False))


def _router_loss(model: PreTrainedModel, output: Any) -> Tensor | None:
    aux = getattr(output, "aux_loss", None)
    # A model without a router in any of its layers has 0 there, or nothing.
    return cast(Any, model).router_aux_loss_coef * aux if isinstance(aux, Tensor) else None


def document_positions(tokens: Tensor, start: int) -> Tensor:
    """Position of each token (sequences, tokens) in its document; one begins with each token `start`, and each row."""
    place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return place - torch.where(tokens == start, place, 0).cummax(1).values


def _loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Of logits (sequences, tokens, vocabulary) and token ids (sequences, tokens)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


@dataclass
class _Hidden(BaseModelOutput):
    """The output of a base model, of which nothing else is asked."""

    router_logits: tuple[Tensor, ...] | None = None

    def __getattr__(self, name: str) -> None:
        return None


class _Done(nn.Module):
    """Stands for a base model that has run, and gives its output."""

    def __init__(self, output: _Hidden) -> None:
        super().__init__()
        self.output, self.calls = output, 0

    def forward(self, *_: Any, **__: Any) -> _Hidden:
        self.calls += 1
        return self.output


def _head(model: PreTrainedModel, forward: Callable[..., Any], hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Logits of hidden states (sequences, tokens, width), by the model's own forward behind its base."""
    return _behind(model, forward, _Hidden(last_hidden_state=cast(Any, hidden)), kwargs).logits


def _behind(model: PreTrainedModel, forward: Callable[..., Any], of_base: _Hidden, kwargs: dict[str, Any]) -> Any:
    """What the model's own forward makes of the output of its base."""
    name, done = model.base_model_prefix, _Done(of_base)
    base = model._modules[name]
    model._modules[name] = done  # not setattr: an engine may have hooks on it
    try:
        output = forward(**kwargs)
    finally:
        model._modules[name] = base
    if done.calls != 1:
        raise ValueError(f"its forward calls {name} {done.calls} times")
    return output


def _base(model: PreTrainedModel) -> nn.Module:
    """The module whose hidden states the head takes, after a trial of the head on the meta device."""
    kind, head = type(model).__name__, model.get_output_embeddings()
    base = model._modules.get(model.base_model_prefix)
    try:
        if base is None or head is None:
            raise ValueError("it has no base model and output embeddings of its own")
        vocabulary, width = head.weight.shape
        ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
        hidden = torch.empty(1, 2, width, device="meta")
        logits = _head(model, model.forward, hidden, {"input_ids": ids, "use_cache": False})
        if logits.shape != (1, 2, vocabulary):
            raise ValueError(f"its logits have the shape {tuple(logits.shape)} for two tokens")
    except Exception as e:  # whatever its forward raises without its base
        raise InputError(f"train.loss_chunks: the loss of {kind} cannot be cut into chunks ({e}); leave it at 1") from e
    return base
