"""The loss inside the model's forward, whole and in chunks of the sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from shardopt.errors import InputError
from shardopt.pretrain.loss import document_positions, loss_in_forward
from shardopt.pretrain.model import ModelConfig, initialise, meta_model, transformers_config
from tests.distributed.pool import on_ranks
from tests.pretrain import tiny

VOCABULARY, LENGTH = 101, 24
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
LLAMA = {"intermediate_size": 40, "num_key_value_heads": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True, **LLAMA},
    "gpt2": {},  # tied
    "gemma2": {
        "final_logit_softcapping": 3.0,
        "initializer_range": 0.5,
        "head_dim": 16,
        **LLAMA,
    },  # a cap that bites, tied
    "cohere": {"logit_scale": 0.25, **LLAMA},
    "granite": {"logits_scaling": 4.0, **LLAMA},
    "phi": LLAMA,  # a head with a bias
    "qwen3": {"head_dim": 16, **LLAMA},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, **LLAMA},
    "apertus": LLAMA,
    "bert": {"intermediate_size": 40},  # a head of three layers
}


def made(name: str, chunks: int | None, **changes: Any) -> PreTrainedModel:
    shape = {"model_type": name, **COMMON, **FAMILIES.get(name, {}), **changes}
    section = ModelConfig(**shape)
    model = meta_model(transformers_config(section, VOCABULARY, 0, LENGTH), attention=section.attention)
    if chunks is not None:
        loss_in_forward(model, chunks)
    initialise(model, torch.device("cpu"), 0)
    return model.eval()  # no dropout


def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (3, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def loss_of(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=tokens()[:, :-1], targets=tokens()[:, 1:], use_cache=False)[0]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain_loss(model: PreTrainedModel) -> torch.Tensor:
    """As anybody would write it."""
    logits = model(input_ids=tokens()[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens()[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_in_chunks_are_those_of_all_logits_at_once(family: str) -> None:
    plain = made(family, None)
    expected = plain_loss(plain)
    expected.backward()
    for chunks in (1, 5, LENGTH):
        model = made(family, chunks)
        loss = loss_of(model)
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert gradients(model).keys() == gradients(plain).keys()
        whole = nn.utils.get_total_norm(gradients(plain).values())
        for name, gradient in gradients(model).items():
            theirs = gradients(plain)[name]
            # The second for gradients that would be zero without rounding: a bias of attention's keys.
            assert (gradient - theirs).norm() <= 1e-6 * theirs.norm() + 1e-9 * whole, (chunks, name)
        # Who asks for logits gets them.
        assert torch.equal(model(input_ids=tokens()).logits, plain(input_ids=tokens()).logits)


class _Logits(TorchDispatchMode):
    """The elements of tensors whose last dimension is the vocabulary: of the largest, and of all that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = 0
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == VOCABULARY:
                storage = StorageWeakRef(tensor.untyped_storage())
                self._seen[storage.cdata] = storage, tensor.numel()
                self.largest = max(self.largest, tensor.numel())
        self.peak = max(self.peak, sum(size for storage, size in self._seen.values() if not storage.expired()))
        return out


def test_no_more_logits_than_a_chunk_of_the_sequence_exist_in_forward_and_backward() -> None:
    seen = {}
    for chunks in (1, 6):
        model = made("llama", chunks, hidden_size=8)
        with _Logits() as seen[chunks]:
            loss_of(model).backward()
    whole = 3 * LENGTH * VOCABULARY
    assert seen[1].largest == whole
    assert seen[1].peak >= 2 * whole
    assert seen[6].largest == whole // 6
    assert seen[6].peak <= 5 * whole // 6  # a chunk's logits, their softmax, gradients


def test_a_model_of_whose_head_no_chunks_can_be_made_is_refused_by_name() -> None:
    made("opt", 1, ffn_dim=40, word_embed_proj_dim=32)
    with pytest.raises(InputError, match=r"train.loss_chunks: the loss of OPTForCausalLM cannot be cut into chunks"):
        made("opt", 2, ffn_dim=40, word_embed_proj_dim=32)


def test_a_run_in_chunks_logs_what_one_with_all_logits_does(tmp_path):
    tiny.corpus(tmp_path / "text")
    same = {"train__steps": 4, "eval__every": 2, "model__tie_word_embeddings": "true"}
    tiny.run(0, 1, tmp_path, run__name="plain", engine="{name: single}", **same)
    figures = ("loss", "grad_norm", "m1_norm", "eval_loss")
    plain = [[row.get(name, 0) for name in figures] for row in tiny.metrics(tmp_path, "plain")]
    cut = same | {"train__loss_chunks": 5, "train__activation_checkpointing": "true"}
    for index, engine in enumerate(("{name: fsdp}", "{name: zero, stage: 2}", "{name: ddp}")):
        name = f"cut-{index}"
        on_ranks(2, tiny.run, tmp_path, run__name=name, engine=engine, **cut)
        rows = [[row.get(figure, 0) for figure in figures] for row in tiny.metrics(tmp_path, name)]
        for ours, theirs in zip(rows, plain, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5), engine


def test_chunks_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"train.loss_chunks: not in a model that is compiled whole"):
        tiny.config(tmp_path, train__loss_chunks=2, train__compile="model")
    with pytest.raises(InputError, match=r"train.loss_chunks: 33 is more than the tokens of a sequence"):
        tiny.config(tmp_path, train__loss_chunks=33)


START = 0
DOCUMENTS = [[24], [1, 1, 9, 13], [5, 19]]
"""Lengths of the documents in each row; the first of row 2 began in the block before."""


def packed() -> torch.Tensor:
    """`tokens`, with the token START where a document begins."""
    ids = tokens() % (VOCABULARY - 1) + 1
    for row, lengths in zip(ids, DOCUMENTS, strict=True):
        row[[sum(lengths[:n]) for n in range(len(lengths))]] = START
    ids[2, 0] = 7
    return ids


def test_positions_begin_with_each_document() -> None:
    expected = [[place for length in lengths for place in range(length)] for lengths in DOCUMENTS]
    assert document_positions(packed()[:, :-1], START).tolist() == expected


def loss_apart(model: PreTrainedModel) -> torch.Tensor:
    """The loss of each document of `packed` by itself, summed; every token but a row's first is a target."""
    total = torch.zeros(())
    for row, lengths in zip(packed(), DOCUMENTS, strict=True):
        begin = 0
        for length in lengths:
            part = row[begin : begin + length + 1]
            logits = model(input_ids=part[None, :-1], use_cache=False).logits
            total = total + nn.functional.cross_entropy(logits[0], part[1:], reduction="sum")
            begin += length
    return total


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_masked_documents_train_as_if_apart(family: str, attention: str) -> None:
    plain = made(family, None, attention=attention)
    expected = loss_apart(plain)
    expected.backward()
    for chunks, start in ((1, START), (5, START), (1, None)):
        model = made(family, None, attention=attention)
        loss_in_forward(model, chunks, start)
        loss, _ = model(input_ids=packed()[:, :-1], targets=packed()[:, 1:], use_cache=False)
        loss.backward()
        errors = [(g - gradients(plain)[name]).abs().max() for name, g in gradients(model).items()]
        largest = max(g.abs().max() for g in gradients(plain).values())
        if start is None:  # it can fail
            assert max(errors) > 1e-3 * largest
        else:
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
            assert max(errors) <= 1e-5 * largest


def test_masked_documents_have_the_same_loss_under_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward alone: its backward is not there on the CPU, and compiling it needs a C++ compiler."""
    monkeypatch.setattr(torch._dynamo.config, "disable", True)
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    losses = []
    for attention in ("sdpa", "flex_attention"):
        model = made("llama", None, attention=attention)
        loss_in_forward(model, 1, START)
        with torch.no_grad():
            losses.append(model(input_ids=packed()[:, :-1], targets=packed()[:, 1:], use_cache=False)[0].item())
            expected = loss_apart(made("llama", None, attention="sdpa")).item()
    assert losses == pytest.approx([expected] * 2, rel=1e-5)


def test_a_model_that_takes_no_positions_is_refused() -> None:
    section = ModelConfig(model_type="mamba", hidden_size=32, num_hidden_layers=1)
    model = meta_model(transformers_config(section, VOCABULARY, 0, LENGTH))
    with pytest.raises(InputError, match=r"data\.document_mask: MambaForCausalLM .* leave it at false"):
        loss_in_forward(model, 1, START)


def test_a_model_that_sees_the_document_before_is_refused_at_the_start(tmp_path) -> None:
    tiny.corpus(tmp_path / "text")
    same = {"engine": "{name: single}", "train__steps": 1, "data__document_mask": True, "schedule__warmup": 0}
    assert tiny.run(0, 1, tmp_path, **same).step == 1
    recurrent = "{model_type: recurrent_gemma, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 3, "
    recurrent += "num_attention_heads: 2, lru_width: 32, attention_window_size: 16}"
    with pytest.raises(InputError, match=r"data\.document_mask: \w+ sees the documents before"):
        tiny.run(0, 1, tmp_path, run__name="leak", model=recurrent, **same)
