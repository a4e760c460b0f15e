"""The page of `shardopt report`, without a browser: what is in it, of runs in every state; see test_page_browser.py."""

import json
import math
import os
import re
import socket
from html.parser import HTMLParser

import pytest

from shardopt import cli
from shardopt.errors import InputError, StorageError
from shardopt.pretrain.page import curves, drawing, records
from shardopt.pretrain.page.story import story
from shardopt.pretrain.page.tables import differences, figures
from shardopt.pretrain.page.write import _tokens, write
from tests.pretrain import made_runs
from tests.pretrain.made_runs import evaluated, event, row, rows, start

MINE = {"host": socket.gethostname(), "pid": os.getpid()}


class Page(HTMLParser):
    """Text of a page, its elements and attributes, and what its script is given."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.text, self.given, self.open = [], [], "", "", None
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self.given)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.open = dict(attributes).get("type") if tag == "script" else self.open

    def handle_data(self, data):
        if self.open == "application/json":
            self.given += data
        else:
            self.text += data

    def handle_endtag(self, tag):
        self.open = None if tag == "script" else self.open


def page(tmp_path, *folders):
    write(folders, tmp_path / "report.html")
    return Page(tmp_path / "report.html")


def bends(values):
    return sum(abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False))


def table(made):
    return {cells[0]: cells[1:] for cells in made.rows}


def test_the_command_writes_into_the_run_or_where_it_is_told_and_says_so(tmp_path, capsys, monkeypatch):
    run, other = (made_runs.write(tmp_path / "runs" / name, rows(100)) for name in "ab")
    assert cli.main(["report", str(run)]) == 0
    said = capsys.readouterr().out
    assert said == f"a: {run}/report.html, {(run / 'report.html').stat().st_size / 1e3:,.0f} kB, opens in any browser\n"
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(run), str(other)]) == 0
    assert cli.main(["report", str(tmp_path / "runs"), "--output", "x.html"]) == 0
    assert capsys.readouterr().out.startswith("2 runs: report.html, ")
    assert (tmp_path / "x.html").stat().st_size == (tmp_path / "report.html").stat().st_size
    assert not list(tmp_path.rglob("*.tmp"))
    assert cli.main(["report", str(run), "--output", str(tmp_path / "nowhere" / "x.html")]) == 2
    assert "--output: cannot write" in capsys.readouterr().err


def test_no_part_of_a_page_comes_from_elsewhere(tmp_path):
    made = page(tmp_path, made_runs.write(tmp_path / "a", rows()))
    assert made.tags.count("script") == 2
    assert not {"img", "iframe", "object", "embed", "base"} & set(made.tags)
    assert {value for name, value in made.attributes if name in ("src", "href")} == {"data:,"}
    text = (tmp_path / "report.html").read_text()
    assert re.findall(r"https?://[^\s\"']+", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"@import|url\(", text)
    assert (
        "Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
        in text
    )


def test_what_comes_from_a_run_is_text_and_nothing_else(tmp_path):
    evil = '</script><script>injected()</script><img src=x onerror="injected()">&amp;'
    run = made_runs.write(
        tmp_path / "a<b>&quot;", rows(200), config={"optimizer": {"note": evil}},
        events=[start(git_commit=evil), event("warning", 20, text=evil), event("failed", 200, text=evil)],
        samples=[{"step": 100, "text": evil + "\x1b[2J\x00"}],
    )  # fmt: skip
    other = made_runs.write(tmp_path / "other", [row(10, **{f"eval_bits_per_byte/{evil}": 1.0})])
    made = page(tmp_path, run, other)
    assert "img" not in made.tags
    assert made.tags.count("script") == 2
    assert made.text.count(evil) >= 6  # config twice, commit, two events, sample, a panel
    assert "\\x1b[2J\\x00" in made.text
    assert made.data["runs"][0]["name"] == "a<b>&quot;"
    assert evil in made.data["marks"][0]["text"]


def test_curves_are_in_the_page_as_images_and_as_numbers(tmp_path):
    run = made_runs.write(tmp_path / "a", rows(1000))
    made = page(tmp_path, run)
    assert [one["key"] for one in made.data["panels"]] == [
        "loss", "eval_loss", "eval_bits_per_byte", "bits_per_byte", "lr", "grad_norm", "tokens_per_second",
        "step_time", "memory_bytes", "skipped_steps", "m1_norm",
    ]  # fmt: skip
    assert made.tags.count("figure") == 11
    loss, held_out = made.data["panels"][:2]
    raw, smooth = loss["series"]
    assert (raw["raw"], smooth["raw"]) == (True, False)
    assert raw["x"] == smooth["x"] == list(range(2, 1001, 2))
    assert raw["y"] == [float(f"{one['loss']:.5g}") for one in rows()]
    assert bends(smooth["y"]) < bends(raw["y"]) / 10
    assert held_out["series"][0]["x"] == list(range(100, 1001, 100))
    assert held_out["view"][:2] == loss["view"][:2] == [2, 1000]
    assert made.data["runs"][0]["tokens"] == [[0, 0], [1000, 100_000]]
    for number, one in enumerate(made.data["panels"]):
        drawn = drawing.draw(curves.panels(records.read([run]))[number])
        assert [bool(line.path) for line in drawn.lines] == [True] * len(one["series"])


def test_a_figure_that_was_not_finite_is_a_gap_and_an_event(tmp_path):
    metrics = [*rows(20, 1)[:17], row(18, loss=None, grad_norm=None), row(19, loss=None), row(20)]
    (one,) = records.read([made_runs.write(tmp_path / "a", metrics)])
    loss = curves.panels([one])[0]
    assert [value is None for _, value in loss.series[0].points] == [False] * 17 + [True, True, False]
    assert drawing.draw(loss).lines[0].path.count("M") == 2
    assert [line.text for line in story(one).lines] == [
        "loss is not finite at step 18 and 1 more rows, up to step 19", "grad_norm is not finite at step 18",
    ]  # fmt: skip
    alone = records.read([made_runs.write(tmp_path / "b", [row(1, loss=None, eval_loss=None)])])
    assert table(figures(alone))["train loss"] == ["not finite"]
    assert "loss" not in [panel.key for panel in curves.panels(alone)]


@pytest.mark.parametrize(
    ("metrics", "parts", "state"),
    [
        (rows(1000), {"events": [start(), event("finished", 1000)]}, "finished"),
        (rows(500), {"events": [start(), event("interrupted", 500, text="SIGTERM")]}, "stopped"),
        (rows(500), {"events": [start(), event("save", 500), event("failed", 500, text="a disk")]}, "failed"),
        (rows(500), {"events": [start(), event("save", 500)]}, "killed"),
        (rows(500), {"events": [start()], "lock": MINE}, "running"),
        (rows(500), {"events": [start()], "lock": MINE | {"pid": 2**22 + 1}}, "killed"),
        (rows(1000), {}, "finished"),
        (rows(500), {}, "unfinished"),
        ([], {"events": [start()], "lock": MINE}, "running"),
    ],
)
def test_the_state_of_a_run(tmp_path, metrics, parts, state):
    run = made_runs.write(tmp_path / "a", metrics, **parts)
    (one,) = records.read([run])
    shown = table(figures([one]))
    assert (one.state, shown["state"]) == (state, [state])
    assert shown["step"] == [f"{len(metrics) * 2:,} of 1,000"]
    assert shown.get("time left") == (["0:50"] if state == "running" and metrics else None)
    made = page(tmp_path, run)
    assert ("There are no metrics yet." in made.text) == (not metrics)
    assert ("killed: it could not say why" in made.text) == (state == "killed")


def test_rows_of_a_killed_start_that_overlap_are_drawn_once(tmp_path):
    """Until the run goes on, what lies beyond its checkpoint stands there; readers see one row a step, in order."""
    metrics = [*rows(60, 1), *rows(80, 1, shift=0.5)[40:]]
    run = made_runs.write(
        tmp_path / "a", metrics,
        events=[
            start(), event("save", 20), event("save", 40), start(40), event("save", 60), event("warning", 70, text="!"),
        ],
    )  # fmt: skip
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 81, "lo')
    (one,) = records.read([run])
    (loss,) = (panel for panel in curves.panels([one]) if panel.key == "loss")
    assert [step for step, _ in loss.series[0].points] == list(range(1, 81))
    assert loss.series[0].points[50][1] == pytest.approx(row(51, 0.5)["loss"])
    told = [(line.step, line.text.split(",")[0]) for line in story(one).lines]
    assert told == [
        (0, "started"), (40, "saved 2 checkpoints"), (None, "killed: it could not say why"), (40, "resumed at step 40"),
        (60, "saved a checkpoint"), (70, "!"), (None, "killed: it could not say why"),
    ]  # fmt: skip
    assert [(mark.step, mark.text) for mark in curves.marks([one])] == [(40, "a: resumed at step 40"), (70, "a: !")]


def test_stages_that_have_begun_are_events_and_marks(tmp_path):
    stages = [
        {"from_step": 20, "global_batch": 16, "weights": None},
        {"from_step": 50, "weights": {"code": 1, "text": 0.5}},
        {"from_step": 80, "global_batch": 32},
    ]
    run = made_runs.write(tmp_path / "a", rows(60), config={"train": {"steps": 100, "stages": stages}})
    told = [
        (20, "stage from step 21: global_batch 16"),
        (50, "stage from step 51: weights code 1, text 0.5"),
    ]
    (one,) = records.read([run])
    assert [(line.step, line.text) for line in story(one).lines] == told
    assert [(mark["step"], mark["text"]) for mark in page(tmp_path, run).data["marks"]] == [
        (step, f"a: {text}") for step, text in told
    ]
    (run / "config.yaml").write_text("train: {stages: 7}")
    assert records.read([run])[0].stages == []


def test_only_differing_keys_of_configs_are_compared(tmp_path):
    runs = [
        made_runs.write(tmp_path / "a", rows(10), config={"run": {"name": "a"}}),
        made_runs.write(
            tmp_path / "b", rows(10), config={"run": {"name": "b"}, "optimizer": {"lr": 0.1, "alpha": None}}
        ),
        made_runs.write(tmp_path / "c", rows(10), config={"data": {"sources": [{"source": "text", "paths": ["new"]}]}}),
    ]
    found = records.read(runs)
    assert table(differences(found)) == {
        "data.sources[0].paths": ['["text"]', '["text"]', '["new"]'],
        "optimizer.lr": ["0.001", "0.1", "0.001"],
        "optimizer.alpha": ["—", "null", "—"],
    }
    assert differences(found[:1]) is None
    assert "The configs are the same." in page(tmp_path, runs[0], made_runs.write(tmp_path / "d", rows(10))).text


def test_a_study_has_its_table_and_its_runs_in_natural_order(tmp_path):
    folder = tmp_path / "grid"
    for name in ("lr-1-seed10", "lr-1-seed2", "lr-2-seed2"):
        made_runs.write(folder / name, rows(50))
    (folder / "logs").mkdir()
    variant = {
        "eval_loss": 3.25, "eval_loss_spread": 0.01, "gain": None, "gain_spread": None, "tokens_to_baseline": 5e6,
        "step_time": 0.25, "state_bytes": 4e6,
    }  # fmt: skip
    results = {"baseline": "lr-1", "best": "lr-2", "variants": [variant | {"name": "lr-1"}, variant | {"name": "lr-2"}]}
    (folder / "results.json").write_text(json.dumps(results))
    made = page(tmp_path, folder)
    assert [run["name"] for run in made.data["runs"]] == ["lr-1-seed2", "lr-1-seed10", "lr-2-seed2"]
    for text in ("Study grid", "lr-2 (best)", "3.2500 ± 0.0100", "5.00 M", "250.0", "4 MB"):
        assert text in made.text
    (folder / "results.json").write_text("[]")
    with pytest.raises(InputError, match=r"results\.json is no study's of this version"):
        page(tmp_path, folder)


def test_runs_of_one_name_are_told_apart_and_none_stands_twice(tmp_path):
    runs = [made_runs.write(tmp_path / where / "a", rows(4)) for where in ("x/one", "y/one", "z/two")]
    found = records.read([*runs, runs[0] / ".." / "a"])
    assert [one.name for one in found] == ["x/one/a", "y/one/a", "two/a"]


def test_folders_that_hold_no_run_or_a_damaged_one_are_named(tmp_path):
    for nothing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"{nothing} holds no run: give a run's folder"):
            records.read([nothing])
    run = made_runs.write(tmp_path / "a", rows(4))
    (run / "config.yaml").rename(run / "other.yaml")
    with pytest.raises(InputError, match=f"{run}/config.yaml: there is none"):
        records.read([run])
    (run / "other.yaml").rename(run / "config.yaml")
    (taken := tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match=r"--output: cannot write .*taken: Is a directory"):
        write([run], taken)
    assert [path.name for path in tmp_path.iterdir() if path != run] == ["taken"]


@pytest.mark.parametrize(
    ("file", "content", "warning"),
    [
        ("config.yaml", b"a: [", "config.yaml is damaged: while parsing"),
        ("config.yaml", b"\xff", "config.yaml is damaged: 'utf-8' codec"),
        ("config.yaml", b"[]", "config.yaml is damaged: it holds no sections"),
        ("data.json", b"{", "data.json is damaged: Expecting property name"),
        ("samples.jsonl", b"7\n{}\n", "samples.jsonl: 1 line cannot be read"),
        ("events.jsonl", b"\xff", "events.jsonl: 1 line cannot be read"),
        ("metrics.jsonl", b"\x00\xff\n\n[[[[\n\xfe", "metrics.jsonl: 3 lines cannot be read"),
    ],
)
def test_a_damaged_file_is_named_on_the_console_and_the_page_which_does_without_it(
    tmp_path, capsys, file, content, warning
):
    run = made_runs.write(tmp_path / "a", rows(40), events=[start(), event("finished", 40)])
    (run / file).write_bytes(content)
    assert cli.main(["report", str(run)]) == 1
    assert f"warning: {run}/{warning}" in capsys.readouterr().out
    made = Page(run / "report.html")
    assert warning in made.text
    assert "no metrics yet" not in made.text
    assert ("no metrics that can be read" in made.text) == (file == "metrics.jsonl")
    assert table(figures(records.read([run])))["step"] == ["40" if file == "config.yaml" else "40 of 1,000"]


def test_a_half_written_last_line_is_no_damage(tmp_path):
    run = made_runs.write(tmp_path / "a", [])
    (run / "metrics.jsonl").write_text('{"step": 1, "lo')
    assert records.read([run])[0].damage == []


def test_damaged_runs_in_a_folder_are_named_and_the_others_shown(tmp_path, capsys):
    runs = {name: made_runs.write(tmp_path / "runs" / name, rows(40)) for name in ("good", "torn", "unknown")}
    (runs["torn"] / "config.yaml").write_text("a: [")
    (runs["unknown"] / "config.yaml").unlink()
    assert cli.main(["report", str(tmp_path / "runs")]) == 1
    said = capsys.readouterr().out
    made = Page(tmp_path / "runs" / "report.html")
    assert [run["name"] for run in made.data["runs"]] == list(runs)
    assert made.text.count("is damaged: while parsing") == said.count(f"{runs['torn']}/config.yaml is damaged") == 1
    for text in (said, made.text):
        assert "config.yaml cannot be read: No such file or directory" in text
        assert "good/" not in text


def test_data_of_another_version_is_said_to_be_so_and_shown_once_for_runs_that_share_it(tmp_path):
    runs = [made_runs.write(tmp_path / name, rows(4), data={"sources": [{"label": "old"}]}) for name in "ab"]
    assert page(tmp_path, *runs).text.count("data.json is of another version of shardopt (KeyError('documents'))") == 1


def test_thinning_keeps_first_and_last_every_peak_and_every_gap_and_the_order():
    points = [(step, math.sin(step / 50)) for step in range(10_000)]
    points[5432] = (5432, 9.0)
    points[7654] = (7654, -9.0)
    kept = curves.thin(points, 100)
    assert len(kept) <= 100
    assert kept == sorted(kept)
    assert {points[0], points[-1], points[5432], points[7654]} <= set(kept)
    points[3333] = (3333, None)
    kept = curves.thin(points, 100)
    assert len(kept) <= 100
    assert {points[3333], points[5432], points[7654]} <= set(kept)
    assert curves.thin(points[:100], 100) == points[:100]


@pytest.mark.parametrize(("runs", "steps"), [(1, 20_000), (30, 300)])
def test_long_runs_and_many_runs_make_a_page_below_two_megabytes(tmp_path, runs, steps):
    events = [start(), *(event("warning", step, text="x" * 100) for step in range(1000))]
    folders = [made_runs.write(tmp_path / f"r{i}", rows(steps, 1, i / 9), events=events) for i in range(runs)]
    made = page(tmp_path, *folders)
    assert (tmp_path / "report.html").stat().st_size < 2e6
    first = made.data["panels"][0]["series"]
    assert len(first) == (2 if runs == 1 else runs)
    assert all(30 <= len(one["x"]) <= 1000 for one in first)
    left_out = 1002 - min(200, 2000 // runs)  # of a start, the warnings, and that there is no end
    assert made.text.count(f"{left_out} older events are left out") == runs


def test_tokens_of_steps_are_known_at_those_where_their_growth_changes(tmp_path):
    metrics = [row(step, tokens=100 * step if step <= 40 else 4000 + 200 * (step - 40)) for step in range(10, 101, 10)]
    (one,) = records.read([made_runs.write(tmp_path / "a", metrics)])
    assert _tokens(one) == [(0, 0), (40, 4000), (100, 16_000)]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1000, ["0", "200", "400", "600", "800", "1000"]),
        (12_300, 13_100, ["12.4k", "12.6k", "12.8k", "13k"]),
        (-0.1, 0.25, ["-0.1", "0", "0.1", "0.2"]),
        (0, 3e-5, ["0", "1e-5", "2e-5", "3e-5"]),
        (0, 5e9, ["0", "1G", "2G", "3G", "4G", "5G"]),
    ],
)
def test_ticks_are_round_and_short(low, high, ticks):
    assert [drawing.label(tick) for tick in drawing.ticks(low, high, 5)] == ticks


@pytest.mark.parametrize(
    ("low", "high", "labels", "offset"),
    [
        (2.1, 2.9, ["2.2", "2.4", "2.6", "2.8"], ""),
        (-0.0013, 0.001, ["-0.001", "-5e-4", "0", "5e-4", "0.001"], ""),
        (0.0049849, 0.0049863, ["0", "5e-7", "1e-6"], "0.004985"),
        (12_345_600, 12_345_900, ["0", "100", "200", "300"], "12.3456M"),
    ],
)
def test_labels_of_a_y_axis_differ_and_are_short(low, high, labels, offset):
    assert drawing.labels(drawing.ticks(low, high, 5)) == (labels, offset)


def test_held_out_loss_may_be_missing_and_sources_have_panels_of_their_own(tmp_path):
    without = made_runs.write(tmp_path / "a", [row(step) for step in range(1, 9)])
    of_sources = made_runs.write(
        tmp_path / "b", [evaluated(8, **{"eval_bits_per_byte/code": 0.5, "eval_loss/code": 1.0})]
    )
    found = records.read([without, of_sources])
    assert table(figures(found))["held-out loss"] == ["", f"{evaluated(8)['eval_loss']:.4f}"]
    panels = {panel.key: panel for panel in curves.panels(found)}
    assert [one.run for one in panels["eval_loss"].series] == [1]
    assert panels["eval_bits_per_byte/code"].main
    assert "eval_loss/code" not in panels
