"""How long a step waits for its batch, with the thread that prepares batches ahead and without.

    OMP_NUM_THREADS=1 python scripts/bench_data_wait.py [--steps 60] [CONFIG] [key.sub=value ...]

Trains a Llama of two layers of 64, whose short steps leave little time, on the standard library, packed and streamed
(from JSON lines) by a trained bpe tokenizer, with data.prefetch 0 and 4; prints the mean `data_wait` and `step_time`
of the rows of metrics after the first.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sysconfig
import tempfile
from pathlib import Path

from shardopt.pretrain.config import load
from shardopt.pretrain.loop import pretrain
from shardopt.pretrain.record import read_metrics


def dataset(folder: Path, files: int = 8) -> Path:
    """The standard library as a dataset of JSON lines."""
    folder.mkdir()
    rows: list[list[str]] = [[] for _ in range(files)]
    for index, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        rows[index % files].append(json.dumps({"text": path.read_text(encoding="utf-8", errors="replace")}) + "\n")
    for index, part in enumerate(rows):
        (folder / f"train-{index}.jsonl").write_text("".join(part))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    if arguments.steps < 30:
        parser.error("--steps must be at least 30: metrics come every 10 steps, and the first row is left out")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        hub = dataset(folder / "hub")
        streamed = f"[{{source: hf, name: {hub}, streaming: true, shards: 4}}]"
        print(f"{'text':10} {'prefetch':>8} {'data_wait':>12} {'step_time':>12} {'share':>8}")
        for text, sources in (("packed", "[{source: stdlib}]"), ("streamed", streamed)):
            for ahead in (0, 4):
                given = [
                    "engine={name: single}", "model.hidden_size=64", "model.intermediate_size=128",
                    "model.num_hidden_layers=2", "data.holdout=0.05", f"run.dir={folder}", f"run.name={text}-{ahead}",
                    f"train.steps={arguments.steps}", f"data.sources={sources}", "data.tokenizer={bpe: 4096}",
                    f"data.prefetch={ahead}", f"data.cache={folder / 'cache'}", "tracking.wandb.mode=disabled",
                    "tracking.log_every=10", "checkpoint.export=false", "eval.every=100000", "eval.sample_tokens=0",
                    f"schedule.warmup={min(10, arguments.steps)}",
                ]  # fmt: skip
                with contextlib.redirect_stdout(io.StringIO()):
                    pretrain(load(arguments.config, [*given, *arguments.overrides]))
                rows = read_metrics(folder / f"{text}-{ahead}" / "metrics.jsonl")[1:]
                wait, step = (sum(row[key] for row in rows) / len(rows) for key in ("data_wait", "step_time"))
                print(f"{text:10} {ahead:8} {1000 * wait:9.2f} ms {1000 * step:9.1f} ms {100 * wait / step:6.2f} %")


if __name__ == "__main__":
    main()
