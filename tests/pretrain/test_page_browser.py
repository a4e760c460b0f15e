"""The page of `shardopt report` in a real browser: without scripts, at phone width, in the dark, and worked with."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from shardopt.pretrain.page.write import write
from tests.pretrain import made_runs
from tests.pretrain.made_runs import event, row, rows, start

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--allow-file-access-from-files",
    "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom",
]  # fmt: skip
DRIFT = "eval_bits_per_byte/of a source that hardly changes"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What browser.html finds in a page of three runs; the console's lines are in `console`."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no chromium on the PATH (apt-get install chromium)")
    folder = tmp_path_factory.mktemp("browser")
    evil = "</script><script>injected = true</script><img src=x onerror='injected = true'>"
    runs = [
        made_runs.write(folder / "runs" / "a", rows(), events=[start(), event("warning", 500, text=evil), start(500)]),
        made_runs.write(folder / "runs" / "b<img src=x onerror='injected = true'>", rows(shift=0.4)),
        made_runs.write(
            folder / "runs" / "c",
            [*({**one, DRIFT: 0.004985 + 1e-9 * one["step"]} for one in rows(400)), row(402, loss=None)],
            config={"optimizer": {"note": evil, "long": "x" * 400}}, samples=[{"step": 9, "text": evil * 9}],
        ),
    ]  # fmt: skip
    write(runs, folder / "report.html")
    shutil.copy(Path(__file__).parent / "browser.html", folder)
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"file://{folder}/browser.html"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    answer = re.search(r'<pre id="found">(.+?)</pre>', ran.stdout, re.DOTALL)
    assert answer is not None, ran.stderr
    console = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(answer[1])) | {"console": console}


def shown(lines):
    return [line["run"] for line in lines if line["shown"]]


ALL = [f"r{run}{kind}" for kind in (" raw", "") for run in range(3)]


def test_the_page_opens_without_an_error_and_runs_nothing_that_it_was_given(found):
    assert found["titles"][:4] == ["Figures", "Curves", "Differing keys of the configs", "Events"]
    # The frame without scripts says so; a policy, a script or a request that failed would be another line.
    assert [line for line in found["console"] if "document's frame is sandboxed" not in line] == []
    assert (found["injected"], found["scripts"]) == (False, 2)


@pytest.mark.parametrize("reader", ["desk", "phone", "dark", "plain"])
def test_every_reader_sees_all_curves_with_labels_and_nothing_runs_out_of_the_page(found, reader):
    seen = found[reader]
    assert shown(seen["lines"]) == ALL
    assert all(line["points"] > 100 and line["inside"] for line in seen["lines"])
    assert len(seen["labels"]) >= 2
    assert seen["labels"][-1] == "1000"
    assert seen["overflow"] == 0
    assert seen["cut"] == []
    assert seen["offsets"] == ["+ 0.0049851"]


def test_letters_on_a_phone_are_as_large_as_elsewhere(found):
    assert (found["phone"]["text"], found["phone"]["scale"]) == ("12.5px", 1)


def test_the_dark_is_dark(found):
    def lightness(colour):
        return sum(map(int, re.findall(r"\d+", colour)))

    (ground, ink), (dark_ground, dark_ink) = ([lightness(c) for c in found[of]["colours"]] for of in ("desk", "dark"))
    assert ground - ink > 600
    assert dark_ink - dark_ground > 600


def test_curves_are_printed_as_wide_as_they_come_whatever_the_screen(found):
    assert set(found["print"]) == {480}
    assert len(found["print"]) > 7


def test_without_scripts_there_are_no_dead_controls_and_runs_are_still_hidden(found):
    assert found["plain"]["controls"] == 0
    assert shown(found["plain"]["hidden"]) == [run for run in ALL if not run.startswith("r0")]


def test_hovering_tells_the_values_of_the_runs_at_a_step(found):
    losses = [re.search(rf"{re.escape(name)} ([\d.]+) at (\d+)", found["tip"]) for name in ("a", "'>", "c")]
    assert [int(each[2]) for each in losses] == [500, 500, 400]
    assert float(losses[0][1]) == pytest.approx(row(500)["loss"], abs=0.3)
    assert float(losses[1][1]) - float(losses[0][1]) == pytest.approx(0.4, abs=0.02)


def test_dragging_zooms_every_curve_and_a_double_click_goes_back(found):
    zoomed = found["zoomed"]
    assert zoomed["labels"] == zoomed["other"] == ["300", "350", "400", "450", "500"]
    low, high = map(float, re.fullmatch(r"#zoom=([\d.]+)-([\d.]+)", zoomed["address"]).groups())
    assert (low, high) == (pytest.approx(251, abs=3), pytest.approx(501, abs=3))
    assert found["reset"] == {"labels": found["desk"]["labels"], "address": ""}


def test_a_run_is_hidden_by_its_box_and_the_address_keeps_it(found):
    assert shown(found["hidden"]["lines"]) == [run for run in ALL if not run.startswith("r0")]
    assert found["hidden"]["address"] == "#hide=0"


def test_an_address_that_was_shared_shows_the_same(found):
    shared = found["shared"]
    assert shared["labels"] == ["20k", "22k", "24k", "26k", "28k", "30k"]  # tokens, 100 a step
    assert shown(shared["lines"]) == [run for run in ALL if not run.startswith("r1")]
    assert [line["dots"] for line in shared["lines"]] == [0, 0, 0, 51, 51, 51]  # few enough to be told apart


def test_log_axes_have_ticks_of_their_own_and_show_all_that_is_positive(found):
    logs = found["logs"]
    assert logs["labels"] == ["2", "5", "10", "20", "50", "100", "200", "500", "1000"]
    place = dict(zip(logs["labels"], logs["places"], strict=True))
    assert place["50"] - place["5"] == pytest.approx(place["200"] - place["20"], abs=0.5)
    assert logs["y"] == ["3", "5", "7", "10"]
    assert all(line["inside"] for line in logs["lines"])
