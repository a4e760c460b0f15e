"""The deepspeed engine on real ranks: the numbers of the other engines, whatever DeepSpeed does by default."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from scripts import forked
from shardopt import checkpoint, engines
from shardopt.distributed import Ranks
from shardopt.engines import DdpConfig, DeepspeedConfig, ZeroConfig
from shardopt.engines.base import EngineInputs
from shardopt.engines.deepspeed.engine import DeepspeedEngine
from shardopt.engines.deepspeed.state import DeepspeedState
from shardopt.errors import InputError
from shardopt.optim import registry
from shardopt.pretrain.config import load
from shardopt.pretrain.loop import pretrain
from shardopt.pretrain.record import read_metrics
from tests.distributed.forked import Command
from tests.distributed.pool import on_ranks
from tests.pretrain import tiny

STEPS = 20
SMALL = {"zero_optimization": {"sub_group_size": 300, "stage3_param_persistence_threshold": 20}}
ROUND_ROBIN = {"zero_optimization": {"round_robin_gradients": True}}


# ------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    tiny.corpus(folder / "text")
    return folder


def rows(folder, name):
    return read_metrics(folder / "runs" / name / "metrics.jsonl")


def losses(folder, name):
    return [row["loss"] for row in rows(folder, name)]


def run(folder, name, engine, steps=STEPS, ranks=2, **changes):
    on_ranks(
        ranks, tiny.run, folder, run__name=name, engine=engine, train__steps=steps, train__grad_clip=0.5, **changes
    )
    return rows(folder, name)


@pytest.fixture(scope="module")
def others(folder):
    """Rows of the same run on FSDP2, on our ZeRO and on one process."""
    made = [run(folder, "fsdp", "{name: fsdp}"), run(folder, "zero", "{name: zero}")]
    tiny.run(0, 1, folder, run__name="single", engine="{name: single}", train__steps=STEPS, train__grad_clip=0.5)
    return [*made, rows(folder, "single")]


@pytest.mark.parametrize(
    "engine",
    [
        {"stage": 1},
        {"stage": 2},
        {"stage": 3},
        {"stage": 3, "config": {"zero_optimization": {"sub_group_size": 3000}}},
        {"stage": 1, "overlap_comm": False, "bucket_mb": 0.01},
        {"stage": 2, "overlap_comm": False, "config": ROUND_ROBIN},
        {"stage": 2, "offload_optimizer": True, "config": "launch/deepspeed/zero2-offload.json"},
        {"stage": 3, "offload_optimizer": True, "config": "launch/deepspeed/zero3-offload.json"},
    ],
    ids=json.dumps,
)
def test_losses_schedules_and_norms_are_those_of_the_other_engines(folder, others, engine):
    name = "ds-" + re.sub(r"\W+", "-", json.dumps(engine)).strip("-")
    mine = run(folder, name, json.dumps({"name": "deepspeed", **engine}))
    norms = [row["grad_norm"] for row in mine]
    assert sum(norm > 0.5 for norm in norms) > STEPS // 2  # clipping is on
    for theirs in others:
        for key in ("loss", "grad_norm", "m1_norm", "m2_norm", "update_norm"):
            assert [row[key] for row in mine] == pytest.approx([row[key] for row in theirs], rel=1e-4), key
        # Counted once a step, however many sub-groups DeepSpeed steps one by one.
        for key in ("alpha", "beta3", "lr"):
            assert [row[key] for row in mine] == [row[key] for row in theirs], key


def test_bf16_with_accumulation_follows_fsdp_in_bf16(folder):
    expected = [row["loss"] for row in run(folder, "fsdp-bf16", "{name: fsdp, compute_dtype: bf16}")]
    for stage in (1, 2, 3):
        engine = {"name": "deepspeed", "stage": stage, "compute_dtype": "bf16"}
        mine = [row["loss"] for row in run(folder, f"bf16-{stage}", json.dumps(engine))]
        assert mine == pytest.approx(expected, rel=2e-3)
        assert mine[0] == expected[0]
        assert mine[-1] < 0.7 * mine[0]


def rewind(folder, name, step):
    """Leave the run with the checkpoint of `step` alone."""
    for path in (folder / "runs" / name / "checkpoints").iterdir():
        if path.name != f"step-{step:08d}":
            shutil.rmtree(path)


@pytest.mark.parametrize(
    ("first", "second", "ranks", "third"),
    [
        ("{name: fsdp}", "{name: deepspeed, stage: 3}", 2, "{name: zero}"),
        ("{name: zero}", "{name: deepspeed, stage: 2, offload_optimizer: true}", 1, "{name: deepspeed, stage: 3}"),
        ("{name: deepspeed, stage: 3}", "{name: deepspeed, stage: 1}", 2, "{name: fsdp}"),
    ],
)
def test_a_run_moves_between_engines_and_ranks(folder, first, second, ranks, third):
    name = f"moved-{ranks}-{first[7:].strip('}').replace(', ', '-').replace(': ', '')}"
    changes = {"steps": 12, "checkpoint__every": 4}
    expected = [row["loss"] for row in run(folder, name, first, **changes)]
    for engine, count, step in [(second, ranks, 4), (third, 2, 8)]:
        rewind(folder, name, step)
        resumed = run(folder, name, engine, ranks=count, **changes)
        assert [row["step"] for row in resumed] == list(range(1, 13))
        assert [row["loss"] for row in resumed] == pytest.approx(expected, rel=1e-5)
        # A loss that had started again from nothing would be far from it.
        assert resumed[step]["loss"] < 0.97 * resumed[0]["loss"]


@pytest.mark.parametrize("engine", ["stage: 1, compute_dtype: bf16", "stage: 2", "stage: 3, compute_dtype: bf16"])
def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(folder, engine):
    name = "resumed-" + engine[7]
    changes = {"steps": 8, "checkpoint__every": 4, "optimizer__state_dtype": "bf16", "checkpoint__export": "true"}

    def weights():
        return (folder / "runs" / name / "export" / "model.safetensors").read_bytes()

    whole = run(folder, name, f"{{name: deepspeed, {engine}}}", **changes)
    exported = weights()
    rewind(folder, name, 4)
    shutil.rmtree(folder / "runs" / name / "export")
    resumed = run(folder, name, f"{{name: deepspeed, {engine}}}", **changes)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]
    assert weights() == exported


# ------------------------------------------------------------------------------- the engine alone


class Model(nn.Module):
    """Odd sizes, a tied weight, a single element, a frozen layer and parts that a step may leave unused."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(53, 15)
        self.layers = nn.ModuleList(nn.Linear(15, 15) for _ in range(3))
        self.frozen = nn.Linear(15, 15)
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(15, 53, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens, used=(0, 1, 2)):
        x = self.embed(tokens)
        for i in used:
            x = x + self.scale * torch.tanh(self.layers[i](x))
        return self.head(self.frozen(x)).float()


OPTIMIZER = {"lr": 3e-3, "alpha": 4.0, "alpha_warmup": 20, "beta3_warmup": 20, "weight_decay": 0.1, "seed": 7}


def built(config, seed=0, **optimizer):
    ranks = Ranks(*(int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK")), torch.device("cpu"), True)
    torch.manual_seed(seed)
    model = Model()
    spec = registry.spec(optimizer.pop("name", "ademamix"), **(OPTIMIZER | optimizer))
    inputs = EngineInputs(ranks, model, lambda _: None, spec, list(model.layers))
    engine = engines.build(config, inputs)
    engine.state.init()
    return engine


def micro(engine, last, seed, used=(0, 1, 2), poison=False):
    generator = torch.Generator().manual_seed(100 * seed + engine.ranks.rank)
    tokens = torch.randint(53, (4, 7), generator=generator)
    with engine.accumulate(last):
        logits = engine.model(tokens[:, :-1], used=used)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum") / 48
        engine.backward(loss * float("nan") if poison else loss)


def step(engine, seed, uses=((0, 1, 2),), clip=None, poison=False):
    for i, used in enumerate(uses):
        micro(engine, i == len(uses) - 1, 10 * seed + i, used, poison)
    norm = engine.clip_grad_norm(clip)
    if norm < float("inf"):
        engine.step()
    engine.zero_grad()
    return norm


def held(engine):
    """Every kind of every parameter, whole, put together from all ranks' slices; NaN where no rank has it."""
    parts = [(s.name, s.kind, s.layout, s.tensors[0].float().reshape(-1).clone()) for s in engine.state.slices()]
    whole = {}
    for pieces in engine.ranks.gather(parts):
        for name, kind, layout, values in pieces:
            target = whole.setdefault(f"{name}/{kind}", torch.full(layout.shape, float("nan")))
            layout.copy_to_whole(values, target)
    return whole


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def counts(engine):
    merged = {}
    for part in engine.ranks.gather(engine.state.step_counts()):
        for name, entry in part.items():
            assert merged.setdefault(name, entry) == entry
    return {name: entry["step"] for name, entry in merged.items()}


CONFIGS = {
    "1": DeepspeedConfig(stage=1),
    "2": DeepspeedConfig(stage=2),
    "2-round-robin": DeepspeedConfig(stage=2, config=ROUND_ROBIN),
    "3": DeepspeedConfig(stage=3),
    "3-small": DeepspeedConfig(stage=3, config=SMALL),
    "1-offload": DeepspeedConfig(stage=1, offload_optimizer=True),
    "2-offload": DeepspeedConfig(stage=2, offload_optimizer=True, config=ROUND_ROBIN),
    "3-offload": DeepspeedConfig(stage=3, offload_optimizer=True, config=SMALL),
    "1-bf16": DeepspeedConfig(stage=1, compute_dtype="bf16"),
    "2-bf16": DeepspeedConfig(stage=2, compute_dtype="bf16", config=ROUND_ROBIN),
    "3-bf16": DeepspeedConfig(stage=3, compute_dtype="bf16", config=SMALL),
}
FP32 = [name for name in CONFIGS if "bf16" not in name]


def _bits(rank, world_size, names):
    state_dtype = {"m1": "bf16", "m2": "bf16", "nu": "bf16"}
    outcome = {}
    control = built(DdpConfig(bucket_mb=0.001), state_dtype=state_dtype)
    for i in range(4):
        step(control, i)
    expected = held(control)
    for name in names:
        engine = built(CONFIGS[name], state_dtype=state_dtype)
        before = held(engine)
        for i in range(4):
            step(engine, i)
        after = held(engine)
        share = sum(s.nbytes for s in engine.state.slices() if s.kind == "m2" and s.tensors[0].dtype == torch.bfloat16)
        outcome[name] = (same(before, after), same(after, expected), share, counts(engine))
        engine.close()
    total = 2 * sum(value.numel() for key, value in expected.items() if key.endswith("/m2"))
    return outcome, total, counts(control)


def test_state_and_weights_are_bit_for_bit_those_of_ddp():
    """At two ranks a sum has one order; the state is rounded stochastically, so bits follow from the layouts."""
    reports = on_ranks(2, _bits, FP32)
    for outcome, total, expected in reports:
        for name, (still, equal, share, steps) in outcome.items():
            assert not still, name
            assert equal, name
            assert share < 0.55 * total, name
            assert steps == expected, name


def _covered(rank, world_size):
    outcome = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(3)
        expected = dict(Model().named_parameters())
        engine = built(config, seed=3)
        weights = {key[:-7]: value for key, value in held(engine).items() if key.endswith("/weight")}
        whole = {n: v for n, v in engine.state.full_parameters() if v is not None}
        exact = {n: p.bfloat16().float() if "bf16" in name and not p.requires_grad else p for n, p in expected.items()}
        elements = sum(engine.ranks.gather(sum(s.layout.local_numel for s in engine.state.slices() if s.kind == "nu")))
        outcome[name] = (same(weights, exact), rank > 0 or same({n: v.float() for n, v in whole.items()}, exact))
        outcome[name] += (elements == sum(p.numel() for p in expected.values() if p.requires_grad),)
        engine.close()
    return outcome


def test_layouts_cover_each_parameter_once_and_masters_start_exact():
    """Under bf16 too, where DeepSpeed takes its masters from rounded weights; on 3 ranks no size divides."""
    for outcome in on_ranks(3, _covered):
        assert outcome == dict.fromkeys(CONFIGS, (True, True, True))


def _unused(rank, world_size, names):
    # Layer 1 is used, then not, then only in the second micro-batch, then not.
    pattern = [((0, 1, 2), (0, 1, 2)), ((0, 2), (0, 2)), ((0, 2), (0, 1, 2)), ((2,), (2,))]

    def trained(config):
        engine = built(config)
        trace = []
        for i, uses in enumerate(pattern):
            step(engine, i, uses, clip=0.3)
            trace.append(held(engine))
        return engine, trace

    control, expected = trained(ZeroConfig(stage=2))
    outcome = {}
    for name in names:
        engine, mine = trained(CONFIGS[name])
        close = all(
            torch.allclose(m[key], e[key], rtol=1e-5, atol=1e-7)
            for m, e in zip(mine, expected, strict=True)
            for key in m
        )
        moved = [not torch.equal(mine[i]["layers.1.weight/m2"], mine[i - 1]["layers.1.weight/m2"]) for i in range(1, 4)]
        frozen = all(torch.equal(m["frozen.weight/weight"], expected[0]["frozen.weight/weight"]) for m in mine)
        # Through a checkpoint's scalars and back.
        scalars = {k: v for part in engine.ranks.gather(engine.state.step_counts()) for k, v in part.items()}
        engine.state.load_step_counts(scalars)
        outcome[name] = (close, moved, frozen, counts(engine))
        engine.close()
    return outcome, counts(control)


def test_a_parameter_without_a_gradient_does_not_decay_move_count_or_see_an_old_gradient():
    names = ["1", "2", "3-small", "2-offload", "3-offload"]
    for outcome, expected in on_ranks(2, _unused, names):
        assert (expected["layers.1.weight"], expected["layers.0.bias"], expected["scale"]) == (2, 3, 4)
        for name, (close, moved, frozen, steps) in outcome.items():
            assert moved == [False, True, False], name
            assert frozen, name
            assert steps == expected, name
            assert close, name


def _poisoned(rank, world_size):
    outcome = {}
    for name, config in CONFIGS.items():
        clean, engine = built(config), built(config)
        first = step(engine, 0, ((0, 1, 2),) * 2), step(clean, 0, ((0, 1, 2),) * 2)
        before = held(engine)
        norm = step(engine, 1, ((0, 1, 2),) * 2, clip=1.0, poison=rank == 1)
        unmoved = same(held(engine), before)
        step(engine, 2, ((0, 1, 2),) * 2, clip=1.0)
        step(clean, 2, ((0, 1, 2),) * 2, clip=1.0)
        outcome[name] = (norm < float("inf"), unmoved, first[0] == first[1], same(held(engine), held(clean)))
        engine.close()
        clean.close()
    return outcome


def test_a_gradient_that_is_not_finite_on_one_rank_is_seen_on_all_and_leaves_nothing_behind():
    for outcome in on_ranks(2, _poisoned):
        assert outcome == dict.fromkeys(CONFIGS, (False, True, True, True))


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return (self.weight * x).float()


def _accumulated(rank, world_size, folder):
    outcome = {}
    for name, config in CONFIGS.items():
        ranks = Ranks(rank, world_size, rank, torch.device("cpu"), True)
        model = Sum()
        inputs = EngineInputs(ranks, model, lambda _: None, registry.spec("sgd", lr=1.0), [])
        engine = engines.build(config, inputs)
        checkpoint.save(folder / name, engine.state)
        for last in (False, True):  # whose gradients a load drops
            with engine.accumulate(last):
                engine.backward(engine.model(torch.full((6,), 64.0)).sum())
            checkpoint.load(folder / name, engine.state)
            assert not engine.state.holds_gradients()
        # 1 and 2^-12 twice: in bf16 the small ones would be lost.
        for i, size in enumerate((1.0, 2.0**-12, 2.0**-12)):
            with engine.accumulate(i == 2):
                engine.backward(engine.model(torch.full((6,), size)).sum())
            assert engine.state.holds_gradients()  # a save would lose them
        norm = engine.clip_grad_norm(None)
        engine.step()
        assert not engine.state.holds_gradients()
        engine.zero_grad()
        outcome[name] = (norm, sorted({v for part in held(engine).values() for v in part.tolist()}))
        engine.close()
    return outcome


def test_gradients_are_sums_over_ranks_and_micro_batches_in_fp32(tmp_path):
    """Neither the mean over ranks, nor a division by accumulation steps, nor bf16 in between; any client optimizer.

    Nor what there was before a load.
    """
    each = 2 * (1 + 2.0**-11)
    for outcome in on_ranks(2, _accumulated, tmp_path):
        for name, (norm, values) in outcome.items():
            assert norm == pytest.approx(each * 6**0.5, rel=1e-7), name
            assert values == [-each], name


def _attached(rank, world_size):
    """DeepSpeed started by somebody else, as accelerate does it: no engine of ours in between."""
    import deepspeed

    from shardopt import AdEMAMix

    outcome = {}
    control = built(DdpConfig(), state_dtype="bf16")
    step(control, 1)
    expected = held(control)
    for stage in (1, 2, 3):
        torch.manual_seed(0)
        model = Model()
        groups = registry.spec("ademamix", **OPTIMIZER).groups(model.named_parameters())
        optimizer = AdEMAMix(groups, **OPTIMIZER, state_dtype="bf16")
        config = DeepspeedConfig(stage=stage, config=SMALL if stage == 3 else ROUND_ROBIN).merged(False, False)
        host, wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        layouts = DeepspeedState(wrapped if stage == 2 else host, optimizer, model).layouts()
        tokens = torch.randint(53, (4, 7), generator=torch.Generator().manual_seed(1000 + rank))
        loss = nn.functional.cross_entropy(host(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        host.backward(loss / 24)
        host.step()
        equal = all(
            torch.equal(
                optimizer.state[flat][kind].float()[r.local_start : r.local_start + r.length],
                expected[f"{layout.name}/{kind}"].flatten()[r.global_start : r.global_start + r.length],
            )
            for flat, held_here in layouts.items()
            for layout in held_here
            for r in layout.ranges
            for kind in ("m1", "m2", "nu")
        )
        outcome[stage] = (equal, len(layouts))
        host.destroy()
    return outcome


def test_layouts_can_be_attached_to_a_deepspeed_that_somebody_else_made():
    for outcome in on_ranks(2, _attached):
        assert all(equal for equal, _ in outcome.values())
        assert outcome[3][1] > 2  # several sub-groups a parameter group


def _own_checkpoint(rank, world_size, folder):
    outcome = {}
    for name in ("1", "2-round-robin", "3-small"):
        engine = built(CONFIGS[name], state_dtype="bf16")
        step(engine, 0)
        saved = held(engine)
        with engine.state.in_groups(False):  # as stage 3 has it without our engine around
            engine.model.save_checkpoint(folder / name, tag="now")
        step(engine, 1)
        expected, moved = held(engine), not same(held(engine), saved)
        with engine.state.in_groups(False):
            engine.model.load_checkpoint(folder / name, tag="now")
        outcome[name] = moved, same(held(engine), saved), set(counts(engine).values())
        step(engine, 1)
        outcome[name] += (same(held(engine), expected),)
        engine.close()
    return outcome


def test_deepspeeds_own_checkpoints_take_an_optimizer_that_has_its_parameters_names(tmp_path):
    for outcome in on_ranks(2, _own_checkpoint, tmp_path):
        assert outcome == dict.fromkeys(outcome, (True, True, {1}, True))


def test_partitions_of_an_unknown_optimizer_are_refused():
    from shardopt import AdEMAMix

    model = Model()
    for state_dtype in ("fp32", "bf16", {"m2": "bf16"}):
        with pytest.raises(InputError, match="object holds: it is not DeepSpeed's ZeRO-1, 2 or 3"):
            DeepspeedState(object(), AdEMAMix(model.parameters(), state_dtype=state_dtype), model)


def _refused(rank, world_size):
    said = []
    for config, optimizer in [
        (DeepspeedConfig(), {"state_dtype": {"m2": "block8"}}),
        (DeepspeedConfig(config={"zero_optimization": {"overlap_com": True}}), {}),
        (DeepspeedConfig(), {"name": "muon"}),
        (DeepspeedConfig(), {"model": Scalar()}),
    ]:
        model = optimizer.pop("model", None) or Model()
        spec = registry.spec(optimizer.pop("name", "ademamix"), **optimizer)
        ranks = Ranks(rank, world_size, rank, torch.device("cpu"), True)
        inputs = EngineInputs(ranks, model, lambda _: None, spec, [])
        try:
            engines.build(config, inputs)
        except InputError as error:
            said.append(str(error))
    return said


def test_what_deepspeed_cannot_do_is_refused_before_it_starts():
    for said in on_ranks(2, _refused):
        assert "optimizer.state_dtype: block8" in said[0]
        assert "overlap_com" in said[1]
        assert "cannot shard Muon" in said[2]
        assert "parameter scale has no dimension" in said[3]


# ------------------------------------------------------------------------------- how it ends


def torchrun(folder, name, target, **changes):
    config = folder / f"{name}.yaml"
    config.write_text(json.dumps(tiny.tree(folder, run__name=name, engine="{name: deepspeed}", **changes)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [*command, str(target), str(config)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def alive(session):
    return [p.pid for p in psutil.process_iter() if p.status() != psutil.STATUS_ZOMBIE and _session(p.pid) == session]


def _session(pid):
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


@pytest.mark.slow  # imports DeepSpeed on two new ranks
def test_a_run_ends_cleanly_and_says_nothing_of_deepspeed(folder):
    process = torchrun(folder, "clean", "launch/pretrain.py", train__steps=3)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    for noise in (
        "DeepSpeed",
        "deepspeed.",
        "Warning",
        "WARNING",
        "destroy_process_group",
        "Abort",
        "Traceback",
        "MA ",
    ):
        assert noise not in output, output
    assert "engine         deepspeed, 2 ranks" in output
    assert not alive(process.pid)


def _failing(path):
    """For `Command`: torchrun, whose rank 1 fails in its third step.

    Ranks end as programs do: they wait for their threads and do what was left for the exit.
    """

    def rank(_):
        step = DeepspeedEngine.step

        def fail(self):
            self.done = getattr(self, "done", 0) + 1
            if self.done == 3 and self.ranks.rank == 1:
                raise OSError("the test's own failure")
            step(self)

        DeepspeedEngine.step = fail
        try:
            pretrain(load(path))
        finally:
            threading._shutdown()
            atexit._run_exitfuncs()

    forked.torchrun(["--standalone", "--nproc-per-node", "2", "failing.py"], rank)


def writing_to(log):
    """Processes that have `log` as their standard output."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(f"/proc/{process.pid}/fd/1").readlink() == log:
                found.append(process.pid)
        except OSError:  # it has ended
            continue
    return found


def test_a_rank_that_fails_leaves_no_process_behind(folder):
    target, log = folder / "failing.yaml", folder / "failing.log"
    changes = {"run__name": "failing", "engine": "{name: deepspeed}", "train__steps": 50}
    target.write_text(json.dumps(tiny.tree(folder, **changes)))
    process = Command(_failing, str(target), output=log)
    deadline = time.monotonic() + 60
    while len(writing_to(log)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(writing_to(log)) >= 3  # torchrun and its ranks
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the test's own failure" in output
    assert len(read_metrics(folder / "runs" / "failing" / "metrics.jsonl")) < 4
    deadline = time.monotonic() + 20
    while writing_to(log) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = writing_to(log)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
