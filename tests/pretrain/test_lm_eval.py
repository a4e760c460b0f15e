"""An export in lm-evaluation-harness, with a task made of local files and no network."""

import json
import math

import pytest

from tests.pretrain import tiny

TASK = """
task: cloze
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: "{{{{right}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""
PERPLEXITY = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{start}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.mark.parametrize("tokenizer", ["byte", "{bpe: 300}"])
def test_an_export_is_scored_by_lm_eval_with_a_task_of_local_files(tmp_path, monkeypatch, capsys, tokenizer):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is in the dev extra")
    from lm_eval.tasks import TaskManager

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    tiny.corpus(tmp_path / "text")
    words = [path.read_text().split()[:3] for path in sorted((tmp_path / "text").iterdir())[:8]]
    rows = [{"start": " ".join(some[:2]), "ends": [some[2], "QZ-9#"], "right": 0} for some in words]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("cloze", TASK), ("words", PERPLEXITY)):
        (tmp_path / f"{name}.yaml").write_text(text.format(rows=tmp_path / "rows.jsonl"))
    changes = {"train__steps": 12, "optimizer__lr": 1e-2, "data__tokenizer": tokenizer}
    result = tiny.run(0, 1, tmp_path, engine="{name: single}", checkpoint__export="true", **changes)
    found = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(result.export), "device": "cpu"},
        tasks=["cloze", "words"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
    )["results"]
    assert found["cloze"]["acc,none"] > 0.5
    assert found["words"]["bits_per_byte,none"] == pytest.approx(bits_per_byte(result.export, rows), rel=1e-4)


def bits_per_byte(export, rows):
    """Of the texts alone: lm-eval counts no end of a document."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (auto.from_pretrained(export) for auto in (AutoModelForCausalLM, AutoTokenizer))
    nats = text_bytes = 0.0
    for row in rows:
        ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(row["start"])["input_ids"]])
        with torch.no_grad():
            nats += F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="sum").item()
        text_bytes += len(row["start"].encode())
    return nats / math.log(2) / text_bytes
