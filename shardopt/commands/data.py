"""`shardopt data prepare | inspect`."""

from __future__ import annotations

import argparse
import json
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, and the function that runs the command."""
    commands = parser.add_subparsers(required=True, metavar="command")
    prepare = commands.add_parser("prepare", help="tokenise and pack what the cache lacks, before a run needs it")
    inspect = commands.add_parser("inspect", help="the same, then show what the data is")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for command in (prepare, inspect):
        command.add_argument("config", help="of a run: a YAML file, such as configs/quickstart.yaml")
        command.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the file")
        command.add_argument(
            "--processes", type=int, default=cores, metavar="N", help="that tokenise; by default %(default)s, the cores"
        )
        command.add_argument("--json", action="store_true", help="the report as JSON")
        command.set_defaults(run=_run, blocks=0, whole=command is inspect)
    inspect.add_argument(
        "--blocks", type=int, default=2, metavar="N", help="packed blocks to show, the first of the run; by default 2"
    )


def _run(arguments: argparse.Namespace) -> int:
    from shardopt.errors import InputError, MissingExtraError

    try:
        from shardopt.distributed import Ranks
        from shardopt.pretrain import config as configuration
    except ModuleNotFoundError as e:
        raise MissingExtraError(e.name or "a package", "pretrain") from e
    if arguments.processes < 1:
        raise InputError(f"--processes: {arguments.processes} tokenises nothing; give a number of at least 1")
    config = configuration.load(arguments.config, arguments.overrides)
    from shardopt.pretrain import data, model
    from shardopt.pretrain.data.report import render
    from shardopt.pretrain.data_facts import in_short
    from shardopt.pretrain.hub import local
    from shardopt.pretrain.report import Report

    weights = model.weight_files(local(config.model).path)
    train, holdout = data.prepare(
        config.data,
        Ranks.current(),
        config.run.seed,
        config.train.global_batch,
        weights[0].parent if weights else None,
        arguments.processes,
        stages=config.train.stages,
    )
    scored = min(config.eval.batches * config.train.global_batch, holdout.n_blocks)
    report = data.describe(config.data, train, holdout, config.train.steps, scored)
    rows = train.batch(0, 0, min(arguments.blocks, config.train.global_batch))[:, :-1]
    blocks = [str(train.tokenizer.decode(row)) for row in rows.tolist()]
    if arguments.json:
        print(json.dumps(report | ({"blocks": blocks} if arguments.whole else {}), indent=1))
        return 0
    console = Report(True)
    console.facts(in_short(report))
    if arguments.whole:
        console.show(render(report, blocks))
    return 0
