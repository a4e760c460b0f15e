"""The pretraining loop: build, resume, train, evaluate, save, stop."""

from __future__ import annotations

import math
import sys
import time
from contextlib import ExitStack
from functools import partial
from typing import Any, NoReturn

from shardopt import checkpoint, engines
from shardopt.checkpoint.folders import step_folder
from shardopt.distributed import Ranks
from shardopt.engines.base import DTYPES, EngineInputs
from shardopt.errors import InputError, NonFiniteError, writing
from shardopt.pretrain import branch, data, model, report, rng, saves
from shardopt.pretrain.about import about, console_facts
from shardopt.pretrain.advice import after_nonfinite
from shardopt.pretrain.begin import Begun, begin
from shardopt.pretrain.config import Config
from shardopt.pretrain.flops import flops_per_token, peak_flops
from shardopt.pretrain.hub import local
from shardopt.pretrain.loss import loss_in_forward
from shardopt.pretrain.meter import Meter
from shardopt.pretrain.metrics import Tracker, peak_memory
from shardopt.pretrain.model_files import ModelFiles
from shardopt.pretrain.probes import Probes
from shardopt.pretrain.profile import Profiler
from shardopt.pretrain.progress import Progress, resume, saved
from shardopt.pretrain.report import Result
from shardopt.pretrain.schedule import lr_factor
from shardopt.pretrain.scoring import Score, check_documents_apart, generate, held_out, limits
from shardopt.pretrain.signals import Stop, patience_of_torchrun, stop_signals
from shardopt.pretrain.step import take_step


def pretrain(config: Config) -> Result:
    """Run `config` to its last step, or to the first SIGINT or SIGTERM, which stops it after a checkpoint.

    Every rank of a torchrun job calls this; it leaves the process group before it returns or raises.

    Raises:
        InputError: the config cannot run here (before any step), on every rank.
        NonFiniteError: see train.max_nonfinite_steps; or the weights or the optimizer's state are not finite.
    """
    with ExitStack() as stack:
        ranks = Ranks.start(config.run.device, config.run.timeout_minutes)
        stack.callback(ranks.stop)
        config.check_ranks(ranks.world_size, ranks.distributed)
        try:
            begun = begin(config, ranks, stack)
            return begun.finished() or Run(begun).train()
        except (InputError, NonFiniteError):  # every rank has it, and the command says it once
            raise
        except Exception as error:  # before anything is closed, which may take long
            print(f"shardopt: rank {ranks.rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            if places := ranks.explain(error):
                print(places, file=sys.stderr, flush=True)
            raise


class Run:
    """One process's part of a run, from an engine that is ready to the last checkpoint."""

    def __init__(self, begun: Begun) -> None:
        self.config, self.ranks, self.report, self.folder = begun.config, begun.ranks, begun.report, begun.folder
        config, ranks, stack, resume_from = begun.config, begun.ranks, begun.stack, begun.checkpoint
        self.progress = Progress()
        self.logged: dict[str, float] = {}
        self.logged_steps = 0
        self.holdout: Score | None = None
        self.stopped = False
        self.finite_since_save = False
        self.began = time.monotonic()
        rng.seed_all(config.run.seed, ranks.rank)
        spec = config.optimizer.spec(config.train.steps, config.run.seed)
        section = ranks.together(lambda: local(config.model))
        weights = model.weight_files(section.path)
        self.train_data, self.holdout_data = data.prepare(
            config.data,
            ranks,
            config.run.seed,
            config.train.global_batch,
            weights[0].parent if weights else None,
            check=branch.tokenizer_check(config) if resume_from is None else None,
            stages=config.train.stages,
        )
        self.batches = data.Batches(self.train_data, ranks, config.data.prefetch)
        stack.callback(self.batches.close)
        self.tokenizer = self.train_data.tokenizer  # loaded anew at every access
        model_config = ranks.together(
            lambda: model.transformers_config(
                section, self.train_data.vocab_size, self.tokenizer.eos_token_id, config.data.block_size
            )
        )
        self.model_files = ModelFiles(section, model_config, self.tokenizer)
        meta = model.meta_model(model_config, section.trust_remote_code, section.attention, section.weights)
        flops = flops_per_token(meta, config.data.block_size)
        self.parameters = sum(p.numel() for p in meta.parameters())  # an engine may leave none of them whole
        for limit in limits(meta, self.holdout_data, self.scored_blocks):
            self.report.warn(limit)
        document_start = self.tokenizer.eos_token_id if config.data.document_mask else None
        loss_in_forward(meta, config.train.loss_chunks, document_start)
        if config.train.activation_checkpointing:
            model.checkpoint_activations(meta)
        self.engine = engines.build(
            config.engine,
            EngineInputs(
                ranks=ranks,
                model=meta,
                initialise=lambda m: model.initialise(m, ranks.device, config.run.seed, section.path),
                optimizer=spec,
                blocks=model.blocks_of(meta),
                compile=config.train.compile,
            ),
        )
        stack.callback(self.engine.close)
        self.engine.state.init()
        self.base_lrs = [group["lr"] for group in self.engine.optimizer.param_groups]
        document: dict[str, Any] = {}
        self.origin: dict[str, object] = {}  # of a branch, for the console
        if resume_from is not None:
            self.progress, document = resume(resume_from, self.engine.state, self.batches, config.run.seed)
        elif config.run.source is not None:
            self.progress, self.origin = branch.start(config, self.engine.state, self.batches)
        if document_start is not None:
            check_documents_apart(self.engine, document_start, config.data.block_size, config.train.micro_batch)
        self.meter = Meter(ranks, flops, peak_flops(ranks.device))
        self.meter.clock.watch_update(self.engine.state.inner)
        self.probes = Probes(config, self.engine)
        self.tokens_before = self.progress.tokens

        ranks.together(self._write_models_config)
        root, kept = config.store / "checkpoints", config.checkpoint
        saver = checkpoint.Saver(root, kept.rules, ranks=ranks, asynchronous=kept.asynchronous)
        self.saver = stack.enter_context(saver)
        self._try = partial(saves.attempt, saver, self.report.warn)
        self.tracker = ranks.together(
            lambda: Tracker(
                config.folder,
                config.tracking,
                config.as_dict(),
                config.run.name,
                self.progress.step if document else None,
                about=about(self.engine, self.parameters, self.train_data.fingerprint) if ranks.is_main else None,
                run_id=document.get("wandb_id"),
                is_main=ranks.is_main,
                warn=self.report.warn,
            )
        )
        stack.push(self._close_tracker)
        self.profiler = Profiler(config.profile, config.folder / "profile", ranks, self.report.say, self.report.warn)
        stack.callback(self.profiler.close)
        texts = self.train_data, self.holdout_data
        self.data_report = data.describe(config.data, *texts, config.train.steps, self.scored_blocks)
        ranks.together(lambda: self.folder.write("data.json", self.data_report) if self.folder is not None else None)
        self._report_start()

    def _write_models_config(self) -> None:
        if self.ranks.is_main:
            folder = self.config.store / checkpoint.export.MODEL
            with writing(folder, self.config.store_key):
                self.model_files.put(folder)

    def _keep_folder(self) -> None:
        if self.folder is not None and not self.folder.keep(self.config):
            self.report.warn(
                f"somebody has removed {self.config.folder}: it is made again, and holds what is written from now on"
            )
            self._write_models_config()

    # ---------------------------------------------------------------- a run, step by step

    def train(self) -> Result:
        steps = self.config.train.steps
        work = self.train_data.stages.samples
        with stop_signals() as stop, self.report.training(steps, self.progress.step, work) as bar:
            while self.progress.step < steps and not self.stopped:
                self.advance(stop, bar)
            self.saver.wait()
        return self._finish(stop)

    def advance(self, stop: Stop, bar: report.Training) -> None:
        """One step, and the evaluation, the row of metrics and the checkpoint that are due after it."""
        config, progress = self.config, self.progress
        with self.ranks.watched(), self.profiler.step(progress.step + 1):
            self._step(stop)
        if self._rewound():
            return
        step, last = progress.step, progress.step == config.train.steps
        hopeless = progress.skipped_in_row > config.train.max_nonfinite_steps
        # Weights that are about to be given up are not saved over the last good ones.
        save = not hopeless and (
            last or self.stopped or (step % config.checkpoint.every == 0 and not progress.skipped_in_row)
        )
        if not save and not hopeless and step % config.checkpoint.every == 0:
            self.report.warn(f"step {step} is skipped, so that no checkpoint is written after it")
        if save and self.stopped:  # whoever asked the run to stop soon kills it: first of all
            self.report.say(f"{stop.asked or 'another rank'}: saves step {step:,} and stops{patience_of_torchrun()}")
            self._save()
            self.saver.wait()
        self.holdout = self._evaluate() if last or step % config.eval.every == 0 else None
        if last or self.stopped or self.holdout is not None or step % config.tracking.log_every == 0:
            self.logged = self._log(self.holdout)
            bar.step(step, self.logged["loss"], self.logged["tokens_per_second"])
        else:
            bar.step(step)
        if config.eval.sample_tokens and not last and config.tracking.samples_at(step):
            self._sample()
        if hopeless:
            self._give_up(
                f"{progress.skipped_in_row} steps in a row, up to step {step}, had a loss or a gradient that is not "
                f"finite"
            )
        if save and not self.stopped:
            self._save(self.holdout)

    def _step(self, stop: Stop) -> None:
        """One optimizer step. Notes its loss over the global batch, and whether any rank was asked to stop."""
        self.meter.begin()
        self.probes.begin(self.progress.step + 1)
        engine, ranks, train, progress = self.engine, self.ranks, self.config.train, self.progress
        factor = lr_factor(progress.step + 1, train.steps, self.config.schedule)
        for group, lr in zip(engine.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * factor
        sequences = self.train_data.stages.at(progress.step).global_batch
        tokens = sequences * self.config.data.block_size
        batch = self.batches.attempt(progress.step)
        done = take_step(
            engine,
            batch.split(train.micro_batch),
            tokens,
            train.grad_clip,
            self.meter.clock,
            failed=self.batches.failure is not None,
            stop=stop.asked is not None,
        )
        if done.failed:
            ranks.together(self.batches.check)
        self.probes.end(done.norm, done.taken, sequences)
        if done.taken:
            progress.skipped_in_row = 0
            self.finite_since_save = True
        else:
            progress.skipped += 1
            progress.skipped_in_row += 1
            self.report.warn(
                f"step {progress.step + 1} is skipped on all ranks: loss {done.loss}, gradient norm {done.norm}"
            )
        progress.step += 1
        progress.tokens += tokens
        self.meter.end(done.loss, done.norm, tokens, self.batches.waited, done.router_loss)
        self.stopped = done.stop

    def _rewound(self) -> bool:
        """Whether the loss has jumped and the run has gone back to a checkpoint. A collective."""
        guard, loss = self.config.train.loss_spike, self.meter.losses[-1]
        if guard is None or not guard.is_spike(self.progress, loss):
            return False
        self._try(self.saver.wait)
        state, seed = self.engine.state, self.config.run.seed
        back = guard.rewind(self.progress, loss, self.saver.root, state, self.batches, seed, self.report.warn)
        if back is not None:
            self.progress = back
            self.meter.clear()
            self.tracker.rewind(back.step)
        return back is not None

    def _evaluate(self) -> Score:
        with self.engine.state.use_weight_ema():  # the weights that are exported
            return held_out(self.engine, self.holdout_data, self.scored_blocks, self.config.train.micro_batch)

    @property
    def scored_blocks(self) -> int:
        return min(self.config.eval.batches * self.config.train.global_batch, self.holdout_data.n_blocks)

    def _sample(self) -> str:
        with self.engine.state.use_weight_ema():  # the weights that the held-out loss is of
            text = generate(self.engine, self.tokenizer, self.config.eval.sample_tokens, self.config.data.block_size)
        self.tracker.sample(self.progress.step, text)
        return text

    # ---------------------------------------------------------------- checkpoints, metrics, the console

    def _log(self, holdout: Score | None) -> dict[str, float]:
        """Write a row of metrics and return it: `loss` is the mean over the steps since the last row, `grad_norm`,
        the other norms and the schedules are of the latest step. A collective."""
        engine, step, train_data = self.engine, self.progress.step, self.train_data
        self.logged_steps = len(self.meter.losses)
        statistics, measured = engine.state.statistics(), self.meter.read()
        metrics: dict[str, float] = {
            "tokens": self.progress.tokens,
            "bits_per_byte": measured["loss"] / math.log(2) / train_data.bytes_per_token(step - 1),
            "lr": engine.optimizer.param_groups[0]["lr"],
            **statistics,
            **measured,
            **self.probes.read(),
            "memory_bytes": peak_memory(self.ranks.device),
            "skipped_steps": self.progress.skipped,
        }
        if self.config.train.loss_spike is not None:
            metrics["rewinds"] = self.progress.rewinds
        if holdout is not None:
            metrics |= holdout.metrics()
            of_sources = {label: one.bits_per_byte for label, one in holdout.sources.items()}
            self.report.evaluated(step, holdout.loss, holdout.bits_per_byte, of_sources)
        self.tracker.log(step, metrics)
        return metrics

    def _save(self, holdout: Score | None = None) -> None:
        self._try(self.saver.wait)
        document = self.progress.document(self.batches, self.config.as_dict(), self.tracker.run_id)

        def save() -> None:
            with self.saver.counting():
                self.ranks.together(self._keep_folder)
            self.saver.save(
                self.progress.step,
                self.engine.state,
                document,
                rng.capture(self.ranks.rank),
                loss=holdout.loss if holdout else None,
                after_finite_step=self.finite_since_save,
            )
            self.finite_since_save = False
            self.tracker.event("save", self.progress.step)

        try:
            self._try(save, last=self.stopped or self.progress.step == self.config.train.steps)
        except NonFiniteError as error:
            self._give_up(f"after step {self.progress.step}: {error}")

    def _give_up(self, reason: str) -> NoReturn:
        also, cause = "", None
        try:
            self.saver.wait()
        except (InputError, RuntimeError) as error:  # not why the run ends
            also, cause = f". The save before has failed, too: {error}", error
        advice = after_nonfinite(self.config, self.saver, self.finite_since_save)
        raise NonFiniteError(f"{reason}. {advice}{also}") from cause

    def _report_start(self) -> None:
        held, branched = report.holdings(self.engine.state), bool(self.origin)
        self.report.start(self.config.run.name, console_facts(self), held, self.progress.step, branched=branched)
        self.tracker.start(self.progress.step, held, self.origin)
        self.report.listen(self.tracker.warned)

    def _finish(self, stop: Stop) -> Result:
        config, engine = self.config, self.engine
        finished = self.progress.step >= config.train.steps
        holdout = self.holdout or (self._evaluate() if finished else None)
        export = sample = failure = None
        with engine.state.use_weight_ema():  # the weights that the held-out loss is of
            if finished and config.checkpoint.export:
                export = config.store / "export"
                try:
                    self.model_files.export(export, engine.state, DTYPES[config.export_dtype])
                except InputError as e:  # on every rank
                    failure, export = e, None
        if finished and config.eval.sample_tokens:
            sample = self._sample()
        self.tracker.keep(step_folder(self.saver.root, self.progress.step), export)
        where = self.tracker.where
        self.tracker.close("finished" if finished else "interrupted", "" if finished else stop.asked or "another rank")
        result = Result(
            run_name=config.run.name,
            status="finished" if finished else "stopped",
            stopped_by=None if finished else stop.asked or "another rank",
            folder=config.folder,
            step=self.progress.step,
            tokens=self.progress.tokens,
            tokens_before=self.tokens_before,
            seconds=time.monotonic() - self.began,
            loss=self.logged.get("loss"),
            loss_steps=self.logged_steps,
            holdout_loss=holdout.loss if holdout else None,
            holdout_bits_per_byte=holdout.bits_per_byte if holdout else None,
            skipped=self.progress.skipped,
            checkpoint=saved(self.saver.root, self.progress.step, self.ranks),
            plot=self.tracker.plot_path,
            export=export,
            tracking=where,
            sample=sample,
        )
        self.report.end(result)
        if failure is not None:
            raise InputError(f"{failure}; the run is complete but for its export: run it again, or shardopt export")
        return result

    def _close_tracker(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.tracker.close("finished" if kind is None else "failed", str(error or ""))
