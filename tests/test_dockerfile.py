"""launch/Dockerfile, and scripts/run_dockerfile.py, which takes its steps without docker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import run_dockerfile


def test_the_instructions_are_known_and_every_path_that_is_copied_is_there() -> None:
    text = run_dockerfile.DOCKERFILE.read_text()
    assert run_dockerfile.mistakes(text) == []
    copied = {path for name, rest in run_dockerfile.instructions(text) if name == "COPY" for path in rest.split()[:-1]}
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "shardopt", "configs", "launch"} <= copied


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("COPY nowhere.txt README.md ./", "COPY nowhere.txt: it is not there"),
        ("COPY README.md LICENSE there", "several sources need a folder"),
        ("RUN if true; then echo", "RUN if true; then echo: "),
        ("INSTALL torch", "INSTALL is none of FROM, ARG"),
        ("ENTRYPOINT shardopt", "ENTRYPOINT shardopt: it is no JSON list"),
    ],
)
def test_a_mistake_is_found_without_taking_a_step(line: str, message: str) -> None:
    (found,) = run_dockerfile.mistakes(f"ARG A=1\nFROM python\n{line}\n")
    assert message in found
    assert run_dockerfile.mistakes("RUN true\n") == ["nothing but ARG stands before FROM"]


def test_steps_are_taken_in_the_folder_with_the_values_that_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_dockerfile.venv, "create", lambda folder, **_: (folder / "bin").mkdir(parents=True))
    monkeypatch.setenv("PYTHONPATH", "/of/this/machine")
    file, image = tmp_path / "Dockerfile", tmp_path / "image"
    file.write_text(
        "ARG PYTHON=3\nFROM python:${PYTHON}\nARG DEVICE=cuda\nENV A=1 B=two\n"
        "RUN apt-get update && touch apt\nWORKDIR /opt/x\nCOPY README.md LICENSE sub/\nCOPY launch launch\n"
        '# why\nRUN echo "$DEVICE $A $B ${PYTHONPATH:-none} ${PYTHON:-gone}" \\\n    # and this\n    >said\n'
        'ENTRYPOINT ["sh", "-c"]\nCMD ["exit 5"]\n'
    )
    run_dockerfile.main(["--file", str(file), "--build-arg", "DEVICE=cpu", str(image), "--", "cat said; pwd"])
    assert capfd.readouterr().out.endswith(f"cpu 1 two none gone\n{image}/opt/x\n")
    assert {path.name for path in (image / "opt/x").iterdir()} == {"sub", "launch", "said"}
    assert (image / "opt/x/launch/slurm.sbatch").exists()
    for arguments, status in ([str(tmp_path / "again")], 5), ([str(image)], 2), (["--build-arg", "DEVISE=cpu", "x"], 2):
        with pytest.raises(SystemExit) as ended:
            run_dockerfile.main(["--file", str(file), *arguments])
        assert ended.value.code == status


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_image_without_cuda_trains(tmp_path: Path) -> None:
    """Installs torch and the rest anew, from the network or what pip is configured to take."""
    command = [sys.executable, run_dockerfile.__file__, "--build-arg", "DEVICE=cpu", str(tmp_path / "image"), "--"]
    run = [
        "pretrain",
        "--nproc-per-node=2",
        "configs/quickstart.yaml",
        "train.steps=2",
        "schedule.warmup=0",
        "eval.sample_tokens=0",
        "run.dir=runs",
    ]
    done = subprocess.run([*command, *run], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "image/opt/shardopt/runs/quickstart/checkpoints/step-00000002").is_dir()
