"""Exports load in transformers and compute the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shardopt.checkpoint import export, export_safetensors
from shardopt.errors import InputError, MissingExtraError
from shardopt.slices import named_parameters
from tests.checkpoint import made
from tests.distributed.pool import on_ranks


def _model(tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40,
        max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(3)
    return LlamaForCausalLM(config)


def _reused(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """As an engine may gather: every parameter in the same memory."""
    buffer = torch.empty(max(p.numel() for p in model.parameters()))
    for name, param in named_parameters(model):
        whole = buffer[: param.numel()].view(param.shape)
        yield name, whole.copy_(param.detach())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_file_bytes", [2**30, 4000])
def test_transformers_reads_it(tmp_path: Path, tied: bool, max_file_bytes: int) -> None:
    from transformers import AutoModelForCausalLM

    model = _model(tied)
    export_safetensors(
        tmp_path / "export", _reused(model), made.ranks_here(),
        max_file_bytes=max_file_bytes, complete=lambda folder: model.config.save_pretrained(folder),
    )  # fmt: skip
    files = sorted(p.name for p in (tmp_path / "export").glob("*.safetensors*"))
    if max_file_bytes == 2**30:
        assert files == ["model.safetensors"]
    else:
        assert len(files) > 3
        assert files[0] == f"model-00001-of-{len(files) - 1:05d}.safetensors"
        index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
        assert set(index["weight_map"].values()) == set(files[:-1])
    read, report = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(report.values()), report
    tokens = torch.arange(20).view(2, 10)
    assert torch.equal(read(tokens).logits, model(tokens).logits)


def test_files_keep_to_their_size(tmp_path: Path) -> None:
    sizes = [300, 300, 300, 2000, 100, 900]
    parameters = ((f"w{i}", torch.ones(n // 4)) for i, n in enumerate(sizes))
    export_safetensors(tmp_path / "a", parameters, made.ranks_here(), max_file_bytes=1000)
    where = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())["weight_map"]
    assert [int(where[f"w{i}"][6:11]) for i in range(6)] == [1, 1, 1, 2, 3, 3]


def _sharded(rank: int, world_size: int, folder: Path) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))

    def gathered() -> Iterator[tuple[str, Tensor | None]]:
        for name, param in named_parameters(model):
            whole = param.full_tensor().detach()  # type: ignore[attr-defined]
            yield name, whole if rank == 0 else None

    ranks = made.ranks_here(rank, world_size)
    export_safetensors(folder / "good", gathered(), ranks)
    # A disk that fails on rank 0 in the middle: the others are in the next gathering.
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(export._Files, "add", _full)
        with pytest.raises(InputError, match="No space left"):
            export_safetensors(folder / "bad", gathered(), ranks)
    return {n: p.full_tensor().detach() for n, p in model.named_parameters()}  # type: ignore[attr-defined]


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_sharded_parameters_are_gathered_one_at_a_time(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    results = on_ranks(2, _sharded, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["good"]
    read = load_file(tmp_path / "good" / "model.safetensors")
    assert read.keys() == results[0].keys()
    assert all(torch.equal(read[name], value) for name, value in results[0].items())


def test_an_export_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    here = made.ranks_here()
    for number in (1.0, 2.0):
        export_safetensors(tmp_path / "a", iter([("w", torch.tensor([number]))]), here)
    from safetensors.torch import load_file

    assert load_file(tmp_path / "a" / "model.safetensors")["w"].item() == 2
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds something else"):
        export_safetensors(tmp_path / "b", iter([("w", torch.ones(1))]), here)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_failing_addition_leaves_the_export_before(tmp_path: Path) -> None:
    here = made.ranks_here()
    export_safetensors(tmp_path / "a", iter([("w", torch.ones(1))]), here)
    with pytest.raises(InputError, match=r"cannot write .*/a: .*No space left"):
        export_safetensors(tmp_path / "a", iter([("w", torch.zeros(1))]), here, complete=_full)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_safetensors_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(MissingExtraError, match=r"shardopt\[pretrain\]"):
        export_safetensors(tmp_path / "a", iter([]), made.ranks_here())
