"""events.jsonl: what happened to a run, through failures, resumptions and half-written lines, and its page."""

import json

import pytest

from shardopt.pretrain import loop
from shardopt.pretrain.events import EventsFile, read_events
from shardopt.pretrain.page import records, tables
from shardopt.pretrain.page.story import story
from shardopt.pretrain.page.write import write
from shardopt.pretrain.report import count
from tests.pretrain import tiny

RUN = {"run__name": "told", "engine": "{name: single}", "checkpoint__every": 2, "train__steps": 6}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that failed at its step 3 and then went on from step 2 to its end."""
    folder = tmp_path_factory.mktemp("events")
    tiny.corpus(folder / "text")

    def broken(*_):
        raise RuntimeError("the disk has\nburnt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "limits", lambda *_: ["said before there was a file"])
        with patch.context() as at_first:
            at_first.setattr(loop, "held_out", broken)
            with pytest.raises(RuntimeError, match="burnt"):
                tiny.run(0, 1, folder, eval__every=3, **RUN)
        patch.setattr(loop, "limits", lambda *_: [])
        return tiny.run(0, 1, folder, eval__every=3, **RUN).folder


def test_a_run_that_fails_and_goes_on_tells_its_starts_saves_warnings_and_ends(run):
    events = read_events(run / "events.jsonl")
    assert [(event["event"], event["step"]) for event in events] == [
        ("start", 0), ("warning", 0), ("save", 2), ("failed", 2),
        ("start", 2), ("save", 4), ("save", 6), ("finished", 6),
    ]  # fmt: skip
    assert events[1]["text"] == "said before there was a file"
    assert events[3]["text"] == "the disk has\nburnt"
    assert sorted(event["time"] for event in events) == [event["time"] for event in events]
    start = events[4]
    assert (start["about"]["engine"], start["about"]["world_size"]) == ("single", 1)
    sizes = start["memory"]["bytes"]
    assert start["memory"]["columns"] == ["rank 0", "unsharded"]
    assert sizes["weights"] == [4 * start["about"]["parameters"]] * 2
    assert sizes["total"] == [sum(one[i] for kind, one in sizes.items() if kind != "total") for i in (0, 1)]


def test_the_page_of_a_run_shows_what_its_folder_holds(run, tmp_path):
    (record,) = records.read([run])
    shown = {cells[0]: cells[1] for cells in tables.figures([record]).rows}
    last = record.rows[-1]
    assert (shown["state"], shown["step"], shown["engine"]) == ("finished", "6 of 6", "single, 1 rank")
    assert (shown["train loss"], shown["held-out loss"]) == (f"{last['loss']:.4f}", f"{last['eval_loss']:.4f}")
    assert [line.text.partition(",")[0] for line in story(record).lines] == [
        "started", "said before there was a file", "saved a checkpoint", "failed: the disk has\nburnt",
        "resumed at step 2", "saved 2 checkpoints", "finished",
    ]  # fmt: skip
    held = {cells[0]: cells[1:] for cells in tables.memory(record).rows}
    assert held["m2, slow average"] == held["weights"]
    (text,) = tables.texts([record])
    assert text.facts["data"] == [
        f"{count(record.data['tokens'])} tokens, fingerprint {record.data['fingerprint'][:12]}"
    ]
    assert "stages" not in text.facts  # there is one alone
    assert text.sources.rows[0][:2] == ["text", "60"]
    write([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert all(part in page for part in ("nu, second moment", "60 (", "the disk has\nburnt", "git commit"))


def test_lines_that_a_full_disk_has_torn_are_ended_and_left_out(tmp_path):
    file = EventsFile(tmp_path / "new" / "events.jsonl")
    file.event("start", 0, {"about": {"torch": "2"}})
    with file.path.open("ab") as torn:
        torn.write(b'{"time": 1, "ev')
    file.event("save", 10, {})
    with file.path.open("ab") as strange:
        strange.write(b'{"event": "save"}\n[1]\n')
    assert [(e["event"], e["step"]) for e in read_events(file.path)] == [("start", 0), ("save", 10)]
    assert json.loads(file.path.read_text().splitlines()[0])["about"] == {"torch": "2"}
    assert read_events(tmp_path / "none.jsonl") == []
