"""bf16 weights, rounded stochastically or with split masters, against fp32 weights. Writes a table and a plot.

    python scripts/study_weights.py scripts/bench.yaml --name weights --out bench/weights [--seeds 5] [key=value ...]

Runs of each in RUN.DIR/NAME, as `shardopt sweep` makes them; what is missing is run. All compute in bf16, so that they
differ in their weights alone. Split masters are those in fp32, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from scripts.bench_page import keep, study_table
from shardopt.pretrain.study.plan import Study, Variant
from shardopt.pretrain.study.run import run

KEYS = ("model.dtype", "optimizer.master_weights")
VARIANTS = {"fp32": ("fp32", None), "bf16": ("bf16", None), "bf16-split": ("bf16", "split")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--name", required=True, help="folder of the runs, inside run.dir")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, help="runs at once; by default one for each core")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, table.txt and curves.png")
    arguments = parser.parse_intermixed_args()
    variants = [Variant(name, dict(zip(KEYS, values, strict=True))) for name, values in VARIANTS.items()]
    overrides = [*arguments.overrides, "engine.compute_dtype=bf16"]
    study = Study(arguments.config, overrides, variants, arguments.seeds, arguments.name, "weights", variants[0].name)
    if status := run(study, arguments.jobs, dry_run=False):
        sys.exit(status)
    results = json.loads((study.folder / "results.json").read_text(encoding="utf-8"))
    text = study_table(results)
    keep(arguments.out, results, text)
    shutil.copy(study.folder / "curves.png", arguments.out / "curves.png")
    print(text)


if __name__ == "__main__":
    main()
