import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from torch import nn

from shardopt.distributed import Ranks
from shardopt.pretrain.data import build
from shardopt.pretrain.data import report as data_report
from shardopt.pretrain.report import Holdings, Report, Result, holdings, printable, render
from shardopt.pretrain.study.results import Results
from shardopt.slices import Layout, Slice, layout_of, local_tensor
from tests.checkpoint import made
from tests.distributed.pool import on_ranks

MIB = 1024**2


def written(console):
    console.file.flush()
    return console.file.getvalue() if isinstance(console.file, io.StringIO) else console.file.buffer.getvalue()


def log_console():
    return Console(file=io.StringIO(), width=80, highlight=False)


def terminal():
    return Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor", highlight=False)


def text_of(table):
    console = log_console()
    console.print(table)
    return written(console).splitlines()


# What each rank holds


def fsdp_body(rank, world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 1))  # 5 rows: 3 and 2; 1 row: rank 1 holds nothing of it
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    slices = []
    for name, param in model.named_parameters():
        local, layout = local_tensor(param.detach()), layout_of(param, name)
        slices.append(Slice(name, "weight", layout, (local,)))
        slices.append(Slice(name, "m1", layout, (local.to(torch.bfloat16),)))
        scale = torch.ones(min(1, local.numel()), dtype=torch.float32)
        slices.append(Slice(name, "nu", layout, (local.to(torch.uint8), scale), "block8"))
        slices.append(Slice(name, "weight_ema", Layout.whole(name, param.shape), (torch.zeros(param.shape),)))
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"), True)
    return holdings(made.State(slices, ranks, gradients=100 + rank))


def test_holdings_are_counted_from_the_slices_of_every_rank():
    first, second = on_ranks(2, fsdp_body)
    assert first == second
    numel = (8 * 5 + 5) + (5 + 1)
    rows = [(8 + 1) * 3 + (5 + 1), (8 + 1) * 2]
    assert first.unsharded["weight"] == first.unsharded["gradient"] == 4 * numel
    assert first.unsharded["m1"] == 2 * numel
    assert first.unsharded["weight_ema"] == 4 * numel  # held twice, counted once
    # A byte per element and a scale per tensor on the rank that holds its start; scaled up where the rest is elsewhere.
    assert first.unsharded["nu"] == round(28 * 40 / 24) + round(7 * 5 / 3) + (5 + 4) + (1 + 4)
    assert [rank["weight"] for rank in first.per_rank] == [4 * rows[0], 4 * rows[1]]
    assert [rank["m1"] for rank in first.per_rank] == [2 * rows[0], 2 * rows[1]]
    assert [rank["nu"] for rank in first.per_rank] == [rows[0] + 4 * 4, rows[1] + 2 * 4]
    assert [rank["weight_ema"] for rank in first.per_rank] == [4 * numel, 4 * numel]
    assert [rank["gradient"] for rank in first.per_rank] == [100, 101]
    assert first.kinds == ["weight", "gradient", "m1", "nu", "weight_ema"]


def test_a_process_alone_holds_everything():
    weight = torch.zeros(3, 4, dtype=torch.bfloat16)
    piece = Slice("w", "weight", Layout.whole("w", weight.shape), (weight,))
    held = holdings(made.State([piece], made.ranks_here(), gradients=24))
    assert held == Holdings(({"gradient": 24, "weight": 24},), {"weight": 24, "gradient": 24})


def even(world_size, size=40 * MIB):
    kinds = {"weight": size, "gradient": size, "m1": size // 2, "m2": size // 2, "nu": size // 2, "zeta": size}
    return Holdings(tuple({k: v // world_size for k, v in kinds.items()} for _ in range(world_size)), kinds)


@pytest.mark.parametrize("world_size", [1, 2, 4, 5, 512])
@pytest.mark.parametrize("size", [3 * 1024, 40 * MIB, 9 * 1024**4 // 5, 999 * 1024**4])
def test_table_fits_80_columns(world_size, size):
    lines = text_of(render(even(world_size, size)))
    assert all(cell_len(line) <= 80 for line in lines)
    labels = ["weights", "gradients", "m1, fast average", "m2, slow average", "nu, second moment", "zeta", "total"]
    assert [line.split("  ")[0].strip() for line in lines if not line.startswith(("─", " "))][1:] == labels
    share = f"{100 / world_size:.1f} %"
    assert all(line.rstrip().endswith(share) for line in lines if line.startswith(tuple(labels)))
    assert "…" not in "".join(lines)


def test_table_reads_right():
    held = Holdings(({"weight": 30 * MIB, "m1": 10 * MIB}, {"weight": 10 * MIB}), {"weight": 40 * MIB, "m1": 10 * MIB})
    rows = [re.split(r"\s{2,}", line.strip()) for line in text_of(render(held)) if "─" not in line]
    assert rows == [
        ["MiB held", "rank 0", "rank 1", "unsharded", "share"],
        ["weights", "30.00", "10.00", "40.00", "75.0 %"],
        ["m1, fast average", "10.00", "0.00", "10.00", "100.0 %"],
        ["total", "40.00", "10.00", "50.00", "80.0 %"],
    ]
    many = Holdings(tuple({"m1": MIB * rank} for rank in range(8)), {"m1": 28 * MIB})
    rows = [re.split(r"\s{2,}", line.strip()) for line in text_of(render(many)) if "─" not in line]
    assert rows[0] == ["MiB held", "least", "most", "unsharded", "share"]
    assert rows[1] == ["m1, fast average", "0.00", "7.00", "28.00", "25.0 %"]


# The console of a run


FACTS = {
    "model": "9.96 M parameters",
    "optimizer": "ademamix[bold]",
    "weight EMA": None,
    "run folder": Path("runs/quick"),
}
OUTCOME = Result(
    run_name="quick[bold]",
    status="finished",
    folder=Path("runs/quick"),
    step=300,
    tokens=2_457_600,
    seconds=3723.4,
    loss=1.23456,
    holdout_loss=1.34567,
    holdout_bits_per_byte=1.941,
    skipped=2,
    checkpoint=Path("runs/quick/checkpoints/step-00000300"),
    plot=Path("runs/quick/loss.png"),
    export=Path("runs/quick") / ("long-" * 20) / "export",
    tracking={"W&B": "wandb sync runs/quick/wandb/offline-run-*-abcdefgh*"},
    sample="main():\n\t[red]x[/red] \x1b[31m\x1b]0;title\x07\u202e\r\n[/nothing] 日本 \ud800 end " + "word " * 400,
)


def test_start_says_what_runs():
    console = log_console()
    Report(True, console).start("quick[bold]", FACTS, even(2))
    text = written(console)
    for part in ("quick[bold]", "model          9.96 M parameters", "ademamix[bold]", "run folder     runs/quick"):
        assert part in text
    assert "weight EMA" not in text
    assert "m2, slow average" in text
    assert all(cell_len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize("console", [log_console, terminal])
def test_end_says_what_came_of_it_and_no_sample_breaks_the_terminal(console):
    console = console()
    Report(True, console).end(OUTCOME)
    text = re.sub(r"\x1b\[[0-9;]*m", "", written(console))  # the colours of a terminal are ours
    for part in ("1.2346 at step 300", "1.3457, 1.941 bits per byte", "2.46 M in 1:02:03", "runs/quick/loss.png"):
        assert part in text
    assert str(OUTCOME.export) in text  # in one piece, however long
    assert OUTCOME.tracking["W&B"] in text
    sample = text[text.index("sample") :]
    assert r"[red]x[/red] \x1b[31m\x1b]0;title\x07\u202e" in sample
    assert r"[/nothing] 日本 \ud800 end" in sample
    assert len(sample) < 1500
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert all(cell_len(line) <= 80 for line in sample.splitlines())


def test_a_resumed_run_says_how_many_tokens_this_start_has_seen():
    console = log_console()
    Report(True, console).end(replace(OUTCOME, tokens_before=2_000_000))
    assert "457,600 in 1:02:03 since it was resumed, 2.46 M in all" in written(console)


def test_a_console_without_unicode_prints_too():
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80, highlight=False)
    report = Report(True, console)
    report.start("quick[bold]", FACTS, even(2))
    with report.training(10) as training:
        training.step(1, 2.0, 10.0)
    report.end(OUTCOME)
    assert b"[/nothing] ?? " in written(console)


def test_what_is_unknown_is_left_out():
    console = log_console()
    Report(True, console).end(Result("quick", "stopped", Path("runs/quick"), 3, 100, 1.0))
    assert [line.split("  ")[0].split(" ─")[0] for line in written(console).splitlines()] == [
        "quick stopped",
        "tokens seen",
        "run folder",
    ]


def test_log_gets_a_line_a_logged_step():
    console, now = log_console(), [0.0]
    report = Report(True, console, clock=lambda: now[0])
    with report.training(3600, start=3580) as training:
        for step in range(3581, 3601):
            now[0] += 60.0
            training.step(step, *((step / 1000, 12_345.0) if step % 10 == 0 else ()))
        report.evaluated(3600, 2.5, 3.6)
        report.warn("W&B failed: [red]\x1b[2J")
    assert written(console).splitlines() == [
        "step 3,590/3,600  loss 3.5900   12.3k tokens/s  10:00 left",
        "step 3,600/3,600  loss 3.6000   12.3k tokens/s",
        "step 3,600: held-out loss 2.5000, 3.600 bits per byte",
        r"warning: W&B failed: [red]\x1b[2J",
    ]


def test_time_left_follows_the_recent_pace():
    console, now = log_console(), [0.0]
    with Report(True, console, clock=lambda: now[0]).training(1000) as training:
        for step in range(1, 201):
            now[0] += 100.0 if step == 1 else 1.0  # the first step compiles
            training.step(step, 1.0 if step == 200 else None)
    assert "13:20 left" in written(console)  # 800 steps of a second


def test_time_left_follows_the_work_of_the_steps_to_come():
    console, now = log_console(), [0.0]
    work = lambda start, stop: sum(4 if step >= 100 else 1 for step in range(start, stop))  # noqa: E731
    with Report(True, console, clock=lambda: now[0]).training(200, work=work) as training:
        for step in range(1, 111):
            now[0] += work(step - 1, step)
            training.step(step, 1.0 if step in (90, 110) else None)
    assert "6:50 left" in written(console)  # 10 steps of a second and 100 of four
    assert "6:00 left" in written(console)  # 90 of four


def test_terminal_shows_a_bar_within_80_columns_and_gets_its_cursor_back():
    console, now = terminal(), [0.0]
    report = Report(True, console, clock=lambda: now[0])

    def train():
        with report.training(1_000_000) as training:
            for step in range(1, 200):
                now[0] += 5.0
                training.step(step, 11.0 if step % 10 == 0 else None, 123_456.0)
            report.evaluated(199, 10.5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    output = written(console)
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output).replace("\r", "\n").splitlines()
    assert all(cell_len(line) <= 80 for line in drawn)
    assert any(
        re.fullmatch(r"[━╸╺]+ step +199/1,000,000  loss 11.0000  123.5k tokens/s  57 d 20 h left", line)
        for line in drawn
    )
    assert "step 199: held-out loss 10.5000" in drawn


def test_other_ranks_print_nothing():
    console = terminal()
    report = Report(False, console)
    report.start("quick[bold]", FACTS, even(2))
    with report.training(2) as training:
        training.step(1, 1.0)
    report.evaluated(1, 1.0)
    report.warn("no")
    report.end(OUTCOME)
    assert written(console) == ""


def test_printable_keeps_text_and_shows_the_rest():
    assert printable("a\tb\nc é 日\r\nd") == "a\tb\nc é 日\nd"
    assert printable("\x00\x1b\x9b\u200b\ue000\U000e0001") == r"\x00\x1b\x9b\u200b\ue000\U000e0001"


def test_names_in_tables_are_no_markup():
    names = ["[/x]", "a[bold]b", "two\nlines"]
    holdings = Holdings((dict.fromkeys(names, 5),), dict.fromkeys(names, 5))
    source = {
        "documents": 1, "bytes": 1, "tokens": 1, "tokens_per_byte": 1.0, "share": 1.0, "epochs": 1.0,
        "holdout": {"tokens": 1}, "broken": {}, "broken_examples": [], "empty": 0, "skipped_files": 0, "longest": [],
    }  # fmt: skip
    text, _ = data_report.render({"sources": [source | {"label": name} for name in names]}, [])
    study = SimpleNamespace(baseline="[/b]")
    rows = [SimpleNamespace(variant=SimpleNamespace(name=name)) for name in names]
    results = SimpleNamespace(study=study, rows=rows, best=None, _cells=lambda _: [""] * 5, _only_key=lambda: "[/k]")
    for table in (render(holdings), text, Results.table(results)):
        said = [line.strip() for line in text_of(table)]
        assert all(any(line.startswith(name.replace("\n", "\\n")) for line in said) for name in names), said
    assert "below [/b]" in said[0]


def test_the_label_of_a_bar_is_no_markup(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=out, force_terminal=True, width=100))
    with build._bar("tokenising [/x]", True) as tick:
        tick(1, 2)
    assert "tokenising [/x]" in out.getvalue()
