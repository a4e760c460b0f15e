"""docs/memory.png: what each rank holds of the quickstart's model, under every engine.

    torchrun --standalone --nproc_per_node 4 scripts/draw_memory.py

The bytes are counted from the tensors themselves, as in the report at the start of a run; they are divided by the
model's parameters.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shardopt import engines
from shardopt.distributed import Ranks
from shardopt.engines import DdpConfig, EngineConfig, FsdpConfig, ZeroConfig
from shardopt.engines.base import EngineInputs
from shardopt.pretrain import model
from shardopt.pretrain.config import load
from shardopt.pretrain.report import Holdings, holdings

ROOT = Path(__file__).parent.parent
KINDS = {"weight": "weights", "gradient": "gradients", "m1": "m1", "m2": "m2", "nu": "nu"}
COLORS = ["#4c72b0", "#8fb0d9", "#c44e52", "#dd8452", "#e8b878"]
ENGINES: dict[str, EngineConfig] = {
    "DDP": DdpConfig(),
    "our ZeRO-2": ZeroConfig(stage=2),
    "FSDP2": FsdpConfig(),
}


def measure(ranks: Ranks, engine: EngineConfig, state_dtype: str) -> tuple[Holdings, int]:
    """What the ranks hold once the optimizer's state exists, and the number of parameters. A collective."""
    config = load(ROOT / "configs" / "quickstart.yaml", [f"optimizer.state_dtype={state_dtype}"])
    made = model.transformers_config(config.model, config.data.tokenizer.vocab_size, 0, config.data.block_size)
    meta = model.meta_model(made)
    count = sum(p.numel() for p in meta.parameters())
    running = engines.build(
        engine,
        EngineInputs(
            ranks=ranks,
            model=meta,
            initialise=lambda m: model.initialise(m, ranks.device, 0),
            optimizer=config.optimizer.spec(config.train.steps, 0),
            blocks=model.blocks_of(meta),
        ),
    )
    running.state.init()
    held = holdings(running.state)
    running.close()
    return held, count


def draw(rows: dict[str, list[float]], ranks: int, target: Path) -> None:
    """Bytes a parameter of each of `KINDS`, a bar for each row."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(rows)[::-1]
    left = [0.0] * len(names)
    for index, (label, color) in enumerate(zip(KINDS.values(), COLORS, strict=True)):
        widths = [rows[name][index] for name in names]
        axes.barh(names, widths, left=left, color=color, label=label, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, total in enumerate(left):
        axes.text(total + 0.2, place, f"{total:.2f}".rstrip("0").rstrip("."), va="center")
    axes.set_xlim(0, max(left) * 1.12)
    axes.set_xlabel(f"bytes a parameter on the rank of {ranks} that holds most, before activations")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(target, dpi=150)


def main() -> None:
    ranks = Ranks.start("cpu", 5)
    rows = {}
    for name, engine in ENGINES.items():
        for state_dtype in ("fp32", "bf16"):
            held, count = measure(ranks, engine, state_dtype)
            most = max(held.per_rank, key=lambda kinds: sum(kinds.values()))
            rows[f"{name}, {state_dtype} state"] = [most.get(kind, 0) / count for kind in KINDS]
    if ranks.is_main:
        draw(rows, ranks.world_size, ROOT / "docs" / "memory.png")
        for name, sizes in rows.items():
            print(f"{name:22}", *(f"{size:6.2f}" for size in sizes), f"{sum(sizes):7.2f}")
    ranks.stop()


if __name__ == "__main__":
    main()
