"""Commits of the hub: found once, recorded, opened again. A folder per commit stands in for the hub."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import yaml
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardopt.errors import InputError
from shardopt.pretrain import hub
from shardopt.pretrain.config import load
from shardopt.pretrain.model import ModelConfig
from tests.pretrain import tiny
from tests.pretrain.test_prefetch import _streamed

FIRST, SECOND = "a" * 40, "b" * 40


class Hub:
    """What `owner/name` is at each commit, and where its main branch stands."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.main, self.asked, self.offline = folder, FIRST, list[Any](), False
        builder, tokenizer = datasets.load_dataset_builder, AutoTokenizer.from_pretrained
        for ask in ("dataset_info", "model_info"):
            patch.setattr(f"huggingface_hub.HfApi.{ask}", lambda _, name, revision=None: self.info(name, revision))
        patch.setattr("huggingface_hub.snapshot_download", lambda name, **more: str(self.at(**more)))
        patch.setattr(
            datasets,
            "load_dataset_builder",
            lambda name, subset, revision, **more: builder(str(self.at(revision)), subset, **more),
        )
        patch.setattr(
            AutoTokenizer,
            "from_pretrained",
            lambda path, revision=None, **more: tokenizer(self.at(revision) if path == "owner/name" else path, **more),
        )

    def info(self, name: str, revision: str | None) -> Any:
        self.asked.append((name, revision))
        if self.offline:
            raise OfflineModeIsEnabled("offline")
        return SimpleNamespace(sha=self.main)

    def at(self, revision: str | None = None, **_: Any) -> Path:
        return self.folder / (revision if revision in (FIRST, SECOND) else self.main)


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "hub", monkeypatch)


def recorded(folder: Path, name: str) -> dict[str, Any]:
    return yaml.safe_load((folder / "runs" / name / "config.yaml").read_text())


def losses(folder: Path, name: str) -> list[float]:
    return [row["loss"] for row in tiny.metrics(folder, name)]


@pytest.mark.parametrize("streaming", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_goes_on_with_the_commit_that_it_began_with(tmp_path: Path, there: Hub, streaming: bool) -> None:
    for commit, start in ((FIRST, 0), (SECOND, 500)):
        texts = [" ".join(str(start + n * k) for k in range(60)) for n in range(80)]
        (there.folder / commit).mkdir(parents=True)
        (there.folder / commit / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    changes = {
        "data__sources": f"[{{source: hf, name: owner/name, streaming: {str(streaming).lower()}}}]",
        "engine": "{name: single}",
    }
    tiny.run(0, 1, tmp_path, run__name="whole", **changes)
    _streamed(0, 1, tmp_path, 3, run__name="parts", **changes)
    there.main = SECOND
    asked = len(there.asked)
    _streamed(0, 1, tmp_path, run__name="parts", **changes)
    assert len(there.asked) == asked
    assert losses(tmp_path, "parts") == losses(tmp_path, "whole")
    (source,) = recorded(tmp_path, "parts")["data"]["sources"]
    assert (source["revision"], source["commit"]) == (None, FIRST)
    # A new run takes what is there now; another revision is another run.
    tiny.run(0, 1, tmp_path, run__name="new", **changes)
    assert recorded(tmp_path, "new")["data"]["sources"][0]["commit"] == SECOND
    assert losses(tmp_path, "new") != losses(tmp_path, "whole")
    other = changes["data__sources"].replace("owner/name", f"owner/name, revision: {SECOND}")
    with pytest.raises(InputError, match=r"already holds another run; these keys differ:\n  data\.sources"):
        tiny.run(0, 1, tmp_path, run__name="parts", **changes | {"data__sources": other})


def test_model_path_takes_a_hub_name_and_its_tokenizer(tmp_path: Path, there: Hub) -> None:
    tiny.corpus(tmp_path / "text")
    same = {"engine": "{name: single}", "checkpoint__export": "true"}
    first = tiny.run(0, 1, tmp_path, run__name="first", data__tokenizer="{bpe: 300}", **same)
    there.folder.mkdir()
    assert first.export is not None
    first.export.rename(there.folder / FIRST)
    tree = tiny.tree(tmp_path, run__name="further", model="{path: owner/name}", schedule__warmup=0, **same)
    tree |= {"train": tree["train"] | {"steps": 1}, "optimizer": {"lr": 0.0}}
    config = tiny.parse(tree)
    assert config.data.tokenizer.path == "owner/name"
    result = tiny.pretrain(config)
    assert result.holdout_loss == pytest.approx(first.holdout_loss, rel=1e-5)
    kept = recorded(tmp_path, "further")
    assert kept["model"]["commit"] == kept["data"]["tokenizer"]["commit"] == FIRST
    weights = [AutoModelForCausalLM.from_pretrained(folder) for folder in (there.folder / FIRST, result.export)]
    assert all(torch.equal(a, b) for a, b in zip(*(list(one.parameters()) for one in weights), strict=True))
    (there.folder / FIRST / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.path: 'owner/name' has no safetensors on the hub"):
        hub.local(ModelConfig(path="owner/name"))


def test_what_the_hub_does_not_have_is_refused_and_silence_is_warned_of(
    there: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert hub.commit_of("dataset", "owner/name", FIRST, "data.sources[0].name") == FIRST
    assert there.asked == []
    there.offline = True
    with caplog.at_level(logging.WARNING):
        assert hub.commit_of("dataset", "owner/name", "main", "data.sources[0].name") is None
    assert "data.sources[0].name: the hub does not answer (offline), so the commit of owner/name" in caplog.text

    def missing(*_: Any, **__: Any) -> None:
        from httpx import Request, Response
        from huggingface_hub.errors import RevisionNotFoundError

        raise RevisionNotFoundError("404", response=Response(404, request=Request("GET", "https://none")))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", missing)
    with pytest.raises(InputError, match=r"model\.path: the hub has no model 'owner/name' at revision 'v2' for you"):
        hub.commit_of("model", "owner/name", "v2", "model.path")
    monkeypatch.setattr("huggingface_hub.snapshot_download", missing)
    with pytest.raises(
        InputError, match=r"model\.path: 'owner/name' is no folder here, and cannot be had from the hub"
    ):
        hub.local(ModelConfig(path="owner/name"))
    for path in ("runs/a/export", "./a", "/a", "~/a", "a/", "tests/pretrain"):
        assert not hub.is_hub_name(path)


@pytest.mark.parametrize("preset", sorted(path.name for path in Path("configs").glob("*.yaml")))
def test_presets_pin_what_they_take_from_the_hub(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: pytest.fail("not pinned"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("not pinned"))
    config = load(f"configs/{preset}")
    pinned = hub.pin(config)
    assert [getattr(one, "revision", None) for one in config.data.sources] == [
        getattr(one, "commit", None) for one in pinned.data.sources
    ]
