"""`shardopt eval`: loss and bits per byte of a trained model."""

from __future__ import annotations

import argparse
import json
import sys

from shardopt.commands import models, numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, and the function that runs the command."""
    models.add_arguments(parser)
    models.add_dtype(parser, "of weights and computation; by default as in the run")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="[NAME=]PATH",
        help="text: files, folders or globs of txt, jsonl, parquet, also compressed, each a set of its own; by default "
        "what the run held out",
    )  # fmt: skip
    parser.add_argument("--column", default="text", help="of jsonl and parquet; by default %(default)s")
    parser.add_argument(
        "--max-broken",
        type=numbers.between(0, 1),
        default=0.001,
        metavar="SHARE",
        help="of rows that may be broken; by default 0.001",
    )
    parser.add_argument(
        "--document-mask", action=argparse.BooleanOptionalAction, default=None,
        help="attention stays within a document; by default as in the run",
    )  # fmt: skip
    parser.add_argument(
        "--block-size", type=numbers.at_least(1), metavar="TOKENS", help="of a block of --data; by default the run's"
    )
    parser.add_argument(
        "--batch-size", type=numbers.at_least(1), metavar="N", help="blocks at a time; by default the run's micro-batch"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    from shardopt.errors import InputError
    from shardopt.pretrain import evaluate
    from shardopt.pretrain.data.text_sets import text_sets
    from shardopt.pretrain.report import Report
    from shardopt.pretrain.trained import one_process, opened

    given = arguments
    if given.block_size is not None and not given.data:
        raise InputError("--block-size: the held-out blocks of a run are as long as it made them; give --data, too")
    sets = text_sets(given.data, given.column)
    ranks = one_process(given.device)
    with opened(given.model, given.step, given.trust_remote_code) as trained, evaluate.progress("scoring") as tick:
        how = evaluate.How(given.raw, models.dtype(given), given.document_mask, given.block_size, given.batch_size)
        evaluator = evaluate.Evaluator.load(trained, ranks, how)
        score = evaluator.texts(sets, given.max_broken, tick) if sets else evaluator.held_out(tick)
        what = {
            "model": str(trained.path),
            "step": trained.step,
            "weights": trained.weights_of(given.raw),
            "block_size": evaluator.block_size,
            "document_mask": evaluator.document_mask,
        }
    if given.json:
        print(json.dumps(what | evaluate.as_dict(score), indent=1, allow_nan=False))
        return 0
    report = Report(True)
    report.facts(
        {
            "model": what["model"],
            "weights": "their EMA" if what["weights"] == "weight_ema" else None,
            "blocks": f"of {evaluator.block_size:,} tokens"
            + (", attention within documents" if evaluator.document_mask else ""),
        }
    )
    report.console.print(evaluate.table(score))
    sys.stdout.flush()
    return 0
