"""`shardopt plan`: figures of a run before it starts, in 80 columns and as JSON."""

from __future__ import annotations

import json

import pytest
import yaml

from shardopt import cli
from shardopt.checkpoint import inspect
from shardopt.errors import InputError
from shardopt.pretrain.flops import GPUS, flops_per_token
from shardopt.pretrain.forecast import USABLE, Device, forecast, model_of
from shardopt.pretrain.forecast_text import as_text
from tests.pretrain import tiny

GIB = 2**30
H100 = Device("H100", 80 * GIB, 1e15)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny.tree(tmp_path)))
    return path


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    """The tiny run on four H100s with a state dtype of the config's own."""
    config = tiny.config(tmp_path_factory.mktemp("plan"), optimizer__state_dtype="bf16", optimizer__weight_ema=0.9)
    return config, forecast(config, 4, H100, mfu=0.5)


def say(capsys, *arguments):
    capsys.readouterr()
    status = cli.main(["plan", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_every_engine_and_state_dtype_has_a_row_and_the_configs_own_is_first(on_four):
    _, found = on_four
    engines = ["fsdp", "ddp", "zero-1", "zero-2", "deepspeed-1", "deepspeed-2", "deepspeed-3"]
    rows = [(row.state_dtype, row.engine) for row in found.rows]
    expected = [("bf16", e) for e in engines] + [("fp32", e) for e in engines]
    # A flat partition has no blocks.
    assert rows == expected + [(name, e) for name in ("block16", "block8") for e in engines[:4]]
    assert [(row.state_dtype, row.engine) for row in found.rows if row.chosen] == [("bf16", "fsdp")]
    held = {(row.state_dtype, row.engine): row.memory for row in found.rows}
    for key in ("m1", "m2", "nu", "weight_ema"):
        assert held["fp32", "ddp"].state[key] == 4 * found.parameters == 2 * held["bf16", "ddp"].state[key]
        assert found.parameters < held["block8", "ddp"].state[key] < 1.1 * found.parameters
    for memory in held.values():
        parts = (memory.weights, memory.masters, memory.gradients, memory.buckets, memory.activations)
        assert memory.total == sum(parts) + sum(memory.state.values())


def test_steps_tokens_operations_and_hours_are_those_of_the_config(on_four):
    config, found = on_four
    assert (found.steps, found.tokens, found.stages[0].micro_batches) == (6, 6 * 8 * 32, 1)
    assert found.flops == found.tokens * flops_per_token(model_of(config), 32)
    assert found.hours == pytest.approx(found.flops / (4 * 1e15 * 0.5) / 3600)


def test_checkpoint_size_is_that_of_a_real_one(tmp_path):
    tiny.corpus(tmp_path / "text")
    changes = {"optimizer__state_dtype": "block16", "engine": "{name: single}", "train__steps": 2}
    planned = forecast(tiny.config(tmp_path, **changes), 1, H100).checkpoint_bytes["block16"]
    kinds = inspect.describe(tiny.run(0, 1, tmp_path, **changes).checkpoint)["kinds"]
    assert sum(kind["bytes"] for kind in kinds.values()) == pytest.approx(planned, rel=0.05)


def test_largest_micro_batch_fits_and_the_next_does_not(tmp_path):
    def own(micro_batch, memory):
        config = tiny.config(tmp_path, train__global_batch=256, train__micro_batch=micro_batch)
        return next(row for row in forecast(config, 4, Device("it", memory, None)).rows if row.chosen)

    enough = own(8, 1e12).memory.total / USABLE
    assert own(2, enough * 1.01).largest_micro_batch == 8
    assert own(2, enough * 0.99).largest_micro_batch == 4


def test_text_has_80_columns_and_marks_the_configs_own(on_four):
    lines = as_text(on_four[1]).splitlines()
    assert max(map(len, lines)) <= 80
    (titles,) = [line for line in lines if " a rank " in line and "fsdp" in line]
    assert titles.split()[3:] == ["fsdp*", "ddp", "zero-1", "zero-2", "ds-1", "ds-2", "ds-3"]
    assert "with bf16 state*" in lines


def test_command_prints_text_or_json_and_takes_overrides_behind_options(config_file, capsys):
    status, text, _ = say(capsys, config_file, "--world-size", 2, "--memory", "24GiB", "run.device=auto")
    assert status == 0
    assert "2 × GPU of 24.0 GiB" in text.splitlines()[0]
    assert "hours" not in text  # of a device whose peak is not known
    status, text, _ = say(capsys, config_file, "--world-size", 2, "--gpu", "h100", "--json", "train.steps=7")
    what = json.loads(text)
    assert (what["steps"], what["device"], what["world_size"]) == (7, "H100", 2)
    assert what["device_bytes"] == GPUS["H100"].memory * GIB
    row = what["rows"][0]
    assert row["bytes"]["total"] == sum(v for k, v in row["bytes"].items() if k != "total")


def test_a_run_on_the_cpu_computes_in_fp32_and_fits_nowhere_in_particular(config_file, capsys):
    _, text, _ = say(capsys, config_file, "--world-size", 2, "--json")
    what = json.loads(text)
    assert (what["device"], what["hours"], what["device_bytes"]) == ("cpu", None, None)
    rows = {(row["engine"], row["state_dtype"]): row["bytes"] for row in what["rows"]}
    assert rows["deepspeed-2", "fp32"]["weights"] == rows["ddp", "fp32"]["weights"]  # bf16 would be half


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--world-size", "none"], "--world-size must be a whole number >= 1, got 'none'"),
        (["--world-size", "3"], "train.global_batch: 8 cannot be cut"),
        (["--world-size", "2", "--gpu", "h10"], "--gpu: no 'h10' in the list; did you mean h100?"),
        (["--world-size", "2", "--memory", "lots"], "--memory: 'lots' is no size"),
        (["--world-size", "2", "--mfu", "40"], "--mfu: '40' is no share"),
        (["--world-size", "2", "train.setps=4"], "train.setps"),
    ],
)
def test_wrong_arguments_are_told_by_name(config_file, capsys, arguments, words):
    status, _, error = say(capsys, config_file, *arguments)
    assert status == 2
    assert error.startswith(f"shardopt: {words}")


def test_an_optimizer_that_cannot_be_sharded_has_ddp_alone_and_the_reason(tmp_path):
    with pytest.raises(InputError, match="choose ddp"):
        forecast(tiny.config(tmp_path, optimizer="{name: adafactor, lr: 1e-3}", engine="{name: zero}"), 2, H100)
    config = tiny.config(tmp_path, optimizer="{name: adafactor, lr: 1e-3}", engine="{name: ddp}")
    found = forecast(config, 2, H100)
    assert [(row.engine, row.state_dtype) for row in found.rows] == [("ddp", None)]
    assert "averages squared gradients" in found.refused["fsdp"]
    assert max(map(len, as_text(found).splitlines())) <= 80
