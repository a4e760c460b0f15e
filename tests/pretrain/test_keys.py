"""The list of all keys, its page, its JSON schema, and configs written with every key explained."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from shardopt import cli
from shardopt.optim import registry
from shardopt.pretrain import keys, presets
from shardopt.pretrain.config import Config, load, parse, read
from shardopt.pretrain.strict_yaml import Loader, flat
from tests.pretrain import tiny

CONFIGS = sorted(Path("configs").glob("*.yaml"))
# Numbers that count nothing.
PURE = {
    "run.seed", "train.grad_clip", "engine.stage", "engine.replicate", "profile.steps", "optimizer.lr",
    "optimizer.betas", "optimizer.alpha", "optimizer.eps",
    "optimizer.eps_root", "optimizer.weight_decay", "optimizer.seed",
}  # fmt: skip


@pytest.fixture(scope="module")
def groups():
    return keys.groups()


@pytest.fixture(scope="module")
def schema():
    return keys.json_schema()


def test_the_page_of_all_keys_is_that_of_this_code():
    page = Path("docs/config.md").read_text(encoding="utf-8")
    assert page == keys.as_markdown(), "run: shardopt config --markdown > docs/config.md"


def test_every_key_has_a_text_and_every_number_that_counts_something_a_unit(groups):
    of_all = [key for group in groups for key in group.keys]
    assert len(of_all) > 90
    assert [key.name for key in of_all if len(key.text) < 8] == []
    numbers = {key.name for key in of_all if re.match("int|float", key.type) and not key.unit}
    assert numbers - PURE == set()


def test_no_key_of_a_config_is_missing(groups, tmp_path):
    listed = {key.name for group in groups for key in group.keys} | {group.path for group in groups}
    tags = {f"{group.path}.{group.where.split(': ')[0]}" for group in groups if group.where}
    for engine in ("single", "ddp", "zero", "fsdp", "deepspeed"):
        config = tiny.config(tmp_path, engine=f"{{name: {engine}}}", data__tokenizer="{bpe: 300}")
        there = {re.sub(r"\[\d+\]\.", ".", key) for key in flat(config.as_dict())}  # of any member of a list
        found = {key for key in there if not key.startswith("model.") or key in listed}
        assert {"engine.compute_dtype", "data.tokenizer.train_mb", "tracking.wandb.tags"} <= found
        assert found - listed - tags == set()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train.steps", ["int >= 1", "300", "steps", "Optimizer steps of the whole run."]),
        ("run.from", ["text or null", "null", ""]),
        ("run.timeout_minutes", ["float > 0", "10", "minutes"]),
        ("schedule.name", ["cosine | linear | constant | wsd", "cosine", ""]),
        ("checkpoint.keep_hours", ["float > 0 or null", "null", "hours"]),
        ("data.sources.sample_by", ["document | paragraph | line", "document", ""]),
        ("data.holdout", ["float > 0, < 1", "0.01", "share of the documents"]),
        ("train.loss_spike.above", ["float > 0", "required", "nats a token"]),
        ("optimizer.betas", ["list of 3 float", "[0.9, 0.999, 0.9999]", ""]),
        ("optimizer.alpha_warmup", ["int >= 1 or total or null", "null", "steps"]),
        ("optimizer.seed", ["int >= 0", "run.seed", ""]),
        ("engine.overlap_comm", ["true or false", "true", ""]),
        ("engine.name", ["single | ddp | zero | fsdp | deepspeed", "fsdp", ""]),
    ],
)
def test_a_key_has_the_type_default_and_unit_of_its_field(name, expected):
    (group,) = keys.find(name)
    (key,) = group.keys
    assert [key.type, key.default, key.unit, key.text][: len(expected)] == expected


@pytest.mark.parametrize("engine", ["single", "ddp", "zero", "fsdp", "deepspeed"])
def test_every_default_in_the_list_is_what_a_config_without_the_key_has(groups, engine):
    resolved = parse({"model": {"model_type": "llama"}, "data": {}, "engine": {"name": engine}})
    built = registry.spec("ademamix").build(torch.nn.Linear(1, 1)).defaults
    compared = set()
    for key in (key for group in groups if group.where in ("", f"name: {engine}") for key in group.keys):
        node = resolved.as_dict() | {"optimizer": built | {"name": "ademamix", "kernel": "auto", "seed": "run.seed"}}
        for part in key.name.split("."):
            node = node[part] if node is not None else node
        if (key.default != "required" and node is not None) or key.default == "null":
            value = list(node) if isinstance(node, tuple) else node
            given = {"engine.name": "fsdp", "model.model_type": None}  # what this config does not leave out
            assert yaml.load(key.default, Loader) == given.get(key.name, value), key
            compared.add(key.name)
    assert len(compared) > 60


def problems(schema, value, root, at="config"):
    """What a JSON schema, of the keywords that ours uses, finds wrong with `value`."""
    found = problems(root["$defs"][schema["$ref"].split("/")[-1]], value, root, at) if "$ref" in schema else []
    types = {
        "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
        "null": type(None),
    }  # fmt: skip
    if "type" in schema:
        fits = isinstance(value, types[schema["type"]]) and (schema["type"] == "boolean" or not isinstance(value, bool))
        fits |= schema["type"] == "integer" and isinstance(value, float) and value.is_integer()
        if not fits:
            return [*found, f"{at} is no {schema['type']}"]
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        found.append(f"{at} is {value}")
    if "anyOf" in schema and all(problems(member, value, root, at) for member in schema["anyOf"]):
        found.append(f"{at} fits none")
    if type(value) in (int, float) and value < schema.get("minimum", value):
        found.append(f"{at} is too small")
    if isinstance(value, list):
        found += [p for i, one in enumerate(value) for p in problems(schema.get("items", {}), one, root, f"{at}.{i}")]
    if isinstance(value, dict):
        of = schema.get("properties", {})
        found += [f"{at} lacks {key}" for key in schema.get("required", []) if key not in value]
        found += [p for key in of.keys() & value.keys() for p in problems(of[key], value[key], root, f"{at}.{key}")]
        if schema.get("additionalProperties") is False:
            found += [f"{at}.{key} is not known" for key in value.keys() - of.keys()]
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_schema_takes_every_config_and_its_resolved_form(path, schema):
    assert problems(schema, read(path), schema) == []
    assert problems(schema, load(path).as_dict(), schema) == []


@pytest.mark.parametrize(
    "override",
    [
        "data.sources=stdlib", "data.sources=[stdlib, {source: text, paths: notes}]", "data.tokenizer=byte",
        "data.sources={source: jsonl, paths: [a, b], weight: 2}", "data.tokenizer={bpe: 2048}", "engine={replicate: 1}",
        "data.tokenizer={path: here, trust_remote_code: true}", "optimizer={name: adamw, lr: 1e-3, betas: [0.9, 0.99]}",
        "optimizer.state_dtype={m1: bf16}", "optimizer.alpha_warmup=total", "train.steps=1e3", "run.from=runs/a",
        "train.loss_spike={above: 0.5}", "engine={name: zero, stage: 1, bucket_mb: null}", "model.head_dim=64",
    ],
)  # fmt: skip
def test_the_schema_takes_what_a_config_takes(override, schema):
    tree = read("configs/quickstart.yaml", [override])
    parse(tree)
    assert problems(schema, tree, schema) == []


@pytest.mark.parametrize(
    "override",
    [
        "train.stepz=3", "train.steps=0", "train.steps=many", "engine={name: zero, stage: 3}", "engine.replicat=2",
        "engine={name: ddp, replicate: 2}", "optimizer.lrr=3", "optimizer={name: sgd, alpha: 3}", "trian={}",
        "optimizer.alpha_warmup=all", "data.sources=[{source: text}]", "data.sources=[{source: jsonl, path: a}]",
        "data.tokenizer={bpe: many}", "schedule.name=cosin", "tracking.wandb.mode=on", "checkpoint.export=1",
        "optimizer.betas=0.9",
    ],
)  # fmt: skip
def test_the_schema_refuses_what_a_config_refuses(override, schema):
    assert problems(schema, read("configs/quickstart.yaml", [override]), schema)


def test_the_schema_knows_every_optimizer(schema):
    kinds = {kind["properties"]["name"]["const"] for kind in schema["$defs"]["OptimizerConfig"]["anyOf"]}
    assert kinds == set(registry.names())
    assert {group.where.removeprefix("name: ") for group in keys.groups() if group.path == "optimizer"} >= kinds - {
        "ademamix"
    }


@pytest.mark.parametrize("name", presets.names())
def test_a_config_with_comments_is_its_preset_and_so_it_is_with_every_default_uncommented(name):
    text = presets.commented(read(presets.path_of(name)), "Head.")
    assert parse(yaml.load(text, Loader)) == load(f"configs/{name}.yaml")
    whole = re.sub(r"^( *)#(?! )", r"\1", text, flags=re.MULTILINE)
    assert text.count("\n") == whole.count("\n") > 150
    written, resolved = yaml.load(whole, Loader), load(f"configs/{name}.yaml").as_dict()
    of_both = [{re.sub(r"^(data\.sources)\[.*", r"\1", key) for key in flat(tree)} for tree in (written, resolved)]
    assert of_both[0] >= {key for key in of_both[1] if not key.startswith("data.tokenizer.")}
    given = resolved | {"optimizer": registry.defaults("ademamix") | resolved["optimizer"]}
    del given["optimizer"]["seed"]
    parsed = parse(written).as_dict()
    assert parsed["optimizer"] == {k: list(v) if isinstance(v, tuple) else v for k, v in given["optimizer"].items()}
    assert parsed | {"optimizer": 0} == resolved | {"optimizer": 0}
    assert max(map(len, text.splitlines())) <= 100 or name == "apertus-8b"


def run(capsys, *arguments):
    status = cli.main([*map(str, arguments)])
    return status, *capsys.readouterr()


def test_init_writes_the_preset_with_overrides_and_never_over_another_file(tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    arguments = ("init", "--model", "llama-124m", "--out", out, "train.steps=5000", "data.sources=stdlib")
    status, said, _ = run(capsys, *arguments)
    assert (status, said.split()[0]) == (0, str(out))
    assert said.endswith(f"shardopt pretrain {out} --nproc-per-node 2\n")
    single = run(capsys, "init", "--out", tmp_path / "b.yaml", "engine={name: single}")[1]
    assert single.endswith(f"shardopt pretrain {tmp_path / 'b.yaml'}\n")
    assert load(out) == load("configs/llama-124m.yaml", ["train.steps=5000", "data.sources=stdlib"])
    assert "\n  # Optimizer steps of the whole run. (steps)\n  steps: 5000\n" in out.read_text()
    assert out.read_text().startswith("# Llama, 124M parameters. The AdEMAMix settings")
    status, said, error = run(capsys, *arguments)
    assert (status, said) == (2, "")
    assert error == f"shardopt: {out} is there already: give another --out\n"
    assert run(capsys, "init", "--list")[1].split() == [path.stem for path in CONFIGS]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["init", "--model", "llama-124"], "there is no preset llama-124; there are: apertus-8b, "),
        (["init", "--model", "llama-124"], "; did you mean llama-124m?"),
        (
            ["init", "train.stepz=3", "--out", "{tmp}/a.yaml"],
            "train.stepz: there is no such key; did you mean train.steps?",
        ),
        (["init", "--out", "{tmp}/no/a.yaml"], "{tmp}/no/a.yaml cannot be written: "),
        (["config", "train.step"], "train.step: there is no such key; did you mean train.steps?"),
        (["config", "train", "--schema"], "--schema and --markdown are of the whole config"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(arguments, said, tmp_path, capsys):
    status, out, error = run(capsys, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert said.format(tmp=tmp_path) in error
    assert list(tmp_path.iterdir()) == []


def test_config_shows_a_section_or_a_key_in_80_columns(capsys):
    status, out, _ = run(capsys, "config")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    _, train, _ = run(capsys, "config", "train")
    assert {line.split()[0] for line in train.splitlines() if line.startswith("  train.")} == {
        key.name for group in keys.groups() for key in group.keys if key.name.startswith("train.")
    }
    assert run(capsys, "config", "train.steps")[1].splitlines()[-2:] == [
        "  train.steps  (int >= 1, in steps; default 300)",
        "      Optimizer steps of the whole run.",
    ]
    assert "engine {name: zero}" in run(capsys, "config", "engine.replicate")[1]
    assert set(Config.model_fields) <= set(re.findall(r"^(\w+)$", out, re.MULTILINE))
