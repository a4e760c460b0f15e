"""Trained weights: held-out loss, export and sample use the same ones, and training goes on from them."""

import json
import math
import re

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardopt.errors import InputError
from shardopt.pretrain import data, loop
from tests.pretrain import tiny

SINGLE = {"engine": "{name: single}", "checkpoint__export": "true"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    tiny.corpus(folder / "text")
    return folder


def test_held_out_loss_export_and_sample_are_of_the_weight_ema(folder, monkeypatch, capsys):
    sampled = []
    monkeypatch.setattr(loop, "generate", lambda engine, *_: sampled.append(tiny.weights_of(engine.model)) or "text")
    ema = SINGLE | {"optimizer__weight_ema": 0.8, "eval__sample_tokens": 4}
    result = tiny.run(0, 1, folder, run__name="ema", **ema)
    assert "weight EMA     decay 0.8; held-out loss, export and sample are of it" in capsys.readouterr().out
    assert tiny.exported_loss(folder, result.export) == pytest.approx(result.holdout_loss, rel=1e-5)
    exported = tiny.weights_of(AutoModelForCausalLM.from_pretrained(result.export))
    assert exported.keys() == sampled[0].keys()
    assert all(torch.equal(exported[name], sampled[0][name]) for name in exported)
    plain = tiny.run(0, 1, folder, run__name="plain", **SINGLE)
    assert plain.holdout_loss != pytest.approx(result.holdout_loss, rel=1e-3)
    assert "weight EMA" not in capsys.readouterr().out


def test_export_names_its_architecture_and_lets_generation_use_a_cache(folder):
    result = tiny.run(0, 1, folder, run__name="config", **SINGLE)
    written = json.loads((result.export / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["use_cache"] is True
    assert written["dtype"] == "float32"
    model = AutoModelForCausalLM.from_pretrained(result.export)
    assert model.generate(torch.tensor([[97]]), max_new_tokens=2, min_new_tokens=2).shape == (1, 3)


def test_export_dtype_rounds_the_weights_to_nearest(folder):
    whole = tiny.run(0, 1, folder, run__name="fp32", **SINGLE)
    half = tiny.run(0, 1, folder, run__name="bf16", checkpoint__export_dtype="bf16", **SINGLE)
    assert json.loads((half.export / "config.json").read_text())["dtype"] == "bfloat16"
    with (
        safe_open(half.export / "model.safetensors", "pt") as short,
        safe_open(whole.export / "model.safetensors", "pt") as long,
    ):
        assert short.keys() == long.keys()
        for name in long.keys():  # noqa: SIM118  it is a file, which cannot be iterated
            assert torch.equal(short.get_tensor(name), long.get_tensor(name).bfloat16())


def test_weights_are_trained_on_with_their_own_tokenizer(folder, tmp_path):
    bpe = {"data__tokenizer": "{bpe: 300}"}
    first = tiny.run(0, 1, folder, run__name="bpe", **SINGLE, **bpe)
    tree = tiny.tree(folder, run__name="further", model=f"{{path: {first.export}}}", schedule__warmup=0, **SINGLE)
    assert "tokenizer" not in tree["data"]
    # The first step's loss is that of the weights it starts from.
    second = loop.pretrain(tiny.parse(tree | {"train": tree["train"] | {"steps": 1}, "optimizer": {"lr": 0.0}}))
    assert second.holdout_loss == pytest.approx(first.holdout_loss, rel=1e-5)
    assert (
        AutoTokenizer.from_pretrained(second.export).get_vocab()
        == AutoTokenizer.from_pretrained(first.export).get_vocab()
    )
    # The same one, written out, is accepted; another is not, though it has no more ids.
    assert tiny.run(0, 1, folder, run__name="same", model=f"{{path: {first.export}}}", **SINGLE, **bpe).step
    for other in ("byte", "{bpe: 299}"):
        with pytest.raises(InputError, match=r"data\.tokenizer: gives other ids than the tokenizer in model\.path"):
            tiny.run(
                0, 1, folder, run__name="other", model=f"{{path: {first.export}}}", data__tokenizer=other, **SINGLE
            )


def test_train_loss_of_the_console_is_that_of_the_last_row_of_metrics(folder, capsys):
    result = tiny.run(0, 1, folder, run__name="figure", engine="{name: single}", tracking__log_every=4)
    (*_, last) = tiny.metrics(folder, "figure")
    assert (last["step"], last["loss"]) == (6, result.loss)
    assert f"train loss     {last['loss']:.4f} at step 6, mean of the last 2 steps" in capsys.readouterr().out


def test_bits_per_byte_are_of_the_text_of_the_scored_blocks(folder):
    """8 blocks are scored of about 40, with more and fewer bytes per token than all of them together."""
    changes = {"data__tokenizer": "{bpe: 300}", "eval__batches": 1}
    result = tiny.run(0, 1, folder, run__name="scored", engine="{name: single}", **changes)
    train, holdout = data.prepare(tiny.config(folder, **changes).data, tiny.ALONE, 0, 8)
    targets = holdout.batch(0, 8)[:, 1:]
    assert holdout.n_blocks > 16
    text_bytes = sum(len(train.tokenizer.decode(row, skip_special_tokens=True).encode()) for row in targets)
    expected = result.holdout_loss * targets.numel() / math.log(2) / text_bytes
    assert result.holdout_bits_per_byte == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("share", "warned"), [(0.05, True), (0.3, False)])
def test_held_out_text_too_small_to_trust_is_warned_of_with_its_size(folder, capsys, share, warned):
    result = tiny.run(
        0, 1, folder, run__name=f"held-{share}", engine="{name: single}", data__holdout=share, train__steps=2
    )
    assert result.holdout_loss
    said = capsys.readouterr().out
    blocks = int(re.search(r"held-out text +[\d,]+ tokens, 8 of (\d+) blocks scored", said)[1])
    assert (blocks < 128) is warned
    assert (f"only {blocks} blocks of 32 tokens are held out, too few for a held-out loss to trust" in said) is warned


def test_console_describes_the_run_before_its_first_step(folder, capsys):
    tiny.run(0, 1, folder, run__name="described", engine="{name: single}", train__steps=2)
    train, holdout = data.prepare(tiny.config(folder).data, tiny.ALONE, 0, 8)
    said = capsys.readouterr().out
    for line in (
        "engine         single, 1 rank on cpu",
        "optimizer      ademamix, c kernel",
        f"data           {train.tokens:,} tokens, fingerprint {train.fingerprint[:12]}",
        f"held-out text  {holdout.tokens:,} tokens, 8 of {holdout.n_blocks} blocks scored",
    ):
        assert line in said.splitlines()


def test_mixture_of_experts_warns_that_router_losses_are_not_added(folder, capsys):
    experts = (
        "{model_type: mixtral, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2, "
        "num_key_value_heads: 1, num_local_experts: 3, num_experts_per_tok: 1, max_position_embeddings: 64}"
    )
    tiny.run(0, 1, folder, run__name="moe", engine="{name: single}", model=experts, train__steps=2)
    assert (
        "mixtral routes tokens to 3 experts, and no loss that balances its router is added" in capsys.readouterr().out
    )
