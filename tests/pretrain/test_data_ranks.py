"""Rank 0 builds, the others open; a mistake on one rank is an error on all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardopt.distributed import Ranks
from shardopt.errors import InputError
from shardopt.pretrain.data import DataConfig, prepare
from shardopt.pretrain.data.reading import Piece
from shardopt.pretrain.data.sources import Corpus
from tests.distributed.pool import on_ranks


def write_corpus(path: Path, words: str = "some words", count: int = 80) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f'{{"text": "document {i} of {words}"}}\n' for i in range(count)))


def body(
    rank: int, world_size: int, folders: list[str], local_ranks: list[int], tokenizer: Any, slow: float = 0.0
) -> dict[str, Any]:
    """Prepare `a.jsonl` with the cache `cache`, both in this rank's folder: one folder is one machine."""
    read: list[str] = []
    pieces: Callable[[Corpus], list[Piece]] = Corpus.pieces

    def watched(corpus: Corpus) -> list[Piece]:
        read.append(corpus.where)
        time.sleep(slow)
        return pieces(corpus)

    Corpus.pieces = watched  # type: ignore[method-assign]
    ranks = Ranks(rank, world_size, local_ranks[rank], torch.device("cpu"), distributed=True)
    source = {"source": "jsonl", "paths": "a.jsonl"}
    config = {"sources": [source], "cache": "cache", "block_size": 16, "holdout": 0.2, "tokenizer": tokenizer}
    home = Path.cwd()
    try:
        os.chdir(folders[rank])
        train, holdout = prepare(DataConfig.model_validate(config), ranks, seed=0, global_batch=4)
        rows = [train.batch(step, 2 * rank, 2 * rank + 2).tolist() for step in range(3)]
        return {"fingerprint": train.fingerprint, "read": read, "rows": rows, "holdout": holdout.batch(0, 2).tolist()}
    except InputError as error:
        # The ranks are still in step: the next collective goes through.
        return {"error": str(error), "read": read, "in_step": ranks.sum([1.0]) == [world_size]}
    finally:
        os.chdir(home)
        Corpus.pieces = pieces  # type: ignore[method-assign]


def impatient_body(rank: int, world_size: int, folder: str, patience: float, slow: float) -> dict[str, Any]:
    """`body` in a group whose collectives fail after `patience` seconds, with a corpus slower than that."""
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/impatient",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=patience),
    )
    return body(rank, world_size, [folder] * 2, [0, 1], "byte", slow)


@pytest.mark.parametrize("tokenizer", ["byte", {"bpe": 300}])
def test_rank_0_builds_and_rank_1_opens(tmp_path: Path, tokenizer: Any) -> None:
    write_corpus(tmp_path / "a.jsonl")
    folders = [str(tmp_path)] * 2
    first, second = on_ranks(2, body, folders, [0, 1], tokenizer)
    assert first["read"]
    assert second["read"] == []
    assert first["fingerprint"] == second["fingerprint"]
    assert first["holdout"] == second["holdout"]
    again, _ = on_ranks(2, body, folders, [0, 1], tokenizer)
    assert again["read"] == []
    alone = Ranks(0, 1, 0, torch.device("cpu"), distributed=False)
    source = {"source": "jsonl", "paths": str(tmp_path / "a.jsonl")}
    config = {"sources": [source], "block_size": 16, "holdout": 0.2, "tokenizer": tokenizer}
    train, _ = prepare(DataConfig.model_validate(config | {"cache": tmp_path / "other"}), alone, 0, 4)
    for step in range(3):
        assert first["rows"][step] + second["rows"][step] == train.batch(step, 0, 4).tolist()


def test_a_missing_corpus_is_an_error_on_both_ranks(tmp_path: Path) -> None:
    results = on_ranks(2, body, [str(tmp_path)] * 2, [0, 1], "byte")
    for result in results:
        assert result["error"] == "data.sources[0].paths: a.jsonl does not exist"
        assert result["in_step"]


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_machine_that_does_not_see_the_cache_builds_its_own(tmp_path: Path, local_rank: int) -> None:
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        write_corpus(folder / "a.jsonl")
    first, second = on_ranks(2, body, [str(folder) for folder in folders], [0, local_rank], "byte")
    assert first["read"] == second["read"] == ["data.sources[0]"]
    assert first["fingerprint"] == second["fingerprint"]
    assert (folders[1] / "cache" / "packed").is_dir()


def test_machines_with_other_text_are_refused(tmp_path: Path) -> None:
    folders = [tmp_path / "here", tmp_path / "there"]
    write_corpus(folders[0] / "a.jsonl")
    write_corpus(folders[1] / "a.jsonl", words="other words")
    for result in on_ranks(2, body, [str(folder) for folder in folders], [0, 0], "byte"):
        assert "rank 1's machine holds other text" in result["error"]
        assert result["in_step"]


def test_a_corpus_missing_on_the_second_machine_is_an_error_on_both(tmp_path: Path) -> None:
    folders = [tmp_path / "here", tmp_path / "there"]
    write_corpus(folders[0] / "a.jsonl")
    folders[1].mkdir()
    for result in on_ranks(2, body, [str(folder) for folder in folders], [0, 0], "byte"):
        assert result["error"] == "data.sources[0].paths: a.jsonl does not exist"
        assert result["in_step"]


def test_building_may_outlast_the_timeout_of_a_collective(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a.jsonl")
    first, second = on_ranks(2, impatient_body, str(tmp_path), 4.0, 6.0, fresh=True)
    assert first["fingerprint"] == second["fingerprint"]
    assert second["read"] == []
