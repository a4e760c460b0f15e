"""Batches that a thread prepares ahead, and streams whose shards the ranks divide among them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from shardopt import checkpoint
from shardopt.distributed import Ranks
from shardopt.errors import InputError, NonFiniteError
from shardopt.pretrain.data import Batches, DataConfig, TrainData, prepare, streams
from shardopt.pretrain.data.batches import merge_places
from shardopt.pretrain.data.sources import Corpus
from tests.distributed.pool import on_ranks
from tests.pretrain import tiny
from tests.pretrain.test_data import made_up, write_jsonl

BATCH = 12


def ranks_of(world_size: int) -> list[Ranks]:
    return [Ranks(rank, world_size, rank, torch.device("cpu"), distributed=False) for rank in range(world_size)]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def source(folder: Path, shards: int, files: int = 6) -> dict[str, Any]:
    if not folder.exists():
        for part in range(files):
            write_jsonl(folder / f"train-{part}.jsonl", made_up(20 + 7 * part, seed=part))
    return {"source": "hf", "name": str(folder), "streaming": True, "scan": 40, "shards": shards}


def opened(tmp_path: Path, shards: int = 1, mixed: bool = True, files: int = 6) -> TrainData:
    """A stream, mixed with packed text."""
    sources = [source(tmp_path / f"hub-{files}", shards, files)]
    if mixed:
        packed = write_jsonl(tmp_path / "a.jsonl", made_up(60, seed=99))
        sources.append({"source": "jsonl", "paths": str(packed), "weight": 0.5})
    config = {"sources": sources, "cache": tmp_path / "cache", "block_size": 16, "holdout": 0.2}
    return prepare(DataConfig.model_validate(config), ranks_of(1)[0], seed=0, global_batch=BATCH)[0]


def wait_until_ahead(batches: Batches) -> None:
    assert batches._worker is not None
    for future in batches._worker._futures:
        future.result()


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


def assert_goes_on(
    open_data: Callable[[], TrainData], expected: list[torch.Tensor], world_sizes: Sequence[int], steps: int
) -> None:
    """Ranks take `expected`, the global batches, where a run goes on with other numbers of them every few `steps`."""
    place: dict[str, Any] | None = None
    step = 0
    for world_size in world_sizes:
        group = [Batches(open_data(), ranks, 2) for ranks in ranks_of(world_size)]
        for one in group:
            if place is not None:
                one.load_state_dict(place, step)
        for _ in range(steps):
            for rank, one in enumerate(group):
                assert torch.equal(one.batch(step), expected[step][rank::world_size]), (world_size, step, rank)
            step += 1
        place = through_json(merge_places([one._place for one in group]))
        for one in group:
            one.close()


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_batches_ahead_are_the_same_and_the_place_is_that_after_the_last_one_used(tmp_path: Path, ahead: int) -> None:
    data, alone = opened(tmp_path, shards=3), ranks_of(1)[0]
    expected = [data.batch(step, 0, BATCH) for step in range(30)]
    batches = Batches(opened(tmp_path, shards=3), alone, ahead)
    places = []
    for step in range(20):
        assert torch.equal(batches.batch(step), expected[step])
        if ahead:
            wait_until_ahead(batches)
        places.append(through_json(batches.state_dict(step + 1)))
        # A place further on gives the same samples, but by reading everything from the start.
        assert [shard["given"] for shard in places[-1]["streams"]["0"]] == places[-1]["drawn"][0]
    for stop in (1, 7, 20):
        other = Batches(opened(tmp_path, shards=3), alone, ahead)
        other.load_state_dict(places[stop - 1], stop)
        for step in range(stop, stop + 5):
            assert torch.equal(other.batch(step), expected[step]), (stop, step)
        other.close()
    # Back to an earlier place, and on from there without some batches, as after a spike of the loss.
    batches.load_state_dict(places[9], 10)
    assert torch.equal(batches.batch(14), expected[14])
    assert torch.equal(batches.batch(15), expected[15])
    with pytest.raises(RuntimeError, match="before step 14 is asked for, that before step 16 is known"):
        batches.state_dict(14)
    # What was prepared for a step is not taken for it after another beginning.
    if ahead:
        wait_until_ahead(batches)
    batches.begin(16)
    assert torch.equal(batches.batch(16), expected[0])
    if ahead:
        wait_until_ahead(batches)
    batches.load_state_dict(places[9], 17)
    assert torch.equal(batches.batch(17), expected[10])
    batches.close()
    assert threads() == []


@pytest.mark.parametrize(("shards", "files"), [(1, 6), (2, 6), (6, 6), (5, 6), (4, 2)])
def test_samples_do_not_depend_on_ranks_and_a_run_goes_on_with_others(tmp_path: Path, shards: int, files: int) -> None:
    whole = opened(tmp_path, shards, files=files)
    expected = [whole.batch(step, 0, BATCH) for step in range(24)]
    assert len({tuple(row) for batch in expected[:4] for row in batch.tolist()}) > 3 * BATCH
    assert_goes_on(lambda: opened(tmp_path, shards, files=files), expected, (2, 1, 4, 3, 6, 2), 4)
    # Without a place the stream is read again up to the step; and going back works.
    fresh = opened(tmp_path, shards, files=files)
    assert torch.equal(fresh.batch(20, 1, BATCH, 3), expected[20][1::3])
    assert torch.equal(fresh.batch(2, 0, BATCH), expected[2])


def test_each_rank_tokenises_only_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tmp_path, 6, mixed=False)
    read: set[str] = set()
    texts = Corpus.texts

    def watched(self: Corpus, rows: Any, tally: Any) -> Iterator[str]:
        for text in texts(self, rows, tally):
            read.add(text)
            yield text

    of_rank = []
    for ranks in ranks_of(3):
        batches = Batches(opened(tmp_path, 6, mixed=False), ranks, 1)
        with monkeypatch.context() as patch:
            patch.setattr(Corpus, "texts", watched)
            for step in range(40):
                batches.batch(step)
            batches.close()
        of_rank.append(frozenset(read))
        read.clear()
    everything = {text for part in range(6) for text in made_up(20 + 7 * part, seed=part)}
    assert frozenset.union(*of_rank) == everything
    assert sum(map(len, of_rank)) == len(everything)


def test_documents_of_all_shards_are_those_of_the_stream_each_once_an_epoch(tmp_path: Path) -> None:
    for shards, files in ((3, 6), (4, 6), (4, 3)):
        folder = tmp_path / f"hub-{files}"
        corpus_of = DataConfig.model_validate({"sources": [source(folder, shards, files)], "cache": tmp_path / "cache"})
        corpus = Corpus(corpus_of, 0)
        texts = [[row["text"] for row in corpus.stream(shards, index)] for index in range(shards)]
        assert all(texts)
        assert sorted(text for shard in texts for text in shard) == sorted(row["text"] for row in corpus.stream())
        # A place within a shard is exact.
        for index in range(shards):
            reader, again = corpus.stream(shards, index), corpus.stream(shards, index)
            rows = iter(reader)
            first = [next(rows)["text"] for _ in range(5)]
            again.load_state_dict(json.loads(json.dumps(reader.state_dict())))
            assert first + [row["text"] for row in again] == texts[index]


def test_a_batch_that_cannot_be_had_is_an_error_when_it_is_its_turn_and_the_thread_ends(tmp_path: Path) -> None:
    data = opened(tmp_path)
    real = data.batch

    def batch(step: int, *rows: int) -> torch.Tensor:
        if step == 3:
            raise InputError("data.sources[0]: line 7 is bad")
        return real(step, *rows)

    data.batch = batch  # type: ignore[method-assign]
    batches = Batches(data, ranks_of(1)[0], ahead=4)
    for step in range(3):
        batches.batch(step)
    assert len(threads()) == 1
    with pytest.raises(InputError, match="line 7 is bad"):
        batches.batch(3)
    batches.close()
    assert threads() == []


def test_a_source_that_does_not_answer_does_not_keep_the_run_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, answer = opened(tmp_path), threading.Event()
    real = data.batch

    def batch(step: int, *rows: int) -> torch.Tensor:
        if step == 1:
            answer.wait()
        return real(step, *rows)

    data.batch = batch  # type: ignore[method-assign]
    monkeypatch.setattr("shardopt.pretrain.data.prefetch._PATIENCE", 0.05)
    batches = Batches(data, ranks_of(1)[0], ahead=1)
    batches.batch(0)
    batches.close()
    (thread,) = threads()
    assert thread.daemon
    answer.set()
    thread.join(10)
    assert threads() == []


def test_the_wait_for_a_slow_source_is_logged(tmp_path, monkeypatch):
    tiny.corpus(tmp_path / "text")
    now, real = [1000.0], Batches.prepare

    def slow(self, step):
        now[0] += 0.25 * (step + 1)
        return real(self, step)

    monkeypatch.setattr(Batches, "prepare", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    same = {"engine": "{name: single}", "train__steps": 5, "data__prefetch": 0, "tracking__log_every": 2}
    tiny.run(0, 1, tmp_path, **same)
    # Of steps 1 and 2, 3 and 4, 5: the mean of a step.
    assert [row["data_wait"] for row in tiny.metrics(tmp_path, "tiny")] == [0.375, 0.875, 1.25]


def _losses(folder: Path, name: str) -> list[float]:
    return [row["loss"] for row in tiny.metrics(folder, name)]


def _streamed(rank: int, world_size: int, folder: Path, stop_after: int | None = None, **changes: Any) -> list[str]:
    """A run, which is stopped after a step where that is asked; the threads of batches that it leaves behind."""
    from shardopt.pretrain.loop import Run

    real = Run._step

    def step(self, stop):
        real(self, stop)
        self.stopped = self.stopped or self.progress.step == stop_after

    Run._step = step
    try:
        tiny.run(rank, world_size, folder, **changes)
    finally:
        Run._step = real
    return [thread.name for thread in threads()]


def test_a_streamed_run_is_stopped_and_goes_on_with_other_ranks_as_if_it_never_was(tmp_path):
    same = {"data__sources": tiny.stream(tmp_path / "hub", shards=4), "train__steps": 12, "train__micro_batch": 1}
    for name, prefetch in (("whole", 4), ("in-the-loop", 0)):
        _streamed(0, 1, tmp_path, run__name=name, engine="{name: single}", data__prefetch=prefetch, **same)
    whole = _losses(tmp_path, "whole")
    assert _losses(tmp_path, "in-the-loop") == whole
    parts = {"run__name": "parts", "engine": "{name: zero}", **same}
    assert on_ranks(2, _streamed, tmp_path, 5, **parts) == [[], []]
    # The place of every shard, and not of rank 0's alone: the others would be read again from their beginning.
    place = checkpoint.read_document(tmp_path / "runs" / "parts" / "checkpoints" / "step-00000005")["data"]
    assert [shard["given"] for shard in place["streams"]["0"]] == [5 * 8 // 4] * 4
    assert on_ranks(4, _streamed, tmp_path, 8, **parts) == [[]] * 4
    assert on_ranks(2, _streamed, tmp_path, **parts) == [[], []]
    assert _losses(tmp_path, "parts") == pytest.approx(whole, rel=1e-4)


def _refused(rank: int, world_size: int, folder: Path, **changes: Any) -> tuple[str, list[str]]:
    """The error of a run that cannot read the row "bad", and the threads of batches that it leaves behind."""
    real, characters = Corpus.texts, streams._STREAM_CHARACTERS

    def texts(self: Corpus, rows: Any, tally: Any) -> Iterator[str]:
        for text in real(self, rows, tally):
            if text == "bad":
                raise InputError(f"{self.where}: a row is bad")
            yield text

    Corpus.texts, streams._STREAM_CHARACTERS = texts, 500  # type: ignore[method-assign]
    try:
        tiny.run(rank, world_size, folder, **changes)
    except InputError as error:
        return str(error), [thread.name for thread in threads()]
    finally:
        Corpus.texts, streams._STREAM_CHARACTERS = real, characters  # type: ignore[method-assign]
    return "", []


def test_a_bad_row_in_one_ranks_shard_ends_the_run_on_all_ranks(tmp_path):
    sources = tiny.stream(tmp_path / "hub", shards=2)
    bad = tmp_path / "hub" / "train-1.jsonl"
    lines = bad.read_text().splitlines()
    bad.write_text("\n".join([*lines[:15], '{"text": "bad"}', *lines[15:]]))
    for prefetch in (0, 4):
        same = {"data__sources": sources, "data__prefetch": prefetch, "engine": "{name: zero}", "train__steps": 500}
        told = on_ranks(2, _refused, tmp_path, run__name=f"bad-{prefetch}", checkpoint__every=2, **same)
        assert told == [("data.sources[0]: a row is bad", [])] * 2
        assert list((tmp_path / "runs" / f"bad-{prefetch}" / "checkpoints").glob("step-*"))


def test_the_thread_ends_with_a_run_that_fails(tmp_path):
    tiny.corpus(tmp_path / "text")
    with pytest.raises(NonFiniteError):
        tiny.run(0, 1, tmp_path, engine="{name: single}", optimizer__lr=1e30, train__grad_clip="null",
                 train__max_nonfinite_steps=0, train__steps=50)  # fmt: skip
    assert threads() == []
