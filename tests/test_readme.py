"""Every command and snippet of the README, run; every flag, file and link that it names, looked for."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from shardopt.pretrain.config import load
from tests.distributed.pool import on_ranks

README = Path("README.md").read_text(encoding="utf-8")


def fenced(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


class Blocks(nn.Module):
    """Stand-in for the model of the snippets."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def _snippet(rank, world_size, code):
    """Run `code`, then two steps of whatever optimizer it made; the loss before and after."""
    torch.manual_seed(0)
    model = Blocks()
    batches = [torch.randn(4, 8, generator=torch.Generator().manual_seed(rank)) for _ in range(2)]

    def loss(y):
        return y.square().mean()

    names = {"model": model, "loss": loss, "batches": batches, "torch": torch}
    exec(code, names)
    optimizer = names["optimizer"]
    before = loss(model(batches[0])).item()
    for batch in batches * 3:
        loss(model(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, loss(model(batches[0])).item()


SNIPPETS = [code for code in fenced("python") if "from shardopt import" in code]


@pytest.mark.parametrize("code", SNIPPETS, ids=lambda code: re.sub(r"\W+", "-", code.splitlines()[0])[:40])
def test_a_snippet_runs_and_its_optimizer_learns(code):
    for before, after in on_ranks(2, _snippet, code):
        assert after < before


# The quickstart's steps take a second each; the quickstart itself takes some below.
LESS = {"global_batch: 32": "global_batch: 4", "micro_batch: 16": "micro_batch: 2", "batches: 8": "batches: 1"}


@pytest.mark.parametrize("block", fenced("bash"), ids=lambda b: b.split()[0])
def test_command_runs_as_it_stands(block, tmp_path):
    """In a folder of its own, so that its run does not stay in the clone, and with smaller batches."""
    (tmp_path / "launch").symlink_to(Path("launch").absolute())
    shutil.copytree("configs", tmp_path / "configs")
    config = (tmp_path / "configs" / "quickstart.yaml").read_text()
    for text, less in LESS.items():
        assert config.count(text) == 1, text
        config = config.replace(text, less)
    (tmp_path / "configs" / "quickstart.yaml").write_text(config)
    for line in block.strip().replace("\\\n", " ").splitlines():
        command, *arguments = shlex.split(line)
        whole = [str(Path(sys.executable).parent / command), *arguments]
        subprocess.run(whole, check=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=280)
    assert (tmp_path / "runs" / "mine" / "loss.png").exists()


def test_settings_of_commands_in_the_text_are_accepted():
    commands = re.findall(r"`([^`\n]*(?:quickstart\.sh|shardopt pretrain) [^`\n]*)`", README)
    assert len(commands) >= 2
    for command in commands:
        load("configs/quickstart.yaml", [word for word in shlex.split(command) if "=" in word])


def test_the_quickstart_trains_keeps_its_promises_on_disk_and_says_what_each_rank_holds(tmp_path):
    """As a person starts it, with fewer steps."""
    command = ["scripts/quickstart.sh", "train.steps=2", "schedule.warmup=1", "eval.batches=1", f"run.dir={tmp_path}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=280)
    folder = tmp_path / "quickstart"
    for name in ("config.yaml", "metrics.jsonl", "loss.png", "checkpoints/step-00000002", "export/model.safetensors"):
        assert (folder / name).exists(), name
    rows = dict(re.findall(r"^(weights|gradients|m1|m2|nu)\b.* ([\d.]+) %\s*$", done.stdout, re.MULTILINE))
    assert rows.keys() == {"weights", "gradients", "m1", "m2", "nu"}
    assert all(49.5 <= float(share) <= 50.5 for share in rows.values()), rows
    assert all(len(line) <= 80 or str(tmp_path) in line for line in done.stdout.splitlines())


def test_it_stays_short_and_shows_the_loss_and_the_memory_of_a_rank():
    assert len(README.splitlines()) < 200
    assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README) == ["docs/loss.png", "docs/memory.png"]


def test_every_file_and_key_that_it_names_is_there():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or Path(link).exists(), link
    for path in re.findall(r"`((?:configs|docs|launch|scripts)/[\w./-]+)`", README):
        assert Path(path).exists(), path
    from shardopt.pretrain.config import Config

    guide = Path("docs/getting-started.md").read_text(encoding="utf-8")
    sections = re.findall(r"^\| `(\w+)` \| [^|]* \| (.*) \|$", guide, re.MULTILINE)
    assert {name for name, _ in sections} == set(Config.model_fields)
    for name, keys in sections:
        if name in ("model", "optimizer"):  # these take the keys of what they name
            continue
        fields = Config.model_fields[name].annotation.model_fields if name != "engine" else {"name": None}
        known = {getattr(f, "alias", None) or n for n, f in fields.items()}
        if name == "tracking":
            known |= {"mode", "project"}
        assert set(re.findall(r"`(\w+)`", keys)) <= known, name
