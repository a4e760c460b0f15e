"""Commands for checkpoints, on those of a real run, in this process."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardopt import checkpoint, cli
from shardopt.checkpoint import inspect
from shardopt.checkpoint.document import write_document
from shardopt.checkpoint.stored import Stored
from shardopt.slices import Layout, Slice
from tests.checkpoint import made
from tests.pretrain import tiny

DOCS = Path("docs/checkpoints.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of 6 steps with checkpoints of 2, 4 and 6, a weight EMA, a BPE tokenizer and its own export."""
    folder = tmp_path_factory.mktemp("commands")
    tiny.corpus(folder / "text")
    result = tiny.run(
        0, 1, folder,
        run__name="kept", engine="{name: single}", data__tokenizer="{bpe: 300}", optimizer__weight_ema=0.8,
        optimizer__state_dtype="{m1: bf16, m2: block8}", checkpoint__every=2, checkpoint__export="true",
    )  # fmt: skip
    shutil.rmtree(folder / "text")  # no command needs the training data
    shutil.rmtree(folder / "cache")
    return result.folder


def say(capsys, *arguments):
    """Exit status, standard output and standard error of a command."""
    capsys.readouterr()
    status = cli.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_inspect_tells_steps_tokens_parameters_kinds_and_writer_in_80_columns(run, capsys):
    status, text, _ = say(capsys, "checkpoint", "inspect", run / "checkpoints/step-00000004")
    assert status == 0
    folder, *lines = text.splitlines()
    assert folder.endswith("kept/checkpoints/step-00000004")
    assert max(map(len, lines)) <= 80
    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(run / "export").parameters())
    for line in (
        "  step        4 of 6",
        f"  tokens      {4 * 8 * 32:,}",
        "  updates     4 of each parameter",
        "  run         kept, llama, ademamix",
        f"  written by  single on 1 rank, torch {torch.__version__}",
        f"  parameters  {count:,}",
    ):
        assert line in lines
    rows = {line.split()[0]: line.split() for line in lines if line}
    assert rows["m1"][1:4] == ["bfloat16", rows["weight"][2], f"{count:,}"]
    assert rows["m2"][1] == "block8"
    assert rows["weight"][4:] == [f"{4 * count / 1e3:.1f}", "kB"]
    assert {"index.bin", "checkpoint.json", "rank-00000.data"} <= rows.keys()


def test_inspect_as_json_adds_up_to_the_files_on_the_disk(run, capsys):
    _, text, _ = say(capsys, "checkpoint", "inspect", run, "--json")
    what = json.loads(text)
    assert (what["step"], what["steps"], what["ranks"], what["format"]) == (6, 6, 1, checkpoint.document.FORMAT)
    assert what["bytes"] == sum(p.stat().st_size for p in (run / "checkpoints/step-00000006").iterdir())
    kinds = what["kinds"]
    assert kinds["weight"]["bytes"] == 4 * what["parameters"] == 2 * kinds["m1"]["bytes"]
    assert what["parameters"] < kinds["m2"]["bytes"] < 1.1 * what["parameters"]
    assert sum(row["bytes"] for row in kinds.values()) < what["bytes"]


def test_verify_compares_every_byte_and_ends_with_1_where_one_is_another(run, tmp_path, capsys):
    copy = shutil.copytree(run / "checkpoints/step-00000004", tmp_path / "step-00000004")
    status, text, _ = say(capsys, "checkpoint", "inspect", copy, "--verify")
    assert status == 0
    assert re.search(r"format +6, 3 files of [\d.]+ kB, every checksum is right", text)
    data = next(copy.glob("*.data"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    assert say(capsys, "checkpoint", "inspect", copy)[0] == 0
    status, text, error = say(capsys, "checkpoint", "inspect", copy, "--verify")
    assert (status, text) == (1, "")
    assert f"{data} is damaged" in error


def test_list_names_complete_checkpoints_by_step_and_what_else_lies_there(run, tmp_path, capsys):
    copy = shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    (copy / ".step-00000008.partial").mkdir()
    (copy / "step-00000004/rank-00000.data").write_bytes(b"")
    for folder in (tmp_path, copy):
        status, text, _ = say(capsys, "checkpoint", "list", folder)
        rows = [line.split() for line in text.splitlines()]
        assert status == 0
        assert [(row[0], row[-1]) for row in rows[1:]] == [
            ("2", "complete"), ("6", "complete"), (".step-00000008.partial", "partial"), ("step-00000004", "damaged"),
        ]  # fmt: skip
        assert "single, 1 rank" in text
    rows = json.loads(say(capsys, "checkpoint", "list", copy, "--json")[1])
    assert [row.get("tokens") for row in rows] == [2 * 8 * 32, 6 * 8 * 32, None, None]


def test_list_says_which_checkpoints_are_of_another_format_and_how_to_get_at_them(run, tmp_path, capsys):
    copy = shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    (copy / "checkpoint-5/shardopt").mkdir(parents=True)
    for folder, version in ("step-00000004", 5), ("step-00000006", 7), ("checkpoint-5/shardopt", 4):
        (copy / folder / "checkpoint.json").write_text(json.dumps({"checkpoint": {"format": version}}))
    status, text, _ = say(capsys, "checkpoint", "list", copy)
    table, advice = text.split("\n\n")
    assert status == 0
    assert [line.split("UTC")[-1].split()[-3:] for line in table.splitlines()[2:]] == [
        ["old", "format", "4"], ["old", "format", "5"], ["new", "format", "7"]
    ]  # fmt: skip
    assert advice.startswith(f"This shardopt reads format {checkpoint.document.FORMAT}. Of another one: load it with")
    assert "shardopt checkpoint convert FOLDER FILE.pt --to torch" in " ".join(advice.split())
    assert max(map(len, text.splitlines())) <= 80
    assert "format" not in say(capsys, "checkpoint", "list", run)[1]


def test_a_checkpoint_under_the_name_of_another_step_is_noticed(run, tmp_path, capsys):
    copy = shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    (copy / "step-00000004").rename(copy / "step-00000009")
    text = say(capsys, "checkpoint", "list", copy)[1]
    assert text.splitlines()[-1].split()[0] == "step-00000009"
    assert text.split()[-1] == "damaged"
    assert say(capsys, "checkpoint", "inspect", copy)[1].splitlines()[1] == "  step        6 of 6"
    for command in (("checkpoint", "inspect"), ("export",)):
        status, _, error = say(capsys, *command, copy / "step-00000009")
        assert status == 2
        assert "step-00000009 is not of the step in its name: it was saved as step-00000004" in error


def test_the_time_of_a_checkpoint_is_that_of_the_save(run, tmp_path, capsys):
    copy = shutil.copytree(run / "checkpoints/step-00000004", tmp_path / "step-00000004")
    os.utime(copy / "checkpoint.json", (0, 0))
    written = [json.loads(say(capsys, "checkpoint", "inspect", at, "--json")[1])["written"] for at in (copy, run)]
    assert "1970" not in written[0]
    assert written[0][:4] == written[1][:4]


def test_export_of_the_last_step_is_the_runs_own_export_of_the_weight_ema(run, tmp_path, capsys):
    status, text, _ = say(capsys, "export", run, tmp_path / "out", "--dtype", "fp32")
    assert (status, text) == (0, f"{run}/checkpoints/step-00000006, its weight EMA, is exported to {tmp_path}/out\n")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in (run / "export").iterdir())
    for path in (run / "export").iterdir():
        ours = tmp_path / "out" / path.name
        if path.suffix == ".json":
            assert json.loads(ours.read_text()) == json.loads(path.read_text()), path.name
        else:
            assert ours.read_bytes() == path.read_bytes(), path.name


def test_export_of_an_earlier_step_in_another_dtype_loads_in_transformers(run, capsys):
    status, _, _ = say(capsys, "export", run, "--step", 4, "--dtype", "bf16", "--raw")
    assert status == 0
    model = AutoModelForCausalLM.from_pretrained(run / "export-4")
    assert model.dtype == torch.bfloat16
    stored = Stored(run / "checkpoints/step-00000004")
    for name, param in model.named_parameters():
        assert torch.equal(param.detach(), stored.read(name, "weight").bfloat16()), name
    assert len(AutoTokenizer.from_pretrained(run / "export-4")) == 300


def test_a_checkpoint_of_a_program_is_exported_without_config_and_says_so(tmp_path, capsys):
    made.save(0, 1, tmp_path / "a", made.flat)
    status, text, _ = say(capsys, "export", tmp_path / "a", tmp_path / "out")
    assert status == 0
    where = str(tmp_path / "out")
    assert f"exported to {where}. The model's config is not known: write it there before you load it" in text
    assert f"(model.config.save_pretrained({where!r}))" in text
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    for name, value in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(value.view(torch.int32), made.value(name, "weight").view(torch.int32))


def _held(name, kind, values):
    return Slice(name, kind, Layout.whole(name, values.shape), (values,))


def test_inspect_tells_counts_that_differ_and_sums_up_many_files(tmp_path, capsys):
    held = [_held(name, "weight", torch.ones(3)) for name in ("old", "new")]
    counts = {"old": {"step": 5}, "new": {"step": 3}}
    checkpoint.save(tmp_path / "a", made.State(held, made.ranks_here(), counts))
    for rank in range(1, 13):
        (tmp_path / "a" / f"__{rank}_0.distcp").write_bytes(b"0" * 100)
    lines = say(capsys, "checkpoint", "inspect", tmp_path / "a")[1].splitlines()
    assert "  updates     3 to 5 of each parameter" in lines
    rows = [line.split() for line in lines[[line.split()[:1] for line in lines].index(["file"]) + 1 :]]
    shown = [row[0] for row in rows[:-1]]
    left_out = [path.stat().st_size for path in (tmp_path / "a").iterdir() if path.name not in shown]
    assert len(shown) == 9
    assert rows[-1] == ["and", str(len(left_out)), "more", *inspect.size(sum(left_out)).split()]


def test_export_gives_averages_the_dtype_of_their_weights_and_leaves_buffers_theirs(tmp_path, capsys):
    average, mean = torch.full((3, 2), 1 / 3), torch.full((2,), 1 / 3)
    weight = _held("w", "weight", torch.ones(3, 2, dtype=torch.bfloat16))
    held = [weight, _held("w", "weight_ema", average), _held("norm.mean", "buffer", mean)]
    checkpoint.save(tmp_path / "a", made.State(held, made.ranks_here()))
    for arguments, dtype in ([], torch.bfloat16), (["--dtype", "fp16"], torch.float16):
        out = tmp_path / f"out{len(arguments)}"
        assert say(capsys, "export", tmp_path / "a", out, *arguments)[0] == 0
        exported = load_file(out / "model.safetensors")
        assert torch.equal(exported["w"], average.bfloat16().to(dtype))
        assert exported["w"].dtype == dtype
        assert torch.equal(exported["norm.mean"], mean)
    (tmp_path / "as-others").touch()
    assert (out / "model.safetensors").stat().st_mode == (tmp_path / "as-others").stat().st_mode


def test_checkpoint_of_hf_trainer_is_exported_with_the_config_and_tokenizer_around_it(tmp_path, capsys):
    trainers = tmp_path / "checkpoint-7"
    made.save(0, 1, trainers / "shardopt", made.whole)
    kept = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    for name in kept | {"optimizer.pt", "trainer_state.json", "model-00001-of-00001.safetensors"}:
        (trainers / name).write_text("{}")
    for path in trainers, tmp_path:
        status, said, error = say(capsys, "export", path, tmp_path / f"of-{path.name}")
        assert (status, error) == (0, "")
        assert "weights alone" not in said
        assert {p.name for p in (tmp_path / f"of-{path.name}").iterdir()} == kept | {"model.safetensors"}
    assert say(capsys, "export", tmp_path)[0] == 0
    assert (tmp_path / "export-7/model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["checkpoint", "inspect", "{run}/nowhere"], "nowhere does not exist: give a run's folder"),
        (["checkpoint", "inspect", "{run}/export"], "is neither a checkpoint of shardopt (it has no checkpoint.json)"),
        (["checkpoint", "inspect", "{run}", "--step", "5"], "--step 5: {run}/checkpoints has steps 2, 4, 6"),
        (["checkpoint", "list", "{run}/export"], "has no checkpoints: give a run's folder"),
        (["export", "{run}/checkpoints/step-00000002", "--step", "4"], "--step 4: {run}/checkpoints/step-00000002 is"),
        (["export", "{run}", "{run}/export"], "{run}/export exists already: name another folder"),
        (["export", "{made}", "/proc/out"], "cannot write"),
        (["export", "{made}"], "{made} is not in a run's folder: name the folder to write, after {made}"),
    ],
)
def test_a_mistake_is_one_line_that_names_what_to_change(run, tmp_path, capsys, arguments, said):
    made.save(0, 1, tmp_path / "made", made.whole)
    places = {"run": run, "made": tmp_path / "made"}
    status, out, error = say(capsys, *(argument.format(**places) for argument in arguments))
    assert (status, out) == (2, "")
    assert said.format(**places) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "made-out").exists()


def test_export_and_convert_of_a_damaged_checkpoint_name_the_newest_older_one_that_is_whole(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    for step in 4, 6:
        data = copy / f"checkpoints/step-0000000{step}/rank-00000.data"
        content = bytearray(data.read_bytes())
        content[-1] ^= 1
        data.write_bytes(content)
    for command in ("export", copy), ("checkpoint", "convert", copy):
        status, _, error = say(capsys, *command, tmp_path / "out")
        assert status == 2
        assert "step-00000006/rank-00000.data is damaged" in error
        assert error.endswith(f"The newest older one that is whole is {copy}/checkpoints/step-00000002\n")
    _, _, error = say(capsys, "export", shutil.move(copy / "checkpoints/step-00000006", tmp_path), tmp_path / "out")
    assert error.endswith("No older one beside it is whole\n")
    assert not (tmp_path / "out").exists()


def test_a_step_in_the_name_of_a_conversion_is_that_of_its_source(run, tmp_path, capsys):
    for name, right, to in (
        ("checkpoint-3", "checkpoint-6", "trainer"),
        ("step-00000003", "step-00000006", "shardopt"),
    ):
        status, _, error = say(capsys, "checkpoint", "convert", run, tmp_path / name, "--to", to)
        assert status == 2
        assert f"the source is of step 6, and whoever resumes goes by the number: {tmp_path / right}" in error
    assert say(capsys, "checkpoint", "convert", run, tmp_path / "step-00000006")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


def test_export_refuses_a_dtype_that_cannot_hold_the_weights_and_leaves_nothing(tmp_path, capsys):
    state = made.State(made.slices(made.whole), made.ranks_here())
    state.held[0].tensors[0].view(-1)[5] = 7e4
    checkpoint.save(tmp_path / "a", state, allow_nonfinite=True)
    status, _, error = say(capsys, "export", tmp_path / "a", tmp_path / "out", "--dtype", "fp16")
    assert status == 2
    assert "embed.weight has values that float16 cannot hold: export as bf16 or fp32" in error
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_commands_of_the_documentation_run_as_they_stand(run, tmp_path, monkeypatch, capsys):
    """On a copy of a run, whose step 4 stands for theirs."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(run, tmp_path / "runs/mine")
    theirs = (tmp_path / "runs/mine/checkpoints/step-00000004").rename(tmp_path / "runs/mine/checkpoints/step-00000020")
    document = checkpoint.read_document(theirs)
    document["checkpoint"]["name"], document["step"] = theirs.name, 20
    write_document(theirs, document)
    monkeypatch.chdir(tmp_path)
    commands = [line for block in re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL) for line in block.splitlines()]
    assert len(commands) >= 3
    for command in commands:
        program, *arguments = shlex.split(command)
        assert (program, cli.main(arguments)) == ("shardopt", 0), capsys.readouterr().err
    assert (tmp_path / "runs/mine/export-20/model.safetensors").exists()


def test_convert_says_where_the_settings_are_not_known(tmp_path, capsys):
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.named_parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    state["param_groups"] = [{key: g[key] for key in ("params", "param_names")} for g in state["param_groups"]]
    torch.save({"model": net.state_dict(), "optimizer": state}, tmp_path / "a.pt")
    status, text, _ = say(capsys, "checkpoint", "convert", tmp_path / "a.pt", tmp_path / "a")
    assert status == 0
    assert "its hyper-parameters are not known: those in it are defaults" in text
