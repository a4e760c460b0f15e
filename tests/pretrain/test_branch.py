"""Another run from a checkpoint: what is taken over is taken over to the bit, what is new begins there."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from shardopt import AdEMAMix, checkpoint, cli
from shardopt.checkpoint.stored import Stored
from shardopt.distributed import Ranks
from shardopt.engines.state import ModuleState
from shardopt.errors import InputError, NonFiniteError
from shardopt.optim import states
from shardopt.pretrain import data, loop, model, rng
from shardopt.pretrain.begin import begin
from shardopt.pretrain.branch import resolve
from shardopt.pretrain.data import build
from shardopt.pretrain.progress import Progress
from shardopt.pretrain.schedule import lr_factor
from tests.distributed.pool import on_ranks
from tests.pretrain import tiny

# A trunk whose lr is constant, with what could be lost on the way: dropout, rounding by random bits, own counts.
TRUNK = {
    "engine": "{name: single}",
    "schedule": "{name: constant, warmup: 2}",
    "train__steps": 12,
    "checkpoint__every": 6,
    "model__attention_dropout": 0.1,
    "optimizer": "{name: ademamix, lr: 3e-3, alpha_warmup: 8, beta3_warmup: 8, state_dtype: bf16, weight_ema: 0.9}",
}
PLAIN = "{name: ademamix, lr: 3e-3, alpha_warmup: 8, beta3_warmup: 8, weight_decay: 0.1%s}"
ADAMW = TRUNK | {"optimizer": "{name: adamw, lr: 3e-3, weight_decay: 0.1}", "model__attention_dropout": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("branch")
    tiny.corpus(folder / "text")
    tiny.run(0, 1, folder, run__name="trunk", **TRUNK)
    tiny.run(0, 1, folder, run__name="plain", **TRUNK | {"optimizer": PLAIN % "", "train__steps": 6})
    tiny.run(0, 1, folder, run__name="adamw", **ADAMW | {"train__steps": 6})
    return folder


def at(folder: Path, name: str, step: int) -> Path:
    return folder / "runs" / name / "checkpoints" / f"step-{step:08d}"


def branch(folder: Path, name: str, source: str = "trunk", **changes: Any) -> Any:
    """A run from step 6 of `source`."""
    return tiny.run(0, 1, folder, run__name=name, run__from=at(folder, source, 6), **TRUNK | changes)


def tensors(path: Path) -> dict[tuple[str, str], torch.Tensor]:
    stored = Stored(path)
    return {key: stored.read(*key) for key in stored.keys}


def assert_equal_checkpoints(a: Path, b: Path) -> None:
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    counts = [checkpoint.read_document(path)["checkpoint"]["step_counts"] for path in (a, b)]
    assert counts[0] == counts[1]


def rows(folder: Path, name: str, first: int = 1) -> list[dict[str, Any]]:
    """The rows of metrics from step `first` on, without what depends on the machine."""
    every = tiny.metrics(folder, name)
    return [{k: v for k, v in r.items() if k not in tiny.MEASURED} for r in every][first - 1 :]


@contextmanager
def begun(folder: Path, name: str, source: str, **changes: Any) -> Iterator[loop.Run]:
    """A branch from step 6 before its first step."""
    config = tiny.config(folder, run__name=name, run__from=at(folder, source, 6), **TRUNK | changes)
    with ExitStack() as stack:
        yield loop.Run(begin(config, Ranks.start("cpu", 1.0), stack))


def state_of(run: loop.Run) -> dict[tuple[str, str], torch.Tensor]:
    return {(s.name, s.kind): s.tensors[0].detach().clone() for s in run.engine.state.slices()}


def test_a_branch_without_changes_equals_the_undisturbed_run(folder: Path) -> None:
    result = branch(folder, "same")
    assert_equal_checkpoints(at(folder, "same", 12), at(folder, "trunk", 12))
    assert rows(folder, "same") == rows(folder, "trunk", 7)
    assert [row["step"] for row in rows(folder, "same")] == [*range(7, 13)]
    assert (result.tokens, result.tokens_before) == (12 * 8 * 32, 6 * 8 * 32)


def test_a_cooldown_from_a_trunk_equals_the_run_that_had_this_schedule_from_the_beginning(folder: Path) -> None:
    cooldown = {"schedule": "{name: wsd, warmup: 2, cooldown: 3}", "train__steps": 10}
    tiny.run(0, 1, folder, run__name="wsd", **TRUNK | cooldown)
    branch(folder, "cooldown", **cooldown)
    assert_equal_checkpoints(at(folder, "cooldown", 10), at(folder, "wsd", 10))
    assert rows(folder, "cooldown") == rows(folder, "wsd", 7)
    assert rows(folder, "cooldown")[-1]["lr"] < 0.1 * rows(folder, "cooldown")[0]["lr"]


def by_hand(folder: Path, name: str, steps: int, **options: Any) -> list[float]:
    """Losses of AdamW's checkpoint at step 6 trained on with AdEMAMix.from_adamw, in plain torch."""
    config = tiny.config(folder, **ADAMW | {"train__steps": steps})
    train, _ = data.prepare(config.data, tiny.ALONE, 0, 8)
    eos = train.tokenizer.eos_token_id
    net = model.meta_model(model.transformers_config(config.model, train.vocab_size, eos, 32))
    model.initialise(net, torch.device("cpu"), 0)
    adamw = config.optimizer.spec(steps, 0).build(net)
    checkpoint.load(at(folder, name, 6), ModuleState(adamw, net, tiny.ALONE))
    ours = AdEMAMix.from_adamw(adamw, **options)
    losses = []
    for step in range(6, steps):
        tokens = train.batch(step, 0, 8)
        loss = net(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for group in ours.param_groups:
            group["lr"] = 3e-3 * lr_factor(step + 1, steps, config.schedule)
        ours.step()
        ours.zero_grad()
        losses.append(loss.item())
    return losses


def test_adamw_goes_on_as_ademamix_in_mid_run_as_by_hand(folder: Path) -> None:
    changes = {"model__attention_dropout": 0.0, "optimizer": PLAIN % ", weight_ema: 0.9"}
    expected = by_hand(folder, "adamw", 12, alpha_warmup=8, beta3_warmup=8)
    branch(folder, "switched", "adamw", **changes)
    assert [row["loss"] for row in rows(folder, "switched")] == pytest.approx(expected, rel=1e-6)
    assert [row["alpha"] for row in rows(folder, "switched")] == [5.0 * t / 8 for t in range(1, 7)]
    counts = checkpoint.read_document(at(folder, "switched", 12))["checkpoint"]["step_counts"]
    assert all(held == {"step": 12, "schedule_step": 6} for held in counts.values())
    sharded = {"run__from": at(folder, "adamw", 6), "engine": "{name: zero, bucket_mb: 0.01}"}
    on_ranks(2, tiny.run, folder, run__name="switched-2", **TRUNK | changes | sharded)
    assert [row["loss"] for row in rows(folder, "switched-2")] == pytest.approx(expected, rel=1e-5)
    with begun(folder, "switched-now", "adamw", **changes) as run:
        now, stored = state_of(run), Stored(at(folder, "adamw", 6))
    for (name, kind), value in now.items():
        source = {"m1": "exp_avg", "nu": "exp_avg_sq", "weight_ema": "weight", "weight": "weight"}.get(kind)
        assert torch.equal(value, stored.read(name, source) if source else torch.zeros_like(value)), (name, kind)

    kept = yaml.safe_load((folder / "runs" / "switched-now" / "branch.yaml").read_text())
    assert kept["taken_over"] == ["weight", "m1 from exp_avg", "nu from exp_avg_sq"]
    assert {"optimizer.name", "optimizer.weight_ema"} <= kept["changed"].keys()
    assert "optimizer.state_dtype" not in kept["changed"]  # which AdamW has not, and nobody gave
    plain = "{name: ademamix, lr: 3e-3, betas: [0, 0.95, 0.99], alpha_warmup: 8, beta3_warmup: 8}"
    with begun(folder, "no-m1", "adamw", model__attention_dropout=0.0, optimizer=plain) as run:
        assert {kind for _, kind in state_of(run)} == {"weight", "m2", "nu"}


@pytest.mark.parametrize("dtype", ["bf16", "block8"])
def test_another_state_dtype_is_the_state_rounded_once(folder: Path, dtype: str) -> None:
    with begun(folder, f"to-{dtype}", "plain", optimizer=PLAIN % f", state_dtype: {dtype}") as run:
        now = {(s.name, s.kind): s for s in run.engine.state.slices()}
        stored = Stored(at(folder, "plain", 6))
        for name, kind in stored.keys:
            value, piece = stored.read(name, kind), now[name, kind]
            if kind == "weight":
                assert torch.equal(piece.tensors[0], value)
                continue
            assert (piece.format or "bf16", piece.tensors[0].dtype.itemsize) == (dtype, 2 if dtype == "bf16" else 1)
            wanted = replace(piece, tensors=tuple(torch.zeros_like(tensor) for tensor in piece.tensors))
            states.write_slice(wanted, value.view(-1))
            assert all(torch.equal(a, b) for a, b in zip(piece.tensors, wanted.tensors, strict=True)), (name, kind)


def test_a_weight_ema_begins_at_the_weights_or_is_left_behind(folder: Path, capsys: pytest.CaptureFixture) -> None:
    with begun(folder, "with-ema", "plain", optimizer=PLAIN % ", weight_ema: 0.5") as run:
        now = state_of(run)
    assert all(torch.equal(now[name, "weight"], now[name, "weight_ema"]) for name, kind in now if kind == "weight_ema")
    assert sum(kind == "weight_ema" for _, kind in now) == sum(kind == "weight" for _, kind in now)
    assert re.search(r"begins anew +weight_ema, from the weights", capsys.readouterr().out)
    with begun(folder, "without-ema", "trunk", optimizer=PLAIN % ", state_dtype: bf16") as run:
        left, stored = state_of(run), Stored(at(folder, "trunk", 6))
    assert {kind for _, kind in left} == {"weight", "m1", "m2", "nu"}
    assert all(torch.equal(value, stored.read(*key)) for key, value in left.items())
    assert re.search(r"left behind +weight_ema", capsys.readouterr().out)


def test_another_batch_goes_on_at_the_next_sequence_and_so_does_its_resumption(folder: Path) -> None:
    changes = {"train__global_batch": 4, "train__steps": 10, "checkpoint__every": 2}
    fresh, _ = data.prepare(tiny.config(folder).data, tiny.ALONE, 0, 4)
    with begun(folder, "half-seen", "trunk", **changes) as run:
        assert torch.equal(run.train_data.batch(6, 0, 4), fresh.batch(12, 0, 4))
        assert run.progress.tokens == 6 * 8 * 32
        with pytest.raises(IndexError):
            run.train_data.batch(-7, 0, 4)
    result = branch(folder, "half", **changes)
    assert [row["tokens"] for row in rows(folder, "half")] == [32 * (48 + 4 * n) for n in range(1, 5)]
    assert result.tokens == 32 * (48 + 16)
    expected = rows(folder, "half")
    shutil.rmtree(at(folder, "half", 10))
    assert branch(folder, "half", **changes).tokens_before == 32 * (48 + 8)
    assert rows(folder, "half") == expected
    assert checkpoint.read_document(at(folder, "half", 10))["data"]["samples"] == 64


def test_other_text_or_another_order_begins_at_its_beginning(folder: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(Progress, "of", lambda document, of=Progress.of: replace(of(document), rewinds=2))
    tiny.corpus(folder / "more", documents=30)
    both = f"[{{source: text, paths: {folder}/text}}, {{source: text, paths: {folder}/more, weight: 2}}]"
    for name, changes in (("mixture", {"data__sources": both}), ("order", {"run__seed": 1})):
        config = tiny.config(folder, **changes)
        fresh, _ = data.prepare(config.data, tiny.ALONE, config.run.seed, 8)
        with begun(folder, name, "trunk", **changes) as run:
            assert torch.equal(run.train_data.batch(6, 0, 8), fresh.batch(0, 0, 8))
            assert (run.progress.tokens, run.progress.rewinds) == (6 * 8 * 32, 0)
        assert re.search(r"text +begins at its beginning", capsys.readouterr().out)
    drawn = torch.get_rng_state()
    rng.seed_all(1, 0, 6)
    assert torch.equal(drawn, torch.get_rng_state())


def test_a_branch_goes_on_under_another_engine_and_number_of_ranks(folder: Path) -> None:
    changes = {"run__from": at(folder, "plain", 6), "optimizer": PLAIN % "", "model__attention_dropout": 0.0}
    tiny.run(0, 1, folder, run__name="one", **TRUNK | changes)
    on_ranks(2, tiny.run, folder, run__name="two", **TRUNK | changes | {"engine": "{name: fsdp}"})
    one, two = ([row["loss"] for row in rows(folder, name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


def test_a_branch_is_resumed_without_its_source_and_keeps_where_it_came_from(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seen: list[tuple[str, str | None, int | None]] = []

    class Named(loop.Tracker):
        def __init__(self, folder: Path, *arguments: Any, run_id: str | None = None, **keywords: Any) -> None:
            super().__init__(folder, *arguments, run_id=run_id, **keywords)
            seen.append((folder.name, run_id, arguments[3]))
            self.run_id = run_id or f"id-{folder.name}"

    monkeypatch.setattr(loop, "Tracker", Named)
    tiny.run(0, 1, folder, run__name="gone", **TRUNK | {"train__steps": 6})
    save_id = checkpoint.read_document(at(folder, "gone", 6))["checkpoint"]["save_id"]
    changes = TRUNK | {"run__name": "heir", "checkpoint__every": 2, "optimizer__lr": 1e-3}
    with ExitStack() as stack:  # killed before its first checkpoint; then there is a newer one where it came from
        loop.Run(
            begin(tiny.config(folder, run__from=folder / "runs" / "gone", **changes), Ranks.start("cpu", 1.0), stack)
        )
    shutil.copytree(at(folder, "gone", 6), at(folder, "gone", 9))
    capsys.readouterr()
    tiny.run(0, 1, folder, run__from=folder / "runs" / "gone", **changes)
    said = capsys.readouterr().out
    recorded = yaml.safe_load((folder / "runs" / "heir" / "config.yaml").read_text())
    assert recorded["run"]["from"] == str(at(folder, "gone", 6))
    kept = yaml.safe_load((folder / "runs" / "heir" / "branch.yaml").read_text())
    assert (kept["run"], kept["step"], kept["tokens"], kept["save_id"]) == ("gone", 6, 6 * 8 * 32, save_id)
    assert kept["taken_over"] == ["weight", "m1", "m2", "nu", "weight_ema"]
    assert kept["changed"] == {"train.steps": {"from": 6, "to": 12}, "optimizer.lr": {"from": 3e-3, "to": 1e-3}}
    assert "heir branched at step 6" in said
    assert re.search(r"new +train\.steps: 6 → 12|new +optimizer\.lr: 0\.003 → 0\.001", said)
    assert "since it branched, 3,072 in all" in said
    expected = rows(folder, "heir")
    assert expected[0]["lr"] == 1e-3
    shutil.rmtree(folder / "runs" / "gone")
    for given in ({"run__from": folder / "runs" / "gone"}, {}, {"run__from": at(folder, "gone", 6)}):
        shutil.rmtree(at(folder, "heir", 12))
        tiny.run(0, 1, folder, **changes | given)
        assert "heir resumed at step 10" in capsys.readouterr().out
        assert rows(folder, "heir") == expected
    assert yaml.safe_load((folder / "runs" / "heir" / "config.yaml").read_text()) == recorded
    assert seen[:3] == [("gone", None, None), ("heir", None, None), ("heir", None, None)]
    assert seen[3:] == [("heir", "id-heir", 10)] * 3
    with pytest.raises(InputError, match=r"run\.from: .*gone.* → .*trunk"):
        tiny.run(0, 1, folder, **changes | {"run__from": folder / "runs" / "trunk"})


def test_the_start_of_a_branch_fits_into_80_columns(folder: Path, capsys: pytest.CaptureFixture) -> None:
    sources = f"[{{source: text, paths: [{folder}/text, {folder}/text/000.txt]}}]"
    with begun(folder, "narrow", "adamw", optimizer=PLAIN % "", data__sources=sources, schedule="{warmup: 1}"):
        pass
    said = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(said) if line.startswith("from "))
    last = next(i for i in range(first, len(said)) if not said[i].strip())
    assert last - first > 8
    assert max(len(line) for line in said[first + 1 : last]) <= 80
    assert any(line.endswith("optimizer.name: adamw → ademamix") for line in said)


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (
            "trunk",
            {"train__steps": 6},
            r"train\.steps: 6 is not larger than 6, the step of run\.from = .*step-00000006",
        ),
        ("trunk", {"run__from": "/nowhere"}, r"run\.from: /nowhere does not exist"),
        ("trunk", {"optimizer": "{name: adamw}"}, r"optimizer\.name: ademamix → adamw: .*cannot be taken over"),
        ("adamw", {"optimizer": "{name: yogi}"}, r"optimizer\.name: adamw → yogi: .*cannot be taken over"),
        (
            "adamw",
            {"optimizer": "{name: amsgrad}"},
            r"checkpoint has no .*/max_exp_avg_sq .*; set optimizer as it",
        ),
        ("trunk", {"optimizer__betas": "[0, 0.9, 0.99]"}, r"optimizer\.betas: .* → \[0.*there is no m1"),
        ("trunk", {"model__hidden_size": 64}, r"shapes differ: .*32\) there.*64\) here.*; set model as it was"),
        (
            "trunk",
            {"data__tokenizer": "{bpe: 300}"},
            r"data\.tokenizer: .*another tokenizer: take that one, data.token",
        ),
    ],
)
def test_what_cannot_be_taken_over_is_refused_saying_which_part(
    folder: Path, source: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tiny.run(0, 1, folder, **{"run__name": "no", "run__from": at(folder, source, 6)} | TRUNK | changes)
    assert not (folder / "runs" / "no" / "checkpoints").exists()


@pytest.mark.parametrize("cache", ["new", "of the source"])
def test_another_tokenizer_is_refused_before_it_is_trained_or_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    def too_late(*_: Any) -> None:
        raise AssertionError("text was read")

    changes = {"data__cache": tmp_path} if cache == "new" else {}
    if cache == "new":
        monkeypatch.setattr(build, "train_bpe", too_late)
    monkeypatch.setattr(build, "_build_packed", too_late)
    with pytest.raises(InputError, match=r"data\.tokenizer: .*another tokenizer: take that one"):
        branch(folder, "early", data__tokenizer="{bpe: 301}", **changes)


def test_a_warm_up_that_begins_in_mid_run_is_not_total(folder: Path) -> None:
    changes = {"model__attention_dropout": 0.0, "optimizer": "{name: ademamix, lr: 3e-3, beta3_warmup: total}"}
    said = r"optimizer\.beta3_warmup: total is train\.steps = 12, and .* begins at step 6, .* such as the 6 that"
    with pytest.raises(InputError, match=said):
        branch(folder, "total", "adamw", **changes)


def test_a_checkpoint_that_no_finite_step_came_after_is_not_called_good(folder: Path) -> None:
    changes = {"optimizer__lr": 1e18, "train__grad_clip": "null", "train__max_nonfinite_steps": 1}
    with pytest.raises(NonFiniteError, match=r"2 steps in a row, up to step 9, .*") as given_up:
        branch(folder, "ruined", "plain", **{"optimizer": PLAIN % "", "checkpoint__every": 1} | changes)
    source = at(folder, "plain", 6)
    assert str(given_up.value).endswith(
        "under another run.name; no finite step came after step-00000007, so that its weights may be ruined; "
        f"run.from = {source} is where it began"
    )


def test_another_optimizers_state_is_refused_before_anything_is_loaded(folder: Path) -> None:
    with pytest.raises(InputError, match="cannot be taken over"):
        resolve(tiny.config(folder, run__from=at(folder, "trunk", 6), **TRUNK | {"optimizer": "{name: adamw}"}))


def test_the_tokenizer_of_the_run_is_the_one_that_the_refusal_names(folder: Path) -> None:
    """A bpe of other text has other ids under the same size."""
    changes = {"train__steps": 6, "data__tokenizer": "{bpe: 300}"}
    tiny.run(0, 1, folder, run__name="bpe", **TRUNK | changes)
    tiny.corpus(folder / "fewer", documents=40)
    changes = {"data__sources": f"[{{source: text, paths: {folder}/fewer}}]", "data__tokenizer": "{bpe: 300}"}
    with pytest.raises(InputError, match=r"data\.tokenizer='\{path: (.*bpe/model)\}'") as refused:
        branch(folder, "bpe-on", "bpe", **changes)
    path = re.search(r"\{path: (.*)\}", str(refused.value))
    assert path is not None
    branch(folder, "bpe-on", "bpe", **changes | {"data__tokenizer": f"{{path: {path[1]}}}", "train__steps": 7})


def stopped(folder: Path, name: str, **changes: Any) -> None:
    """A run of 12 steps whose checkpoint after step 6 is the last."""
    tiny.run(0, 1, folder, run__name=name, **TRUNK | changes)
    shutil.rmtree(at(folder, name, 12))


def test_steps_may_be_raised_where_no_step_that_is_done_would_have_differed(folder: Path) -> None:
    wsd = {"schedule": "{name: wsd, warmup: 2, cooldown: 4}"}
    stopped(folder, "longer", **wsd)
    tiny.run(0, 1, folder, run__name="longer", **TRUNK | wsd | {"train__steps": 14})
    tiny.run(0, 1, folder, run__name="long", **TRUNK | wsd | {"train__steps": 14})
    assert_equal_checkpoints(at(folder, "longer", 14), at(folder, "long", 14))
    assert rows(folder, "longer") == rows(folder, "long")
    assert yaml.safe_load((folder / "runs" / "longer" / "config.yaml").read_text())["train"]["steps"] == 14


@pytest.mark.parametrize(
    ("changes", "steps", "reason"),
    [
        ({"schedule": "{name: cosine, warmup: 2}"}, 14, "with schedule.name = cosine step 3 would have had another lr"),
        ({"schedule": "{name: wsd, warmup: 2, cooldown: 8}"}, 14, "step 5 would have had another lr"),
        ({}, 10, "it can only be raised"),
        ({"optimizer__alpha_warmup": "total"}, 14, "optimizer.alpha_warmup is total, which stands for it"),
    ],
)
def test_steps_stay_where_a_step_that_is_done_would_have_differed(
    folder: Path, changes: dict[str, Any], steps: int, reason: str
) -> None:
    name = "stays-" + re.sub(r"\W", "-", reason)
    stopped(folder, name, **changes)
    with pytest.raises(InputError) as refused:
        tiny.run(0, 1, folder, run__name=name, **TRUNK | changes | {"train__steps": steps})
    assert re.search(rf"train\.steps: 12 → {steps} \(.*{re.escape(reason)}\)\n", str(refused.value))
    assert f"run.from={folder}/runs/{name}" in str(refused.value)


def test_steps_of_a_finished_run_stay(folder: Path) -> None:
    with pytest.raises(InputError, match=r"train\.steps: 6 → 12 \(the run is finished\)"):
        tiny.run(0, 1, folder, run__name="plain", **TRUNK | {"optimizer": PLAIN % ""})


DOCS = Path("docs/checkpoints.md").read_text(encoding="utf-8").split("## Another run from a checkpoint")[1]


def _commands(rank: int, world_size: int, folder: Path, lines: list[str]) -> list[int]:
    """The commands on ranks that are there already, in `folder`, whose quickstart is a tiny one."""
    with chdir(folder):
        return [cli.main(shlex.split(line)[1:]) for line in lines]


def test_the_commands_of_the_page_run_as_they_stand(folder: Path) -> None:
    page = folder / "page"
    (page / "configs").mkdir(parents=True)
    (page / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(tiny.tree(folder, run__dir="runs")))
    block = DOCS.split("```shell\n")[1].split("```")[0].replace("\\\n", " ")
    lines = [line for line in block.splitlines() if line]
    assert len(lines) == 2
    assert on_ranks(2, _commands, page, lines) == [[0, 0]] * 2
    assert [row["step"] for row in rows(page, "cooldown")] == [*range(41, 61)]
    assert rows(page, "cooldown")[-1]["lr"] == pytest.approx(0.01 * rows(page, "trunk")[-1]["lr"])
