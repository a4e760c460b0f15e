"""The start of a run: its folder is taken and its newest checkpoint found, before data and model are touched."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from shardopt.checkpoint.store import exists
from shardopt.checkpoint.stored import step_of
from shardopt.distributed import Ranks
from shardopt.pretrain import model
from shardopt.pretrain.config import Config
from shardopt.pretrain.folder import RunFolder, open_folder
from shardopt.pretrain.progress import newest, read_document
from shardopt.pretrain.report import Report, Result, held_out_words
from shardopt.rows import newest_rows


@dataclass(frozen=True)
class Begun:
    """A run of which nothing is built yet.

    Attributes:
        config: as its folder has it, on every rank.
        stack: closes what the run opens.
        folder: on rank 0.
        checkpoint: the newest intact one, from which it goes on; None: it begins at step 0.
    """

    config: Config
    ranks: Ranks
    stack: ExitStack
    report: Report
    folder: RunFolder | None
    checkpoint: Path | None

    def finished(self) -> Result | None:
        """What came of a run whose steps are all done, which is told in one line; None of another. A collective."""
        result = self.ranks.ask_main(self._finished)
        if result is not None:
            loss, bits = result.holdout_loss, result.holdout_bits_per_byte
            held_out = "" if loss is None else f", held-out loss {held_out_words(loss, bits)}"
            self.report.say(f"{result.run_name} is finished: step {result.step:,}{held_out}, in {result.folder}")
        return result

    def _finished(self) -> Result | None:
        config, newest = self.config, self.checkpoint
        step = None if newest is None else step_of(newest)
        if newest is None or step is None or step < config.train.steps:
            return None
        export = config.store / "export"
        if config.checkpoint.export and not exists(export / "config.json"):  # which failed: it is made now
            return None
        rows = newest_rows(config.folder / "metrics.jsonl")
        last = next((row for row in rows if row.get("eval_loss") is not None), {})
        plot = config.folder / "loss.png"
        tokens = read_document(newest)["tokens"]
        return Result(
            run_name=config.run.name,
            status="finished",
            folder=config.folder,
            step=step,
            tokens=tokens,
            tokens_before=tokens,
            seconds=0.0,
            holdout_loss=last.get("eval_loss"),
            holdout_bits_per_byte=last.get("eval_bits_per_byte"),
            skipped=last.get("skipped_steps", 0),
            checkpoint=newest,
            plot=plot if plot.exists() else None,
            export=export if config.checkpoint.export else None,
        )


def begin(config: Config, ranks: Ranks, stack: ExitStack) -> Begun:
    """Take the run's folder. A collective.

    Raises:
        InputError: see `RunFolder` and `newest`; the device or the optimizer does not do what the config says.
    """
    report = Report(ranks.is_main)
    model.check_attention(config.model.attention, ranks.device, config.engine.compute_dtype)
    config.optimizer.spec(config.train.steps, config.run.seed)
    folder = ranks.together(lambda: open_folder(config) if ranks.is_main else None)
    if folder is not None:
        stack.callback(folder.release)
    config = ranks.from_main(folder.config if folder is not None else config)
    found = newest(config.store, ranks, config.run.resume, report.warn)
    return Begun(config, ranks, stack, report, folder, found)
