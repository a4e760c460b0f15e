"""scripts/bench_all.py: its list of parts, what it leaves alone, and its page."""

import argparse
import importlib
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
from scipy import stats

from scripts import bench_all, bench_page
from shardopt import cli
from shardopt.pretrain.config import load
from shardopt.pretrain.plot import canvas, save
from shardopt.pretrain.study.plan import Study

ROOT = Path(__file__).parent.parent
PARTS = bench_all.read_parts()
ABOUT = {"command": "made up", "seconds": 60, "date": "2026-01-01", "load_before": 0.1, "processor": "none", "cores": 2,
         "gpus": [], "torch": "2", "commit": "abc"}  # fmt: skip


class Parsed(Exception):
    """The script has taken its arguments."""


def test_every_part_is_a_command_that_its_program_takes(monkeypatch, tmp_path):
    studies = []
    monkeypatch.setattr("shardopt.pretrain.study.run.run", lambda study, jobs, dry_run: studies.append(study) or 0)
    # One config of each variant: seeds differ in nothing else.
    one = lambda study, variant, seed: study.config_of(variant) if seed == study.seeds[0] else None  # noqa: E731
    monkeypatch.setattr(Study, "_trial", one)
    for part in PARTS:
        words = part.words(tmp_path, guess="0.004")
        assert not any("{out" in word or "{runs" in word or "{best" in word for word in words), part.name
        if words[:2] == ["shardopt", "plan"]:
            assert load(words[2], [])
            continue
        if words[0] == "shardopt":
            assert cli.main(words[1:]) == 0, part.name
            assert studies[-1].name == part.name == part.study_name
            continue
        script = next(word for word in words if word.endswith(".py"))
        module = importlib.import_module(Path(script).with_suffix("").as_posix().replace("/", "."))
        given = words[words.index(script) + 1 :]
        if "torchrun" in words:
            assert load(given[0], given[1:])
            continue
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", [script, *given])
            for name in ("parse_args", "parse_intermixed_args"):
                patched.setattr(argparse.ArgumentParser, name, taking(getattr(argparse.ArgumentParser, name)))
            with pytest.raises(Parsed):
                module.main()
    steps = {study.name: study.base.train.steps for study in studies}
    assert steps["byte"] >= 3000
    assert len(next(s for s in studies if s.name == "byte").seeds) == 5
    reported = {seed for study in studies if not study.name.startswith("lr-") for seed in study.seeds}
    tuned = {seed for study in studies if study.name.startswith("lr-") for seed in study.seeds}
    assert tuned
    assert not tuned & reported


def taking(parse):
    def parsed(self, *given, **named):
        raise Parsed(parse(self, *given, **named))

    return parsed


def test_the_best_value_of_a_study_is_taken_from_its_config(tmp_path):
    part = bench_all.Part("a", "c", "t", 1, "shardopt compare x --set adamw.lr={best:lr:optimizer.lr} --name a")
    with pytest.raises(bench_all.NotYet, match="a needs the result of lr"):
        part.words(tmp_path, tmp_path)
    (tmp_path / "lr").mkdir()
    (tmp_path / "lr" / "best.yaml").write_text("optimizer: {lr: 0.002}\n")
    assert part.words(tmp_path / "out", tmp_path)[4] == "adamw.lr=0.002"
    # Of results that were copied, without their runs.
    assert part.words(tmp_path, tmp_path / "runs")[4] == "adamw.lr=0.002"


def test_a_part_that_fails_leaves_nothing_and_one_that_succeeds_is_left_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(bench_all, "machine", lambda: {key: ABOUT[key] for key in ABOUT if key not in ("command",)})
    written = tmp_path / "list.yaml"
    monkeypatch.setattr(bench_all, "read_parts", lambda: [bench_all.Part("a", "c", "A title", 1, written.read_text())])
    monkeypatch.setattr(sys, "argv", ["bench_all", "--out", str(tmp_path / "out")])
    written.write_text("sh -c 'echo half > {out}/half; exit 3'")
    assert bench_all.main() == 1
    assert not (tmp_path / "out" / "a").exists()
    assert "Not run yet: a." in (tmp_path / "out" / "benchmarks.md").read_text()
    written.write_text("sh -c 'echo whole > {out}/whole.txt; echo said'")
    assert bench_all.main() == 0
    assert sorted(p.name for p in (tmp_path / "out" / "a").iterdir()) == ["part.json", "table.txt", "whole.txt"]
    page = (tmp_path / "out" / "benchmarks.md").read_text()
    assert "A title" in page
    assert "\n    said\n" in page, "what is no table keeps its columns"
    assert str(tmp_path / "out" / "a") in page
    written.write_text("sh -c 'exit 3'")
    assert bench_all.main() == 0
    assert "a: there" in capfd.readouterr().out
    shutil.rmtree(tmp_path / "out" / "a")
    monkeypatch.setattr(sys, "argv", ["bench_all", "--out", str(tmp_path / "out"), "--page"])
    assert bench_all.main() == 0
    assert "Not run yet: a." in (tmp_path / "out" / "benchmarks.md").read_text()


def made_up_study(folder, adamw, ademamix):
    def variant(name, losses, reached):
        runs = [{"seed": seed, "train_loss": loss - 0.5, "eval_loss": loss, "tokens": 1000,
                 "eval_bits_per_byte": loss / math.log(2)} for seed, loss in enumerate(losses)]  # fmt: skip
        return {"name": name, "runs": runs, "tokens_to_baseline": reached}

    variants = [variant("adamw", adamw, None), variant("ademamix", ademamix, 750.0)]
    results = {"baseline": "adamw", "seeds": list(range(len(adamw))), "variants": variants}
    (folder / "results.json").write_text(json.dumps(results))


def test_the_page_has_each_results_command_machine_table_and_plots(tmp_path):
    out = tmp_path / "docs" / "benchmarks"
    folder = out / "byte"
    folder.mkdir(parents=True)
    adamw, ademamix = [1.31, 1.33, 1.30, 1.32], [1.30, 1.325, 1.31, 1.285]
    made_up_study(folder, adamw, ademamix)
    (folder / "part.json").write_text(json.dumps(ABOUT | {"command": "shardopt compare x.yaml --name byte"}))
    figure = canvas(1, 1)
    save(figure, folder / "curves.png")
    page = bench_page.write(PARTS, out)
    text = page.read_text()
    assert page == tmp_path / "docs" / "benchmarks.md"
    assert text.startswith(bench_page.INTRODUCTION.read_text())
    elsewhere = bench_page.write(PARTS, tmp_path / "elsewhere").read_text()
    assert "(memory.png)" in text
    assert "(memory.png)" not in elsewhere, "a link of docs/"
    assert "    shardopt compare x.yaml --name byte\n" in text
    assert "none, 2 cores, torch 2, commit abc" in text
    picture = text.rpartition("![")[2].partition("](")[2].partition(")")[0]
    assert (page.parent / picture).exists()
    assert picture.endswith("curves.png")
    row = next(line for line in text.splitlines() if line.startswith("| ademamix "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1].startswith("0.8050 ± ")
    assert cells[2].startswith("1.3050 ± ")
    assert cells[-1] == "75 %"
    assert cells[6].startswith("-0.0100 ± ")
    assert cells[7] == f"{stats.ttest_rel(ademamix, adamw).pvalue:.3f}"
    assert "Not run yet: lr-adamw-byte, " in text
    assert ", byte, " not in text


def test_the_page_of_docs_is_made_by_the_script():
    page, introduction = (path.read_text() for path in (ROOT / "docs" / "benchmarks.md", bench_page.INTRODUCTION))
    assert page.startswith(introduction), (
        "write it in scripts/bench_intro.md, then scripts/bench_all.sh --out docs/benchmarks --page"
    )


def test_a_paired_test_takes_the_seeds_that_both_have():
    test = bench_page.Paired.of({0: 1.0, 1: 1.1, 2: 1.2, 9: 5.0}, {0: 0.9, 1: 1.05, 2: 1.0, 7: 0.0})
    assert test.differences == pytest.approx([-0.1, -0.05, -0.2])
    assert test.p == pytest.approx(stats.ttest_rel([0.9, 1.05, 1.0], [1.0, 1.1, 1.2]).pvalue)
    assert math.isnan(bench_page.Paired.of({0: 1.0}, {0: 2.0}).p)


def test_panels_with_bands_marks_and_log_axes_are_drawn(tmp_path):
    line = bench_page.Line([1, 10, 100], [3.0, 2.0, 1.0], [0.1, 0.1, 0.1])
    panel = bench_page.Panel(
        "a", "x", "y", {"one": line}, xscale="log", yscale="log", marks={"here": 10.0}, settled=True
    )
    bench_page.draw([panel, panel], tmp_path / "two.png", "title")
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")
