"""The loop on real ranks: the same numbers however it is split, and nothing lost when it is stopped or killed."""

import hashlib
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig

from scripts import forked
from shardopt.cli import main
from shardopt.errors import InputError, NonFiniteError
from shardopt.pretrain.loop import Run
from shardopt.pretrain.metrics import Tracker
from shardopt.pretrain.record import read_metrics
from tests.distributed.forked import Command, pretrain
from tests.distributed.pool import Pool, on_ranks
from tests.pretrain import tiny

STEPS = 30


def losses(folder, name="tiny"):
    return [row["loss"] for row in read_metrics(folder / "runs" / name / "metrics.jsonl")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    tiny.corpus(folder / "text")
    return folder


@pytest.fixture(scope="module")
def control(folder):
    """The losses and held-out loss of the run on one process."""
    result = tiny.run(0, 1, folder, run__name="control", engine="{name: single}", train__steps=STEPS)
    curve = losses(folder, "control")
    assert curve[-1] < 0.7 * curve[0]
    return curve, result.holdout_loss


@pytest.mark.parametrize(
    ("name", "ranks", "changes"),
    [
        ("fsdp", 2, {}),
        ("fsdp-whole", 2, {"engine": "{name: fsdp, reshard_after_forward: false}", "train__micro_batch": 4}),
        ("fsdp-recompute", 2, {"train__activation_checkpointing": "true"}),
        ("hsdp", 4, {"engine": "{name: fsdp, replicate: 2}", "train__micro_batch": 1}),
        ("ddp", 2, {"engine": "{name: ddp}", "train__micro_batch": 1}),
        ("zero-1", 2, {"engine": "{name: zero, stage: 1}"}),
        ("zero-2", 4, {"engine": "{name: zero, stage: 2, bucket_mb: 0.01}"}),
    ],
)
def test_the_loss_curve_does_not_depend_on_engine_ranks_or_micro_batches(folder, control, name, ranks, changes):
    changes = {"engine": "{name: fsdp}", "train__micro_batch": 2} | changes
    results = on_ranks(ranks, tiny.run, folder, run__name=name, train__steps=STEPS, **changes)
    assert losses(folder, name) == pytest.approx(control[0], rel=1e-4)
    assert len({r.holdout_loss for r in results}) == 1
    assert results[0].holdout_loss == pytest.approx(control[1], rel=1e-4)


def test_bf16_compute_learns_with_fp32_shards(folder):
    on_ranks(2, tiny.run, folder, run__name="bf16", train__steps=20, engine="{name: fsdp, compute_dtype: bf16}")
    curve = losses(folder, "bf16")
    assert curve[-1] < 0.9 * curve[0]


def eval_losses(folder, name):
    return [row["eval_loss"] for row in read_metrics(folder / "runs" / name / "metrics.jsonl") if "eval_loss" in row]


def test_weight_ema_is_evaluated_and_exported_and_training_goes_on_as_without_it(folder):
    changes = {"train__steps": 12, "eval__every": 4, "checkpoint__export": "true"}
    averaged = changes | {"optimizer__weight_ema": 0.9}
    tiny.run(0, 1, folder, run__name="plain", engine="{name: single}", **changes)
    tiny.run(0, 1, folder, run__name="weight_ema", engine="{name: single}", **averaged)
    assert losses(folder, "weight_ema") == losses(folder, "plain")
    expected = eval_losses(folder, "weight_ema")
    assert all(a != pytest.approx(b, rel=1e-3) for a, b in zip(expected, eval_losses(folder, "plain"), strict=True))
    for engine in ("{name: fsdp}", "{name: fsdp, reshard_after_forward: false}", "{name: zero}"):
        name = "average-" + str(abs(hash(engine)))
        result = on_ranks(2, tiny.run, folder, run__name=name, engine=engine, **averaged)[0]
        assert tiny.exported_loss(folder, result.export) == pytest.approx(result.holdout_loss, rel=1e-5)
        assert losses(folder, name) == pytest.approx(losses(folder, "plain"), rel=1e-4)
        assert eval_losses(folder, name) == pytest.approx(expected, rel=1e-4)


def _holdings(rank, world_size, folder):
    """Elements of each kind on this rank, counted on the live tensors, and whether any state is whole."""
    from contextlib import ExitStack

    from torch.distributed.tensor import DTensor

    from shardopt.distributed import Ranks
    from shardopt.pretrain.begin import begin
    from shardopt.pretrain.loop import Run

    with ExitStack() as stack:
        run = Run(begin(tiny.config(folder, run__name="holdings", train__steps=2), Ranks.start("cpu"), stack))
        run.train()
        held = {}
        for s in run.engine.state.slices():
            held[s.kind] = held.get(s.kind, 0) + sum(t.numel() for t in s.tensors)
        state = run.engine.optimizer.state
        sharded = all(isinstance(state[p][k], DTensor) for p in state for k in ("m1", "m2", "nu"))
        whole = sum(p.numel() for p in run.engine.model.parameters())
    return held, sharded, whole


def test_each_of_two_ranks_holds_half_of_every_state(folder):
    reports = on_ranks(2, _holdings, folder)
    whole = reports[0][2]
    for kind in ("weight", "m1", "m2", "nu"):
        shares = [held[kind] for held, _, _ in reports]
        assert sum(shares) == whole
        assert max(shares) <= 0.505 * whole
    assert all(sharded for _, sharded, _ in reports)


def weights(folder, name):
    """Hash of the exported weights."""
    return hashlib.sha256((folder / "runs" / name / "export" / "model.safetensors").read_bytes()).hexdigest()


def torchrun(folder, name, *overrides, ranks=2, **changes):
    """A real job in processes of its own."""
    config = folder / f"{name}.yaml"
    config.write_text(json.dumps(tiny.tree(folder, run__name=name, **changes)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.Popen(
        [*command, "launch/pretrain.py", str(config), *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(folder, name, step, process):
    """Wait until `process`, a command or a rank of a pool, has done `step`."""
    path = folder / "runs" / name / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or len(read_metrics(path)) < step:
        if isinstance(process, subprocess.Popen | Command):
            assert process.poll() is None, process.communicate()[0]
        else:
            assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)


KILLED = {
    "train__steps": 40,
    "checkpoint__every": 5,
    "checkpoint__export": "true",
    "model__attention_dropout": 0.1,  # so that the generators matter
    "optimizer__state_dtype": "bf16",
}


def test_killed_and_resumed_is_bit_identical_to_never_killed(folder):
    on_ranks(2, tiny.run, folder, run__name="whole", **KILLED)
    ranks = Pool(2)
    ranks.begin(tiny.run, folder, run__name="killed", **KILLED)
    wait_for_step(folder, "killed", 6 + os.getpid() % 10, ranks.processes[0])
    ranks.end(kill=True)
    written = read_metrics(folder / "runs" / "killed" / "metrics.jsonl")
    assert written[-1]["step"] < 40
    on_ranks(2, tiny.run, folder, run__name="killed", **KILLED)
    resumed = read_metrics(folder / "runs" / "killed" / "metrics.jsonl")
    assert [row["step"] for row in resumed] == list(range(1, 41))
    assert losses(folder, "killed") == losses(folder, "whole")
    assert weights(folder, "killed") == weights(folder, "whole")


def stopped_with_a_checkpoint(folder, name, number, process):
    """Stop a job of two ranks after its fourth step; what it said."""
    wait_for_step(folder, name, 4, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=90)
    assert f"stopped by {number.name}" in output
    last = read_metrics(folder / "runs" / name / "metrics.jsonl")[-1]["step"]
    assert (folder / "runs" / name / "checkpoints" / f"step-{last:08d}").is_dir()
    return output


@pytest.mark.slow  # two new ranks; test_started.py starts torchrun too
def test_a_signal_to_torchrun_stops_after_the_step_with_a_checkpoint(folder):
    process = torchrun(folder, "interrupted", train__steps=3000)
    output = stopped_with_a_checkpoint(folder, "interrupted", signal.SIGINT, process)
    assert "Traceback" not in output.split("torch/distributed")[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_worker_exits_with_status_zero(folder, number):
    """Without torchrun in between, whose own status after a signal is not ours to set."""
    name = f"alone-{number.name}"
    config = folder / f"{name}.yaml"
    config.write_text(json.dumps(tiny.tree(folder, run__name=name, engine="{name: single}", train__steps=3000)))
    ended = folder / f"{name}.status"
    process = Command(main, ["pretrain", str(config)], output=folder / f"{name}.log", SHARDOPT_STATUS=str(ended))
    wait_for_step(folder, name, 2, process)
    assert not ended.exists()
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"stopped by {number.name}" in output
    assert "run it again to go on" in output
    assert ended.read_text() == "stopped"


def _slow_disk():
    """For the first rank: each sync of a file takes a second."""
    real = os.fsync

    def fsync(descriptor):
        time.sleep(1.0)
        real(descriptor)

    if os.environ["RANK"] == "0":
        os.fsync = fsync


@pytest.mark.skipif(
    "shutdown_timeout" not in LaunchConfig.__dataclass_fields__, reason="this torch's torchrun always waits 30 s"
)
def test_a_stop_has_time_for_its_checkpoint_or_ends_with_an_error(folder):
    changes = {"train__steps": 3000, "checkpoint__every": 3000, "eval__every": 1, "run__timeout_minutes": 1}

    def stopped(name, **environment):
        config = folder / f"{name}.yaml"
        config.write_text(json.dumps(tiny.tree(folder, run__name=name, **changes)))
        argv = ["pretrain", "--nproc-per-node", "2", str(config)]
        process = Command(pretrain, argv, _slow_disk, output=folder / f"{name}.log", **environment)
        wait_for_step(folder, name, 2, process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=90)
        return process.returncode, output

    ended = folder / "ended"
    ended.write_text("stopped")  # by the start before
    status, output = stopped("too-slow", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1", SHARDOPT_STATUS=str(ended))
    assert not ended.exists()
    assert status == 128 + signal.SIGTERM, output
    assert "SIGTERM ended the run before its checkpoint was complete (torchrun kills the ranks after 1 s" in output
    assert "1 s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT, or run.timeout_minutes)); " in output
    assert "there is none" in output
    status, output = stopped("slow", SHARDOPT_STATUS=str(ended))
    assert ended.read_text() == "stopped"
    assert status == 0, output
    assert re.search(r"SIGTERM: saves step \d+ and stops; torchrun waits 90 s", output)
    (saved,) = (folder / "runs" / "slow" / "checkpoints").iterdir()
    assert saved.name == f"step-{read_metrics(folder / 'runs' / 'slow' / 'metrics.jsonl')[-1]['step']:08d}"
    assert f"checkpoint     {saved}" in output


def _stop_at_an_evaluation(rank, world_size, folder):
    """The newest checkpoint at each evaluation of a run that is told to stop during the first one."""
    from shardopt import checkpoint
    from shardopt.pretrain import loop

    seen, real = [], loop.held_out

    def held_out(*arguments):
        seen.append(checkpoint.latest(folder / "runs" / "stop-first" / "checkpoints"))
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    loop.held_out = held_out
    try:
        tiny.run(rank, world_size, folder, run__name="stop-first", eval__every=1, checkpoint__every=50)
    finally:
        loop.held_out = real
    return [path and path.name for path in seen]


def test_a_stop_saves_before_it_evaluates(folder):
    assert on_ranks(2, _stop_at_an_evaluation, folder) == [[None, "step-00000002"]] * 2
    assert "eval_loss" in read_metrics(folder / "runs" / "stop-first" / "metrics.jsonl")[-1]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"train__stepz": 1}, "did you mean train.steps?"),
        ({"train__micro_batch": 8}, "8 cannot be cut into micro-batches of 8 over 2 ranks"),
        ({"engine": "{name: single}"}, "engine.name: single runs on one process, this run has 2"),
        ({"engine": "{name: zero}", "optimizer": "{name: muon}"}, "engine.name: zero cannot shard Muon"),
        ({"engine": "{name: fsdp}", "optimizer": "{name: adafactor}"}, "engine.name: fsdp cannot shard Adafactor"),
    ],
)
def test_config_is_checked_before_any_rank_is_started(folder, monkeypatch, capsys, mistake, message):
    monkeypatch.setattr("torch.distributed.run.main", lambda *_: pytest.fail("started ranks"))
    config = folder / "checked.yaml"
    config.write_text(json.dumps(tiny.tree(folder)))
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in mistake.items()]
    assert main(["pretrain", "--nproc-per-node=2", str(config), *overrides]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def _late(config):
    """For `Command`: torchrun, whose rank 0 is two seconds late."""

    def rank(_):
        time.sleep(2 * (os.environ["RANK"] == "0"))
        return main(["pretrain", config])

    forked.torchrun(["--standalone", "--nproc-per-node", "2", "late.py"], rank)


def test_error_that_all_ranks_have_is_printed_however_late_rank_0_is(folder):
    """torchrun kills the others when the first rank ends, so that one must wait."""
    config = folder / "late.yaml"
    config.write_text(json.dumps(tiny.tree(folder) | {"trian": {}}))
    process = Command(_late, str(config), output=folder / "late.log")
    said, _ = process.communicate(timeout=90)
    assert process.returncode
    assert said.count("shardopt: trian: there is no such key; did you mean train?") == 1


@pytest.mark.parametrize("count", ["0", "-1", "two", "gpu"])
def test_a_number_of_ranks_that_starts_none_is_refused(count, capsys):
    if count == "gpu" and torch.cuda.is_available():
        count = "none"
    assert main(["pretrain", f"--nproc-per-node={count}", "configs/quickstart.yaml"]) == 2
    assert f"--nproc-per-node: '{count}' starts no rank" in capsys.readouterr().err


def test_the_launcher_shows_the_arguments_that_it_takes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch/pretrain.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("launch/pretrain.py", run_name="__main__")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "usage: pretrain.py [-h]" in said
    assert " config [key.sub=value ...]" in said
    assert "{pretrain}" not in said


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_word(folder, capsys):
    changes = {"run__name": "damaged", "engine": "{name: single}", "checkpoint__every": 3}
    tiny.run(0, 1, folder, **changes)
    expected = losses(folder, "damaged")
    checkpoints = folder / "runs" / "damaged" / "checkpoints"
    newest = checkpoints / "step-00000006"

    def flip():
        data = newest / "rank-00000.data"
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)

    names = {"step-00000003", "step-00000006"}
    damages = (
        ((newest / "checkpoint.json").unlink, "it has no checkpoint.json", "step-00000006.damaged"),
        (flip, "do not have their checksum", "step-00000006.damaged-again"),
    )
    for damage, reason, aside in damages:
        damage()
        capsys.readouterr()
        tiny.run(0, 1, folder, **changes)
        said = capsys.readouterr().out
        words = "".join(said.split())
        assert words.count("setaside") == 1
        assert "".join(reason.split()) in words
        assert f"It is set aside as {checkpoints / aside}, and the one before it is used".replace(" ", "") in words
        assert re.search(r"tokens seen +768 in \d:\d\d since it was resumed, 1,536 in all", said)
        names.add(aside)
        assert {path.name for path in checkpoints.iterdir()} == names
        assert losses(folder, "damaged") == expected


def test_ranks_that_are_started_here_share_the_cores_and_outlive_a_wait_for_each_other(folder, monkeypatch):
    seen = {}
    monkeypatch.setattr("torch.distributed.run.main", lambda arguments: seen.update(os.environ))
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    for name in ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "RANK"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    config = folder / "shared.yaml"
    config.write_text(json.dumps(tiny.tree(folder, run__name="shared", run__timeout_minutes=3)))
    assert main(["pretrain", "--nproc-per-node=2", str(config)]) == 0
    assert seen["OMP_NUM_THREADS"] == "4"
    assert int(seen["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 3 * 60


@pytest.mark.parametrize(("exits", "status"), [(2, 2), (-9, 1)])
def test_status_of_ranks_that_fail_is_that_of_the_first(folder, monkeypatch, capsys, exits, status):
    def fails(_):
        raise ChildFailedError("shardopt", {0: ProcessFailure(0, 1, exits, "no file")})

    monkeypatch.setattr("torch.distributed.run.main", fails)
    for name in ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "RANK"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    config = folder / "fails.yaml"
    config.write_text(json.dumps(tiny.tree(folder, run__name="fails")))
    assert main(["pretrain", "--nproc-per-node=2", str(config)]) == status
    assert ("rank 0 was ended by SIGKILL" in capsys.readouterr().err) == (exits < 0)


def test_a_status_that_cannot_be_written_is_told(folder, monkeypatch, capsys):
    monkeypatch.setenv("SHARDOPT_STATUS", str(folder / "nowhere" / "status"))
    config = folder / "status.yaml"
    config.write_text(json.dumps(tiny.tree(folder, run__name="status", engine="{name: single}", train__steps=2)))
    assert main(["pretrain", str(config)]) == 2
    said = f"SHARDOPT_STATUS: cannot write {folder}/nowhere/status: No such file or directory; the run is finished"
    assert said in capsys.readouterr().err


def test_run_whose_last_checkpoint_is_gone_ends_with_an_error(folder, monkeypatch):
    root = folder / "runs" / "gone" / "checkpoints"
    close = Tracker.close

    def removes(self, *arguments):
        shutil.rmtree(root / "step-00000006", ignore_errors=True)
        close(self, *arguments)

    monkeypatch.setattr(Tracker, "close", removes)
    with pytest.raises(InputError, match=r"ended at step 6, but .*step-00000006 is not there .*newest is .*-00000003"):
        tiny.run(0, 1, folder, run__name="gone", engine="{name: single}", checkpoint__every=3)


def test_stop_at_a_step_that_is_given_up_does_not_save_it(folder, monkeypatch):
    step = Run._step

    def stopped_at_step_2(self, stop):
        if self.progress.step == 1:
            signal.raise_signal(signal.SIGTERM)
        step(self, stop)

    monkeypatch.setattr(Run, "_step", stopped_at_step_2)
    with pytest.raises(NonFiniteError, match=r"1 steps in a row, up to step 2, .*step-00000001"):
        tiny.run(
            0, 1, folder, run__name="given-up", engine="{name: single}", optimizer__lr=1e30, schedule__warmup=0,
            train__max_nonfinite_steps=0, checkpoint__every=1,
        )  # fmt: skip
    assert [p.name for p in (folder / "runs" / "given-up" / "checkpoints").iterdir()] == ["step-00000001"]


def test_random_numbers_of_another_number_of_ranks_are_not_those_of_the_start(folder, monkeypatch):
    changes = {"run__name": "other-ranks", "engine": "{name: single}", "checkpoint__every": 3}
    tiny.run(0, 1, folder, **changes)
    shutil.rmtree(folder / "runs" / "other-ranks" / "checkpoints" / "step-00000006")
    drawn = []
    monkeypatch.setattr(Run, "advance", lambda self, *_: drawn.append(torch.rand(1).item()) or sys.exit())
    # As a run of 2 ranks leaves them for a third.
    monkeypatch.setattr("shardopt.checkpoint.load_extras", lambda *_: {})
    with pytest.raises(SystemExit):
        tiny.run(0, 1, folder, **changes)
    with pytest.raises(SystemExit):
        tiny.run(0, 1, folder, **changes | {"run__name": "other-start"})
    assert drawn[0] != drawn[1]


def test_weights_that_are_not_finite_are_not_saved_and_older_checkpoints_are_named(folder, monkeypatch):
    step = Run._step

    def poisoned(run, stop):
        step(run, stop)
        if run.progress.step == 6:
            run.engine.state.slices()[0].tensors[0].data.view(-1)[0] = math.inf

    monkeypatch.setattr(Run, "_step", poisoned)
    said = (
        r"^after step 6: checkpoint .*step-00000006 is not written: .*/weight \(1 values that are not finite\).*"
        r"the last good checkpoint is .*step-00000004 \(older: step-00000002;"
    )
    changes = {"engine": "{name: single}", "checkpoint__every": 2, "train__steps": 8}
    with pytest.raises(NonFiniteError, match=said):
        tiny.run(0, 1, folder, run__name="poisoned", **changes)
    names = sorted(path.name for path in (folder / "runs" / "poisoned" / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004"]


def test_a_run_keeps_its_best_checkpoint(folder):
    """The held-out loss of a run whose growing lr makes its weights worse is best at step 2."""
    changes = {"engine": "{name: single}", "checkpoint__every": 2, "eval__every": 2, "train__steps": 8}
    changes |= {"checkpoint__keep": 1, "checkpoint__keep_best": 1, "optimizer__lr": 1.0, "schedule__warmup": 7}
    tiny.run(0, 1, folder, run__name="best", **changes)
    rows = read_metrics(folder / "runs" / "best" / "metrics.jsonl")
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    best = min(losses, key=losses.get)
    kept = sorted(int(path.name[5:]) for path in (folder / "runs" / "best" / "checkpoints").iterdir())
    assert kept == sorted({best, 6, 8})
    assert best < 6  # or nothing is shown


def test_a_run_goes_on_with_another_number_of_ranks_and_another_engine(folder):
    changes = {"train__steps": 12, "checkpoint__every": 6}
    on_ranks(2, tiny.run, folder, run__name="moved", **changes)
    expected = losses(folder, "moved")
    for path in (folder / "runs" / "moved" / "checkpoints").iterdir():
        if path.name != "step-00000006":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    tiny.run(0, 1, folder, run__name="moved", engine="{name: single}", **changes)
    moved = losses(folder, "moved")
    assert moved[:6] == expected[:6]
    assert moved == pytest.approx(expected, rel=1e-5)
    # And a loss that had started again from nothing would be far from it.
    assert moved[6] < 0.95 * moved[0]


def test_a_finished_run_started_again_changes_nothing(folder):
    changes = {"run__name": "twice", "engine": "{name: single}"}
    first = tiny.run(0, 1, folder, **changes)
    before = (folder / "runs" / "twice" / "metrics.jsonl").read_text()
    second = tiny.run(0, 1, folder, **changes)
    assert (second.step, second.loss) == (first.step, None)
    assert second.holdout_loss == first.holdout_loss
    assert (folder / "runs" / "twice" / "metrics.jsonl").read_text() == before


def test_the_export_loads_in_transformers_and_computes_the_same(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = on_ranks(2, tiny.run, folder, run__name="export", checkpoint__export="true", eval__sample_tokens=8)[0]
    model = AutoModelForCausalLM.from_pretrained(result.export)
    tokenizer = AutoTokenizer.from_pretrained(result.export)
    text = "abc dé"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.shape[1] == len(text.encode())
    assert tokenizer.decode(ids[0]) == text
    from shardopt.distributed import Ranks
    from shardopt.pretrain import data

    config = tiny.config(folder)
    alone = Ranks(0, 1, 0, torch.device("cpu"), False)
    _, holdout = data.prepare(config.data, alone, 0, 8)
    tokens = holdout.batch(0, min(8, holdout.n_blocks))
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(result.holdout_loss, rel=1e-5)
    assert isinstance(result.sample, str)
