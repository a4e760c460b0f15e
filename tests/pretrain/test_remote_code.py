"""A folder's own code is not run, and nobody is asked on standard input whether it may be."""

import builtins
import json

import pytest

from shardopt.errors import InputError
from shardopt.pretrain.config import parse
from shardopt.pretrain.data.config import PathTokenizer
from shardopt.pretrain.data.tokenizers import load_path
from shardopt.pretrain.model import ModelConfig, meta_model, transformers_config
from tests.pretrain import tiny


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tokenizer and a model whose code leaves a mark, on a terminal where somebody always says yes."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "theirs.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import LlamaForCausalLM, PreTrainedTokenizer\n"
        "class Theirs(PreTrainedTokenizer): pass\nclass Model(LlamaForCausalLM): pass\n"
    )
    auto = {"AutoTokenizer": ["theirs.Theirs", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto, "tokenizer_class": "Theirs"}))
    yield folder
    assert not (tmp_path / "ran").exists()


def test_tokenizer_with_code_of_its_own_is_refused_without_a_question(folder):
    with pytest.raises(InputError, match=r"data\.tokenizer: .*theirs.* contains custom code"):
        load_path(PathTokenizer(path=str(folder)))


def test_code_of_a_model_folder_is_not_run(folder, tmp_path):
    tree = tiny.tree(tmp_path)["model"] | {"architectures": ["Model"], "vocab_size": 257}
    tree["auto_map"] = {"AutoModelForCausalLM": f"{folder}--theirs.Model"}
    (folder / "config.json").write_text(json.dumps(tree))
    model = meta_model(transformers_config(ModelConfig(path=str(folder)), 257, 256, 32))
    assert type(model).__name__ == "LlamaForCausalLM"


def test_model_folder_gives_the_default_tokenizer(folder, tmp_path):
    tree = tiny.tree(tmp_path)
    (folder / "config.json").write_text(json.dumps(tree["model"] | {"vocab_size": 257}))
    tree["model"] = {"path": str(folder)}
    assert parse(tree).data.tokenizer == PathTokenizer(path=str(folder))
    tree["data"]["tokenizer"] = "byte"
    assert parse(tree).data.tokenizer.type == "byte"
