"""Runs whose weights are bf16 (`model.dtype`), rounded stochastically or with masters."""

from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file

from shardopt import engines
from shardopt.checkpoint.stored import Stored
from shardopt.distributed import Ranks
from shardopt.engines.base import compute_dtype
from shardopt.engines.state import sum_of_squares
from shardopt.errors import InputError
from shardopt.optim import registry
from shardopt.pretrain import loop
from shardopt.pretrain.begin import begin
from shardopt.pretrain.forecast import Device, forecast
from tests.distributed.pool import on_ranks
from tests.pretrain import tiny

ALONE = {"engine": "{name: single}", "checkpoint__every": 3, "checkpoint__keep": 9}
MASTERS = ["none", "split", "fp32"]
SHARDED = {
    "ddp": "{name: ddp}",
    "zero-1": "{name: zero, stage: 1}",
    "zero-2": "{name: zero, stage: 2, bucket_mb: 0.01}",
    "fsdp": "{name: fsdp}",
}
ADAMW = "{name: adamw, lr: 3e-3}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    tiny.corpus(folder / "text")
    for masters in MASTERS:
        export = {"checkpoint__export": masters == "split"}
        tiny.run(0, 1, folder, run__name=masters, **bf16(masters), **ALONE | export)
    tiny.run(0, 1, folder, run__name="plain", **ALONE)
    return folder


def bf16(masters):
    return {"model__dtype": "bf16", "optimizer__master_weights": "null" if masters == "none" else masters}


def losses(folder, name):
    return [row["loss"] for row in tiny.metrics(folder, name)]


def stored(folder, name, step=6):
    found = Stored(folder / "runs" / name / "checkpoints" / f"step-{step:08d}")
    return {key: found.read(*key) for key in found.keys}


def joined(weight, low):
    """The fp32 values of bf16 weights and the 16 bits that they lack."""
    bits = weight.contiguous().view(torch.int16).int() << 16
    return (bits + low.view(weight.shape).int()).view(torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "{name: deepspeed}"}, r"model\.dtype: deepspeed makes bf16 weights .* engine\.compute_dtype=bf16"),
        ({"engine": "{name: fsdp, compute_dtype: fp32}"}, r"engine\.compute_dtype: bf16 weights"),
        ({"optimizer": ADAMW}, r"model\.dtype: AdamW on fsdp would round .*engine\.name=zero"),
        (
            {"optimizer": "{name: muon, lr: 1e-2}", "engine": "{name: ddp}"},
            r"choose optimizer\.name=ademamix, or model",
        ),
        ({"model__dtype": "fp16"}, r"model\.dtype: "),
        ({"model__dtype": "fp32", "optimizer__master_weights": "split"}, r"optimizer\.master_weights: split is for"),
    ],
)
def test_what_cannot_have_bf16_weights_is_refused_by_name_at_the_start(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        tiny.config(tmp_path, **{"model__dtype": "bf16"} | changes).check_ranks(2)


def test_an_optimizer_without_masters_may_have_those_of_zero(tmp_path):
    tiny.config(tmp_path, model__dtype="bf16", engine="{name: zero}", optimizer=ADAMW).check_ranks(2)


def test_weights_are_bf16_and_split_masters_train_as_fp32_ones(folder):
    kinds = {"none": {"weight", "m1", "m2", "nu"}, "split": {"weight", "master_low", "m1", "m2", "nu"}}
    for masters in MASTERS:
        now = stored(folder, masters)
        assert {v.dtype for (_, kind), v in now.items() if kind == "weight"} == {torch.bfloat16}
        assert {kind for _, kind in now} == kinds.get(masters, {"weight", "master", "m1", "m2", "nu"})
    assert losses(folder, "split") == losses(folder, "fp32")
    assert losses(folder, "none") != losses(folder, "split")
    assert losses(folder, "none") == pytest.approx(losses(folder, "plain"), rel=0.02)
    split, whole = stored(folder, "split"), stored(folder, "fp32")
    for name in (name for name, kind in whole if kind == "master"):
        assert torch.equal(joined(split[name, "weight"], split[name, "master_low"]), whole[name, "master"]), name


@pytest.mark.parametrize("masters", MASTERS)
def test_a_run_that_is_resumed_equals_the_undisturbed_one(folder, masters):
    config = tiny.config(folder, run__name=f"{masters}-again", **bf16(masters), **ALONE)
    with ExitStack() as stack:
        run = loop.Run(begin(config, Ranks.start("cpu", 1.0), stack))
        with loop.stop_signals() as stop, run.report.training(6) as bar:
            for _ in range(3):
                run.advance(stop, bar)
        run.saver.wait()
    tiny.run(0, 1, folder, run__name=f"{masters}-again", **bf16(masters), **ALONE)
    assert losses(folder, f"{masters}-again") == losses(folder, masters)
    now, undisturbed = stored(folder, f"{masters}-again"), stored(folder, masters)
    assert all(torch.equal(now[key], value) for key, value in undisturbed.items())
    with pytest.raises(InputError, match=r"model\.dtype"):
        tiny.run(0, 1, folder, run__name=f"{masters}-again", **ALONE)


def test_the_export_is_of_the_weights_that_held_out_loss_is_of(folder):
    export = folder / "runs" / "split" / "export"
    exported, now = load_file(export / "model.safetensors"), stored(folder, "split")
    assert all(torch.equal(value, now[name, "weight"]) for name, value in exported.items())
    assert '"dtype": "bfloat16"' in (export / "config.json").read_text()


def test_a_branch_takes_masters_from_weights_and_weights_from_masters(folder):
    def begun(name, source, **changes):
        path = folder / "runs" / source / "checkpoints" / "step-00000003"
        config = tiny.config(folder, run__name=name, run__from=path, **changes, **ALONE)
        with ExitStack() as stack:
            run = loop.Run(begin(config, Ranks.start("cpu", 1.0), stack))
            return {(s.name, s.kind): s.tensors[0].detach().clone() for s in run.engine.state.slices()}

    plain = stored(folder, "plain", 3)
    weights = [name for name, kind in plain if kind == "weight"]
    to_split, to_whole = (begun(f"to-{masters}", "plain", **bf16(masters)) for masters in ("split", "fp32"))
    for name in weights:
        exact = plain[name, "weight"]
        assert torch.equal(joined(to_split[name, "weight"], to_split[name, "master_low"]), exact), name
        assert torch.equal(to_whole[name, "master"], exact), name
        assert torch.equal(to_whole[name, "weight"], to_split[name, "weight"]), name
    whole, split = stored(folder, "fp32", 3), stored(folder, "split", 3)
    for source in ("fp32", "split"):
        back = begun(f"back-{source}", source)
        assert {kind for _, kind in back} == {"weight", "m1", "m2", "nu"}
        assert all(torch.equal(back[name, "weight"], whole[name, "master"]) for name in weights)
    into_whole, into_split = begun("into-whole", "split", **bf16("fp32")), begun("into-split", "fp32", **bf16("split"))
    for name in weights:
        assert torch.equal(into_whole[name, "weight"], whole[name, "weight"]), name
        assert torch.equal(into_whole[name, "master"], whole[name, "master"]), name
        assert torch.equal(into_split[name, "master_low"], split[name, "master_low"]), name
    left = begun("left", "split", **bf16("none"))
    assert all(torch.equal(left[name, "weight"], split[name, "weight"]) for name in weights)


def _runs(rank, world_size, folder):
    """Losses by engine, and bytes by kind of slice; one run that goes on after step 3 on another engine."""
    held = {}
    for name, engine in {**SHARDED, "zero-2 with adamw": SHARDED["zero-2"]}.items():
        changes = {"optimizer": ADAMW} if "adamw" in name else {"optimizer__master_weights": "split"}
        config = tiny.config(folder, run__name=name.replace(" ", "-"), engine=engine, model__dtype="bf16", **changes)
        with ExitStack() as stack:
            run = loop.Run(begin(config, Ranks.start("cpu", 1.0), stack))
            state = run.engine.state
            kinds = {"gradient": state.gradient_bytes()}
            for piece in state.slices():
                kinds[piece.kind] = kinds.get(piece.kind, 0) + piece.nbytes
            held[name] = kinds
            run.train()
    for engine, steps in (("zero-2", 3), ("fsdp", 6)):
        config = tiny.config(folder, run__name="moved", engine=SHARDED[engine], checkpoint__every=3, **bf16("split"))
        with ExitStack() as stack:
            run = loop.Run(begin(config, Ranks.start("cpu", 1.0), stack))
            with loop.stop_signals() as stop, run.report.training(6) as bar:
                while run.progress.step < steps:
                    run.advance(stop, bar)
            run.saver.wait()
    return held


@pytest.mark.slow  # starts six runs
def test_two_ranks_of_every_engine_train_alike_move_and_hold_what_is_planned(folder):
    found = on_ranks(2, _runs, folder)
    for name in SHARDED:
        assert losses(folder, name) == pytest.approx(losses(folder, "split"), rel=2e-3), name
    assert losses(folder, "moved") == pytest.approx(losses(folder, "zero-2"), rel=2e-3)
    cpu = Device("cpu", None, None, cuda=False)
    for name, engine in {**SHARDED, "zero-2 with adamw": SHARDED["zero-2"]}.items():
        adamw = "adamw" in name
        changes = {"optimizer": ADAMW} if adamw else {"optimizer__master_weights": "split"}
        config = tiny.config(folder, engine=engine, model__dtype="bf16", **changes)
        memory = next(row for row in forecast(config, 2, cpu).rows if row.chosen).memory
        most = {kind: max(one[name].get(kind, 0) for one in found) for kind in found[0][name]}
        assert most["weight"] == pytest.approx(memory.weights, rel=0.05), name
        whole = memory.gradients if "zero-1" not in name else None  # whole ones come with micro-batches
        assert whole is None or most["gradient"] == pytest.approx(whole, rel=0.05), name
        assert most.get("master", 0) == pytest.approx(memory.masters, rel=0.05), name
        for kind, nbytes in memory.state.items():
            assert most[kind] == pytest.approx(nbytes, rel=0.05), (name, kind)


@pytest.mark.parametrize(
    ("name", "weights", "computes"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float32, torch.float32),
        ("auto", torch.float16, torch.float32),  # without autocast: as the model says
        ("auto", torch.float64, torch.float32),
        ("bf16", torch.float32, torch.bfloat16),
        ("fp32", torch.bfloat16, torch.float32),
    ],
)
def test_an_engine_computes_in_the_dtype_of_narrow_weights(name, weights, computes):
    model = torch.nn.Linear(2, 2, dtype=weights)
    assert compute_dtype(name, torch.device("cpu"), model) == computes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_norm_of_bf16_gradients_is_not_rounded_to_bf16(dtype):
    gradients = [torch.randn(1000, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)]
    gradients.append(gradients.pop().to(dtype))  # of layers that have kept a wider dtype
    exact = sum(gradient.double().square().sum().item() for gradient in gradients)
    assert sum_of_squares(gradients) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_model_of_other_weights_is_computed_with_as_it_says(dtype):
    plain = engines.SingleConfig(compute_dtype="fp32")
    engines.check(plain, registry.spec("ademamix", lr=1e-3), 1, False, dtype)
