"""Cost of the training loop: tokens/s of `shardopt pretrain` against a bare loop, in one run.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 scripts/bench_loop.py [CONFIG] [key.sub=value ...]

Both train the same engine, model and batch size in the same processes, in turns of STEPS steps. The bare loop is
forward, backward, clip and step on a batch that is ready; the other is what a run does, its data, collectives,
metrics, W&B and progress bar included. The last line is the median over turns of the ratio.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from contextlib import ExitStack

import torch

from shardopt.distributed import Ranks
from shardopt.pretrain.begin import begin
from shardopt.pretrain.config import load
from shardopt.pretrain.loop import Run
from shardopt.pretrain.scoring import losses
from shardopt.pretrain.signals import stop_signals

STEPS, TURNS = 10, 7


def bare(run: Run, micros: tuple[torch.Tensor, ...], steps: int) -> float:
    """Seconds of `steps` bare steps."""
    engine, train = run.engine, run.config.train
    targets = train.global_batch * run.config.data.block_size
    began = time.perf_counter()
    for _ in range(steps):
        for index, tokens in enumerate(micros):
            with engine.accumulate(last=index == len(micros) - 1):
                nats, _ = losses(engine, tokens)
                engine.backward(nats / targets)
        engine.clip_grad_norm(train.grad_clip)
        engine.step()
        engine.zero_grad()
    return time.perf_counter() - began


def main() -> None:
    config_path, *overrides = sys.argv[1:] or ["configs/quickstart.yaml"]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ranks = Ranks.start()
        stack.callback(ranks.stop)
        settings = [f"run.dir={ranks.from_main(folder)}", "train.steps=100000", "eval.every=100000"]
        config = load(config_path, [*settings, "checkpoint.every=100000", *overrides])
        run = Run(begin(config, ranks, stack))
        batch = run.train_data.batch(0, ranks.rank, config.train.global_batch, ranks.world_size)
        micros = batch.to(ranks.device).split(config.train.micro_batch)
        ratios = []
        with stop_signals() as stop, run.report.training(config.train.steps) as bar:
            for turn in range(TURNS + 1):
                plain = bare(run, micros, STEPS)
                began = time.perf_counter()
                for _ in range(STEPS):
                    run.advance(stop, bar)
                full = time.perf_counter() - began
                if turn:  # the first warms up
                    ratios.append(plain / full)
        run.saver.wait()
        if ranks.is_main:
            print(f"{config_path}: {ranks.world_size} ranks on {ranks.device.type}, torch {torch.__version__}")
            print("turns:", " ".join(f"{r:.3f}" for r in ratios))
            print(f"tokens/s of the loop over the bare loop, median of {TURNS} turns: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
