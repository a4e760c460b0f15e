from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from shardopt import cli
from shardopt.engines import DdpConfig, FsdpConfig
from shardopt.errors import InputError
from shardopt.pretrain.config import differences, load, parse
from shardopt.pretrain.model import ModelConfig, meta_model, transformers_config
from shardopt.pretrain.schedule import ScheduleConfig, lr_factor
from tests.pretrain import tiny

CONFIGS = sorted(Path("configs").glob("*.yaml"))
PARAMETERS = {"llama-124m": 124e6, "llama-350m": 350e6, "llama-1.3b": 1.3e9, "apertus-8b": 8e9, "quickstart": 2.2e6}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_preset_parses_and_builds_on_the_meta_device(path):
    config = load(path)
    vocab_size = (config.model.model_extra or {}).get("vocab_size") or config.data.tokenizer.vocab_size
    model = meta_model(transformers_config(config.model, vocab_size, 0, config.data.block_size))
    assert all(p.is_meta for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert total == pytest.approx(PARAMETERS[path.stem], rel=0.05)


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "camembert"])
def test_a_model_that_counts_positions_from_the_padding_token_needs_one(model_type):
    def build(**pad):
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        return meta_model(transformers_config(ModelConfig(model_type=model_type, **shape, **pad), 257, 256, 32))

    with pytest.raises(InputError, match=r"model\.pad_token_id: .*max_position_embeddings"):
        build()
    assert build(pad_token_id=0).config.pad_token_id == 0


def test_what_is_printed_is_the_same_config_again():
    config = load("configs/llama-124m.yaml", ["train.steps=5000", "engine={name: ddp}"])
    assert parse(yaml.safe_load(config.as_yaml())) == config
    assert config.engine == DdpConfig()
    assert config.train.steps == 5000


def test_overrides_are_yaml_and_1e_3_is_a_number():
    config = load("configs/quickstart.yaml", ["optimizer.lr=1e-3", "train.grad_clip=null", "run.name=other"])
    assert config.optimizer.model_extra["lr"] == 1e-3
    assert config.train.grad_clip is None
    assert config.engine == FsdpConfig()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", r"train\.stepz: there is no such key; did you mean train\.steps\?"),
        ("trian={}", r"trian: there is no such key; did you mean train\?"),
        ("model.hidden_sise=3", r"model\.hidden_sise: .* did you mean model\.hidden_size\?"),
        ("model.model_type=lama", r"transformers knows no 'lama'; did you mean llama\?"),
        ("model.path=/nowhere", r"give either model_type .* or path.* write model='\{path: \.\.\.\}'"),
        ("model.num_attention_heads=7", "model: llama refuses this configuration"),
        ("optimizer.lrr=3", r"no 'lrr'; it has: .*; did you mean lr\?"),
        ("optimizer.name=ademamixx", r"; did you mean ademamix\?"),
        ("optimizer.alpha=-1", r"alpha.*-1"),
        ("engine.name=fsdq", r"engine\.name: 'fsdq' .*; did you mean fsdp\?"),
        (
            "engine.reshard_after=true",
            r"engine\.reshard_after: the engine fsdp has no such key; did you mean engine\.resh",
        ),
        ("engine={name: ddp, replicate: 2}", r"engine\.replicate: the engine ddp has no such key; known: name"),
        ("engine={name: zero, stage: 3, bucket_mb: x}", r"engine\.stage: .* 1 or 2, got 3\nengine\.bucket_mb: .*'x'"),
        ("engine.replicate=0", r"engine\.replicate: 0 must be at least 1"),
        ("engine.compute_dtype=fp8", r"engine\.compute_dtype"),
        ("checkpoint.keep=0", r"checkpoint\.keep: .* 1, got 0"),
        ("checkpoint.keep_hours=0", r"checkpoint\.keep_hours: "),
        (
            "checkpoint.keep_evry=4",
            r"checkpoint\.keep_evry: there is no such key; did you mean checkpoint\.keep_every\?",
        ),
        ("checkpoint={every: 4, keep_every: 6}", r"keep_every: 6 is not a multiple of checkpoint\.every = 4"),
        ("checkpoint={every: 4, keep_best: 1}", r"keep_best: goes by the held-out loss.* multiple of eval\.every = "),
        ("engine=zero", r"engine: is a section, .* such as engine\.name=zero$"),
        ("tracking.wandb=offlin", r"is a section, .*wandb\.mode=\.\.\.; did you mean tracking\.wandb\.mode=offline\?$"),
        ("tracking.wandb=offline", r"is a section, .* such as tracking\.wandb\.mode=offline$"),
        ("train=5", r"train: is a section, .* such as train\.steps=5$"),
        ("train=", r"train: is a section, .* such as train\.steps=\.\.\.$"),
        ("train.steps=abc", r"train\.steps: .*integer, got 'abc'"),
        ("train.steps=1.5", r"train\.steps: .*integer, got 1\.5"),
        ("train={steps: 1, steps: 2}", r"steps stands twice"),
        ("train.loss_spike={above:1.0}", r"above:1\.0: YAML wants a blank after the colon"),
        ("checkpoint.dir=memroy://b", r"^checkpoint\.dir: memroy://b: ((?!got).)*memory((?!got).)*$"),
        ("train.steps=0", r"train\.steps: .*greater than or equal to 1, got 0"),
        ("train.global_batch=7", r"train\.global_batch: 7 is not a multiple of train\.micro_batch = 16"),
        ("data.block_size=512", r"data\.block_size: 512 is over this model's limit, model\.max_position_embeddings"),
        (
            "data.sources=[{source: txt}]",
            r"^data\.sources\[0\]\.source: 'txt' is not one of stdlib, text, .*; did you mean text\?$",
        ),
        ("data.sources=[{weight: 2}]", r"^data\.sources\[0\]: 'source' is required$"),
        ("data.sources=5", r"^data\.sources: must be a list of sources, such as \[\{source: stdlib\}\], got 5$"),
        ("data.tokenizer=5", r"^data\.tokenizer: must be byte, bpe, "),
        (
            "optimizer.alpha_warmup=totl",
            r"optimizer\.alpha_warmup: must be a whole number of steps or total, got 'totl'",
        ),
        ("optimizer.beta3_warmup=1.5", r"optimizer\.beta3_warmup: must be a whole number of steps or total, got 1\.5"),
        ("schedule.warmup=1000", r"schedule\.warmup: 1000 is longer than train\.steps"),
        ("run.resume=true", r"^run\.resume: .*, got true$"),
        ("eval.every=~", r"^eval\.every: .*, got null$"),
        ("data.sources=[]", r"^data\.sources: must not be empty, got \(\)$"),
        ("data.sources=[{source: text, paths: 5}]", r"^data\.sources\[0\]\.paths: write a list, got 5$"),
        ("data.tokenizer={bpe: 10}", r"^data\.tokenizer\.vocab_size: .* 257, got 10$"),
        ("run.resume=yes", r"run\.resume: .*, got 'yes'"),
        ("checkpoint.export=on", r"checkpoint\.export: write true or false, got 'on'"),
        ("run.name=[a]", r"run\.name: .*string, got \['a'\]"),
        ("optimizer.lr=total", r"optimizer ademamix: lr must be a number, got the text 'total'$"),
        ("optimizer.lr=nan", r"optimizer ademamix: lr must be a finite number, got nan$"),
        ("train.loss_spike=yes", r"train\.loss_spike: is a section, .* such as train\.loss_spike\.above=\.\.\.$"),
        ("train.loss_spike=1.0", r"train\.loss_spike: is a section, .* such as train\.loss_spike\.above=1\.0$"),
        ("run.from=", r"^override 'run\.from=': there is no value; for none write run\.from=null$"),
        ("checkpoint.dir=", r"^override 'checkpoint\.dir=': there is no value; for none write checkpoint\.dir=null$"),
        (
            "optimizer.weight_ema=None",
            r"optimizer ademamix: weight_ema is the text 'None': for none at all, write null$",
        ),
        ("optimizer.lr=fast", r"optimizer ademamix: lr must be a number, got the text 'fast'$"),
        ("train.steps=010", r"train\.steps: .*integer, got '010'"),
        ("schedule.cooldown=10", r"schedule\.cooldown: belongs to schedule\.name=wsd"),
        (
            "run.name=a/b",
            r"^run\.name: write letters, digits and any of \. \+ - _, a letter, digit or _ first, got 'a/b'$",
        ),
        ("train.stages=[]", r"^train\.stages: must not be empty; for none write train\.stages=null, or leave it out$"),
        ("train.stages=[5]", r"^train\.stages\[0\]: is a section, .* such as \{from_step: 5\}$"),
        ("train.stages=[{from_step: 5, weights: 3}]", r"^train\.stages\[0\]\.weights: write a mapping, got 3$"),
        (
            "train.stages=[{from_step: 5, micro_batch: 3}]",
            r"^train\.stages\[0\]\.micro_batch: there is no such key; known: from_step, global_batch, weights; "
            r"micro_batch is a key of train: write train\.micro_batch$",
        ),
        (
            "train.stages=[{from_stp: 5}]",
            r"train\.stages\[0\]\.from_stp: .*; did you mean train\.stages\[0\]\.from_step\?",
        ),
        ("train.steps", "write it as key.sub=value"),
        ("train.steps.x=1", r"train\.steps\.x|steps is a value, not a section"),
    ],
)
def test_a_mistake_is_refused_with_the_key_to_change(override, message):
    with pytest.raises(InputError, match=message):
        load("configs/quickstart.yaml", [override])


def test_a_command_without_a_config_asks_for_that_alone(capsys):
    with pytest.raises(SystemExit):
        cli.main(["pretrain"])
    assert capsys.readouterr().err.endswith("the following arguments are required: config\n")


def test_another_optimizer_is_told_which_keys_are_left_over_and_how_to_replace_them_at_once():
    with pytest.raises(InputError) as caught:
        load("configs/quickstart.yaml", ["optimizer.name=adamw"])
    assert "optimizer adamw has no 'alpha', 'alpha_warmup', 'beta3_warmup'; it has: lr, " in str(caught.value)
    assert "write optimizer='{name: adamw, lr: ...}'" in str(caught.value)
    assert load("configs/quickstart.yaml", ["optimizer={name: adamw, lr: 1e-3}"]).optimizer.name == "adamw"
    with pytest.raises(InputError, match="optimizer adamw: betas must be 2 numbers"):
        load("configs/quickstart.yaml", ["optimizer={name: adamw, betas: [0.9, 0.99, 0.999]}"])


def test_a_key_that_stands_twice_is_refused_with_its_line_and_a_merge_is_not(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("model: {model_type: llama}\ndata: {}\ntrain:\n  steps: 3\n  micro_batch: 1\n  steps: 4\n")
    with pytest.raises(InputError, match=r"twice\.yaml .*steps stands twice\n.*line 6, column 3"):
        load(path)
    path.write_text(
        "model: {model_type: llama}\ndata: {}\neval: &often {every: 3}\ncheckpoint: {<<: *often, every: 4, keep: 1}\n"
    )
    assert (load(path).eval.every, load(path).checkpoint.every) == (3, 4)


def test_override_of_an_aliased_section_leaves_the_other_alone(tmp_path):
    path = tmp_path / "alias.yaml"
    path.write_text("model: {model_type: llama}\ndata: {}\neval: &often {every: 3}\ncheckpoint: *often\n")
    config = load(path, ["eval.every=7", "eval.batches=2"])
    assert (config.eval.every, config.eval.batches, config.checkpoint.every) == (7, 2, 3)


def test_words_and_dates_are_text_and_total_stands_for_the_steps_of_a_warmup():
    config = load("configs/quickstart.yaml", ["run.name=2024-01-31", "tracking.wandb.group=off", "run.resume=never"])
    assert (config.run.name, config.tracking.wandb.group) == ("2024-01-31", "off")
    given = config.optimizer.spec(300, 0).kwargs
    assert (given["alpha_warmup"], given["beta3_warmup"], given["lr"]) == (300, 300, 1.5e-3)
    assert given["betas"] == (0.9, 0.99, 0.999)


def test_warmup_of_the_optimizer_may_be_written_as_the_steps_are():
    config = load("configs/quickstart.yaml", ["optimizer.beta3_warmup=1e4", "train.steps=1e3"])
    assert config.optimizer.spec(1000, 0).kwargs["beta3_warmup"] == 10_000


def test_default_warmup_that_is_too_long_is_said_to_be_the_default():
    config = load("configs/quickstart.yaml").as_dict()
    del config["schedule"]
    config["train"]["steps"] = 6
    with pytest.raises(InputError, match=r"schedule\.warmup: 100 \(the default\) is longer than train\.steps = 6"):
        parse(config)


def test_all_mistakes_of_a_file_are_listed_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("model: {model_type: llama}\ndata: {}\ntrain: {steps: x, micro: 3}\n")
    with pytest.raises(InputError) as caught:
        load(path)
    assert "train.steps" in str(caught.value)
    assert "train.micro" in str(caught.value)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\tx: 1"])
def test_a_file_that_is_no_config_is_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"bad\.yaml"):
        load(path)


def test_a_missing_file_names_the_ones_there_are():
    with pytest.raises(InputError, match=r"no config file nowhere\.yaml; there are: .*quickstart"):
        load("nowhere.yaml")


def test_ranks_that_cannot_share_the_batch_are_told_what_would_do(tmp_path):
    config = tiny.config(tmp_path, train__global_batch=8, train__micro_batch=4)
    config.check_ranks(2)
    with pytest.raises(InputError, match=r"train\.global_batch: 8 .* 3 ranks; make it a multiple of 12"):
        config.check_ranks(3)


def test_state_in_blocks_is_refused_under_deepspeed_before_any_rank_starts(tmp_path):
    config = tiny.config(tmp_path, engine="{name: deepspeed}", optimizer__state_dtype="{m2: block8}")
    with pytest.raises(InputError, match=r"optimizer\.state_dtype: block8 has scales .* another engine than DeepSpeed"):
        config.check_ranks(2)


def test_a_resumed_run_may_change_how_it_runs_but_not_what_it_computes(tmp_path):
    old = tiny.config(tmp_path).as_dict()
    free = tiny.config(tmp_path, engine="{name: ddp}", train__micro_batch=4, tracking__log_every=7, eval__every=3)
    assert differences(old, free.as_dict()) == []
    bound = tiny.config(tmp_path, optimizer__lr=1, train__steps=9, model__hidden_size=64)
    assert [d.split(":")[0] for d in differences(old, bound.as_dict())] == [
        "model.hidden_size",
        "optimizer.lr",
        "train.steps",
    ]


def test_schedules_have_the_shapes_they_are_named_after():
    def factors(**kwargs):
        config = ScheduleConfig(warmup=4, min_lr_ratio=0.1, **kwargs)
        return [lr_factor(s, 20, config) for s in range(1, 21)]

    for name in ("cosine", "linear", "constant", "wsd"):
        assert factors(name=name)[:4] == [0.25, 0.5, 0.75, 1.0]
    cosine, linear, constant = factors(name="cosine"), factors(name="linear"), factors(name="constant")
    assert cosine[11] == pytest.approx(0.55)  # half-way down
    assert linear[11] == pytest.approx(0.55)
    assert cosine[-1] == linear[-1] == pytest.approx(0.1)
    assert set(constant[3:]) == {1.0}
    wsd = factors(name="wsd", cooldown=4)
    assert set(wsd[3:16]) == {1.0}
    assert wsd[16:] == pytest.approx([0.1 + 0.9 * (1 - (k / 4) ** 0.5) for k in (1, 2, 3, 4)])
    assert lr_factor(1, 10, ScheduleConfig(warmup=0)) > 0.9
    assert all(a >= b for a, b in pairwise(cosine[3:]))


def test_a_syntax_error_names_the_file_and_the_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("run: [1\ntrain: 2\n")
    with pytest.raises(InputError, match=f'in "{path}", line 2'):
        load(path)


def test_zero_for_what_may_be_null_is_told_what_to_write():
    with pytest.raises(InputError, match=r"train\.grad_clip: .*got 0; for none write train\.grad_clip=null$"):
        load("configs/quickstart.yaml", ["train.grad_clip=0"])
