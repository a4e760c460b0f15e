"""A trained model outside of its run, whole on one device: of a run's checkpoint, a program's, or an export."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from shardopt.checkpoint.blocks import reading
from shardopt.checkpoint.document import DOCUMENT
from shardopt.checkpoint.export import INDEX, WHOLE, model_files
from shardopt.checkpoint.store import as_folder, exists, get, is_local, listing
from shardopt.checkpoint.stored import SLICES, Stored, locate, step_of
from shardopt.checkpoint.verify import naming_whole
from shardopt.distributed import Ranks
from shardopt.errors import InputError
from shardopt.pretrain.data.config import holds_tokenizer
from shardopt.pretrain.model import give_storage, load_weights, meta_model, read_safetensors, weight_files
from shardopt.pretrain.record import recorded_config


@dataclass(frozen=True)
class Trained:
    """A model that is found, with its config and tokenizer, and not yet loaded.

    Attributes:
        path: the checkpoint or the export.
        files: a folder on this machine with its config and tokenizer; of an export, with its weights.
        stored: the checkpoint; None of an export.
        run: the config of the run that it is of, as config.yaml has it; empty where that is not known.
        fingerprint: of that run's data; None where it is not known.
        trust_remote_code: run the code that is named in its config, if it needs any.
    """

    path: Path
    files: Path
    stored: Stored | None
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    run: Mapping[str, Any]
    fingerprint: str | None
    trust_remote_code: bool

    @property
    def step(self) -> int | None:
        return step_of(self.path)

    @property
    def end_of_text(self) -> int:
        """The token that ends a document, and with which the next begins."""
        end = self.tokenizer.eos_token_id
        if not isinstance(end, int):
            raise InputError(f"{self.path}: its tokenizer has no end-of-text token, with which a text begins")
        return end

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        if self.stored is None:
            dtype = self.config.dtype or torch.float32
            return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
        return next(self.stored.dtype(*key) for key in self.stored.keys if key[1] == "weight")

    def weights_of(self, raw: bool) -> str | None:
        """The kind of weights that `load` gives: weight, or the weight_ema that the run kept of them; None of an
        export, which does not say what its weights were."""
        if self.stored is None:
            return None
        averaged = any(kind == "weight_ema" for _, kind in self.stored.keys)
        return "weight_ema" if averaged and not raw else "weight"

    def model(self, dtype: torch.dtype | None = None, attention: str | None = None) -> PreTrainedModel:
        """The model without storage: see `load`.

        Args:
            dtype: of its weights; None: as they are stored.
            attention: see `ModelConfig.attention`.
        """
        return meta_model(self.config, self.trust_remote_code, attention, dtype or self.dtype)

    def load(self, model: PreTrainedModel, device: torch.device, raw: bool = False) -> None:
        """Give `model` storage on `device` and the trained weights, one parameter at a time, in place.

        Args:
            raw: the weights themselves where there is a weight EMA of them.

        Raises:
            InputError: they do not fit; the checkpoint is damaged.
        """
        give_storage(model, device)
        if self.stored is None:
            load_weights(model, read_safetensors(weight_files(str(self.files))), self.path)
            return
        with naming_whole(self.path):
            load_weights(model, self.stored.weights(raw), self.path)


@contextmanager
def opened(path: str | Path, step: int | None = None, trust_remote_code: bool = False) -> Iterator[Trained]:
    """Find the trained model that `path` stands for: an export's, a checkpoint's, or that of a run's newest checkpoint.

    Args:
        path: on this machine or in a store.
        step: of a run's checkpoints; None: the newest.
        trust_remote_code: see `Trained`.

    Raises:
        InputError: there is none; its config or its tokenizer cannot be had.
    """
    path = as_folder(path)
    with reading(path):
        names = listing(path)
    with TemporaryDirectory(prefix="shardopt-") as scratch:
        here = Path(scratch)
        if not {WHOLE, INDEX}.isdisjoint(names) and not exists(path / SLICES / DOCUMENT):
            if step is not None:
                raise InputError(f"--step {step}: {path} is an export, of one step; give its run's folder, or no step")
            if is_local(path):
                here = path
            else:
                with reading(path):
                    get(path, here)
            yield _trained(path, here, None, *_run_around(path), trust_remote_code)
            return
        folder = locate(path, step)
        with naming_whole(folder):
            stored = Stored(folder)
        kept = model_files(folder)
        if not any(file.name == "config.json" for file in kept):
            raise InputError(
                f"{folder}: the config of its model is not known, since a program wrote it: shardopt export it, put "
                f"config and tokenizer there (save_pretrained), and give that folder"
            )
        if is_local(folder):
            here = kept[0].parent
        else:
            for file in kept:
                with reading(file):
                    (here / file.name).write_bytes(file.read_bytes())
        fingerprint = stored.document.get("data_fingerprint")
        yield _trained(folder, here, stored, stored.config, fingerprint, trust_remote_code)


def _trained(
    path: Path,
    files: Path,
    stored: Stored | None,
    run: Mapping[str, Any],
    fingerprint: str | None,
    trust_remote_code: bool,
) -> Trained:
    if not holds_tokenizer(files):  # of which transformers would make one up
        raise InputError(f"{path} has no tokenizer: write the model's own there (tokenizer.save_pretrained)")
    trusted: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(files, **trusted)
        tokenizer = AutoTokenizer.from_pretrained(files, **trusted)
    except (OSError, ValueError, ImportError, KeyError) as error:
        said = (str(error).strip() or repr(error)).splitlines()[0]
        advice = "; to run it, give --trust-remote-code" if "trust_remote_code" in str(error) else ""
        raise InputError(f"{path}: transformers cannot read its config or tokenizer ({said}){advice}") from error
    return Trained(path, files, stored, config, tokenizer, run, fingerprint, trust_remote_code)


def _run_around(export: Path) -> tuple[Mapping[str, Any], str | None]:
    """The config of the run in whose folder an export lies, and the fingerprint of its data, where they are known."""
    run = export.absolute().parent if is_local(export) else export.parent
    config = recorded_config(run) if is_local(run) else None
    data = run / "data.json"
    if config is None or not data.is_file():
        return config or {}, None
    try:
        return config, json.loads(data.read_text(encoding="utf-8"))["fingerprint"]
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{data} is damaged ({error!r}): the text that the run was trained on is not known") from error


def one_process(device: str) -> Ranks:
    """This process alone, on `device` (see `run.device`).

    Raises:
        InputError: there is no such device; torchrun has started it.
    """
    if "RANK" in os.environ:
        raise InputError("the model is whole on one device: run the command once, without torchrun")
    return Ranks.start(device)
