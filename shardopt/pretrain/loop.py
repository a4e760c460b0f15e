"""The pretraining loop: build, resume, train, evaluate, save, stop."""

from __future__ import annotations

import math
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shardopt import checkpoint, engines
from shardopt.engines.base import Engine, EngineInputs
from shardopt.engines.ranks import Ranks
from shardopt.errors import InputError
from shardopt.pretrain import data, model, report, rng
from shardopt.pretrain.config import Config
from shardopt.pretrain.folder import RunFolder
from shardopt.pretrain.schedule import lr_factor
from shardopt.pretrain.tracking import Tracker

FORMAT = "shardopt.pretrain/1"


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


@dataclass
class Progress:
    """What a run has done so far; saved with every checkpoint."""

    step: int = 0
    """Steps done, skipped ones included: what the data and the lr follow."""
    skipped: int = 0
    """Steps skipped because something was not finite."""
    skipped_in_row: int = 0


@dataclass(frozen=True)
class Result:
    """How a run ended; the same on every rank."""

    status: Literal["finished", "stopped"]
    folder: Path
    step: int
    loss: float | None
    """Of the last step trained here, nats a token; None where there was none to train."""
    holdout_loss: float | None
    holdout_bits_per_byte: float | None
    skipped: int
    checkpoint: Path | None
    export: Path | None
    sample: str | None


def pretrain(config: Config) -> Result:
    """Run `config` to its last step, or to the first SIGINT or SIGTERM, which stops it after a checkpoint.

    Every rank of a torchrun job calls this; it leaves the process group before it returns or raises.

    Raises:
        InputError: the config cannot run here (before any step), on every rank.
        NonFiniteError: see train.max_nonfinite_steps.
    """
    with ExitStack() as stack:
        ranks = Ranks.start(config.run.device, config.run.timeout_minutes)
        stack.callback(ranks.stop)
        config.check_ranks(ranks.world_size)
        return _Run(config, ranks, stack).train()


class _Run:
    """One process's part of a run, from an engine that is ready to the last checkpoint."""

    def __init__(self, config: Config, ranks: Ranks, stack: ExitStack) -> None:
        self.config, self.ranks = config, ranks
        self.progress = Progress()
        rng.seed_all(config.run.seed, ranks.rank)
        # Cheap checks of the optimizer and the run folder come before data and model are touched.
        spec = config.optimizer.spec(config.train.steps, config.run.seed)
        folder = ranks.together(lambda: RunFolder(config) if ranks.is_main else None)
        if folder is not None:
            stack.callback(folder.release)
        resume_from = ranks.from_main(folder.resume_from if folder is not None else None)

        self.train_data, self.holdout = data.prepare(
            config.data, ranks, config.run.seed, config.train.global_batch
        )
        tokenizer = self.train_data.tokenizer
        self.model_config = ranks.together(
            lambda: model.model_config(
                config.model, self.train_data.vocab_size, tokenizer.eos_token_id, config.data.block_size
            )
        )
        meta = model.meta_model(self.model_config)
        if config.train.activation_checkpointing:
            meta.gradient_checkpointing_enable({"use_reentrant": False})
        self.engine = engines.build(
            config.engine,
            EngineInputs(
                ranks=ranks,
                model=meta,
                initialise=lambda m: model.initialise(m, ranks.device, config.run.seed, config.model.path),
                optimizer=spec,
                blocks=model.blocks_of(meta),
            ),
        )
        stack.callback(self.engine.close)
        self.engine.init_state()
        self.base_lrs = [group["lr"] for group in self.engine.optimizer.param_groups]
        document = self._resume(resume_from) if resume_from is not None else {}

        root = config.folder / "checkpoints"
        self.saver = checkpoint.Saver(root, config.checkpoint.keep, ranks, config.checkpoint.asynchronous)
        stack.callback(self.saver.close)
        self.last_checkpoint = resume_from
        self.tracker = ranks.together(
            lambda: Tracker(
                config.folder,
                config.tracking,
                config.as_dict(),
                config.run.name,
                self.progress.step if document else None,
                run_id=document.get("wandb_id"),
                is_main=ranks.is_main,
            )
        )
        stack.push(self._close_tracker)
        self.console = report.Console(config.run.name, config.train.steps, is_main=ranks.is_main)
        stack.callback(self.console.close)
        self._report_start(resume_from)

    # ---------------------------------------------------------------- a run, step by step

    def train(self) -> Result:
        config, progress = self.config, self.progress
        self.window = _Window()
        result_loss: float | None = None
        holdout: _Held | None = None
        stopped = False
        with _stop_signals() as stop:
            while progress.step < config.train.steps and not stopped:
                began = time.perf_counter()
                loss, norm, stopped = self._step(stop)
                self.window.add(loss, norm, time.perf_counter() - began)
                if not progress.skipped_in_row:
                    result_loss = loss
                step, last = progress.step, progress.step == config.train.steps
                holdout = None
                if last or step % config.eval.every == 0:
                    holdout = self._evaluate()
                if last or holdout is not None or step % config.tracking.log_every == 0:
                    self._log(holdout)
                self.console.advance(step)
                if last or stopped or step % config.checkpoint.every == 0:
                    self._save()
                if progress.skipped_in_row > config.train.max_nonfinite_steps:
                    self._give_up()
            self.saver.wait()
            self.last_checkpoint = self.ranks.from_main(checkpoint.latest(config.folder / "checkpoints"))
            finished = progress.step >= config.train.steps
            if finished and holdout is None:
                holdout = self._evaluate()
            result = self._finish("finished" if finished else "stopped", result_loss, holdout, stop)
        return result

    def _step(self, stop: _Stop) -> tuple[float, float, bool]:
        """One optimizer step: its loss over the global batch, its gradient norm, and whether to stop."""
        config, engine, ranks = self.config, self.engine, self.ranks
        train = config.train
        factor = lr_factor(self.progress.step + 1, train.steps, config.schedule)
        for group, lr in zip(engine.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * factor
        share = train.global_batch // ranks.world_size
        batch = self.train_data.batch(self.progress.step, ranks.rank * share, (ranks.rank + 1) * share)
        targets = train.global_batch * config.data.block_size
        micros = batch.split(train.micro_batch)
        total = torch.zeros((), device=ranks.device)
        for index, tokens in enumerate(micros):
            with engine.accumulate(last=index == len(micros) - 1):
                loss = token_loss_sum(engine, tokens.to(ranks.device, non_blocking=True)) / targets
                engine.backward(loss)
            total += loss.detach()
        norm = engine.clip_grad_norm(train.grad_clip)
        summed, stops = ranks.sum([total.item(), float(stop.asked is not None)])
        if math.isfinite(norm) and math.isfinite(summed):
            engine.step()
            self.progress.skipped_in_row = 0
        else:
            self.progress.skipped += 1
            self.progress.skipped_in_row += 1
        engine.zero_grad()
        self.progress.step += 1
        return summed, norm, stops > 0

    @torch.no_grad()
    def _evaluate(self) -> _Held:
        """Mean loss over the same held-out blocks on any number of ranks. A collective."""
        config, ranks, micro = self.config, self.ranks, self.config.train.micro_batch
        blocks = min(self.holdout.n_blocks, config.eval.batches * config.train.global_batch)
        self.engine.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=ranks.device)
        a_round = ranks.world_size * micro
        for start in range(0, blocks, a_round):
            mine = min(start + ranks.rank * micro, blocks)
            # Every rank goes through every forward: sharded weights are gathered in it.
            tokens = self.holdout.batch(min(mine, blocks - 1), max(min(mine + micro, blocks), 1))
            loss = token_loss_sum(self.engine, tokens.to(ranks.device))
            total += loss.double() * (mine < blocks)
        self.engine.model.train()
        nats = ranks.sum([total.item()])[0] / (blocks * config.data.block_size)
        return _Held(nats, nats / math.log(2) / self.holdout.bytes_per_token)

    # ---------------------------------------------------------------- what is kept and shown

    def _log(self, holdout: _Held | None) -> None:
        engine, step = self.engine, self.progress.step
        local = {name: value.item() for name, value in engine.statistics().items()}
        squares = self.ranks.sum(list(local.values()))
        norms = {
            f"{name}_norm": math.sqrt(square / engine.replicas())
            for name, square in zip(local, squares, strict=True)
        }
        tokens_a_step = self.config.train.global_batch * self.config.data.block_size
        loss, norm, seconds, steps = self.window.take()
        metrics: dict[str, float | int | None] = {
            "tokens": step * tokens_a_step,
            "loss": loss,
            "bits_per_byte": loss / math.log(2) / self.train_data.bytes_per_token,
            "lr": engine.optimizer.param_groups[0]["lr"],
            **engine.schedule_values(),
            "grad_norm": norm,
            **norms,
            "tokens_per_second": steps * tokens_a_step / seconds,
            "memory_bytes": peak_memory(self.ranks.device),
            "skipped_steps": self.progress.skipped,
        }
        if holdout is not None:
            metrics |= {"holdout_loss": holdout.loss, "holdout_bits_per_byte": holdout.bits_per_byte}
        self.tracker.log(step, metrics)
        self.console.log(step, metrics)

    def _save(self) -> None:
        scalars: dict[str, dict[str, int | float]] = {}
        for part in self.ranks.gather(self.engine.scalar_state()):
            scalars |= part
        document = {
            "format": FORMAT,
            "step": self.progress.step,
            "skipped": self.progress.skipped,
            "skipped_in_row": self.progress.skipped_in_row,
            "optimizer": {"name": self.config.optimizer.name, "parameters": scalars},
            "data": self.train_data.state_dict(),
            "data_fingerprint": self.train_data.fingerprint,
            "wandb_id": self.tracker.run_id,
            "config": self.config.as_dict(),
        }
        self.saver.save(self.progress.step, self.engine.slices(), rng.capture(self.ranks.rank), document)

    def _resume(self, folder: Path) -> dict[str, Any]:
        """Fill the engine from a checkpoint and set everything else that it holds; its document."""
        ranks, engine = self.ranks, self.engine
        document = ranks.together(lambda: checkpoint.read_document(folder))
        if document.get("format") != FORMAT:
            raise InputError(f"{folder} is no checkpoint of a pretraining run of this version ({FORMAT})")
        if document["data_fingerprint"] != self.train_data.fingerprint:
            raise InputError(
                f"data: the corpus or its tokenizer has changed since {folder} was written, so the run would not go "
                f"on where it stopped; restore it, or choose another run.name"
            )
        checkpoint.load(folder, engine.slices(), ranks)
        engine.load_scalar_state(document["optimizer"]["parameters"])
        engine.after_load()
        self.train_data.load_state_dict(document["data"])
        self.progress = Progress(document["step"], document["skipped"], document["skipped_in_row"])
        saved = checkpoint.load_extras(folder, list(rng.capture(ranks.rank)))
        if saved:
            rng.restore(ranks.rank, saved)
        else:  # another number of ranks: new streams, of their own for this step
            rng.seed_all(self.config.run.seed, ranks.rank, self.progress.step)
        return document

    def _give_up(self) -> None:
        self.saver.wait()
        raise NonFiniteError(
            f"{self.progress.skipped_in_row} steps in a row, up to step {self.progress.step}, had a loss or a gradient "
            f"that is not finite. Lower optimizer.lr or train.grad_clip; the last good checkpoint is "
            f"{self.last_checkpoint or 'none: the run never reached one'}"
        )

    def _report_start(self, resume_from: Path | None) -> None:
        config, engine = self.config, self.engine
        holdings = report.holdings(engine.slices(), engine.gradient_bytes(), self.ranks)
        self.console.start(
            holdings,
            {
                "parameters": f"{sum(p.numel() for p in engine.model.parameters()):,}",
                "engine": f"{engine.name} on {self.ranks.world_size} × {self.ranks.device.type}",
                "optimizer": f"{config.optimizer.name}, kernel {getattr(engine.optimizer, 'kernel', 'torch')}",
                "data": f"{self.train_data.tokens:,} tokens, fingerprint {self.train_data.fingerprint[:12]}",
                "run": f"{config.folder}" + (f", from {resume_from.name}" if resume_from else ""),
                "tracking": self.tracker.where or "metrics.jsonl",
            },
        )

    def _finish(self, status: Any, loss: float | None, holdout: _Held | None, stop: _Stop) -> Result:
        config = self.config
        export = sample = None
        if status == "finished":
            if config.checkpoint.export:
                export = config.folder / "export"
                checkpoint.export_safetensors(export, self.engine.full_parameters(), self.ranks)
                if self.ranks.is_main:
                    self.model_config.save_pretrained(export)
                    self.train_data.tokenizer.save_pretrained(export)
            if config.eval.sample_tokens:
                sample = generate(
                    self.engine, self.train_data.tokenizer, config.eval.sample_tokens, config.data.block_size
                )
        result = Result(
            status=status,
            folder=config.folder,
            step=self.progress.step,
            loss=loss,
            holdout_loss=holdout.loss if holdout else None,
            holdout_bits_per_byte=holdout.bits_per_byte if holdout else None,
            skipped=self.progress.skipped,
            checkpoint=self.last_checkpoint,
            export=export,
            sample=sample,
        )
        self.tracker.close()
        self.console.finish(result, stop.asked)
        return result

    def _close_tracker(self, kind: type[BaseException] | None, *_: object) -> None:
        self.tracker.close("finished" if kind is None else "failed")


@dataclass(frozen=True)
class _Held:
    loss: float
    bits_per_byte: float


@dataclass
class _Window:
    """Steps since the last row of metrics."""

    losses: list[float] = field(default_factory=list)
    norm: float = math.nan
    seconds: float = 0.0

    def add(self, loss: float, norm: float, seconds: float) -> None:
        self.losses.append(loss)
        self.norm = norm
        self.seconds += seconds

    def take(self) -> tuple[float, float, float, int]:
        """Mean loss, latest gradient norm, seconds and steps; starts anew."""
        out = (sum(self.losses) / len(self.losses), self.norm, self.seconds, len(self.losses))
        self.losses, self.seconds = [], 0.0
        return out


def token_loss_sum(engine: Engine, tokens: Tensor) -> Tensor:
    """Sum of the next-token cross-entropy in nats, fp32, of `tokens` (sequences, block_size + 1)."""
    logits = engine.model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def generate(engine: Engine, tokenizer: Any, tokens: int, context: int, temperature: float = 0.8) -> str:
    """Text that the model goes on with from the end of a document. A collective, as the weights are sharded."""
    device = engine.ranks.device
    draw = torch.Generator().manual_seed(0)  # the same tokens on every rank
    ids = torch.tensor([[tokenizer.eos_token_id]], device=device)
    engine.model.eval()
    for _ in range(tokens):
        logits = engine.model(input_ids=ids[:, -context:], use_cache=False).logits[0, -1].float().cpu()
        chosen = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=draw)
        ids = torch.cat([ids, engine.ranks.from_main(chosen).to(device)[None]], dim=1)
    engine.model.train()
    return tokenizer.decode(ids[0, 1:].tolist(), skip_special_tokens=True)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: of the GPU's memory, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class _Stop:
    asked: str | None = None
    at: float = 0.0


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """SIGINT and SIGTERM ask the run to stop after its step; a second SIGINT, 2 s later or more, interrupts it.

    torchrun passes on the Ctrl-C that the terminal has already sent to every process, hence the two seconds.
    """
    stop = _Stop()

    def ask(number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if stop.asked is not None and number == signal.SIGINT and now - stop.at > 2:
            raise KeyboardInterrupt
        if stop.asked is None:
            stop.asked, stop.at = signal.Signals(number).name, now

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
