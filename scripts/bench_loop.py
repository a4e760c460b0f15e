"""Cost of the training loop: tokens/s of `shardopt pretrain`, a bare loop, nanoGPT's and HF Trainer's, in one run.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 scripts/bench_loop.py [CONFIG] [key.sub=value ...]

All train the same model on batches of the same size in the same processes, in turns of STEPS steps. "shardopt pretrain"
is what a run does, its data, collectives, metrics, W&B and progress bar included; "bare" is forward, backward, clip and
step of the same engine on a batch that is ready. nanoGPT's loop (its lines, on a memory map of the same text) and HF
Trainer have DDP on several ranks; Trainer logs as often as the run, saves nothing, and is timed without its start. The
table has medians over turns, and of the ratio to the bare loop within a turn.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from scripts.bench_page import table
from shardopt import AdEMAMix
from shardopt.distributed import Ranks
from shardopt.pretrain import model
from shardopt.pretrain.begin import begin
from shardopt.pretrain.config import load
from shardopt.pretrain.loop import Run
from shardopt.pretrain.scoring import losses
from shardopt.pretrain.signals import stop_signals

STEPS, TURNS = 10, 7
WARM = 2  # steps of a Trainer before it is timed
OURS, BARE = "shardopt pretrain", "bare loop, same engine"


def new_model(run: Run) -> torch.nn.Module:
    """The run's model once more, unsharded, as transformers has it."""
    made = model.meta_model(run.model_files.config)
    model.initialise(made, run.ranks.device, run.config.run.seed)
    return made


def bare(run: Run, micros: tuple[torch.Tensor, ...]) -> float:
    """Seconds of `STEPS` bare steps."""
    engine, train = run.engine, run.config.train
    targets = train.global_batch * run.config.data.block_size
    began = time.perf_counter()
    for _ in range(STEPS):
        for index, tokens in enumerate(micros):
            with engine.accumulate(last=index == len(micros) - 1):
                nats, _ = losses(engine, tokens)
                engine.backward(nats / targets)
        engine.clip_grad_norm(train.grad_clip)
        engine.step()
        engine.zero_grad()
    return time.perf_counter() - began


class NanoGpt:
    """nanoGPT's loop: random pieces of a memory map, DDP, the lr set by hand, a line of text now and then."""

    def __init__(self, run: Run, optimizer: Callable[..., torch.optim.Optimizer], text: Path) -> None:
        config, self.ranks = run.config, run.ranks
        self.text = np.memmap(text, dtype=np.uint16, mode="r")
        self.length, self.rows = config.data.block_size, config.train.micro_batch
        self.micros = config.train.global_batch // (self.rows * self.ranks.world_size)
        self.every, self.clip = config.tracking.log_every, config.train.grad_clip
        self.model = made = new_model(run)
        if self.ranks.world_size > 1:
            self.model = DistributedDataParallel(made)
        self.optimizer = optimizer(made)
        self.step = 0

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.randint(len(self.text) - self.length - 1, (self.rows,)).tolist()
        cut = [torch.from_numpy(self.text[i : i + self.length + 1].astype(np.int64)) for i in at]
        tokens = torch.stack(cut).to(self.ranks.device)
        return tokens[:, :-1], tokens[:, 1:]

    def __call__(self) -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-3
            for micro in range(self.micros):
                last = micro == self.micros - 1
                waits = isinstance(self.model, DistributedDataParallel) and not last
                with self.model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                    inputs, targets = self.batch()
                    logits = self.model(input_ids=inputs, use_cache=False).logits
                    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) / self.micros
                    loss.backward()
            if self.clip is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            if self.step % self.every == 0 and self.ranks.is_main:
                print(f"iter {self.step}: loss {loss.item() * self.micros:.4f}", file=sys.stderr)
        return time.perf_counter() - began


class HfTrainer:
    """HF Trainer over rows that are ready, timed from the end of step WARM to that of the last."""

    def __init__(self, run: Run, optimizer: Callable[..., torch.optim.Optimizer], rows: torch.Tensor) -> None:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        config, ranks = run.config, run.ranks
        self.ends: list[float] = []
        ends = self.ends

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                ends.append(time.perf_counter())

        def made() -> Trainer:
            arguments = TrainingArguments(
                output_dir=tempfile.mkdtemp(dir=config.run.dir),
                max_steps=STEPS + WARM,
                per_device_train_batch_size=config.train.micro_batch,
                gradient_accumulation_steps=config.train.global_batch // (config.train.micro_batch * ranks.world_size),
                max_grad_norm=config.train.grad_clip or 0.0,
                logging_steps=config.tracking.log_every,
                use_cpu=ranks.device.type == "cpu",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                ddp_find_unused_parameters=False,
            )
            net = new_model(run)
            data = [{"input_ids": row, "labels": row} for row in rows[:, :-1]]
            return Trainer(net, arguments, train_dataset=data, optimizers=(optimizer(net), None), callbacks=[Clock()])  # type: ignore[arg-type]

        self.made = made

    def __call__(self) -> float:
        self.ends.clear()
        self.made().train()
        return self.ends[-1] - self.ends[WARM - 1]


def fused(net: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1, fused=True)


def main() -> None:
    config_path, *overrides = sys.argv[1:] or ["configs/quickstart.yaml"]
    told = sys.stdout  # for the table alone
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr), ExitStack() as stack:
        ranks = Ranks.start()
        stack.callback(ranks.stop)
        here = Path(ranks.from_main(folder))
        settings = [f"run.dir={here}", "train.steps=100000", "eval.every=100000"]
        config = load(config_path, [*settings, "checkpoint.every=100000", *overrides])
        run = Run(begin(config, ranks, stack))
        batch = run.train_data.batch(0, ranks.rank, config.train.global_batch, ranks.world_size)
        micros = batch.to(ranks.device).split(config.train.micro_batch)
        sequences = config.train.global_batch
        rows = torch.cat([run.train_data.batch(step, 0, sequences) for step in range(STEPS + WARM)])
        ranks.together(lambda: ranks.is_main and rows.numpy().astype(np.uint16).tofile(here / "text.bin"))
        given = config.optimizer.spec(config.train.steps, config.run.seed).kwargs

        def ademamix(net: torch.nn.Module) -> torch.optim.Optimizer:
            return AdEMAMix(net.named_parameters(), **given)

        with stop_signals() as stop, run.report.training(config.train.steps) as bar:

            def ours() -> float:
                began = time.perf_counter()
                for _ in range(STEPS):
                    run.advance(stop, bar)
                return time.perf_counter() - began

            loops: dict[str, Callable[[], float]] = {
                OURS: ours,
                BARE: lambda: bare(run, micros),
                "nanoGPT's loop, AdEMAMix": NanoGpt(run, ademamix, here / "text.bin"),
                "nanoGPT's loop, fused AdamW": NanoGpt(run, fused, here / "text.bin"),
                "HF Trainer, AdEMAMix": HfTrainer(run, ademamix, rows),
                "HF Trainer, fused AdamW": HfTrainer(run, fused, rows),
            }
            turns = [{name: loop() for name, loop in loops.items()} for _ in range(TURNS + 1)][1:]  # the first warms up
        run.saver.wait()
        if ranks.is_main:
            tokens = STEPS * config.train.global_batch * config.data.block_size
            lines = [
                [
                    name,
                    f"{tokens / statistics.median(turn[name] for turn in turns):,.0f}",
                    f"{statistics.median(turn[BARE] / turn[name] for turn in turns):.3f}",
                    f"{min(turn[BARE] / turn[name] for turn in turns):.2f} to "
                    f"{max(turn[BARE] / turn[name] for turn in turns):.2f}",
                ]
                for name in loops
            ]
            print(table(["loop", "tokens/s", "× the bare loop", "least to most"], lines), file=told)
            shape = f"{ranks.world_size} ranks on {ranks.device.type}, engine {config.engine.name}"
            note = f"{config_path}: {shape}, torch {torch.__version__}; medians of {TURNS} turns of {STEPS} steps."
            print(f"\n{note}", file=told)


if __name__ == "__main__":
    main()
