"""scripts/gpu_check.py on a machine without a GPU: its cases, its clock, and its page by results that are made up."""

import importlib
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("gpu_check")


def test_cases_fit_ten_minutes_and_their_functions_exist(gpu_check):
    at_once = max(case.limit for case in gpu_check.CASES if not case.measures)
    assert at_once + sum(case.limit for case in gpu_check.CASES if case.measures) <= 600
    for case in gpu_check.CASES:
        module, function = case.where.split(":")
        assert f"def {function}(" in (ROOT / "scripts" / f"{module}.py").read_text()


def test_a_machine_without_a_gpu_is_said(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_check.main(["bitz"])
    assert "no case is called 'bitz'; there are bits, graphs" in capsys.readouterr().err


def test_what_there_is_no_time_for_is_said(gpu_check):
    """Cases that take 45 seconds each, in two minutes: the third is cut short, the fourth is not begun."""
    now, given = [0.0], []

    def run(case, seconds):
        given.append(seconds)
        now[0] += min(45, seconds)
        yield case.name, True, "fine"

    cases = [gpu_check.Case(name, 50, "", "", measures=True) for name in "abcd"]
    results = list(gpu_check.check(cases, 2, run, lambda: now[0]))
    assert given == [50, 50, 30]
    assert [result.rows[0][1:] for result in results] == [(True, "fine")] * 3 + [(None, "no time was left")]
    assert [result.seconds for result in results] == [45, 45, 30, None]


def test_cases_that_measure_have_the_gpu_to_themselves_and_the_others_run_at_once(gpu_check):
    running, together = set(), threading.Barrier(3)

    def run(case, seconds):
        running.add(case.name)
        if not case.measures:
            together.wait(timeout=30)
        yield case.name, True, " ".join(sorted(running)) if case.measures else ""
        running.remove(case.name)

    cases = [gpu_check.Case(name, 50, "", "", measures=name in "bd") for name in "abcde"]
    rows = [row for result in gpu_check.check(cases, 2, run) for row in result.rows]
    assert rows == [("a", True, ""), ("c", True, ""), ("e", True, ""), ("b", True, "b"), ("d", True, "d")]


FIRST = ("first", True, "of two")
CHILD = """
import json, sys
with open(sys.argv[sys.argv.index("--rows") + 1], "w") as rows:
    print(json.dumps(["first", True, "of two"]), file=rows)
sys.exit(3)
"""


def test_a_case_that_dies_keeps_its_rows(gpu_check, monkeypatch, tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(gpu_check, "__file__", str(tmp_path / "child.py"))
    dies = gpu_check.Case("dies", 90, "", "")
    assert list(gpu_check.in_process(dies, 90)) == [FIRST, ("dies", False, "its process ended with 3: see its output")]


def test_a_case_that_hangs_is_ended_with_all_that_it_started_and_keeps_its_rows(gpu_check, monkeypatch):
    ended = []

    class Hangs:
        pid = 77

        def __init__(self, command, **options):
            assert options["start_new_session"]
            Path(command[command.index("--rows") + 1]).write_text(json.dumps(FIRST) + "\n")

        def wait(self, seconds=None):
            if seconds is not None:
                raise subprocess.TimeoutExpired("case", seconds)

    monkeypatch.setattr(subprocess, "Popen", Hangs)
    monkeypatch.setattr(os, "killpg", lambda *given: ended.append(given))
    case = gpu_check.Case("hangs", 9, "", "")
    assert list(gpu_check.in_process(case, 9)) == [FIRST, ("hangs", False, "ended after 9 s")]
    assert list(gpu_check.in_process(case, 4)) == [FIRST, ("hangs", None, "ended after 4 s, as time ran out")]
    assert ended == [(77, 9)] * 2


def test_the_page_names_the_machine_what_failed_and_what_was_not_run(gpu_check):
    bits, graphs, large = gpu_check.CASES[:3]
    results = [
        gpu_check.Result(bits, [("fp32", True, "the same bits"), ("bf16", True, "the same bits")], 30.4),
        gpu_check.Result(graphs, [("defaults", True, "the same bits"), ("a|b", False, "3 of 4")], 9.0),
        gpu_check.Result(large, [("2^31", None, "needs 30 GB")], None),
    ]
    text = gpu_check.page(results, "1 x NVIDIA H100", 70.0)
    assert "Made on 1 x NVIDIA H100, in 70 s: 3 checks hold, 1 fail, 1 were not run." in text
    assert re.search(r"\| bits \| .* \| ok \| 30 \|", text)
    assert re.search(r"\| graphs \| .* \| \*\*FAIL\*\* \| 9 \|", text)
    assert re.search(r"\| large \| .* \| not run \|  \|", text)
    assert "| 2 combinations of formats and options | ok | the same bits |" in text
    assert "| a\\|b | **FAIL** | 3 of 4 |" in text
    assert "| 2^31 | not run | needs 30 GB |" in text
    assert re.search(r"\| speed \| .* \| not run \|  \|", text)  # it was not asked for


def test_docs_gpu_md_is_a_page_of_this_script(gpu_check):
    """Without results, until a GPU has been there; then with every case's."""
    text = (ROOT / "docs" / "gpu.md").read_text()
    if "Nothing below has been measured" in text:
        assert text == gpu_check.page([], "", 0.0)
    for case in gpu_check.CASES:
        assert f"| {case.name} | {case.shows} |" in text


def test_parts_that_a_cpu_has_too_are_right_there(gpu_check, monkeypatch):
    """The checks themselves: what they call exists, and what needs no GPU holds."""
    parts = importlib.import_module("gpu_parts")
    monkeypatch.setattr(parts, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    checks = (parts.read_ahead, parts.random_numbers)
    rows = {what: (ok, figures) for what, ok, figures in map(parts.attempt, "ab", checks)}
    assert all(ok for ok, _ in rows.values()), rows
    assert parts.staged() == ("a save's copy to the host", False, "pinned: False")
    assert parts.names()[1]
    assert parts.attempt("halves", lambda: 1 / 0) == ("halves", False, "ZeroDivisionError: division by zero")


@pytest.fixture(autouse=True)
def _forget_scripts():
    yield
    for name in ("gpu_check", "gpu_parts"):
        sys.modules.pop(name, None)


def test_the_figures_of_a_training_are_those_of_its_later_rows(gpu_check):
    figures = importlib.import_module("gpu_train").figures
    same = {"mfu": 0.1, "step_time": 0.5, "update": 0.01}
    rows = [
        {"step": 10 * i, "loss": 10 / i, "tokens_per_second": 1e5 * i, "memory_bytes": i << 30, **same}
        for i in range(1, 7)
    ]
    rows.append({"step": 60, "eval_loss": 7.5})
    assert figures(rows) == (
        "held-out loss 7.500 after 60 steps (training: 10.00 at first), 450k tokens/s, MFU 10%, "
        "500 ms a step, of that the update 10.0, peak 6.0 GiB",
        True,
    )
    assert not figures([*rows, {"step": 60, "eval_loss": 8.5}])[1]
