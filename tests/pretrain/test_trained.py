"""Commands that load what was trained: its scores are the run's own, and those of its export in transformers."""

import io
import json
import math
import re
import shutil
from contextlib import nullcontext
from itertools import pairwise
from unittest import mock

import pyarrow
import pytest
import torch
import torch.nn.functional as F
import yaml
from pyarrow import parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardopt import cli
from shardopt.checkpoint.store import as_folder, put
from shardopt.errors import InputError
from shardopt.pretrain import evaluate
from shardopt.pretrain.continuation import Printer
from shardopt.pretrain.report import printable
from shardopt.pretrain.scoring import Score
from shardopt.pretrain.trained import one_process
from tests.pretrain import tiny

MASKED = {
    "engine": "{name: single}",
    "data__tokenizer": "{bpe: 300}",
    "data__document_mask": "true",
    "optimizer__weight_ema": 0.8,
    "checkpoint__every": 3,
    "checkpoint__export": "true",
    "eval__every": 3,
    "eval__batches": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of two sources with masked documents and a weight EMA ("masked"), and one of bytes ("bytes")."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.corpus(folder / "text")
    sources = [
        f"{{source: text, paths: '{folder}/text/{part}*.txt', label: {label}}}"
        for part, label in (("0[0-2]", "a"), ("0[3-5]", "b"))
    ]
    tiny.run(0, 1, folder, run__name="masked", data__sources=f"[{', '.join(sources)}]", data__holdout=0.3, **MASKED)
    tiny.run(0, 1, folder, run__name="bytes", engine="{name: single}", checkpoint__export="true")
    return folder


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def say(capsys, *arguments, status=0):
    """Standard output of a command that ends well; else its message."""
    capsys.readouterr()
    ended = cli.main([str(argument) for argument in arguments])
    out, error = capsys.readouterr()
    assert ended == status, error
    return out if status == 0 else error


def scored(capsys, *arguments):
    return json.loads(say(capsys, "eval", *arguments, "--json"))


@pytest.mark.parametrize("step", [3, 6])
def test_held_out_scores_are_those_that_the_run_itself_has_logged(folder, capsys, step):
    run = folder / "runs" / "masked"
    (row,) = [row for row in tiny.metrics(folder, "masked") if row["step"] == step]
    own = {
        f"eval_{name}{label}": row[f"eval_{name}{label}"]
        for name in ("loss", "bits_per_byte")
        for label in ("", "/a", "/b")
    }

    def figures(what):
        sets = {"": what, **{f"/{label}": one for label, one in what["sets"].items()}}
        return {f"eval_{name}{label}": one[name] for label, one in sets.items() for name in ("loss", "bits_per_byte")}

    what = scored(capsys, run, "--step", step)
    assert figures(what) == pytest.approx(own, rel=1e-6)
    assert (what["step"], what["weights"], what["document_mask"]) == (step, "weight_ema", True)
    assert figures(scored(capsys, run, "--step", step, "--batch-size", 3)) == pytest.approx(own, rel=1e-6)
    for other in ("--raw", "--no-document-mask"):
        assert scored(capsys, run, "--step", step, other)["loss"] != pytest.approx(what["loss"], rel=1e-5)


def test_held_out_scores_of_an_export_and_of_a_checkpoint_elsewhere_are_the_runs_too(folder, capsys, tmp_path):
    run = folder / "runs" / "masked"
    expected = tiny.metrics(folder, "masked")[-1]["eval_loss"]
    assert scored(capsys, run / "export")["loss"] == pytest.approx(expected, rel=1e-6)
    moved = tmp_path / "moved"  # with the model's files, and without the run's config.yaml
    shutil.copytree(run / "checkpoints" / "step-00000006", moved / "checkpoints" / "step-00000006")
    shutil.copytree(run / "model", moved / "model")
    assert scored(capsys, moved)["loss"] == pytest.approx(expected, rel=1e-6)
    shutil.copytree(run / "export", tmp_path / "export")
    said = say(capsys, "eval", tmp_path / "export", status=2)
    assert "does not say which text was held out" in said
    assert "give --data PATH" in said
    shutil.rmtree(moved / "model")
    assert "the config of its model is not known" in say(capsys, "eval", moved, status=2)


def test_held_out_text_that_has_changed_since_the_run_is_refused(folder, capsys, tmp_path):
    shutil.copytree(folder / "text", tmp_path / "text")
    (tmp_path / "text" / "000.txt").write_text("another text")
    run = tmp_path / "runs" / "bytes"
    shutil.copytree(folder / "runs" / "bytes", run)
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    recorded["data"]["sources"][0]["paths"] = [str(tmp_path / "text")]
    (run / "config.yaml").write_text(yaml.safe_dump(recorded))
    assert "the text has changed since" in say(capsys, "eval", run / "export", status=2)


TEXTS = ["abc def gh " * 12, "é", "the end\n" * 9, "bad cab " * 40]


def of_transformers(export, texts, block, masked):
    """Nats and tokens of texts by the export alone: in blocks, each with the token before it as its first input."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    ids, starts = [tokenizer.eos_token_id], [0]
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        starts.append(len(ids) - 1)
    nats = 0.0
    for at in range(0, len(ids) - 1, block):
        some = ids[at : at + block + 1]
        # A document apart is a forward of its own.
        cuts = [0, *(s - at for s in starts if masked and at < s < at + len(some) - 1), len(some) - 1]
        for first, last in pairwise(cuts):
            logits = model(torch.tensor([some[first:last]])).logits[0]
            nats += F.cross_entropy(logits, torch.tensor(some[first + 1 : last + 1]), reduction="sum").item()
    return nats, len(ids) - 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["masked", "bytes"])
def test_scores_of_text_are_of_each_of_its_tokens_and_bytes(folder, capsys, tmp_path, name):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    run = folder / "runs" / name
    text_bytes = sum(len(text.encode()) for text in TEXTS)
    for masked, block in ((name == "masked", 32), (True, 20), (False, 64)):
        mask = [] if block == 32 else ["--block-size", block, "--document-mask" if masked else "--no-document-mask"]
        what = scored(capsys, run, "--data", path, *mask)
        nats, tokens = of_transformers(run / "export", TEXTS, block, masked)
        assert (what["tokens"], what["bytes"], what["block_size"]) == (tokens, text_bytes, block)
        assert what["loss"] == pytest.approx(nats / tokens, rel=1e-6)
        assert what["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)


def test_text_is_read_in_every_form_that_a_run_reads_each_path_a_set(folder, capsys, tmp_path, caplog):
    rows = [{"body": text} for text in TEXTS]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "plain.jsonl").write_bytes(lines)
    with pyarrow.output_stream(str(tmp_path / "packed.jsonl.zst"), compression="zstd") as file:
        file.write(lines)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table.parquet")
    (tmp_path / "mixed").mkdir()
    for index, text in enumerate(TEXTS):
        (tmp_path / "mixed" / f"{index}.txt").write_text(text)
    (tmp_path / "mixed" / "image.png").write_bytes(b"\x00\x01")
    export = folder / "runs" / "bytes" / "export"
    what = scored(
        capsys, export, "--column", "body", "--data", tmp_path / "plain.jsonl", f"zst={tmp_path}/packed.jsonl.zst",
        tmp_path / "table.parquet", f"texts={tmp_path}/mixed/*.txt", tmp_path / "mixed",
    )  # fmt: skip
    assert list(what["sets"]) == ["plain.jsonl", "zst", "table.parquet", "texts", "mixed"]
    first, *others = what["sets"].values()
    assert all(one == pytest.approx(first, rel=1e-9) for one in others)
    assert what["tokens"] == 5 * first["tokens"]
    assert what["bits_per_byte"] == pytest.approx(first["bits_per_byte"])
    assert f"--data {tmp_path}/mixed: skipped 1 files that are not UTF-8 text" in caplog.text
    said = say(
        capsys, "eval", export, "--column", "body", "--data", *(tmp_path / name for name in ("plain.jsonl", "mixed"))
    )
    assert max(map(len, said.splitlines()[2:])) <= 80
    assert [line.split()[0] for line in said.splitlines() if "." in line][-3:] == ["plain.jsonl", "mixed", "all"]


@pytest.mark.parametrize("given", [[], ["--data", "{folder}/text"]])
def test_progress_is_told_all_of_the_work(folder, capsys, monkeypatch, given):
    shares = []
    monkeypatch.setattr(evaluate, "progress", lambda _: nullcontext(shares.append))
    scored(capsys, folder / "runs" / "bytes", *(word.format(folder=folder) for word in given))
    assert len(shares) > 1
    assert sum(shares) == pytest.approx(1, rel=0.01)


def test_dtype_is_of_the_weights_that_are_scored(folder, capsys, tmp_path):
    run, text = folder / "runs" / "bytes", ["--batch-size", 8, "--data", folder / "text" / "000.txt"]
    assert cli.main(["export", str(run), str(tmp_path / "half"), "--dtype", "bf16"]) == 0
    half = scored(capsys, tmp_path / "half", "--block-size", 32, *text)
    assert scored(capsys, run, "--dtype", "bf16", *text) == half | {"model": mock.ANY, "step": 6, "weights": "weight"}
    whole = scored(capsys, run, *text)["loss"]
    assert half["loss"] == pytest.approx(whole, rel=1e-2)
    assert half["loss"] != pytest.approx(whole, rel=1e-6)


def test_a_run_whose_attention_needs_a_gpu_is_scored_without_one(folder, capsys, tmp_path):
    run, text = folder / "runs" / "bytes", ["--data", folder / "text" / "000.txt"]
    shutil.copytree(run / "export", tmp_path / "export")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["attention"] = "flash_attention_2"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    scores = scored(capsys, tmp_path / "export", "--device", "cpu", *text)
    assert scores == scored(capsys, run / "export", *text) | {"model": mock.ANY}


@torch.no_grad()
@pytest.mark.parametrize("name", ["masked", "bytes"])
def test_generated_text_without_chance_is_that_of_transformers_from_the_export(
    folder, capsys, tmp_path, name, monkeypatch
):
    run = folder / "runs" / name
    model, tokenizer = (auto.from_pretrained(run / "export") for auto in (AutoModelForCausalLM, AutoTokenizer))
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer("abc é ")["input_ids"]]])
    out = model.generate(ids, do_sample=False, max_new_tokens=12, attention_mask=torch.ones_like(ids), pad_token_id=0)
    expected = tokenizer.decode(out[0], skip_special_tokens=True)
    written = []
    monkeypatch.setattr("shardopt.commands.generate._write", written.append)
    common = ("--temperature", 0, "--max-new-tokens", 12)
    say(capsys, "generate", run, "--prompt", "abc é ", *common)
    assert "".join(written) == printable(expected) + "\n"
    assert written[0] == "abc é "  # before the rest
    texts = ["".join(written)]
    (tmp_path / "prompt").write_text("abc é \n")
    for given in (["--prompt-file", tmp_path / "prompt"], [], ["--prompt", "abc é ", "--top-k", 1, "--temperature", 1]):
        written.clear()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("abc é \n".encode())))
        say(capsys, "generate", run / "checkpoints", *given, *(common if "--top-k" not in given else common[2:]))
        texts.append("".join(written))
    assert len(set(texts)) == 1


def test_samples_follow_the_seed_alone(folder, capsys):
    def samples(*given):
        said = say(capsys, "generate", folder / "runs" / "bytes", "--prompt", "ab", "--max-new-tokens", 10, *given)
        return [
            text for line, text in zip(said.split("\n"), said.split("\n")[1:], strict=False) if line.startswith("──")
        ]

    three = samples("--samples", 3)
    assert len(set(three)) == 3
    assert samples("--samples", 2, "--seed", 1) == three[1:]
    assert samples("--samples", 2, "--seed", 1, "--top-p", 0.01) != three[1:]


def test_models_in_a_store_are_loaded_from_there(folder, capsys):
    store = as_folder("memory://trained-in-a-store")
    run = folder / "runs" / "bytes"
    for path in run.rglob("*"):
        if path.is_file() and path.relative_to(run).parts[0] in ("checkpoints", "export", "model"):
            put(store / path.relative_to(run).as_posix(), path.read_bytes())
    expected = tiny.metrics(folder, "bytes")[-1]["eval_loss"]
    assert scored(capsys, store)["loss"] == pytest.approx(expected, rel=1e-6)
    local = say(capsys, "generate", run, "--prompt", "ab", "--max-new-tokens", 8)
    for model in (store, store / "export"):
        assert say(capsys, "generate", model, "--prompt", "ab", "--max-new-tokens", 8) == local


def test_printer_passes_no_control_character_on_and_leaves_special_tokens_out(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "runs" / "bytes" / "export")
    pieces = []
    printer = Printer(tokenizer, pieces.append)
    for number in (*b"a b\x1b[31m", tokenizer.eos_token_id):
        printer.put(torch.tensor([number]))
    printer.end()
    assert "".join(pieces) == "a b\\x1b[31m\n"
    assert pieces[0] == "a "  # before the rest was there


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "{runs}/byts", "--prompt", "a"], "/byts does not exist: .*; did you mean .*/runs/bytes"),
        (["generate", "{runs}/new", "--prompt", "a"], "new has no checkpoint yet: one is written"),
        (["generate", "{bare}", "--prompt", "a"], "bare has no tokenizer: write the model's own there"),
        (["generate", "{runs}/failed", "--prompt", "a"], "failed at step 3, before its first checkpoint: a disk is"),
        (["export", "{runs}/failed"], "failed at step 3, before its first checkpoint"),
        (["checkpoint", "list", "{runs}/failed"], "failed at step 3, before its first checkpoint"),
        (["checkpoint", "list", "{runs}/new"], "new has no checkpoint yet"),
        (["checkpoint", "list", "{runs}/byts"], "/byts does not exist: give a run's folder.*; did you mean .*/bytes"),
        (["export", "{runs}/new/config.yaml"], "config.yaml is a config: give the run's folder, such as runs/NAME$"),
        (["eval", "{top}/empty.txt"], "empty.txt is not a folder: [^;]*$"),
        (["generate", "{runs}/bytes"], "standard input: is empty; .* --prompt ''"),
        (["generate", "{runs}/bytes", "--prompt-file", "{top}/empty.txt"], "--prompt-file .*empty.txt: is empty"),
        (["generate", "{runs}/bytes", "--prompt", "a" * 64], "is 64 tokens long, and the model has 64 positions"),
        (["generate", "{runs}/bytes", "--prompt-file", "{top}/emty.txt"], "cannot read .*; did you mean .*empty.txt"),
        (["generate", "{runs}/bytes/export", "--step", "3", "--prompt", "a"], "is an export, of one step"),
        (["generate", "{runs}/bytes", "--step", "4", "--prompt", "a"], "--step 4: .* has steps 6"),
        (["eval", "{runs}/bytes", "--data", "{top}/tex"], "--data: .*/tex does not exist; did you mean .*/text"),
        (["eval", "{runs}/bytes", "--data", "{top}/empty.txt"], "--data .*empty.txt: every file is empty"),
        (["eval", "{runs}/bytes", "--data", "{top}/lines.jsonl"], "--column: there is no column 'text'"),
        (["eval", "{runs}/bytes", "--data", "{top}/half.jsonl"], "more than the share --max-broken = 0.001"),
        (["eval", "{runs}/bytes", "--data", "{top}/ids.bin"], "ids.bin: holds token ids"),
        (["eval", "{runs}/bytes", "--data", "{top}/text", "{top}/text"], "two sets are named text"),
        (["eval", "{runs}/bytes", "--data", "{top}/text", "--block-size", "65"], "the model has 64 positions"),
        (["eval", "{runs}/bytes", "--block-size", "16"], "--block-size: .* give --data, too"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_an_error_that_names_the_thing_to_change(folder, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    bare, new, failed = folder / "bare", folder / "runs" / "new", folder / "runs" / "failed"
    if not bare.exists():
        shutil.copytree(folder / "runs" / "bytes" / "export", bare, ignore=shutil.ignore_patterns("*token*"))
        new.mkdir()
        shutil.copy(folder / "runs" / "bytes" / "config.yaml", new)
        shutil.copytree(new, failed)
        (failed / "events.jsonl").write_text('{"event": "failed", "step": 3, "text": "a disk\\nis full"}\n')
        (folder / "empty.txt").write_text("")
        (folder / "ids.bin").write_bytes(b"\1\0")
        (folder / "lines.jsonl").write_text('{"body": "a"}\n')
        (folder / "half.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    words = [word.format(top=folder, runs=folder / "runs", bare=bare) for word in arguments]
    message = say(capsys, *words, status=2)
    assert message.startswith("shardopt: ")
    assert message.count("\n") == 1
    assert re.search(said, message), message


def test_more_tokens_than_the_model_has_positions_for_are_told_and_left_out(folder, capsys):
    capsys.readouterr()
    assert cli.main(["generate", str(folder / "runs" / "bytes"), "--prompt", "a" * 60]) == 0
    error = capsys.readouterr().err
    assert error == "warning: --max-new-tokens 128: the model has room for 3 tokens after the prompt\n"


def test_an_empty_prompt_gives_what_follows_the_end_of_text_token(folder, capsys):
    run, given = folder / "runs" / "bytes", ("--prompt", "", "--max-new-tokens", 8, "--temperature", 0)
    model, tokenizer = (auto.from_pretrained(run / "export") for auto in (AutoModelForCausalLM, AutoTokenizer))
    ids = torch.tensor([[tokenizer.eos_token_id]])
    out = model.generate(ids, do_sample=False, max_new_tokens=8, attention_mask=torch.ones_like(ids), pad_token_id=0)
    said = say(capsys, "generate", run, *given)
    assert len(said) > 1
    assert said == printable(tokenizer.decode(out[0], skip_special_tokens=True)) + "\n"


def test_names_of_sets_stand_in_the_table_as_they_are(folder, capsys):
    globs = [f"[/x]={folder}/text/000.txt", f"a[bold]b={folder}/text/00[0-1].txt", f"{folder}/text/00[0-2]*.txt"]
    said = say(capsys, "eval", folder / "runs" / "bytes", "--data", *globs)
    for name in ("[/x]", "a[bold]b", "00[0-2]*.txt"):
        assert f"\n{name} " in said or f"\n {name} " in said, said


def test_an_export_does_not_claim_what_its_weights_were_and_what_is_not_finite_is_null(folder, capsys, monkeypatch):
    export, text = folder / "runs" / "masked" / "export", folder / "text" / "000.txt"
    monkeypatch.setattr(evaluate.Evaluator, "texts", lambda *_: Score(math.nan, 3, 4))
    what = json.loads(say(capsys, "eval", export, "--data", text, "--json"), parse_constant=pytest.fail)
    assert (what["step"], what["weights"], what["loss"], what["bits_per_byte"]) == (None, None, None, None)


def test_a_process_of_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="without torchrun"):
        one_process("cpu")
