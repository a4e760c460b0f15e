"""What a branch refuses and says, from configs alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardopt.errors import InputError
from shardopt.pretrain import branch
from tests.pretrain import tiny


def test_amsgrad_is_refused_in_the_words_of_from_adamw(tmp_path: Path) -> None:
    old = tiny.config(tmp_path, optimizer="{name: amsgrad, lr: 1e-3}").as_dict()
    with pytest.raises(InputError, match=r"optimizer\.name: amsgrad → ademamix: .*amsgrad"):
        branch._take_over(old, tiny.config(tmp_path))


def test_more_changes_than_fit_are_counted_and_left_to_the_record() -> None:
    changed = {f"data.key{i}": {"from": 0, "to": i} for i in range(1, 21)}
    record = {"checkpoint": "there", "taken_over": [], "tokens": 1, "begins_anew": [], "left_behind": [], "data": ""}
    *lines, last = branch._facts(record | {"changed": changed})["new"]
    assert lines == [f"data.key{i}: 0 → {i}" for i in range(1, 12)]
    assert last == "and 9 more, in branch.yaml"
