"""What a branch refuses and says, from configs alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from shardopt.errors import InputError
from shardopt.pretrain import branch
from tests.checkpoint import made
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


def test_the_screen_has_the_engine_and_each_key_of_a_source_as_yaml_has_them(tmp_path: Path) -> None:
    old = tiny.config(tmp_path, engine="{name: single}", optimizer__betas="[0.8, 0.9, 0.99]").as_dict()
    sources = f"[{{source: text, paths: [{tmp_path}], weight: 2.0}}]"
    new = tiny.config(tmp_path, data__sources=sources, train__grad_clip="null", engine="{name: fsdp}")
    changed = branch._take_over(old, new).changed
    lines = [branch._line(key, *values) for key, values in changed.items()]
    assert "data.sources[0].weight: 1.0 → 2.0" in lines
    assert "train.grad_clip: 1.0 → null" in lines
    assert "optimizer.betas: [0.8, 0.9, 0.99] → [0.9, 0.999, 0.9999]" in lines
    assert "engine.name: single → fsdp" in lines
    same = tiny.config(tmp_path, engine="{name: single}", optimizer__betas="[0.8, 0.9, 0.99]")
    assert branch._take_over(old, same).changed == {}


def test_of_long_values_the_screen_shows_where_they_differ() -> None:
    old, new = (["/usr/share/somewhere/far/away/and/farther/still/" + name] for name in ("one.txt", "two.txt"))
    line = branch._line("data.sources[0].paths", old, new)
    assert line == 'data.sources[0].paths: ...ill/one.txt"] → ...ill/two.txt"]'


def test_a_checkpoint_that_is_no_runs_is_refused_with_the_way_to_its_weights(tmp_path: Path) -> None:
    made.save(0, 1, tmp_path / "x-again", made.whole)
    with pytest.raises(
        InputError, match=r"run\.from: .*x-again is of another program, or converted: .* shardopt export"
    ):
        branch.resolve(tiny.config(tmp_path, run__from=tmp_path / "x-again"))


def test_a_damaged_source_is_refused_by_its_key_with_the_newest_older_one_that_is_whole(tmp_path: Path) -> None:
    for step in 5, 20:
        made.save(0, 1, tmp_path / f"step-{step:08d}", made.whole)
    data = tmp_path / "step-00000020/rank-00000.data"
    data.write_bytes(data.read_bytes()[:-1] + b"!")
    config = tiny.config(tmp_path, run__from=tmp_path / "step-00000020")
    message = r"run\.from: .*step-00000020/rank-00000\.data is damaged: .* whole is .*/step-00000005$"
    with pytest.raises(InputError, match=message):
        branch.start(config, SimpleNamespace(ranks=tiny.ALONE), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_start_that_is_refused_leaves_no_folder_of_the_run(tmp_path: Path, elsewhere: bool) -> None:
    tiny.corpus(tmp_path / "text")
    alone = {"engine": "{name: single}", "train__steps": 2}
    tiny.run(0, 1, tmp_path, **alone)
    data = tmp_path / "runs/tiny/checkpoints/step-00000002/rank-00000.data"
    whole = data.read_bytes()
    alone |= {"run__name": "next", "train__steps": 4}
    if elsewhere:
        alone["checkpoint__dir"] = tmp_path / "store"
    branched = alone | {"run__from": data.parent}
    data.write_bytes(whole[:-1] + b"!")
    with pytest.raises(InputError, match=r"rank-00000\.data is damaged"):
        tiny.run(0, 1, tmp_path, **branched)
    data.write_bytes(whole)
    for changes in alone, branched:
        with pytest.raises(InputError, match=r"tracking\.noise_scale: needs"):
            tiny.run(0, 1, tmp_path, **changes, tracking__noise_scale=True, train__micro_batch=8)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"tiny"}
    assert not (tmp_path / "store").exists()
    assert tiny.run(0, 1, tmp_path, **branched).step == 4
