"""User errors at the launcher: one clear line, status 2 or 1 on every rank, no hang, and nothing on disk lost."""

import contextlib
import io
import json
import os
import shutil

import pytest

from shardopt.cli import main
from shardopt.pretrain.record import read_metrics
from tests.distributed.pool import on_ranks
from tests.pretrain import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    tiny.corpus(folder / "text")
    return folder


def _command(rank, world_size, path, overrides=()):
    """Status and standard error of `shardopt pretrain` on this rank."""
    if world_size == 1:
        os.environ.pop("RANK", None)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        status = main(["pretrain", str(path), *overrides])
    return status, said.getvalue()


def command(folder, name, ranks=2, **changes):
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(tiny.tree(folder, run__name=name) | {}))
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    results = on_ranks(ranks, _command, path, overrides, timeout=90)
    assert len({status for status, _ in results}) == 1, results
    return results[0][0], results[0][1], [said for _, said in results[1:]]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("unknown-key", {"train__stepz": 3}, "train.stepz: there is no such key; did you mean train.steps?"),
        ("wrong-type", {"train__steps": "many"}, "train.steps: input should be a valid integer"),
        (
            "ranks",
            {"train__micro_batch": 8},
            "train.global_batch: 8 cannot be cut into micro-batches of 8 over 2 ranks",
        ),
        ("single", {"engine": "{name: single}"}, "engine.name: single runs on one process, this run has 2"),
        ("mesh", {"engine": "{name: fsdp, replicate: 4}"}, "engine.replicate: 4 does not divide the 2 ranks"),
        ("corpus", {"data__sources": "[{source: text, paths: /nowhere/at/all}]"}, "/nowhere/at/all"),
        ("vocabulary", {"model__vocab_size": 100}, "model.vocab_size: 100 is smaller than the tokenizer's"),
        ("hub", {"data__tokenizer": "no-such-owner/no-such-tokenizer"}, "no-such-owner/no-such-tokenizer"),
    ],
)
def test_bad_input_is_one_clear_line_and_status_2_on_every_rank(folder, name, changes, message):
    status, said, others = command(folder, name, **changes)
    assert status == 2
    assert message in said
    assert "Traceback" not in said
    assert not any(other.strip() for other in others)  # said once, not once a rank
    assert not (folder / "runs" / name).exists()


def test_an_empty_corpus_and_one_shorter_than_a_block_are_refused(folder):
    empty = folder / "empty"
    empty.mkdir()
    status, said, _ = command(folder, "empty-corpus", data__sources=f"[{{source: text, paths: {empty}}}]")
    assert status == 2
    assert str(empty) in said
    short = folder / "short"
    short.mkdir()
    for i in range(30):
        (short / f"{i}.txt").write_text(f"{i}")
    status, said, _ = command(
        folder, "short-corpus", data__sources=f"[{{source: text, paths: {short}}}]", data__block_size=64
    )
    assert status == 2
    assert "block" in said


def test_a_file_that_is_not_utf8_is_skipped_with_a_count(folder):
    mixed = tiny.corpus(folder / "mixed")
    (mixed / "binary.txt").write_bytes(b"\xff\xfe\x00\x01" * 50)
    status, said, _ = command(folder, "mixed", data__sources=f"[{{source: text, paths: {mixed}}}]")
    assert status == 0, said


def test_an_unwritable_run_folder_is_refused(folder):
    (folder / "file").write_text("in the way")
    status, said, _ = command(folder, "unwritable", run__dir=folder / "file")
    assert status == 2
    assert "run.dir: cannot write the run folder" in said


def test_a_folder_with_something_else_in_it_is_left_alone(folder):
    other = folder / "runs" / "thesis"
    other.mkdir(parents=True)
    (other / "chapter1.txt").write_text("years of work")
    status, said, _ = command(folder, "thesis")
    assert status == 2
    assert "holds no run of shardopt (chapter1.txt)" in said
    assert (other / "chapter1.txt").read_text() == "years of work"
    assert [p.name for p in other.iterdir()] == ["chapter1.txt"]


def test_a_folder_with_another_run_is_left_alone_and_the_keys_are_named(folder):
    assert command(folder, "first", checkpoint__every=3)[0] == 0
    metrics = folder / "runs" / "first" / "metrics.jsonl"
    before = metrics.read_text()
    status, said, _ = command(folder, "first", optimizer__lr=1e-2, train__steps=9)
    assert status == 2
    assert "optimizer.lr: 0.003 → 0.01" in said
    assert "train.steps: 6 → 9" in said
    assert f"model='{{path: {folder}/runs/first/export}}'" in said
    status, said, _ = command(folder, "first", run__resume="never")
    assert status == 2
    assert "run.resume: never" in said
    assert metrics.read_text() == before
    status, said, _ = command(folder, "no-checkpoint-yet", run__resume="must")
    assert status == 2
    assert "run.resume: must" in said
    assert not (folder / "runs" / "no-checkpoint-yet").exists()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"data__sources": "[{source: text, paths: /nowhere/at/all}]"}, "/nowhere/at/all does not exist"),
        ({"engine": "{name: fsdp, replicate: 4}"}, "engine.replicate: 4 does not divide the 2 ranks"),
        ({"engine": "{name: single}"}, "engine.name: single runs on one process"),
        ({"train__micro_batch": 8}, "8 cannot be cut into micro-batches of 8 over 2 ranks"),
    ],
)
def test_folder_with_another_run_does_not_hide_a_mistake_in_the_config(folder, mistake, message):
    taken = folder / "runs" / "taken"
    if not taken.exists():
        assert command(folder, "taken")[0] == 0
    status, said, _ = command(folder, "taken", optimizer__lr=1e-2, **mistake)
    assert status == 2
    assert message in said
    assert "already holds another run" not in said


def test_a_damaged_config_of_the_run_folder_is_named(folder):
    assert command(folder, "torn")[0] == 0
    recorded = folder / "runs" / "torn" / "config.yaml"
    recorded.write_text(recorded.read_text() + "foo: [")
    status, said, _ = command(folder, "torn")
    assert status == 2
    assert f"{recorded} is damaged" in said


def test_a_checkpoint_of_another_model_is_refused_by_name(folder):
    """The config is made to agree, as if somebody had copied the checkpoint into another run's folder."""
    assert command(folder, "small", checkpoint__every=3)[0] == 0
    shutil.rmtree(folder / "runs" / "small" / "checkpoints" / "step-00000006")  # it is not finished
    changed = {"model__hidden_size": 64}
    recorded = folder / "runs" / "small" / "config.yaml"
    recorded.write_text(tiny.config(folder, run__name="small", **changed).as_yaml())
    status, said, _ = command(folder, "small", **changed)
    assert status == 2
    assert "model.embed_tokens.weight" in said


def test_a_corpus_that_changed_since_the_checkpoint_is_refused(folder):
    text = tiny.corpus(folder / "changing")
    sources = f"[{{source: text, paths: {text}}}]"
    assert command(folder, "changing", data__sources=sources, checkpoint__every=3)[0] == 0
    shutil.rmtree(folder / "runs" / "changing" / "checkpoints" / "step-00000006")  # it is not finished
    (text / "000.txt").write_text("other words " * 100)
    status, said, _ = command(folder, "changing", data__sources=sources)
    assert status == 2
    assert "the corpus or its tokenizer has changed" in said


def test_a_run_that_is_going_on_is_not_joined_by_a_second(folder):
    from shardopt.pretrain.folder import RunFolder

    held = RunFolder(tiny.config(folder, run__name="held"))
    status, said, _ = command(folder, "held")
    held.release()
    assert status == 2
    assert "another process is running" in said
    assert command(folder, "held")[0] == 0


def test_steps_that_are_not_finite_are_skipped_together_and_then_the_run_stops(folder):
    status, said, _ = command(
        folder, "nan", optimizer__lr=1e30, schedule__warmup=0, train__steps=20, train__max_nonfinite_steps=3,
        checkpoint__every=1,
    )  # fmt: skip
    assert status == 1
    assert "4 steps in a row, up to step 5" in said
    rows = read_metrics(folder / "runs" / "nan" / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[0]["grad_norm"] is not None
    assert rows[-1]["grad_norm"] is None
    assert "step-00000001" in said  # the last good one, and not a later one
    assert [p.name for p in (folder / "runs" / "nan" / "checkpoints").iterdir()] == ["step-00000001"]
