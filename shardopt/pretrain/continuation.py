"""`shardopt generate`: text that goes on from a prompt, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from shardopt.errors import InputError
from shardopt.pretrain.model import position_limits
from shardopt.pretrain.report import printable
from shardopt.pretrain.trained import Trained


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most probable one.
        top_p: only of the most probable ones that together have this probability.
        top_k: only of so many most probable ones; 0: of all.
        seed: of the first sample; that of the next is one more.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int


class Printer(TextStreamer):
    """Writes text as it is generated, with its special tokens left out and control characters escaped.

    Args:
        tokenizer: whose ids it is given.
        write: gets the text, a piece at a time, each once it can no longer change.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=False, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text or stream_end:
            self._write(printable(text) + "\n" * stream_end)


class Generator:
    """A loaded model and a prompt, which begins a document, as in training: after the end-of-text token.

    Args:
        trained, model: where it is of, and the model itself.
        prompt: how the text begins; empty: any text.

    Attributes:
        room: tokens that the model has positions for after the prompt; None: there is no limit.

    Raises:
        InputError: the prompt is longer than the model takes, or the tokenizer has no end-of-text token.
    """

    def __init__(self, trained: Trained, model: PreTrainedModel, prompt: str) -> None:
        self._tokenizer, self._model = trained.tokenizer, model
        ids = self._tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        self._ids = torch.tensor([[trained.end_of_text, *ids]])
        limits = position_limits(trained.config).values()
        self.room = min(limits) - self._ids.shape[1] if limits else None
        if self.room is not None and self.room < 1:
            raise InputError(
                f"--prompt: is {len(ids):,} tokens long, and the model has {min(limits):,} positions, of which one is "
                f"for the end-of-text token before it: shorten it"
            )

    @torch.no_grad()
    def write(self, sampling: Sampling, sample: int, write: Callable[[str], object]) -> None:
        """Generate the text of one sample, from 0; it ends with the model's end-of-text token, or where there is no
        room."""
        torch.manual_seed(sampling.seed + sample)
        choice = (
            {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
            if sampling.temperature
            else {"do_sample": False}
        )
        end = self._ids[0, 0].item()
        ids = self._ids.to(self._model.device)
        self._model.eval()
        cast(Any, self._model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(sampling.max_new_tokens, self.room or sampling.max_new_tokens),
            eos_token_id=end,
            pad_token_id=end,
            streamer=Printer(self._tokenizer, write),
            **choice,
        )
