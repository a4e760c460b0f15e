"""`shardopt compare` and `shardopt sweep`: plans, runs side by side, results.

The finished runs are made in this process; what the processes of a study do is shown with shell scripts in their place,
and once, in the slow tier, with real ones.
"""

import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from statistics import fmean, stdev
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
import yaml
from rich.console import Console

from shardopt import cli
from shardopt.errors import InputError
from shardopt.pretrain import config
from shardopt.pretrain.loop import pretrain
from shardopt.pretrain.page.tables import study as page_of_study
from shardopt.pretrain.record import last_row, read_metrics
from shardopt.pretrain.report import Report
from shardopt.pretrain.study import curves, jobs, plan, wandb_sweep
from shardopt.pretrain.study.plan import Study
from shardopt.pretrain.study.results import Curve, Results
from shardopt.pretrain.study.run import run
from tests.pretrain import tiny


def written(folder, **changes):
    """A config file of a tiny run, whose engine needs torchrun, in `folder`."""
    tree = tiny.tree(folder, eval__every=2, eval__batches=2, optimizer__weight_decay=0.1, **changes)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / "tiny.yaml")


def compare(path, names=("ademamix", "adamw"), seeds=2, overrides=(), name=None, baseline="adamw"):
    return Study(
        path, overrides, plan.optimizers(config.load(path, overrides), names), seeds, name, "compare", baseline
    )


def report():
    return Report(True, Console(width=80, record=True, file=io.StringIO(), highlight=False))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two optimizers with two seeds, all runs finished."""
    folder = tmp_path_factory.mktemp("study")
    tiny.corpus(folder / "text")
    study = compare(written(folder))
    for trial in study.trials:
        pretrain(trial.config)
    return study


# plans


def test_an_optimizer_takes_over_the_settings_that_it_has_too(tmp_path):
    path = written(tmp_path, optimizer="{name: ademamix, lr: 3e-3, betas: [0.8, 0.99, 0.999], alpha: 4, eps: 1e-6}")
    variants = plan.optimizers(config.load(path), ["ademamix", "adamw", "sgd"], ["adamw.lr=1e-3", "adamw.fused=false"])
    own = {"name": "ademamix", "lr": 3e-3, "betas": [0.8, 0.99, 0.999], "alpha": 4, "eps": 1e-6}
    assert [variant.settings["optimizer"] for variant in variants] == [
        own,
        {"name": "adamw", "lr": 1e-3, "betas": [0.8, 0.99], "eps": 1e-6, "fused": False},
        {"name": "sgd", "lr": 3e-3},
    ]
    assert [variant.left_out for variant in variants] == ["", "alpha", "alpha, betas, eps"]
    path = written(tmp_path, optimizer="{name: adamw, betas: [0.8, 0.98], fused: false}")
    (variant,) = plan.optimizers(config.load(path), ["ademamix"])
    assert variant.settings["optimizer"] == {"name": "ademamix", "betas": [0.8, 0.98, 0.9999]}


def test_a_grid_has_every_combination_and_a_list_is_one_value():
    variants = plan.grid(["optimizer.lr=1e-3,3e-3", "optimizer.betas=[0.9, 0.99, 0.999],[0.8, 0.99, 0.999]"])
    assert [v.name for v in variants][::3] == ["lr-0.001_betas-0.9_0.99_0.999", "lr-0.003_betas-0.8_0.99_0.999"]
    assert variants[1].settings == {"optimizer.lr": 0.001, "optimizer.betas": [0.8, 0.99, 0.999]}
    names = [variant.name for variant in plan.grid(["schedule.name=cosine,wsd", "source.name=a,b"])]
    assert names[-1] == "schedule.name-wsd_source.name-b"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sweep", "--grid", "optimizer.lr"], "--grid optimizer.lr: write it as KEY=VALUE,VALUE"),
        (["sweep", "--grid", "optimizer.lr=1,[2"], "--grid optimizer.lr=1,[2: the value is not valid YAML"),
        (["sweep", "--grid", "optimizer.lr=1e-3,0.001"], "--grid: lr-0.001 stands twice"),
        (["sweep", "--grid", "run.seed=1,2"], "--grid run.seed: run is not for a grid, --name and --seeds set it"),
        (["sweep", "--grid", "optimizer.name=adam,adamw"], "--grid optimizer.name: optimizers have keys of their own"),
        (["sweep", "--grid", "engine.name=ddp"], "--grid engine.name: engine is not for a grid"),
        (["sweep", "--grid", "optimizer.lr=1", "--grid", "optimizer.lr=2"], "--grid optimizer.lr: stands twice"),
        (["sweep", "optimizer.lr=1", "--grid", "optimizer.lr=2"], "optimizer.lr: is a value for all runs, and --grid"),
        (["sweep", "--grid", "optimizer.lr=1e-3,-1"], "lr--1: optimizer ademamix: lr"),
        (["sweep", "--grid", "optimizer.lr=1", "--baseline", "lr-2"], "--baseline lr-2: is none of lr-1"),
        (["sweep", "--grid", "optimizer.lr=1", "--name", "a/b"], "--name a/b: is a folder inside run.dir"),
        (["compare", "--optimizers", "adamw,adamv"], "unknown optimizer 'adamv'"),
        (["compare", "--optimizers", "adamw,adamw"], "--optimizers: adamw stands twice"),
        (["compare", "--optimizers", "adamw", "--set", "sgd.lr=1"], "--set sgd.lr=1: write it as NAME.KEY=VALUE"),
        (["compare", "--optimizers", "adamw", "train.stpes=3"], "train.stpes: there is no such key; did you mean"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_is_written(tmp_path, capsys, arguments, said):
    command, *rest = arguments
    assert cli.main([command, written(tmp_path), *rest]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (
            ModuleNotFoundError("no", name="rich"),
            2,
            "rich is not installed. Install it with: pip install 'shardopt[pret",
        ),
    ],
)
def test_ctrl_c_or_a_missing_package_before_the_runs_leaves_no_traceback(
    tmp_path, capsys, monkeypatch, raised, status, said
):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr("shardopt.commands.studies.run", fail)
    assert cli.main(["sweep", written(tmp_path), "--grid", "optimizer.lr=1"]) == status
    assert said in capsys.readouterr().err


def test_a_study_under_torchrun_is_refused(finished, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="without torchrun"):
        run(finished, 1, False, report())


def test_trials_are_runs_of_one_process_in_the_studys_folders(tmp_path):
    path = written(
        tmp_path, run__seed=5, engine="{name: zero, compute_dtype: bf16}", checkpoint__dir=f"file://{tmp_path}/bucket"
    )
    trials = compare(path).trials
    assert [(t.name, t.config.run.seed) for t in trials] == [
        ("ademamix-seed5", 5), ("ademamix-seed6", 6), ("adamw-seed5", 5), ("adamw-seed6", 6),
    ]  # fmt: skip
    one = trials[0].config
    assert one.folder == tmp_path / "runs/tiny-compare/ademamix-seed5"
    assert str(one.store).endswith("/bucket/tiny-compare/ademamix-seed5")
    assert (one.engine.name, one.engine.compute_dtype) == ("single", "bf16")
    assert one.tracking.wandb.group == "tiny-compare"


# runs


def test_runs_of_one_seed_begin_alike_whatever_their_optimizer(finished):
    first = {t.name: read_metrics(t.config.folder / "metrics.jsonl")[0]["loss"] for t in finished.trials}
    assert first["ademamix-seed0"] == first["adamw-seed0"]
    assert first["ademamix-seed1"] == first["adamw-seed1"] != first["adamw-seed0"]


def test_a_study_whose_config_has_changed_is_refused_by_name_and_more_seeds_are_not(finished):
    compare(finished.path, seeds=3).settle()
    compare(
        finished.path, names=("adamw", "sgd", "ademamix"), overrides=["eval.sample_tokens=3", "data.prefetch=1"]
    ).settle()
    for override, said in (
        ("optimizer.lr=1e-3", r"adamw-seed1: optimizer.lr: 0.003 → 0.001"),
        ("eval.batches=1", r"ademamix-seed0: eval.batches: 2 → 1"),
    ):
        with pytest.raises(InputError, match=said) as refused:
            compare(finished.path, overrides=[override]).settle()
        assert str(finished.folder) in str(refused.value)
        assert "another --name" in str(refused.value)


def test_every_run_of_a_study_has_the_hubs_commit_of_the_first(finished, tmp_path, monkeypatch):
    overrides = ["data.sources=[{source: hf, name: owner/name}]", f"run.dir={tmp_path}"]

    def settled(now):
        monkeypatch.setattr("shardopt.pretrain.hub.commit_of", lambda *_: now * 40)
        study = compare(finished.path, overrides=overrides)
        study.settle()
        return study.trials, {trial.config.data.sources[0].commit for trial in study.trials}

    trials, commits = settled("a")
    assert commits == {"a" * 40}
    begun = trials[2].config
    begun.folder.mkdir(parents=True)
    (begun.folder / "config.yaml").write_text(begun.as_yaml())
    (begun.folder / "metrics.jsonl").touch()
    assert settled("b")[1] == {"a" * 40}


def test_a_study_that_branched_goes_on_from_the_checkpoint_that_it_found(finished):
    overrides = [f"run.from={finished.trials[0].config.folder}", "train.steps=7", "schedule.name=constant"]
    study = compare(finished.path, ("ademamix",), 2, overrides, name="branched", baseline="ademamix")
    study.settle()
    assert {trial.config.run.source for trial in study.trials} == {finished.trials[0].checkpoint}
    pretrain(study.trials[0].config)
    again = compare(finished.path, ("ademamix",), 2, overrides, name="branched", baseline="ademamix")
    again.settle()
    assert [trial.finished for trial in again.trials] == [True, False]


def test_results_of_more_runs_are_not_replaced_by_those_of_fewer(finished):
    for names, seeds, left in ((["adamw"], 2, "ademamix-seed0, ademamix-seed1"), (["adamw", "ademamix"], 1, "seed1")):
        fewer = compare(finished.path, names, seeds)
        with pytest.raises(InputError, match=rf"--name: .*also holds .*{left}.*or choose another --name"):
            run(fewer, 1, True, report())


def test_what_one_process_cannot_run_is_refused_before_any_run(tmp_path):
    with pytest.raises(
        InputError, match=r"adamw, as each run of a study is one process: model\.dtype: AdamW on single"
    ):
        compare(written(tmp_path), overrides=["model.dtype=bf16"])


def test_a_second_call_starts_nothing_and_shows_the_results(finished, monkeypatch):
    monkeypatch.setattr(jobs, "command", lambda config: pytest.fail("nothing is missing"))
    shown = report()
    assert run(finished, 2, False, shown) == 0
    text = shown.console.export_text()
    assert "4, 2 seeds of each; 4 finished" in text
    assert str(finished.folder / "best.yaml") in text
    assert "held-out loss" in text


def test_text_that_has_changed_since_a_run_finished_is_refused(finished):
    new = finished.folder.parents[1] / "text" / "new.txt"
    new.write_text("a new document " * 50)
    try:
        with pytest.raises(InputError, match=r"data: the text or its tokenizer has changed since .*ademamix-seed0"):
            run(finished, 1, False, report())
    finally:
        new.unlink()


def scripts(monkeypatch, **by_name):
    """Shell scripts in the place of runs, by the run's name."""
    monkeypatch.setattr(jobs, "command", lambda path: ["sh", "-c", by_name[path.stem.replace("-", "_")]])


def test_a_run_that_fails_is_told_and_the_others_go_on(finished, tmp_path, monkeypatch):
    study = compare(finished.path, names=("sgd", "adam"), seeds=1, name="failing", baseline="sgd")
    store = study.folder / "adam-seed0"
    finished_run = next(t for t in finished.trials if t.name == "adamw-seed0").config.folder
    scripts(
        monkeypatch,
        sgd_seed0="echo 'shardopt: optimizer.lr: is too high'; echo later; exit 3",
        adam_seed0=f"cp -r {finished_run} {store}; echo $OMP_NUM_THREADS $CUDA_VISIBLE_DEVICES",
    )
    shown = report()
    places = [{"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": "7"}]
    outcomes, stopped = jobs.Jobs(study.trials, study.folder, places, shown).run()
    assert [(o.trial.name, o.status, o.reason) for o in outcomes] == [
        ("sgd-seed0", "failed", "exit status 3, optimizer.lr: is too high"),
        ("adam-seed0", "finished", ""),
    ]
    assert stopped is None
    assert (study.folder / "logs/adam-seed0.log").read_text() == "3 7\n"
    assert config.load(study.folder / "configs/sgd-seed0.yaml") == study.trials[0].config
    said = shown.console.export_text()
    assert f"sgd-seed0 failed: exit status 3, optimizer.lr: is too high (all of it: {study.folder}" in said
    loss = last_row(finished_run / "metrics.jsonl")["eval_loss"]
    assert f"adam-seed0: held-out loss {loss:.4f} (" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_every_run_and_starts_no_other(finished, tmp_path, monkeypatch, number):
    study = compare(finished.path, names=("sgd",), seeds=3, name=f"stopped-{number}", baseline="sgd")
    wait = "trap 'echo asked; exit 0' TERM; : > {0}; while [ -e {0} ]; do sleep 0.02; done"
    marks = [tmp_path / f"began-{i}" for i in range(3)]
    scripts(monkeypatch, **{f"sgd_seed{i}": wait.format(mark) for i, mark in enumerate(marks)})
    work = jobs.Jobs(study.trials, study.folder, [{}, {}], report())

    def ask():
        while not all(mark.exists() for mark in marks[:2]):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=ask).start()
    outcomes, stopped = work.run()
    assert stopped == number.name
    assert {o.trial.name: o.status for o in outcomes} == dict.fromkeys([t.name for t in study.trials], "stopped")
    assert (study.folder / "logs/sgd-seed1.log").read_text() == "asked\n"
    assert not marks[2].exists()


def test_slots_are_the_gpus_else_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert jobs.slots(None, 6, "auto") == 6 * [{"OMP_NUM_THREADS": "1"}]
    assert jobs.slots(2, 6, "auto") == 2 * [{"OMP_NUM_THREADS": "4"}]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in jobs.slots(None, 6, "auto")] == ["0", "1"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in jobs.slots(3, 6, "auto")] == ["0", "1", "0"]
    assert "CUDA_VISIBLE_DEVICES" not in jobs.slots(None, 6, "cpu")[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in jobs.slots(None, 6, "auto")] == ["3", "5"]


# results


def test_results_are_those_of_the_runs_own_files(finished):
    results = Results(finished)
    rows = {t.name: read_metrics(t.config.folder / "metrics.jsonl") for t in finished.trials}
    final = {name: one[-1]["eval_loss"] for name, one in rows.items()}
    told = results.as_dict()
    mix, adamw = told["variants"]
    assert mix["eval_loss"] == pytest.approx((final["ademamix-seed0"] + final["ademamix-seed1"]) / 2)
    assert mix["eval_loss_spread"] == pytest.approx(stdev([final["ademamix-seed0"], final["ademamix-seed1"]]))
    gains = [final[f"adamw-seed{i}"] - final[f"ademamix-seed{i}"] for i in (0, 1)]
    assert (mix["gain"], mix["gain_spread"]) == (pytest.approx(fmean(gains)), pytest.approx(stdev(gains)))
    assert (adamw["gain"], adamw["tokens_to_baseline"]) == (0, pytest.approx(6 * 8 * 32))
    assert mix["curve"]["tokens"] == [step * 8 * 32 for step in (2, 4, 6)]
    at_two = [rows[f"ademamix-seed{i}"][1]["eval_loss"] for i in (0, 1)]
    assert (mix["curve"]["eval_loss"][0], mix["curve"]["spread"][0]) == (
        pytest.approx(fmean(at_two)), pytest.approx(stdev(at_two)),
    )  # fmt: skip
    parameters = 2 * 257 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    assert adamw["state_bytes"] == pytest.approx(8 * parameters, rel=0.01)
    assert mix["state_bytes"] == pytest.approx(12 * parameters, rel=0.01)
    assert 0 < adamw["step_time"] < 10
    assert mix["runs"][1]["train_loss"] == rows["ademamix-seed1"][-1]["loss"]  # of 6 steps a tenth is the last one
    assert told["best"] == min(told["variants"], key=lambda one: one["eval_loss"])["name"]


@pytest.mark.parametrize(
    ("losses", "target", "tokens"),
    [([5.0, 4.0, 3.0], 3.5, 250), ([5.0, 4.0, 3.0], 6.0, 100), ([5.0, 4.0, 3.0], 2.9, None), ([5, 3, 4, 3], 3.0, 200)],
)
def test_tokens_to_a_loss_are_interpolated_to_its_first_time(losses, target, tokens):
    curve = Curve([100 * (i + 1) for i in range(len(losses))], losses, [0.0] * len(losses))
    assert curve.tokens_to(target) == tokens


def test_files_of_the_results_can_be_read_back(finished):
    results = Results(finished)
    results.write()
    curves.draw(results, finished.folder / "curves.png")
    assert json.loads((finished.folder / "results.json").read_text()) == results.as_dict()
    told = [row.variant.name + (" (best)" if row is results.best else "") for row in results.rows]
    assert [cells[0] for cells in page_of_study(finished.folder).rows] == told
    best = config.load(finished.folder / "best.yaml")
    assert best.run.name == "tiny-best"
    variant = next(v for v in finished.variants if v.name == results.as_dict()["best"])
    expected = finished.config_of(variant)
    assert best.model_copy(update={"run": expected.run}) == expected
    picture = matplotlib.image.imread(finished.folder / "curves.png")[..., :3]
    assert picture.shape == (750, 1800, 3)
    red, _, blue = picture.transpose(2, 0, 1)
    assert (blue - red > 0.3).sum() > 200  # a curve of each
    assert (red - blue > 0.3).sum() > 200


def test_curves_have_bands_as_wide_as_the_spread(finished, tmp_path, monkeypatch):
    def pale(spread):
        monkeypatch.setattr("shardopt.pretrain.study.results.stdev", lambda values: spread)
        curves.draw(Results(finished), tmp_path / "curves.png")
        red, _, blue = matplotlib.image.imread(tmp_path / "curves.png")[..., :3].transpose(2, 0, 1)
        return ((abs(blue - red) > 0.05) & (abs(blue - red) < 0.3)).sum()

    assert pale(0.5) > pale(0.0) + 100_000  # of 1,350,000 pixels


def test_the_table_fits_80_columns_and_shows_runs_that_are_missing(finished):
    study = compare(finished.path, names=("adamw", "simplified_ademamix", "ademamix"), seeds=2)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(Results(study).table())
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert any("simplified_" in line and "0 of 2 runs" in line for line in lines)
    mix = Results(study).rows[2]
    assert any(f"{mix.loss:.3f} ± {mix.spread:.3f}" in line for line in lines)


def test_a_sweep_of_one_key_names_it_once_in_the_table(finished):
    def head_of(*axes):
        variants = plan.grid(axes)
        study = Study(finished.path, [], variants, 1, "one", "sweep", variants[0].name)
        study.trials.clear()  # no figures are needed
        table = Results(study).table()
        names, below = table.columns[0], table.columns[2].header
        return [*map(str, [names.header, *names.cells])], str(below)

    assert head_of("optimizer.state_dtype=fp32,bf16") == (["state_dtype", "fp32", "bf16"], "below fp32")
    both = head_of("optimizer.state_dtype=fp32", "optimizer.alpha=5.0,8.0")
    assert both == (["variant", "state_dtype-fp32_alpha-5.0", "state_dtype-fp32_alpha-8.0"], f"below {both[0][1]}")


def test_a_loss_that_is_not_finite_is_never_the_best(finished):
    results = Results(finished)
    broken = results.rows[0].runs[0]
    object.__setattr__(broken, "bits", math.inf)
    assert results.best.variant.name == "adamw"


# W&B


def test_wandbs_agent_starts_the_runs_of_the_study(finished, tmp_path, monkeypatch):
    """With the agent's own code, and a stand-in for Python that notes what it is given."""
    from wandb.sdk.launch.sweeps.utils import load_sweep_config
    from wandb.wandb_agent import Agent

    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").write_text(f'#!/bin/sh\nfor a; do echo "$a"; done > {tmp_path}/$WANDB_RUN_ID\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "earlier")  # of the agent's run before; and put back afterwards
    grid = plan.grid(["optimizer.lr=1e-3,3e-3", "optimizer.betas=[0.9,0.99,0.999]"])
    studies = [finished, Study(finished.path, ["train.steps=5"], grid, 2, "swept", "sweep", grid[0].name)]
    for study in studies:
        study.folder.mkdir(exist_ok=True)
        sweep = load_sweep_config(wandb_sweep.write(study))
        assert (sweep["method"], sweep["metric"]["name"], sweep["project"]) == ("grid", "eval_loss", "shardopt")
        names, values = zip(*((key, one["values"]) for key, one in sweep["parameters"].items()), strict=True)
        agent = Agent(SimpleNamespace(), None)
        agent._sweep_command = sweep["command"]
        for trial, last in ((study.trials[0], 0), (study.trials[-1], -1)):
            given = {name: {"value": one[last]} for name, one in zip(names, values, strict=True)}
            agent._command_run({"args": given, "run_id": f"id{last}", "program": sweep["program"]})
            assert agent._run_processes[f"id{last}"]._popen.wait(20) == 0
            module, name, command, path, *overrides = (tmp_path / f"id{last}").read_text().splitlines()
            assert (module, name, command) == ("-m", "shardopt", "pretrain")
            got = config.load(path, overrides)
            assert got.run.name == f"{study.name}-id{last}"
            assert (got.optimizer, got.train, got.engine, got.data, got.run.seed) == (
                trial.config.optimizer, trial.config.train, trial.config.engine, trial.config.data,
                trial.config.run.seed,
            )  # fmt: skip


def test_variants_that_are_no_grid_have_no_sweep(finished):
    """W&B would cross their keys, and run points that the study has not."""
    points = [plan.Variant(f"{i}", {"optimizer.lr": i, "optimizer.alpha": i}) for i in (1.0, 2.0)]
    study = Study(finished.path, [], points, 1, "points", "sweep", "1.0")
    study.folder.mkdir()
    assert wandb_sweep.sweep(study) is None
    assert wandb_sweep.write(study).startswith("none")
    assert not list(study.folder.iterdir())


# the whole


@pytest.mark.slow
def test_a_study_that_is_stopped_goes_on_with_what_is_missing(tmp_path):
    tiny.corpus(tmp_path / "text")
    path = written(tmp_path, train__steps=200, checkpoint__every=50, tracking__log_every=5)
    command = [sys.executable, "-m", "shardopt", "compare", path, "--optimizers", "ademamix,adamw", "--seeds", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folder = tmp_path / "runs/tiny-compare"
    logs = [folder / f"{name}-seed0/metrics.jsonl" for name in ("ademamix", "adamw")]
    while not all(log.exists() for log in logs):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert said.count("stopped, saved in step-") == 2, said
    before = [last_row(log)["step"] for log in logs]
    assert max(before) < 200
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [last_row(log)["step"] for log in logs] == [200, 200]
    assert "resumed at step" in (folder / "logs/adamw-seed0.log").read_text()
    assert (folder / "curves.png").exists(), again.stdout
    trial = compare(path, seeds=1, name="straight").trials[0]
    told = json.loads((folder / "results.json").read_text())
    assert told["variants"][0]["eval_loss"] == pretrain(trial.config).holdout_loss
