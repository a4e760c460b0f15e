"""`shardopt compare` and `shardopt sweep`: from a study's plan to its results."""

from __future__ import annotations

import os
import textwrap

import torch

from shardopt.checkpoint.document import DOCUMENT
from shardopt.distributed import Ranks
from shardopt.errors import InputError, writing
from shardopt.pretrain import data, model
from shardopt.pretrain.hub import local
from shardopt.pretrain.lock import RunLock
from shardopt.pretrain.progress import read_document
from shardopt.pretrain.report import COLUMNS, Report
from shardopt.pretrain.study import curves, wandb_sweep
from shardopt.pretrain.study.jobs import Jobs, Outcome, slots
from shardopt.pretrain.study.plan import Study, Variant
from shardopt.pretrain.study.results import Results


def run(study: Study, jobs: int | None, dry_run: bool, report: Report | None = None) -> int:
    """Run what is missing of a study, and write and print its results.

    Args:
        study: its plan.
        jobs: processes at once; see `slots`.
        dry_run: list the runs and write the W&B sweep, and no more.
        report: the console.

    Returns:
        The exit status: 0 where every run is finished, or was stopped on request; 1 where one has failed.

    Raises:
        InputError: the study cannot run, or does not fit its folder.
    """
    if "RANK" in os.environ:
        raise InputError("a study starts its own processes: run the command once, without torchrun")
    report = report or Report(True)
    with writing(f"the study's folder {study.folder}"):
        study.folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(study.folder / ".lock", "--name")
    try:
        study.settle()
        with writing(study.folder):
            sweep = wandb_sweep.write(study)
        if dry_run:
            _introduce(study, None, sweep, report)
            return 0
        _prepare(study)
        places = slots(jobs, sum(not trial.finished for trial in study.trials), study.base.run.device)
        _introduce(study, places, sweep, report)
        outcomes, signal = Jobs(study.trials, study.folder, places, report).run()
        _conclude(study, outcomes, signal, report)
        return int(any(outcome.status == "failed" for outcome in outcomes))
    finally:
        lock.release()


def _prepare(study: Study) -> None:
    """Pack what the cache lacks, once for all runs, and hold it against what finished runs have seen."""
    # On the CPU: a GPU's memory is for the runs.
    alone = Ranks(0, 1, 0, torch.device("cpu"), distributed=False)
    fingerprints: dict[str, str] = {}
    for trial in study.trials:
        config, newest = trial.config, trial.checkpoint
        key = config.data.model_dump_json()
        if key not in fingerprints:
            weights = model.weight_files(local(config.model).path)
            folder = weights[0].parent if weights else None
            train, _ = data.prepare(config.data, alone, config.run.seed, config.train.global_batch, folder)
            fingerprints[key] = train.fingerprint
        if newest is not None and read_document(newest)["data_fingerprint"] != fingerprints[key]:
            raise InputError(
                f"data: the text or its tokenizer has changed since {newest / DOCUMENT} was written, so that its loss "
                f"is not that of new runs: restore it, or choose another --name"
            )


def _introduce(study: Study, places: list[dict[str, str]] | None, sweep: str, report: Report) -> None:
    runs, seeds, done = len(study.trials), len(study.seeds), sum(trial.finished for trial in study.trials)
    facts: dict[str, object] = {
        "variants": [line for variant in study.variants for line in textwrap.wrap(_words(variant), COLUMNS)],
        "runs": f"{runs}, {seeds} seed{'s' * (seeds > 1)} of each" + (f"; {done} finished" if done else ""),
        "study folder": study.folder,
        "W&B sweep": sweep,
    }
    if places:
        gpus = ", ".join(dict.fromkeys(p["CUDA_VISIBLE_DEVICES"] for p in places if "CUDA_VISIBLE_DEVICES" in p))
        threads = places[0]["OMP_NUM_THREADS"]
        where = f"GPU {gpus}" if gpus else f"{threads} thread{'s' * (threads != '1')} each"
        facts["at once"] = f"{len(places)}, {where}"
    report.title(study.name, "")
    report.facts(facts)


def _words(variant: Variant) -> str:
    return f"{variant.name}{f' (which has no {variant.left_out})' if variant.left_out else ''}"


def _conclude(study: Study, outcomes: list[Outcome], signal: str | None, report: Report) -> None:
    """Write and print the results of the runs that are finished."""
    results = Results(study)
    failed = [outcome.trial.name for outcome in outcomes if outcome.status == "failed"]
    stopped = sum(outcome.status == "stopped" for outcome in outcomes)
    note = "finished"
    if failed:
        note = f"{len(failed)} of {len(outcomes)} runs failed; run it again to try them again"
    elif stopped:
        note = f"stopped{f' by {signal}' if signal else ''}; run it again to go on"
    report.title(study.name, note)
    if not any(row.runs for row in results.rows):
        return
    with writing(study.folder):
        results.write()
        curves.draw(results, study.folder / "curves.png")
    report.console.print(results.table())
    best = study.folder / "best.yaml" if results.best else None
    report.facts({"results": study.folder / "results.json", "curves": study.folder / "curves.png", "best config": best})
