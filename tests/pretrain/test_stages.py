"""Stages: another batch or other weights of the sources from a step on, exact however often a run is stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardopt.errors import InputError
from shardopt.pretrain import data
from shardopt.pretrain.data.batches import Shuffled, TrainData
from shardopt.pretrain.data.config import DataConfig
from shardopt.pretrain.data.stages import StageConfig, Stages
from shardopt.pretrain.data.tokenizers import SavedTokenizer
from shardopt.pretrain.data_facts import in_short
from shardopt.pretrain.forecast import Device, forecast
from shardopt.pretrain.forecast_text import as_text
from tests.distributed.pool import on_ranks
from tests.pretrain import tiny
from tests.pretrain.test_data_order import blocks_of
from tests.pretrain.test_prefetch import assert_goes_on, ranks_of, source

WEIGHTS = {"code": 3.0, "web": 1.0, "late": 0.0}
CHANGES = [
    StageConfig(from_step=3, global_batch=8),
    StageConfig(from_step=5, weights={"late": 1.0, "code": 0.0, "web": 1.0}),
    StageConfig(from_step=6, global_batch=2, weights={"code": 1.0, "web": 1.0, "late": 2.0}),
]
STAGES = Stages(WEIGHTS, 4, CHANGES)


def test_a_stage_keeps_what_it_does_not_change_and_is_that_of_its_steps() -> None:
    batches = [STAGES.at(step).global_batch for step in range(8)]
    assert batches == [4, 4, 4, 8, 8, 8, 2, 2]
    assert [STAGES.at(step).weights for step in (0, 4, 5, 6)] == [(3, 1, 0), (3, 1, 0), (0, 1, 1), (1, 1, 2)]
    assert STAGES.at(0).shares == (0.75, 0.25, 0.0)
    for start in range(8):
        for stop in range(start, 9):
            assert STAGES.samples(start, stop) == sum([*batches, 2][start:stop])
            assert sum(steps for _, steps in STAGES.between(start, stop)) == stop - start
    assert STAGES.batches == {
        "train.global_batch": 4,
        "train.stages[0].global_batch": 8,
        "train.stages[2].global_batch": 2,
    }


def packed(folder: Path, stages: Stages) -> TrainData:
    """As many sources as there are weights, of 15, 25 and 35 blocks, which are told apart by their first token."""
    sources = [
        Shuffled(blocks_of(folder, 15 + 10 * index, 4, first=1000 * index), 0, index)
        for index in range(len(stages.all[0].weights))
    ]
    tokenizer = SavedTokenizer(Path(), "", 1 << 16, 0, False)
    return TrainData(sources, stages, tokenizer, block_size=4, seed=0, tokens=None, fingerprint="", corpora=[])


def first_tokens(train: TrainData, steps: range) -> list[list[int]]:
    return [train.batch(step, 0, train.stages.at(step).global_batch)[:, 0].tolist() for step in steps]


def test_each_source_goes_on_over_a_border_where_it_was(tmp_path: Path) -> None:
    """No block comes a second time before all have come once, whatever the weights are meanwhile."""
    changes = [
        StageConfig(from_step=10, weights={"a": 1.0, "b": 5.0}),
        StageConfig(from_step=20, global_batch=6, weights={"a": 3.0, "b": 0.0}),
        StageConfig(from_step=30, weights={"a": 1.0, "b": 1.0}),
    ]
    steps = first_tokens(packed(tmp_path, Stages({"a": 1.0, "b": 1.0}, 10, changes)), range(40))
    seen = [[token for step in steps for token in step if token // 1000 == index] for index in range(2)]
    for own, blocks in zip(seen, (15, 25), strict=True):
        assert len(own) > 3 * blocks
        for epoch in range(len(own) // blocks):
            assert len(set(own[blocks * epoch : blocks * (epoch + 1)])) == blocks
    shares = [np.mean([token < 1000 for step in steps[at : at + 10] for token in step]) for at in (0, 10, 20, 30)]
    assert shares == pytest.approx([1 / 2, 1 / 6, 1, 1 / 2], abs=0.04)


def test_another_batch_alone_changes_the_cut_and_not_the_samples(tmp_path: Path) -> None:
    ramped = Stages({"a": 1.0, "b": 2.0}, 2, [StageConfig(from_step=3, global_batch=6)])
    flat = [one for step in first_tokens(packed(tmp_path, ramped), range(9)) for one in step]
    assert flat == [
        one for step in first_tokens(packed(tmp_path, Stages({"a": 1.0, "b": 2.0}, 2)), range(21)) for one in step
    ]


def test_a_place_holds_whatever_comes_before_it(tmp_path: Path) -> None:
    """Steps in any order, and from a place that went through JSON, are those of a run that was never stopped."""
    whole = first_tokens(packed(tmp_path, STAGES), range(12))
    for step in (7, 2, 11, 0):
        assert first_tokens(packed(tmp_path, STAGES), range(step, step + 1)) == [whole[step]]
    for stop in range(1, 11):
        train = packed(tmp_path, STAGES)
        train.load_state_dict(json.loads(json.dumps(packed(tmp_path, STAGES).state_dict(stop))), stop)
        assert first_tokens(train, range(stop, 12)) == whole[stop:], stop
        with pytest.raises(IndexError, match=f"the data begins at step {stop}"):
            train.batch(stop - 1, 0, 1)


@pytest.mark.parametrize("shards", [1, 5])
def test_streams_and_packed_text_follow_the_stages_on_any_number_of_ranks(tmp_path: Path, shards: int) -> None:
    config = DataConfig.model_validate(
        {
            "sources": [source(tmp_path / "hub", shards), {"source": "text", "paths": [str(tmp_path / "text")]}],
            "cache": tmp_path / "cache",
            "block_size": 16,
            "holdout": 0.2,
        }
    )
    tiny.corpus(tmp_path / "text", documents=20)
    changes = [
        StageConfig(from_step=5, global_batch=24, weights={"hub": 1.0, "text": 9.0}),
        StageConfig(from_step=9, weights={"hub": 0.0, "text": 1.0}),
        StageConfig(from_step=12, global_batch=6, weights={"hub": 1.0, "text": 0.0}),
    ]

    def opened() -> TrainData:
        return data.prepare(config, ranks_of(1)[0], 0, 12, stages=changes)[0]

    whole = opened()
    expected = [whole.batch(step, 0, whole.stages.at(step).global_batch) for step in range(18)]
    assert_goes_on(opened, expected, (2, 6, 3), 6)


def two_sources(folder: Path) -> str:
    for name, documents in (("text", 60), ("more", 40)):
        if not (folder / name).exists():
            tiny.corpus(folder / name, documents)
    return f"[{{source: text, paths: {folder}/text}}, {{source: text, paths: {folder}/more, label: more, weight: 0}}]"


RAMP = "{from_step: 2, global_batch: 4}"
MIXED = "{from_step: 4, global_batch: 8, weights: {text: 1, more: 2}}"
RUN = {
    "engine": "{name: single}",
    "train__global_batch": 2,
    "train__steps": 6,
    "train__stages": f"[{RAMP}, {MIXED}]",
    "checkpoint__every": 1,
    "checkpoint__keep": 10,
    "optimizer__alpha_warmup": 4,
    "optimizer__beta3_warmup": 4,
    "schedule": "{name: constant, warmup: 2}",
    "model__attention_dropout": 0.1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three stages that was never stopped: "whole"."""
    folder = tmp_path_factory.mktemp("stages")
    tiny.run(0, 1, folder, run__name="whole", data__sources=two_sources(folder), **RUN)
    return folder


def rows(folder: Path, name: str = "whole") -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in tiny.MEASURED} for row in tiny.metrics(folder, name)]


def stopped_at(folder: Path, step: int, name: str = "whole") -> None:
    """Let the newest checkpoint be that after `step`."""
    for path in (folder / "runs" / name / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def test_a_run_that_is_stopped_before_at_or_after_a_border_goes_on_as_if_it_were_not(folder: Path) -> None:
    whole = rows(folder)
    assert [row["tokens"] // 32 for row in whole] == [2, 4, 8, 12, 20, 28]
    for step in (5, 4, 3):
        stopped_at(folder, step)
        result = tiny.run(0, 1, folder, run__name="whole", data__sources=two_sources(folder), **RUN)
        assert result.tokens_before == whole[step - 1]["tokens"]
        assert rows(folder) == whole


def test_two_ranks_go_on_in_the_stages_of_one(folder: Path) -> None:
    changes = RUN | {"train__micro_batch": 1, "model__attention_dropout": 0.0, "data__sources": two_sources(folder)}
    tiny.run(0, 1, folder, run__name="one", **changes)
    expected = rows(folder, "one")
    stopped_at(folder, 3, "one")
    on_ranks(2, tiny.run, folder, run__name="one", **changes | {"engine": "{name: fsdp}"})
    found = rows(folder, "one")
    assert [row["tokens"] for row in found] == [row["tokens"] for row in expected]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-6)


def test_stages_that_are_still_to_come_may_be_changed_and_those_that_were_may_not(folder: Path) -> None:
    changes = RUN | {"data__sources": two_sources(folder), "run__name": "changed"}
    tiny.run(0, 1, folder, **changes)
    stopped_at(folder, 4, "changed")
    for stages, reason in (
        (f"[{{from_step: 3, global_batch: 4}}, {MIXED}]", "step 3 would have had another batch"),
        (f"[{MIXED}]", "step 3 would have had another batch"),
        (f"[{RAMP}, {{from_step: 3, weights: {{text: 2, more: 1}}}}]", "step 4 would have had other weights of the s"),
    ):
        with pytest.raises(InputError, match=rf"already holds another run(.|\n)*\({reason}"):
            tiny.run(0, 1, folder, **changes | {"train__stages": stages})
    later = f"[{RAMP}, {{from_step: 4, global_batch: 6, weights: {{text: 1, more: 1}}}}]"
    tiny.run(0, 1, folder, **changes | {"train__stages": later, "train__steps": 7})
    assert [row["tokens"] // 32 for row in rows(folder, "changed")] == [2, 4, 8, 12, 18, 24, 30]
    assert rows(folder, "changed")[:4] == rows(folder)[:4]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{from_step: 0, global_batch: 4}]", r"train\.stages\[0\]\.from_step: 0, but .* after step 0"),
        (f"[{MIXED}, {RAMP}]", r"train\.stages\[1\]\.from_step: 2, but .* the stage before, at 4"),
        (f"[{RAMP}, {RAMP}]", r"train\.stages\[1\]\.from_step: 2, but .* the stage before, at 2"),
        ("[{from_step: 6, weights: {text: 1, more: 1}}]", r"train\.stages\[0\]\.from_step: 6 is not before the"),
        ("[{from_step: 2}]", r"train\.stages\[0\]: changes nothing"),
        ("[]", r"train\.stages: must not be empty"),
        (f"[{{from_step: 1, global_batch: 3}}, {MIXED}]", r"train\.stages\[0\]\.global_batch: 3 is not a multiple"),
        ("[{from_step: 2, global_batch: 0}]", r"train\.stages\[0\]\.global_batch: .*or equal to 1, got 0"),
        ("[{global_batch: 4}]", r"train\.stages\[0\]\.from_step: is required"),
        ("[{from_step: 2, batch: 4}]", r"train\.stages\[0\]\.batch: there is no such key"),
        (
            "[{from_step: 2, weights: {text: 1, moar: 1}}]",
            r"train\.stages\[0\]\.weights\.moar: no source has this label; did you mean more\?",
        ),
        ("[{from_step: 2, weights: {more: 1}}]", r"train\.stages\[0\]\.weights: lacks text: give every source its"),
        (
            "[{from_step: 2, weights: {text: -1, more: 1}}]",
            r"train\.stages\[0\]\.weights\.text: .* or equal to 0, got -1",
        ),
        ("[{from_step: 2, weights: {text: 0, more: 0}}]", r"train\.stages\[0\]\.weights: every weight is 0"),
        (f"[{RAMP}]", r"data\.sources\[1\]\.weight: 0, and no stage of train\.stages draws from it"),
    ],
)
def test_a_mistake_in_the_stages_is_named(folder: Path, stages: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny.config(folder, **RUN | {"data__sources": two_sources(folder), "train__stages": stages})


def test_a_run_that_begins_with_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"data\.sources: every weight is 0"):
        tiny.config(folder, data__sources="[{source: stdlib, weight: 0}]")


def test_a_source_that_waits_for_a_stage_is_held_out_from_the_beginning(folder: Path) -> None:
    """As whoever scores a run on its own held-out text opens it, without its stages."""
    config = tiny.config(folder, **RUN | {"data__sources": two_sources(folder)})
    _, holdout = data.prepare(config.data, tiny.ALONE, 0, 2)
    assert len(holdout.sets(holdout.n_blocks)["more"]) > 10


def test_every_batch_must_be_cut_over_the_ranks(folder: Path) -> None:
    config = tiny.config(folder, **RUN | {"data__sources": two_sources(folder), "engine": "{name: ddp}"})
    config.check_ranks(1)
    with pytest.raises(InputError, match=r"train\.global_batch: 2 cannot be cut into micro-batches of 2 over 2 ranks"):
        config.check_ranks(2)
    ramp = {"train__global_batch": 8, "data__sources": two_sources(folder), "engine": "{name: ddp}"}
    config = tiny.config(folder, **RUN | ramp)
    with pytest.raises(InputError, match=r"train\.stages\[0\]\.global_batch: 4 cannot be cut .* over 4 ranks"):
        config.check_ranks(4)


def test_the_plan_and_the_data_report_count_what_the_stages_take(folder: Path) -> None:
    config = tiny.config(folder, **RUN | {"data__sources": two_sources(folder)})
    planned = forecast(config, 1, Device("it", None, 1e15))
    assert planned.tokens == 28 * 32
    assert [stage.micro_batches for stage in planned.stages] == [1, 2, 4]
    even = RUN | {"train__stages": "null", "train__global_batch": 8}
    assert planned.rows[0].memory == forecast(tiny.config(folder, **even), 1, planned.device).rows[0].memory
    text = as_text(planned)
    assert max(map(len, text.splitlines())) <= 80
    assert "step 5 on       256 tokens a step, 4 micro-batches of 2 sequences on a rank" in text
    kept = json.loads((folder / "runs" / "whole" / "data.json").read_text())
    assert kept["samples"] == 28
    shares = {one["label"]: one["share"] * 28 for one in kept["sources"]}
    assert shares == pytest.approx({"text": 12 + 16 / 3, "more": 16 * 2 / 3})
    assert in_short(kept)["documents"][1].startswith("over the whole run: text 61.9% (")
    assert in_short(kept)["stages"] == [
        "from step 1: 2 sequences a step, text 100.0%, more 0.0%",
        "from step 3: 4 sequences a step",
        "from step 5: 8 sequences a step, text 33.3%, more 66.7%",
    ]
