"""events.jsonl: what happened to a run, through failures, resumptions and half-written lines."""

import json

import pytest

from shardopt.pretrain import loop
from shardopt.pretrain.events import EventsFile, read_events
from tests.pretrain import tiny

RUN = {"run__name": "told", "engine": "{name: single}", "checkpoint__every": 2, "train__steps": 6}


def test_a_run_that_fails_and_goes_on_tells_its_starts_saves_warnings_and_ends(tmp_path, monkeypatch):
    tiny.corpus(tmp_path / "text")
    monkeypatch.setattr(loop, "limits", lambda *_: [])
    with monkeypatch.context() as patch:

        def broken(*_):
            raise RuntimeError("the disk has\nburnt")

        patch.setattr(loop, "held_out", broken)
        patch.setattr(loop, "limits", lambda *_: ["said before there was a file"])
        with pytest.raises(RuntimeError, match="burnt"):
            tiny.run(0, 1, tmp_path, eval__every=3, **RUN)
    result = tiny.run(0, 1, tmp_path, eval__every=3, **RUN)
    events = read_events(result.folder / "events.jsonl")
    assert [(event["event"], event["step"]) for event in events] == [
        ("warning", 0), ("start", 0), ("save", 2), ("failed", 2),
        ("start", 2), ("save", 4), ("save", 6), ("finished", 6),
    ]  # fmt: skip
    assert events[0]["text"] == "said before there was a file"
    assert events[3]["text"] == "the disk has\nburnt"
    assert sorted(event["time"] for event in events) == [event["time"] for event in events]
    start = events[4]
    assert (start["about"]["engine"], start["about"]["world_size"]) == ("single", 1)
    sizes = start["memory"]["bytes"]
    assert start["memory"]["columns"] == ["rank 0", "unsharded"]
    assert sizes["weights"] == [4 * start["about"]["parameters"]] * 2
    assert sizes["total"] == [sum(one[i] for kind, one in sizes.items() if kind != "total") for i in (0, 1)]


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
