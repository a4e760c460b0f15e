"""Datasets, tokenizers and models of the Hugging Face hub: a run finds their commits once, and keeps to them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shardopt.errors import InputError
from shardopt.pretrain.data.config import HfSource, PathTokenizer
from shardopt.pretrain.model import ModelConfig

if TYPE_CHECKING:
    from shardopt.pretrain.config import Config

logger = logging.getLogger("shardopt.hub")

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.py"]

Section = TypeVar("Section", HfSource, PathTokenizer, ModelConfig)


def is_hub_name(path: str) -> bool:
    """Whether `path` is no folder here, and may be the name of something on the hub."""
    return _NAME.fullmatch(path) is not None and not Path(path).exists()


def commit_of(kind: str, name: str, revision: str | None, where: str) -> str | None:
    """The commit that a branch, a tag or the newest state (None) of `name` is at now; None where the hub does not
    answer, with a warning.

    Args:
        kind: dataset or model.
        where: the key that names it.

    Raises:
        InputError: the hub has no such thing, or not for this user.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    ask = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
    try:
        return ask(name, revision=revision).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise InputError(f"{where}: the hub has no {kind} {name!r}{at} for you ({_first_line(error)})") from error
    except OSError as error:
        logger.warning(
            "%s: the hub does not answer (%s), so the commit of %s is not recorded: should it change there, this run "
            "cannot be resumed",
            where,
            _first_line(error),
            name,
        )
        return None


def pin(config: Config) -> Config:
    """`config` with the commit of whatever it takes from the hub, where it names none."""
    sources = [
        _pinned(one, "dataset", one.name, f"data.sources[{index}].name") if isinstance(one, HfSource) else one
        for index, one in enumerate(config.data.sources)
    ]
    tokenizer, model = config.data.tokenizer, config.model
    if isinstance(tokenizer, PathTokenizer):
        tokenizer = _pinned(tokenizer, "model", tokenizer.path, "data.tokenizer")
    if model.path is not None:
        model = _pinned(model, "model", model.path, "model.path")
    return _with(config, sources, tokenizer, model)


def _pinned(section: Section, kind: str, name: str, where: str) -> Section:
    if section.commit is not None or not is_hub_name(name):
        return section
    return section.model_copy(update={"commit": commit_of(kind, name, section.revision, where)})


def keep(recorded: Mapping[str, Any], config: Config) -> Config:
    """`config` of a run that has begun, with the commits that it began with; `recorded` is its config.yaml.

    What names another commit, or something else on the hub, stays, as a difference.
    """
    old = recorded["data"]["sources"]
    sources = [
        _kept(one, old[index], "name") if isinstance(one, HfSource) and index < len(old) else one
        for index, one in enumerate(config.data.sources)
    ]
    tokenizer = config.data.tokenizer
    if isinstance(tokenizer, PathTokenizer):
        tokenizer = _kept(tokenizer, recorded["data"]["tokenizer"], "path")
    return _with(config, sources, tokenizer, _kept(config.model, recorded["model"], "path"))


def _kept(section: Section, old: Mapping[str, Any], name: str) -> Section:
    same = all(old.get(key) == getattr(section, key) for key in (name, "revision"))
    return section.model_copy(update={"commit": old.get("commit")}) if same and section.commit is None else section


def _with(config: Config, sources: list[Any], tokenizer: Any, model: ModelConfig) -> Config:
    data = config.data.model_copy(update={"sources": tuple(sources), "tokenizer": tokenizer})
    return config.model_copy(update={"data": data, "model": model})


def local(section: ModelConfig, weights: bool = True) -> ModelConfig:
    """The `model` section with a folder as its path: of a model on the hub, that to which it was downloaded.

    Args:
        weights: with the weights; False: config, tokenizer and code alone.

    Raises:
        InputError: there is no such model on the hub, or no safetensors in it, or the hub does not answer.
    """
    if section.path is None or not is_hub_name(section.path):
        return section
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            section.path,
            revision=section.commit or section.revision,
            allow_patterns=[*_SMALL_FILES, *(["*.safetensors"] if weights else [])],
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.path: {section.path!r} is no folder here, and cannot be had from the hub ({_first_line(error)}); "
            f"check its name and model.revision, and that this machine is online"
        ) from error
    if weights and not any(Path(folder).glob("*.safetensors")):
        raise InputError(
            f"model.path: {section.path!r} has no safetensors on the hub; to train from random weights, download its "
            f"config.json into a folder, and give that"
        )
    return section.model_copy(update={"path": str(folder)})


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
