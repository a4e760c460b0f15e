"""What every command has in common: help with an example, completion, mistakes in one line and their traceback."""

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardopt import cli, commands
from shardopt.pretrain import keys

ROOT = Path(__file__).parents[1]


def say(capsys, *arguments):
    capsys.readouterr()
    status = cli.main(list(arguments))
    return status, *capsys.readouterr()


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_of_a_command_has_an_example_that_it_takes_and_fits_80_columns(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser, command = commands.parser(name), commands.COMMANDS[name]
    text = parser.format_help()
    assert f"example:\n  shardopt {name} {command.example}\nmore: {command.page}" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("example")) <= 80
    example = shlex.split(command.example.split(">")[0])
    parse = parser.parse_intermixed_args if command.overrides else parser.parse_args
    assert callable(parse(example).run)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The bash script, once: it knows all keys."""
    path = tmp_path_factory.mktemp("completion") / "shardopt"
    with path.open("w") as file:
        before, sys.stdout = sys.stdout, file
        try:
            assert cli.main(["completion", "bash"]) == 0
        finally:
            sys.stdout = before
    return path


def completed(script, *words):
    words_of = f"COMP_WORDS=({' '.join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}"
    program = f'source {script}; {words_of}; _shardopt; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_completion_knows_commands_options_and_keys(script):
    assert set(completed(script, "shardopt", "")) == {"pretrain", *commands.COMMANDS}
    assert completed(script, "shardopt", "check") == ["checkpoint"]
    assert completed(script, "shardopt", "checkpoint", "in") == ["inspect"]
    assert completed(script, "shardopt", "checkpoint", "inspect", "runs", "--ver") == ["--verify"]
    assert completed(script, "shardopt", "pretrain", "--n") == ["--nproc-per-node"]
    assert completed(script, "shardopt", "pretrain", "configs/quickstart.yaml", "train.ste") == ["train.steps="]
    assert completed(script, "shardopt", "init", "train.ste") == ["train.steps="]
    assert completed(script, "shardopt", "config", "train.ste") == ["train.steps"]
    assert completed(script, "shardopt", "pretrain", "configs/") == []  # then bash completes files
    assert not [key for key in completed(script, "shardopt", "pretrain", "data.so") if key != "data.sources="]
    known = set(completed(script, "shardopt", "config", ""))
    assert {key.name for group in keys.groups() for key in group.keys} <= known


@pytest.mark.parametrize(
    "arguments", [["pretrain", "nowhere.yaml"], ["config", "nowhere"], ["checkpoint", "inspect", "nowhere"]]
)
def test_a_mistake_shows_its_traceback_with_debug_alone(arguments, capsys):
    status, out, error = say(capsys, *arguments)
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert error.startswith("shardopt: ")
    status, out, longer = say(capsys, *arguments, "--debug")
    assert (status, out) == (2, "")
    assert longer.startswith("Traceback")
    assert longer.endswith(error)


def test_a_package_that_is_not_installed_is_named_with_what_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shardopt.pretrain.keys", None)  # a defect of ours stays one
    monkeypatch.delattr("shardopt.pretrain.keys", raising=False)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["config"])
    monkeypatch.undo()

    def missing(arguments):
        raise ModuleNotFoundError("No module named 'yaml'", name="yaml")

    monkeypatch.setattr("shardopt.commands.config._config", missing)
    status, out, error = say(capsys, "config")
    assert (status, out) == (2, "")
    assert error == "shardopt: yaml is not installed. Install it with: pip install 'shardopt[pretrain]'\n"


def test_a_reader_that_has_enough_and_ctrl_c_end_a_command_quietly(monkeypatch, capfd):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("shardopt.commands.config._config", interrupted)
    assert cli.main(["config"]) == 128 + signal.SIGINT
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr("shardopt.commands.config._config", lambda arguments: print("x"))
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["config"]) == 128 + signal.SIGPIPE
    assert capfd.readouterr().err == ""


def test_a_warning_of_a_library_begins_as_those_of_a_run_do(capsys):
    say(capsys, "config", "train.steps")
    logging.lastResort.handle(
        logging.makeLogRecord({"msg": "2 rows are broken", "levelno": 30, "levelname": "WARNING"})
    )
    assert capsys.readouterr().err == "warning: 2 rows are broken\n"


def test_a_signal_before_the_first_step_of_a_start_is_told_as_that(capsys, tmp_path, monkeypatch):
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException

    def killed(_):
        raise SignalException("", signal.SIGTERM)

    monkeypatch.setattr(torchrun, "main", killed)
    for name in ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    arguments = ["pretrain", "--nproc-per-node", "2", "configs/quickstart.yaml", f"run.dir={tmp_path}"]
    events = tmp_path / "quickstart" / "events.jsonl"
    assert say(capsys, *arguments)[::2] == (
        143, "shardopt: SIGTERM ended the run before its first step; it has no checkpoint\n"
    )  # fmt: skip
    events.parent.mkdir()
    for seconds, words in (
        (-9, "before its first step; it"),
        (9, "before its checkpoint was complete (torchrun kills"),
    ):
        events.write_text(json.dumps({"time": time.time() + seconds, "event": "start", "step": 0}) + "\n")
        status, _, error = say(capsys, *arguments)
        assert (status, words in error) == (143, True), error
