"""Sources that are damaged, and disks that are full: one line, status 2, and nothing left of the target."""

from __future__ import annotations

import io
import json
import pickle
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra shardopt[transformers]")
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from shardopt import AdEMAMix, checkpoint, cli
from shardopt.checkpoint import convert as formats
from shardopt.checkpoint.convert import convert
from shardopt.checkpoint.convert.state import Scratch, Whole
from shardopt.checkpoint.export import export_checkpoint
from shardopt.engines.state import ModuleState
from shardopt.errors import InputError

TARGETS = {name: f"out{'.pt' if name in ('torch', 'paper', 'bitsandbytes') else ''}" for name in formats.TARGETS}
SOURCES = (
    "adamw.pt",
    "paper.pt",
    "bitsandbytes.pt",
    "titan",
    "universal",
    "checkpoint-3",
    "adamw-checkpoint-3",
    "ours",
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of one model in all formats, each written by the conversion before it."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    net = LlamaForCausalLM(
        LlamaConfig(vocab_size=7, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    )
    net.config.architectures = ["LlamaForCausalLM"]
    net.config.save_pretrained(folder / "model")
    for cls, name in ((AdEMAMix, "ours"), (torch.optim.AdamW, "adamw")):  # "ours" is one of the sources
        optimizer = cls(net.named_parameters(), lr=1e-3)
        net(input_ids=torch.arange(4)[None], labels=torch.arange(4)[None]).loss.backward()
        optimizer.step()
        checkpoint.save(folder / f"checkpoints/{name}", ModuleState(optimizer, net), {"step": 3})
    made = folder / "checkpoints"
    convert(made / "adamw", made / "adamw.pt", "torch")
    convert(made / "adamw", made / "adamw-checkpoint-3", "trainer")
    for to, name in (("paper", "paper.pt"), ("bitsandbytes", "bitsandbytes.pt"), ("torchtitan", "titan"),
        ("deepspeed", "universal"), ("trainer", "checkpoint-3")):  # fmt: skip
        convert(made / "ours", made / name, to)
    return made


def files_in(source: Path) -> list[Path]:
    return sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]


def held(state: Any) -> dict[Any, Any]:
    return {key: whole.read().view(-1).view(torch.uint8).tolist() for key, whole in state.tensors.items()}


def run(capsys: Any, source: Path, to: str, folder: Path) -> tuple[int, str]:
    """Exit status and the one line of `shardopt checkpoint convert`."""
    capsys.readouterr()
    status = cli.main(["checkpoint", "convert", str(source), str(folder / TARGETS[to]), "--to", to])
    return status, capsys.readouterr().err


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


OTHER = io.BytesIO()
torch.save({"model": 1, "optimizer": {"state": [1], "param_groups": "x"}}, OTHER)

DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "of other JSON": lambda path: path.write_text('{"checkpoint": [], "weight_map": 3, "global_step": []}'),
    "of other tensors": lambda path: path.write_bytes(OTHER.getvalue()),
}
# Files of which a conversion needs nothing: the slices have it (checkpoint-3), or another file has.
NOT_READ = {
    ("checkpoint-3", "config.json"), ("checkpoint-3", "optimizer.pt"), ("checkpoint-3", "scheduler.pt"),
    ("checkpoint-3", "shardopt-files.json"), ("adamw-checkpoint-3", "scheduler.pt"),
    ("universal", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
}  # fmt: skip
# Damage that changes nothing that is read, as a missing number of steps.
HARMLESS = {("trainer_state.json", "missing"), ("mp_rank_00_model_states.pt", "missing")}


def damaged(original: Path, copy: Path, file: Path, damage: Callable[[Path], Any]) -> None:
    """A copy of a source, in which one file is damaged."""
    shutil.rmtree(copy.parent, ignore_errors=True)
    copy.parent.mkdir()
    (shutil.copytree if original.is_dir() else shutil.copy)(original, copy)
    damage(copy / file.relative_to(original))


@pytest.mark.parametrize("name", SOURCES)
def test_each_damaged_file_is_told_in_one_line_and_nothing_is_written(name, sources, tmp_path, capsys):
    original, copy = sources / name, tmp_path / "source" / name
    whole = held(formats.read(original))
    for file in files_in(original):
        if (name, file.name) in NOT_READ or (name == "universal" and "layers.0" in str(file)):
            continue
        for what, damage in DAMAGE.items():
            damaged(original, copy, file, damage)
            status, error = run(capsys, copy, "shardopt", tmp_path)
            case = f"{file.relative_to(original)} {what}: {error}"
            if status == 0 and (what == "flipped" or (file.name, what) in HARMLESS):  # in what only fills a zip file up
                assert held(formats.read(tmp_path / "out")) == whole, case
                shutil.rmtree(tmp_path / "out")
                continue
            assert (status, error.count("\n")) == (2, 1), case
            assert str(copy) in error, case
            assert [path.name for path in tmp_path.iterdir()] == ["source"], case


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", ["ours", "titan"])  # which are read while they are written
def test_data_that_is_damaged_is_found_whatever_it_becomes(name, to, sources, tmp_path, capsys):
    file = next(path for path in files_in(sources / name) if path.suffix in (".data", ".distcp"))
    damaged(sources / name, tmp_path / "source" / name, file, lambda path: path.write_bytes(_zeroed(path)))
    status, error = run(capsys, tmp_path / "source" / name, to, tmp_path)
    assert (status, error.count("\n")) == (2, 1)
    if to != "trainer":  # which wants a config.json first
        assert file.name in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def _zeroed(path: Path) -> bytes:
    """A file's content, of which the second quarter is zeros."""
    content = path.read_bytes()
    quarter = len(content) // 4
    return content[:quarter] + bytes(quarter) + content[2 * quarter :]


def edited(edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        edit(saved)
        torch.save(saved, path)

    return apply


EDITS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a weight that is none": (lambda s: s["model"].update({"lm_head.weight": 3}), "AttributeError"),
    "weights in a list": (lambda s: s.update(model=[1, 2]), "is no dict with the model's state_dict"),
    "no groups": (lambda s: s["optimizer"].update(param_groups=None), "does not fit its model"),
    "a group that is none": (lambda s: s["optimizer"]["param_groups"].append(7), "does not fit its model"),
    "a name that is none": (
        lambda s: s["optimizer"]["param_groups"][0]["param_names"].__setitem__(0, 5), "does not fit its model"
    ),
    "state in a list": (lambda s: s["optimizer"].update(state=[]), "does not fit its model"),
    "betas in words": (lambda s: s["optimizer"]["param_groups"][0].update(betas="high"), "the betas of .* are 'high'"),
    "an lr in words": (lambda s: s["optimizer"]["param_groups"][0].update(lr="high"), "is 'high', which is no number"),
    "no second moment": (lambda s: s["optimizer"]["state"][0].pop("exp_avg_sq"), "and no exp_avg_sq"),
    "no step": (lambda s: s["optimizer"]["state"][0].pop("step"), "and no step"),
    "a step in words": (lambda s: s["optimizer"]["state"][0].update(step="two"), "neither a tensor nor a number"),
    "a negative step": (lambda s: s["optimizer"]["state"][0].update(step=-2), "its counts are no numbers"),
    "state of another shape": (
        lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(2)), r"its state exp_avg is \(2,\), its weight"
    ),
    "a weight that is gone": (lambda s: s["model"].pop("lm_head.weight"), "does not fit its model"),
    "values that are not finite": (lambda s: s["model"]["lm_head.weight"].fill_(torch.nan), "not converted: .*lm_head"),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_wrong_types_in_a_state_dict_are_told(edit, sources, tmp_path):
    change, message = EDITS[edit]
    damaged(sources / "adamw.pt", tmp_path / "source/adamw.pt", sources / "adamw.pt", edited(change))
    with pytest.raises(InputError, match=message) as told:
        convert(tmp_path / "source/adamw.pt", tmp_path / "out", optimizer="ademamix")
    assert "adamw.pt" in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_one_parameter_without_its_m1_is_told_and_all_without_it_are_not_where_beta1_is_0(sources, tmp_path):
    shutil.copytree(sources / "universal", tmp_path / "source")
    folders = sorted(path.parent for path in tmp_path.glob("source/zero/*/m1.pt"))
    (folders[0] / "m1.pt").unlink()
    with pytest.raises(InputError, match=f"there is .* of {folders[0].name}, and no m1"):
        convert(tmp_path / "source", tmp_path / "out")
    for folder in folders[1:]:
        (folder / "m1.pt").unlink()
    settings = torch.load(tmp_path / "source/zero/optimizer_state.pt", weights_only=True)
    settings["param_groups"][0]["betas"] = (0.0, 0.99, 0.999)
    torch.save(settings, tmp_path / "source/zero/optimizer_state.pt")
    convert(tmp_path / "source", tmp_path / "out")


def test_elements_that_a_dcp_index_does_not_place_are_told(sources, tmp_path):
    shutil.copytree(sources / "titan", tmp_path / "source")
    with (tmp_path / "source/.metadata").open("rb") as file:
        index = pickle.load(file)
    gone = next(key for key in index.storage_data if key.fqn == "lm_head.weight")
    del index.storage_data[gone]
    (tmp_path / "source/.metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(InputError, match=r"does not say where all elements of lm_head\.weight are"):
        convert(tmp_path / "source", tmp_path / "out")


def test_a_part_of_the_weights_of_trainer_that_is_missing_is_told(sources, tmp_path):
    source = shutil.copytree(sources / "adamw-checkpoint-3", tmp_path / "source")
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    stored = load_file(source / "model-00001-of-00002.safetensors")
    index = {"weight_map": dict.fromkeys(stored, "model-00001-of-00002.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(source, tmp_path / "whole")
    save_file({"lm_head.weight": stored.pop("lm_head.weight")}, source / "model-00002-of-00002.safetensors")
    save_file(stored, source / "model-00001-of-00002.safetensors")
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert held(formats.read(source)) == held(formats.read(tmp_path / "whole"))
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors cannot be read"):
        convert(source, tmp_path / "out")


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """What a full disk does to a process, which the kernel can be asked for; files below it are those that fit."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("to", TARGETS)
def test_a_full_disk_is_told_and_leaves_nothing(to, sources, tmp_path, capsys):
    for name in ("checkpoint-3", "titan"):  # of which the second is copied to the disk first
        for size in (0, 100, 900) if to != "trainer" else (0, 100) if name == "checkpoint-3" else ():
            with no_file_above(size):
                status, error = run(capsys, sources / name, to, tmp_path)
            assert (status, error.count("\n")) == (2, 1), error
            assert str(tmp_path) in error
            assert re.search("cannot write|could not|free some space", error), error
            assert list(tmp_path.iterdir()) == []
            assert run(capsys, sources / name, to, tmp_path)[0] == 0  # with room, in the same place
            for path in tmp_path.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_full_disk_is_named_where_torch_does_not_say_so_and_an_export_says_what_to_do(sources, tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1664 vs 1558")

    monkeypatch.setattr(torch, "save", full)
    advice = rf"the disk is probably full \({re.escape(str(tmp_path))} has .*B left\): free some space or name another"
    with pytest.raises(InputError, match=advice):
        convert(sources / "ours", tmp_path / "out.pt", "torch")

    def full_too(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full_too)
    with pytest.raises(InputError, match=rf"cannot write {re.escape(str(tmp_path))}/out: {advice}"):
        export_checkpoint(sources / "ours", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_models_state_dict_alone_is_weights_and_a_pickled_model_is_refused_by_its_class(tmp_path, capsys):
    model = torch.nn.Linear(2, 3)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    assert cli.main(["checkpoint", "convert", str(tmp_path / "bare.pt"), str(tmp_path / "out")]) == 0
    assert "no optimizer state" in capsys.readouterr().out
    assert torch.equal(formats.read(tmp_path / "out").tensors["weight", "weight"].read(), model.weight)
    torch.save(model, tmp_path / "pickled.pt")
    status, error = run(capsys, tmp_path / "pickled.pt", "shardopt", tmp_path / "other")
    assert (status, error.count("\n")) == (2, 1)
    assert "holds pickled objects (torch.nn.modules.linear.Linear)" in error
    assert "save state_dicts" in error
    assert "\x1b" not in error


def test_scratch_has_its_place_on_the_disk_before_it_is_mapped(tmp_path, monkeypatch):
    mapped, from_file = [], torch.from_file

    def spy(path, **kwargs):
        mapped.append(Path(path).stat().st_blocks * 512)
        return from_file(path, **kwargs)

    monkeypatch.setattr(torch, "from_file", spy)
    whole = Whole((5000,), torch.float32, lambda: torch.ones(5000))
    assert torch.equal(Scratch(tmp_path).keep(whole), torch.ones(5000))
    assert mapped[0] >= 4 * 5000  # else a full disk would be a SIGBUS in the copy


def test_what_a_killed_conversion_left_is_in_nobodys_way(sources, tmp_path):
    for to in ("deepspeed", "torchtitan", "shardopt", "trainer"):
        left = tmp_path / f".{to}.partial"
        (left / "zero").mkdir(parents=True)
        convert(sources / "checkpoint-3", tmp_path / to, to)
        assert [path.name for path in (tmp_path / to).iterdir() if path.name == "zero"] == ["zero"] * (
            to == "deepspeed"
        )
    assert not list(tmp_path.glob(".*"))
