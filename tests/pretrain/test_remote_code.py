"""A folder's own code is run only where the config says so, and nobody is asked on standard input."""

import builtins
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardopt.errors import InputError
from shardopt.pretrain.config import parse
from shardopt.pretrain.data.config import PathTokenizer
from shardopt.pretrain.data.tokenizers import byte_tokenizer, load_path
from shardopt.pretrain.loop import pretrain
from shardopt.pretrain.model import ModelConfig, meta_model, transformers_config
from tests.pretrain import tiny

CODE = """
from pathlib import Path
Path({ran!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class TheirTokenizerFast(PreTrainedTokenizerFast): pass
class Config(LlamaConfig): model_type = "theirs"
class Model(LlamaForCausalLM): config_class = Config
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tokenizer and a model whose code leaves a mark, on a terminal where somebody always says yes."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *question: asked.append(question) or "y")
    folder = tmp_path / "theirs"
    byte_tokenizer().save_pretrained(folder)
    (folder / "theirs.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    auto = {"AutoTokenizer": [None, "theirs.TheirTokenizerFast"]}
    settings = {"auto_map": auto, "tokenizer_class": "TheirTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    yield folder
    assert not asked


def model_files(folder, tmp_path, model_type="theirs"):
    tree = tiny.tree(tmp_path)["model"] | {"architectures": ["Model"], "vocab_size": 257, "model_type": model_type}
    tree["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (folder / "config.json").write_text(json.dumps(tree))


def test_tokenizer_with_code_of_its_own_is_refused_without_a_question(folder, tmp_path):
    with pytest.raises(InputError, match=r"data\.tokenizer: .*theirs.* contains custom code.*trust_remote_code: true"):
        load_path(PathTokenizer(path=str(folder)))
    assert not (tmp_path / "ran").exists()


def test_code_of_a_model_folder_is_not_run(folder, tmp_path):
    model_files(folder, tmp_path, "llama")
    model = meta_model(transformers_config(ModelConfig(path=str(folder)), 257, 256, 32))
    assert type(model).__name__ == "LlamaForCausalLM"
    model_files(folder, tmp_path)
    with pytest.raises(InputError, match=r"knows no 'theirs'; .* set model\.trust_remote_code=true"):
        transformers_config(ModelConfig(path=str(folder)), 257, 256, 32)
    assert not (tmp_path / "ran").exists()


def test_trusted_code_trains_and_is_exported_with_the_model(folder, tmp_path):
    model_files(folder, tmp_path)
    tiny.corpus(tmp_path / "text")
    tree = tiny.tree(tmp_path, checkpoint__export=True, train__steps=2, engine="{name: single}")
    tree["model"] = {"path": str(folder), "trust_remote_code": True}
    result = pretrain(parse(tree))
    assert (tmp_path / "ran").exists()
    model = AutoModelForCausalLM.from_pretrained(result.export, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(result.export, trust_remote_code=True)
    assert [type(model).__name__, type(tokenizer).__name__] == ["Model", "TheirTokenizerFast"]
    assert model(torch.tensor([tokenizer("abc").input_ids])).logits.shape == (1, 3, 257)


def test_model_folder_gives_the_default_tokenizer(folder, tmp_path):
    tree = tiny.tree(tmp_path)
    (folder / "config.json").write_text(json.dumps(tree["model"] | {"vocab_size": 257}))
    tree["model"] = {"path": str(folder)}
    assert parse(tree).data.tokenizer == PathTokenizer(path=str(folder))
    tree["data"]["tokenizer"] = "byte"
    assert parse(tree).data.tokenizer.type == "byte"
