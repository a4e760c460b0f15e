"""HF Trainer on 2 gloo ranks under every host, held against the same training in one process."""

from __future__ import annotations

import doctest
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers", reason="the extra shardopt[transformers]")
from shardopt.checkpoint import folders
from shardopt.errors import InputError
from shardopt.integrations.transformers import shardopt_optimizer
from tests.distributed.pool import on_ranks
from tests.integrations.hosts import new_job
from tests.integrations.training import difference, refused, train

HOSTS = ("ddp", "fsdp", "zero1", "zero2", "zero3")
# Two ranks add the same gradients in another order; a step divides by their root mean square.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_ranks(1, train, tmp_path_factory.mktemp("alone"))[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """For each host: a training on 2 ranks that left checkpoint-3, made when first asked for."""

    class Made(dict):
        def __missing__(self, host: str) -> Any:
            folder = tmp_path_factory.mktemp(host)
            told = on_ranks(2, train, folder, host=host, save_strategy="steps", save_steps=3)
            self[host] = folder / "checkpoint-3", told
            return self[host]

    return Made()


@pytest.mark.parametrize("host", HOSTS)
def test_two_ranks_are_one_process_with_the_state_cut_in_two(host: str, alone: dict, saved: dict) -> None:
    first, second = saved[host][1]
    assert difference(first["weights"], alone["weights"]) < CLOSE
    assert difference(first["weights"], second["weights"]) == 0.0
    assert abs(first["evaluated"] - alone["evaluated"]) < 1e-5
    total = alone["held"]["m2"]
    for kind in ("m1", "m2", "nu"):
        held = [rank["held"][kind] for rank in (first, second)]
        assert total <= sum(held) <= total + 64  # DeepSpeed pads
        assert max(held) < 0.55 * total
    assert first["parameters"] == ({"DTensor"} if host == "fsdp" else {"Parameter"})
    rows = zip(first["logs"], alone["logs"], strict=True)
    for row, expected in rows:
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        for key in ("alpha", "beta3"):
            assert row[key] == expected[key]
        for key in ("m1_norm", "m2_norm", "update_norm"):
            assert row[key] == pytest.approx(expected[key], rel=1e-4)
        assert row["m2_norm"] > 0
    assert first["logs"][-1]["alpha"] == 2.0  # the warm-up ends with max_steps
    bytes_held = [first["logs"][-1][f"state_bytes/rank_{rank}"] for rank in (0, 1)]
    assert bytes_held == [3 * 4 * rank["held"]["m2"] for rank in (first, second)]


@pytest.mark.parametrize("host", ["ddp", "fsdp", "zero2"])
def test_gradient_accumulation(host: str, alone: dict, tmp_path: Path) -> None:
    two = on_ranks(2, train, tmp_path, host=host, accumulate=2)[0]
    assert difference(two["weights"], alone["weights"]) < CLOSE


@pytest.mark.parametrize("host", HOSTS)
def test_bf16_state_rounds_with_the_same_bits_everywhere(host: str, tmp_path: Path) -> None:
    settings = {"ademamix": {"state_dtype": "bf16"}, "max_steps": 4}
    one = on_ranks(1, train, tmp_path / "one", **settings)[0]
    two = on_ranks(2, train, tmp_path / "two", host=host, **settings)
    settings["ademamix"] = {"state_dtype": "bf16", "seed": 6}
    other = on_ranks(1, train, tmp_path / "other", **settings)[0]
    assert two[1]["dtypes"] == {"m1": "torch.bfloat16", "m2": "torch.bfloat16", "nu": "torch.bfloat16"}
    # A sum in another order moves a value over a rounding boundary now and then: few weights, by little.
    gap = mean_difference(one["weights"], two[0]["weights"])
    assert gap < 0.05 * mean_difference(one["weights"], other["weights"])
    assert gap < 1e-5


def mean_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([(a[name] - b[name]).abs().view(-1) for name in a]).mean())


@pytest.mark.parametrize("host", HOSTS)
def test_bf16_compute(host: str, alone: dict, tmp_path: Path) -> None:
    two = on_ranks(2, train, tmp_path, host=host, bf16=True)[0]
    assert two["logs"][-1]["loss"] == pytest.approx(alone["logs"][-1]["loss"], rel=2e-2)
    assert 0 < difference(two["weights"], alone["weights"]) < 5e-2


@pytest.mark.parametrize("host", HOSTS)
def test_resume_on_as_many_ranks_is_as_if_never_stopped(host: str, saved: dict, tmp_path: Path) -> None:
    checkpoint, straight = saved[host]
    assert all(rank["sums"]["m2"] > 0 for rank in straight)  # rank 1's slices would be missed
    resumed = on_ranks(2, train, tmp_path, host=host, resume=str(checkpoint))
    for before, after in zip(straight, resumed, strict=True):
        assert difference(before["weights"], after["weights"]) == 0.0
        assert before["sums"] == after["sums"]
        assert before["logs"][-1] == after["logs"][-1]


@pytest.mark.parametrize("host", ["ddp", "fsdp", "zero2", "zero3"])
def test_resume_on_more_ranks(host: str, saved: dict, tmp_path: Path) -> None:
    checkpoint, straight = saved[host]
    resumed = on_ranks(3, train, tmp_path, host=host, resume=str(checkpoint), trainer="AdEMAMixTrainer")
    assert difference(straight[0]["weights"], resumed[0]["weights"]) < CLOSE
    assert resumed[2]["sums"]["m2"] > 0
    assert sum(rank["sums"]["m2"] for rank in resumed) == pytest.approx(
        sum(rank["sums"]["m2"] for rank in straight), rel=1e-4
    )


def test_block_formats_resume_exactly_where_they_were_cut(tmp_path: Path) -> None:
    options = {"ademamix": {"state_dtype": "block8"}}
    straight = on_ranks(2, train, tmp_path, save_strategy="steps", save_steps=3, **options)
    resumed = on_ranks(2, train, tmp_path, resume=str(tmp_path / "checkpoint-3"), **options)
    assert difference(straight[0]["weights"], resumed[0]["weights"]) == 0.0
    alone = on_ranks(1, train, tmp_path, resume=str(tmp_path / "checkpoint-3"), **options)[0]
    assert mean_difference(straight[0]["weights"], alone["weights"]) < 1e-4  # new blocks, once through fp32


def test_resume_in_one_process_what_two_ranks_wrote(saved: dict, tmp_path: Path) -> None:
    checkpoint, straight = saved["ddp"]
    resumed = on_ranks(1, train, tmp_path, resume=str(checkpoint))[0]
    assert difference(straight[0]["weights"], resumed["weights"]) < CLOSE


def test_deepspeed_resumes_what_ddp_wrote(saved: dict, tmp_path: Path) -> None:
    checkpoint, straight = saved["ddp"]
    resumed = on_ranks(2, train, tmp_path, host="zero2", resume=str(checkpoint), trainer="AdEMAMixTrainer")
    assert difference(straight[0]["weights"], resumed[0]["weights"]) < CLOSE


def test_deepspeed_on_another_world_size_says_what_to_do(saved: dict, tmp_path: Path) -> None:
    (told,) = on_ranks(1, refused, tmp_path, host="zero2", resume=str(saved["zero2"][0]))
    assert "written by 2 ranks and DeepSpeed reads it on as many only, not on 1" in told
    assert "AdEMAMixTrainer" in told


def test_a_checkpoint_moves_with_its_folder(saved: dict, tmp_path: Path) -> None:
    checkpoint, straight = saved["ddp"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(checkpoint)
    resumed = on_ranks(2, train, tmp_path, resume=str(elsewhere))
    assert difference(straight[0]["weights"], resumed[0]["weights"]) == 0.0


def test_optimizer_file_is_plain_data(saved: dict) -> None:
    file = torch.load(saved["ddp"][0] / "optimizer.pt", weights_only=True)
    assert file["state"] == {}
    assert file["shardopt"] == {"step": 3}
    document = json.loads((saved["ddp"][0] / "shardopt" / "checkpoint.json").read_text())
    assert document["checkpoint"]["world_size"] == 2
    assert document["host"] == "ddp"


def test_resume_without_slices_is_refused(saved: dict, tmp_path: Path) -> None:
    bare = tmp_path / "checkpoint-3"
    bare.mkdir()
    for file in saved["ddp"][0].iterdir():
        if file.is_file():
            (bare / file.name).write_bytes(file.read_bytes())
    for told in on_ranks(2, refused, tmp_path, resume=str(bare)):
        assert "has no shardopt folder" in told
        assert "Start a new run from its weights" in told


@pytest.mark.parametrize("host", HOSTS)
def test_the_best_model_comes_back_at_the_end(host: str, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    # The worst is the first one: had nothing been loaded, the last one would be evaluated.
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    told = on_ranks(2, train, tmp_path, host=host, **options)
    assert told[0]["best"] == pytest.approx(told[0]["evaluated"], rel=1e-5)
    assert told[0]["evaluated"] > told[0]["last_evaluated"][0] + 0.05
    assert difference(told[0]["weights"], told[1]["weights"]) == 0.0


def test_epochs_give_the_length(tmp_path: Path) -> None:
    told = on_ranks(2, train, tmp_path, max_steps=-1, num_train_epochs=1)[0]
    assert told["step"] == 6
    assert [row["alpha"] for row in told["logs"]] == pytest.approx([2 * 2 / 6, 2 * 4 / 6, 2.0])


def test_given_warmups_win(tmp_path: Path) -> None:
    told = on_ranks(2, train, tmp_path, ademamix={"alpha_warmup": 12, "beta3_warmup": None}, max_steps=2)[0]
    assert told["logs"][-1]["alpha"] == pytest.approx(2.0 * 2 / 12)
    assert told["logs"][-1]["beta3"] == 0.9999


def test_wandb_is_one_run_a_job(tmp_path: Path) -> None:
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    options = {"report_to": ["wandb"], "save_strategy": "steps", "save_steps": 3, "environment": environment}
    first = on_ranks(2, train, tmp_path / "run", **options)
    assert first[0]["wandb"]["train/alpha"] == 2.0
    assert first[0]["wandb"]["train/state_bytes/rank_1"] > 0
    assert first[1]["wandb"] is None
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    on_ranks(2, train, tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-3"), **options)
    started = [path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(started) == 2  # offline, every start makes a folder; one id makes them one run
    assert len(set(started)) == 1


def fails_in_the_second_save(rank: int, world_size: int, folder: Path) -> str:
    """Train with save_total_limit=1; the disk is gone when the second checkpoint's slices get their name."""
    publish, published = folders.publish, []

    def fail_later(partial: Path, target: Path, replaceable: Any) -> None:
        if published:
            raise OSError("the disk is gone")
        published.append(target)
        publish(partial, target, replaceable)

    with mock.patch.object(folders, "publish", fail_later):
        return refused(rank, world_size, folder, save_strategy="steps", save_steps=3, save_total_limit=1)


def test_slices_are_written_before_trainer_deletes_the_older_checkpoint(tmp_path: Path) -> None:
    (told,) = on_ranks(1, fails_in_the_second_save, tmp_path)
    assert "the disk is gone" in told
    older = tmp_path / "checkpoint-3"
    assert (older / "shardopt" / "checkpoint.json").is_file()
    straight = on_ranks(2, train, tmp_path / "two", save_strategy="steps", save_steps=3, save_total_limit=1)
    assert sorted(path.name for path in (tmp_path / "two").glob("checkpoint-*")) == ["checkpoint-6"]
    assert (tmp_path / "two" / "checkpoint-6" / "shardopt" / "checkpoint.json").is_file()
    resumed = on_ranks(1, train, tmp_path, resume=str(older))[0]
    assert difference(straight[0]["weights"], resumed["weights"]) < CLOSE


def test_docstring_example_of_shardopt_optimizer_runs() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(shardopt_optimizer, "shardopt_optimizer", globs={})
    new_job()
    assert example.examples
    with mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}):  # or DeepSpeed prints what it has chosen
        assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example).failed == 0


def test_a_new_optimizer_file_is_told_from_anothers(tmp_path: Path) -> None:
    from shardopt.integrations.hosted import FileAdEMAMix

    net = torch.nn.Linear(2, 2)
    optimizer = FileAdEMAMix([{"params": list(net.named_parameters())}], net)
    with pytest.raises(InputError, match="not saved by shardopt"):
        optimizer.load_state_dict(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict())
    pointer = optimizer.state_dict()
    optimizer.load_state_dict(pointer)  # nothing counted yet: nothing to wait for
    optimizer.step()
    optimizer.load_state_dict({**pointer, "shardopt": {"step": 3}})
    with pytest.raises(InputError, match=r"call .*checkpoint\.load"):
        optimizer.step()
