"""Runs whose checkpoints lie in a store: `checkpoint.dir` and `run.from` by URL."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shardopt import cli
from shardopt.checkpoint import folders
from shardopt.checkpoint.store import as_folder, listing
from shardopt.checkpoint.stored import locate
from shardopt.errors import InputError
from tests.checkpoint import objects
from tests.pretrain import tiny


def _run(folder: Path, **changes):
    store = f"objects://{folder}/bucket"
    settings = {"engine": "{name: single}", "checkpoint__every": 2, "checkpoint__export": "true"}
    return tiny.run(0, 1, folder, **{"checkpoint__dir": store, **settings, **changes})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a run of 6 steps, and what it exported."""
    assert objects.Objects.protocol == "objects"
    folder = tmp_path_factory.mktemp("store")
    tiny.corpus(folder / "text")
    result = _run(folder)
    assert str(result.export) == f"objects://{folder}/bucket/tiny/export"
    assert str(result.checkpoint) == f"objects://{folder}/bucket/tiny/checkpoints/step-00000006"
    assert {path.name for path in (folder / "runs/tiny").iterdir()} >= {"config.yaml", "metrics.jsonl"}
    assert not (folder / "runs/tiny/checkpoints").exists()
    return folder, (folder / "bucket/tiny/export/model.safetensors").read_bytes()


def test_a_run_goes_on_from_its_store_on_another_machine(done):
    folder, exported = done
    store = as_folder(f"objects://{folder}/bucket/tiny")
    assert list(listing(store)) == ["checkpoints", "export", "model"]
    assert "config.json" in listing(store / "model")
    folders.remove(store / "checkpoints/step-00000006")
    shutil.rmtree(folder / "runs/tiny")
    with pytest.raises(InputError, match=r"these keys differ:\n  optimizer\.lr"):
        _run(folder, optimizer__lr=1e-4)
    result = _run(folder)
    assert result.tokens_before == 4 * 8 * 32
    assert (folder / "bucket/tiny/export/model.safetensors").read_bytes() == exported


def test_another_checkpoint_dir_is_another_run(done):
    folder, _ = done
    with pytest.raises(InputError, match=r"these keys differ:\n  checkpoint\.dir: "):
        _run(folder, checkpoint__dir=f"objects://{folder}/elsewhere")


def test_a_run_begins_with_a_checkpoint_in_a_store(done, capsys):
    folder, _ = done
    source = f"objects://{folder}/bucket/tiny"
    changes = {"run__name": "branch", "run__from": source, "train__steps": 8, "checkpoint__dir": "null"}
    assert _run(folder, **changes).tokens_before == 6 * 8 * 32
    recorded = (folder / "runs/branch/config.yaml").read_text()
    assert f"from: {source}/checkpoints/step-00000006\n" in recorded
    # It still names the run that it began with: there, or by its run folder.
    for given in source, folder / "runs/tiny":
        assert _run(folder, **changes | {"run__from": given}).step == 8
    assert cli.main(["export", str(folder / "runs/branch"), f"{source}/exported"]) == 0
    assert "model.safetensors" in listing(as_folder(f"{source}/exported"))


def test_the_way_out_of_another_run_names_its_store(done):
    folder, _ = done
    store = f"objects://{folder}/bucket/tiny"
    with pytest.raises(InputError) as refused:
        _run(folder, optimizer__lr=1e-4, checkpoint__dir="null")
    assert f"with run.from={store} to go on" in str(refused.value)
    assert str(refused.value).endswith(f"or model='{{path: {store}/export}}' for its weights alone.")


def test_a_store_that_ends_with_the_process_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"checkpoint\.dir: what is written to memory://runs is gone when the process"):
        _run(tmp_path, checkpoint__dir="memory://runs")
    assert not (tmp_path / "runs").exists()


def test_commands_find_the_checkpoints_of_a_run_folder_in_its_store(done, capsys):
    folder, exported = done
    run, store = folder / "runs/tiny", f"objects://{folder}/bucket/tiny"
    assert locate(run) == as_folder(f"{store}/checkpoints/step-00000006")
    for command in ("checkpoint", "list"), ("checkpoint", "inspect", "--step", "6"):
        assert cli.main([*command, str(run)]) == 0
    assert f"{store}/checkpoints/step-00000006" in capsys.readouterr().out
    assert cli.main(["export", str(run), str(folder / "by-folder")]) == 0
    assert (folder / "by-folder/model.safetensors").read_bytes() == exported
    (run / "config.yaml").write_text("defaults: [another]")  # another program's: what lies here counts
    assert cli.main(["checkpoint", "list", str(run)]) == 2
    (run / "config.yaml").write_text("run: [")
    assert cli.main(["checkpoint", "list", str(run)]) == 2
    assert "config.yaml is damaged, so that its checkpoint.dir is not known" in capsys.readouterr().err


def test_a_run_folder_by_url_names_the_key_to_use(tmp_path):
    with pytest.raises(InputError, match=r"run\.dir: memory://x is not on this machine: give it as checkpoint\.dir"):
        tiny.config(tmp_path, run__dir="memory://x")
    with pytest.raises(InputError, match=r"checkpoint\.dir.* nosuch"):
        tiny.config(tmp_path, checkpoint__dir="nosuch://x")
