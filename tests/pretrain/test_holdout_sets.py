"""The held-out loss of each source by itself."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from shardopt.pretrain import data
from tests.distributed.pool import on_ranks
from tests.pretrain import tiny


def two_sources(folder):
    """Words, and long lines of digits, which a model of words finds hard."""
    tiny.corpus(folder / "text")
    lines = [
        json.dumps({"text": f"{number} " + " ".join(map(str, range(number, number + 60)))}) for number in range(40)
    ]
    (folder / "digits.jsonl").write_text("\n".join(lines))
    return (
        f"[{{source: text, paths: [{folder}/text], label: words, weight: 3}}, "
        f"{{source: jsonl, paths: {folder}/digits.jsonl}}]"
    )


def test_each_source_has_its_own_bits_per_byte(tmp_path, capsys):
    changes = {"data__sources": two_sources(tmp_path), "engine": "{name: zero}", "eval__batches": 3,
               "checkpoint__export": "true"}  # fmt: skip
    results = on_ranks(2, tiny.run, tmp_path, **changes)
    alone = tiny.run(0, 1, tmp_path, run__name="alone", **changes | {"engine": "{name: single}"})
    said = capsys.readouterr().out
    row, of_two = tiny.metrics(tmp_path, "alone")[-1], tiny.metrics(tmp_path, "tiny")[-1]
    config = tiny.config(tmp_path, **changes)
    _, holdout = data.prepare(config.data, tiny.ALONE, 0, 8)
    model = AutoModelForCausalLM.from_pretrained(alone.export)
    assert list(holdout.sets(24)) == ["words", "jsonl"]
    assert sorted(np.concatenate(list(holdout.sets(24).values()))) == list(range(24))
    nats = {}
    for label, numbers in holdout.sets(24).items():
        tokens = holdout.rows(numbers)
        with torch.no_grad():
            logits = model(tokens[:, :-1]).logits
        nats[label] = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()
        # Every block is of its source alone: the digits have no letters.
        letters = (tokens[:, 1:] >= ord("a")) & (tokens[:, 1:] <= ord("z"))
        assert letters.any(1).all() if label == "words" else not letters.any()
        assert row[f"eval_loss/{label}"] == pytest.approx(nats[label] / tokens[:, 1:].numel(), rel=1e-5)
        bits = nats[label] / math.log(2) / holdout.target_bytes(tokens)
        assert row[f"eval_bits_per_byte/{label}"] == pytest.approx(bits, rel=1e-5)
        assert of_two[f"eval_bits_per_byte/{label}"] == pytest.approx(bits, rel=1e-3)
    assert row["eval_loss"] == pytest.approx(sum(nats.values()) / (24 * 32), rel=1e-6)
    assert row["eval_bits_per_byte/words"] != pytest.approx(row["eval_bits_per_byte/jsonl"], rel=0.01)
    assert results[0].holdout_loss == results[1].holdout_loss
    words, jsonl = (row[f"eval_bits_per_byte/{label}"] for label in ("words", "jsonl"))
    assert f"  bits per byte of words {words:.3f}, jsonl {jsonl:.3f}" in said.splitlines()


def test_a_source_without_a_scored_block_is_warned_of(tmp_path, capsys):
    changes = {"data__sources": two_sources(tmp_path), "engine": "{name: single}", "train__global_batch": 2}
    tiny.run(0, 1, tmp_path, train__steps=2, **changes)
    _, holdout = data.prepare(tiny.config(tmp_path, **changes).data, tiny.ALONE, 0, 2)
    without = [label for label, numbers in holdout.sets(2).items() if not len(numbers)]
    said = capsys.readouterr().out
    (label,) = without
    assert f"of the 2 held-out blocks that are scored none is of {label}, which" in said
