"""The guard against loss spikes: back to a checkpoint, and then as a run that never saw the batches since."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from shardopt import checkpoint
from shardopt.errors import InputError
from shardopt.pretrain.data import TrainData
from shardopt.pretrain.progress import Progress
from shardopt.pretrain.spikes import LossSpikeConfig
from tests.distributed.pool import on_ranks
from tests.pretrain import tiny

GUARD = "{above: 1.0, window: 8}"
CHANGES = {"train__steps": 30, "checkpoint__every": 5, "model__attention_dropout": 0.1, "checkpoint__export": "true"}


def _run(rank, world_size, folder, bad=(), passed_over=None, **changes):
    """A run whose batches `bad` are noise; with `passed_over` = (n, k) step n, from 0, and later take batch n + k."""
    real = TrainData.batch

    def batch(self, step, *of_rank):
        if passed_over is not None and step >= passed_over[0]:
            step += passed_over[1]
        rows, number = real(self, step, *of_rank), self.state_dict(step)["samples"] // 8
        if number in bad:
            rows = torch.randint(256, rows.shape, generator=torch.Generator().manual_seed(number))
        return rows

    TrainData.batch = batch
    try:
        return tiny.run(rank, world_size, folder, **CHANGES | changes)
    finally:
        TrainData.batch = real


def _outcome(folder, name):
    rows = tiny.metrics(folder, name)
    weights = (folder / "runs" / name / "export" / "model.safetensors").read_bytes()
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows], weights


@pytest.mark.parametrize(
    ("engine", "streamed"),
    [
        pytest.param("{name: fsdp}", False, marks=pytest.mark.slow),
        ("{name: zero, stage: 2}", False),
        ("{name: zero}", True),
    ],
)
def test_after_a_spike_the_run_is_as_one_that_never_saw_those_batches(tmp_path, engine, streamed):
    tiny.corpus(tmp_path / "text")
    text = {"data__sources": tiny.stream(tmp_path / "hub", shards=4)} if streamed else {}
    # Batch 22 is met at step 23, so 20, 21 and 22 are left out; then 24, at step 22, and with it 23.
    bad = {22, 24}
    on_ranks(2, _run, tmp_path, bad, run__name="guarded", engine=engine, train__loss_spike=GUARD, **text)
    on_ranks(2, _run, tmp_path, bad, (20, 5), run__name="control", engine=engine, **text)
    assert _outcome(tmp_path, "guarded") == _outcome(tmp_path, "control")
    rows = tiny.metrics(tmp_path, "guarded")
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert [row["rewinds"] for row in rows] == [0] * 20 + [2] * 10


def test_run_that_is_stopped_after_a_spike_goes_on_without_those_batches(tmp_path, monkeypatch, capsys):
    from shardopt.pretrain import loop

    tiny.corpus(tmp_path / "text")
    alone = {"engine": "{name: single}", "train__loss_spike": GUARD}
    _run(0, 1, tmp_path, {22}, run__name="whole", **alone)
    said = r"step 23: the loss has jumped by more than 1 nats \(\d\.\d\d → \d\.\d\d\): back to step 20, "
    assert re.search(said + "and on without the 3 batches since", " ".join(capsys.readouterr().out.split()))
    real = loop.Run._step

    def step(self, stop):
        real(self, stop)
        if (self.progress.step, self.progress.rewinds) == (24, 1):
            self.stopped = True

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_step", step)
        assert _run(0, 1, tmp_path, {22}, run__name="stopped", **alone).step == 24
    _run(0, 1, tmp_path, {22}, run__name="stopped", **alone)
    assert _outcome(tmp_path, "stopped") == _outcome(tmp_path, "whole")


def test_a_spike_in_a_later_stage_goes_back_to_the_one_before(tmp_path):
    tiny.corpus(tmp_path / "text")
    # Steps 21, 22 and 23 have 8, 16 and 16 sequences; those of the last begin with the 184th, 23 times 8.
    stages = {"train__stages": "[{from_step: 21, global_batch: 16}]", "train__loss_spike": GUARD}
    result = _run(0, 1, tmp_path, {23}, engine="{name: single}", **stages)
    assert tiny.metrics(tmp_path, "tiny")[-1]["rewinds"] == 1
    assert result.tokens == 32 * (21 * 8 + 9 * 16)
    place = checkpoint.read_document(result.checkpoint)["data"]
    assert place["samples"] == (21 * 8 + 2 * 16) + (8 + 9 * 16)
    assert place["drawn"] == [[place["samples"]]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__loss_spike": "{above: 1.0, window: 8, rewinds: 1}"}, "step 22: the loss has jumped by more than"),
        ({"train__loss_spike": GUARD, "checkpoint__every": 100}, "goes on: there is no checkpoint yet"),
    ],
)
def test_spike_that_cannot_be_undone_is_a_warning(tmp_path, capsys, changes, said):
    tiny.corpus(tmp_path / "text")
    assert _run(0, 1, tmp_path, {22, 24}, engine="{name: single}", **changes).step == 30
    out = " ".join(capsys.readouterr().out.split())
    assert said in out
    assert "and the run goes on: " in out


def test_a_loss_with_which_the_run_goes_on_is_in_the_mean(tmp_path):
    guard, progress, said, spikes = LossSpikeConfig(above=0.3, window=4), Progress(), [], []
    state = SimpleNamespace(ranks=tiny.ALONE)
    for step, loss in enumerate([5.0, 5.0, 5.0, 5.0, 118.0, 136.0, 107.0, 137.0, 72.6], start=1):
        progress.step = step
        if guard.is_spike(progress, loss):
            spikes.append(loss)
            assert guard.rewind(progress, loss, tmp_path, state, None, 0, said.append) is None
    assert spikes == [118.0, 136.0, 107.0, 137.0]
    assert said[0].startswith(
        "step 5: the loss has jumped by more than 0.3 nats (5.00 → 118.00), and the run goes on: "
    )
    assert progress.recent == [136.0, 107.0, 137.0, 72.6]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("3.0", "train.loss_spike: is a section, not a value"),
        ("{}", "train.loss_spike.above: is required"),
        ("{above: 0}", "train.loss_spike.above: input should be greater than 0"),
        ("{above: 1, windw: 5}", "train.loss_spike.windw: there is no such key; did you mean train.loss_spike.window?"),
    ],
)
def test_a_mistake_in_the_guard_is_named(tmp_path, given, message):
    with pytest.raises(InputError) as refused:
        tiny.config(tmp_path, train__loss_spike=given)
    assert message in str(refused.value)
