"""Configurations that the deepspeed engine accepts and refuses, and the places its messages name; no DeepSpeed runs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from shardopt.engines.deepspeed.config import _FORBIDDEN, DeepspeedConfig
from shardopt.errors import InputError, MissingExtraError
from tests.pretrain import tiny

READY = sorted(Path("launch/deepspeed").glob("*.json"))


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("key", _FORBIDDEN)
def test_what_the_engine_cannot_honour_is_refused_with_its_key(key):
    allowed, _ = _FORBIDDEN[key]
    refused = (
        {"type": "Adam"} if allowed is None else "cpu" if allowed == "none" else "bf16" if allowed == "fp32" else 3
    )
    with pytest.raises(InputError, match=f"engine.config: {key} cannot be .*remove it"):
        DeepspeedConfig(config=nested(key, refused))
    for fine in ("auto", allowed):
        if fine is not None:
            DeepspeedConfig(config=nested(key, fine))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "steps_per_print": 5,\n "optimizer": {"type": "AdamW"}\n}', r"ds.json line 3: optimizer cannot be"),
        ('{\n "zero_force_ds_cpu_optimizer": true\n}', r"line 2: zero_force_ds_cpu_optimizer .*DeepSpeedCPUAdam"),
        (
            '{"bf16": {\n "enabled": "auto",\n "bf16_optimizer_states": true}}',
            r"line 3: bf16.bf16_optimizer_states .*state_",
        ),
        (
            '{"zero_optimization": {\n "stage": 3}}',
            r"line 2: zero_optimization.stage is 3, .*engine.stage = 2: change one",
        ),
        ('{"bf16": {"enabled": true}}', r"line 1: bf16.enabled is true, .*engine.compute_dtype = fp32"),
        ('{"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}', r"cannot be nvme: .*cpu only"),
        ('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}', r"engine.offload_optimizer = False"),
        ('{"communication_data_type": "bf16"}', r"engine.reduce_dtype = fp32"),
        ('{"zero_optimisation": {}}', r"zero_optimisation: DeepSpeed has no such key; did you mean zero_optimization"),
        ("{\n 'a': 1}", r"ds.json line 2 is not JSON"),
        ('{"zero_optimization": true}', r"zero_optimization must hold keys of its own"),
        ("[]", r"must hold a JSON object"),
    ],
)
def test_a_file_is_refused_with_the_line_to_change(tmp_path, text, message):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        DeepspeedConfig(config=str(path), compute_dtype="fp32")


def test_a_missing_file_is_an_input_error():
    with pytest.raises(InputError, match=r"engine.config: cannot read nowhere.json"):
        DeepspeedConfig(config="nowhere.json")


@pytest.mark.parametrize(
    ("field", "value"), [("stage", 0), ("compute_dtype", "fp16"), ("reduce_dtype", "fp16"), ("bucket_mb", 0)]
)
def test_a_wrong_value_names_its_key(field, value):
    with pytest.raises(InputError, match=f"engine.{field}"):
        DeepspeedConfig(**{field: value})


def test_the_run_config_says_it_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"^engine.config: optimizer cannot be") as refused:
        tiny.config(tmp_path, engine="{name: deepspeed, config: {optimizer: {type: Adam}}}")
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match=r"did you mean engine\.overlap_comm"):
        tiny.config(tmp_path, engine="{name: deepspeed, overlap_com: true}")


@pytest.mark.parametrize(
    ("key", "value"),
    [("train_batch_size", 9), ("train_micro_batch_size_per_gpu", 4), ("gradient_accumulation_steps", 3)],
)
def test_batch_sizes_must_be_those_of_the_run(tmp_path, key, value):
    own = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    engine = {"name": "deepspeed", "config": own}
    tiny.config(tmp_path, engine=json.dumps(engine)).check_ranks(2)
    engine["config"] = {**own, key: value}
    with pytest.raises(InputError, match=rf"{key} is {value}, .* make it {own[key]}"):
        tiny.config(tmp_path, engine=json.dumps(engine)).check_ranks(2)


def test_without_deepspeed_the_run_does_not_start(tmp_path, monkeypatch):
    config = tiny.config(tmp_path, engine="{name: deepspeed}")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else find(name, *a))
    with pytest.raises(MissingExtraError, match=r"deepspeed is not installed.*shardopt\[deepspeed\]"):
        config.check_ranks(2)


def test_the_config_does_not_import_deepspeed():
    code = "import sys, shardopt.engines as e; e.DeepspeedConfig(); assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_deepspeed_is_given():
    config = {
        "train_batch_size": "auto",
        "steps_per_print": 7,
        "bf16": {"enabled": True, "immediate_grad_update": True},
        "zero_optimization": {"stage": 3, "sub_group_size": 1000, "overlap_comm": False, "reduce_bucket_size": "auto"},
    }
    engine = DeepspeedConfig(stage=3, bucket_mb=4, offload_optimizer=True, config=config)
    assert engine.dtype_name() == "bf16"
    assert engine.merged(bf16=True, pin_memory=False) == {
        "steps_per_print": 7,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": True, "immediate_grad_update": True},
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": 1000,
            "overlap_comm": False,
            "reduce_bucket_size": 4 * 2**20 // 4,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
        },
    }
    assert config["zero_optimization"]["reduce_bucket_size"] == "auto"  # the user's own is left alone


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_the_ready_configurations_are_accepted(path):
    stage, offload = int(path.stem[4]), path.stem.endswith("offload")
    merged = DeepspeedConfig(stage=stage, offload_optimizer=offload, config=str(path)).merged(False, False)
    assert merged["zero_optimization"]["stage"] == stage
    assert ("offload_optimizer" in merged["zero_optimization"]) is offload
    assert "auto" not in json.dumps(merged)


def test_there_is_a_ready_configuration_for_each_stage():
    assert {path.stem for path in READY} == {"zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"}
