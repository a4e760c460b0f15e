"""What a run asks of the system: which files it writes, and whom it connects to."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretrain import tiny

_FILES = "open,openat,openat2,creat,mkdir,mkdirat,rename,renameat,renameat2,link,linkat,symlink,symlinkat"
CALLS = f"{_FILES},connect,sendto,sendmsg,sendmmsg"
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ADDRESS = re.compile(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"')


def traced(command: list[str], log: Path, environment: dict[str, str], cwd: Path) -> list[str]:
    """The calls that `command` and its children made."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    if subprocess.run([strace, "-o", os.devnull, "true"], capture_output=True).returncode:
        pytest.skip("strace may not trace here")
    watched = [strace, "-f", "-qq", "--seccomp-bpf", "-yy", "-s", "4096", "-e", f"trace={CALLS}", "-o", str(log)]
    done = subprocess.run([*watched, *command], env=environment, cwd=cwd, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return log.read_text(errors="replace").splitlines()


def written(calls: list[str], cwd: Path) -> set[str]:
    """Paths that were opened for writing, made or renamed to."""
    found = set()
    for call in calls:
        name = re.sub(r"^\d+ +", "", call).partition("(")[0]
        if name.startswith("open") and not re.search(r"O_WRONLY|O_RDWR|O_CREAT", call):
            continue
        if " = -1 " in call or name.startswith(("connect", "send")) or not (paths := _STRING.findall(call)):
            continue
        base = re.search(r"AT_FDCWD<([^>]*)>", call)
        found.add(os.path.normpath(Path(base[1] if base else cwd) / paths[-1]))
    return found


def reached(calls: list[str]) -> set[str]:
    """Addresses on a network that were connected or sent to, with an answer or without; but for name servers."""
    return {a or b for call in calls if "htons(53)" not in call for a, b in _ADDRESS.findall(call)}


def looked_up(calls: list[str]) -> list[str]:
    """Questions to name servers, as they were sent."""
    return [call for call in calls if re.match(r"\d+ +send\w+\(\d+<UDP.*?:53\]>", call)]


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("::1", "::ffff:127.0.0.1")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="strace is Linux's")
def test_a_run_writes_to_its_folder_and_the_caches_alone_and_reaches_no_network(tmp_path: Path) -> None:
    tiny.corpus(tmp_path / "text")
    tree = tiny.tree(tmp_path, checkpoint__every=3, checkpoint__export="true")
    del tree["data"]["cache"]  # as a user leaves it; W&B is switched off in this tree
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    quiet = ("HF_", "WANDB_", "XDG_", "TRANSFORMERS_", "PYTEST", "DO_NOT_TRACK")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(quiet)}
    environment |= {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "shardopt", "pretrain", "--nproc-per-node", "2", str(tmp_path / "config.yaml")]
    calls = traced(command, tmp_path / "calls", environment, tmp_path)

    assert {address for address in reached(calls) if not is_loopback(address)} == set()
    # torchrun asks for this machine's own name, and for that of its addresses.
    name = socket.gethostname().partition(".")[0]
    own = re.compile(rf"\\0*{len(name):o}{re.escape(name)}|4arpa")
    assert [question for question in looked_up(calls) if not own.search(question)] == []
    paths = written(calls, tmp_path)
    allowed = [f"{tmp_path}/runs", f"{home}/.cache", str(temporary), "/dev/", "/proc/self/", "/proc/thread-self/"]
    # Folders that matplotlib and torch's compiler make for themselves.
    allowed += [f"{home}/.config/matplotlib", "/tmp/torchinductor_"]
    assert sorted(path for path in paths - {f"{home}/.config"} if not path.startswith(tuple(allowed))) == []
    # And a search that finds what is there, and in the home the caches of the documentation alone.
    assert any(path.startswith(f"{tmp_path}/runs/tiny/checkpoints/") for path in paths)
    assert any(path.startswith(f"{home}/.cache/shardopt/data/") for path in paths)
    assert {p.name for p in home.iterdir()} <= {".cache", ".config"}
    assert {p.name for p in (home / ".cache").iterdir()} <= {"shardopt", "huggingface", "matplotlib", "torch", "wandb"}
    assert all(p.name.startswith("torchelastic_") for p in temporary.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="strace is Linux's")
def test_the_trace_sees_files_and_connections(tmp_path: Path) -> None:
    code = """
import socket, pathlib
pathlib.Path("made").mkdir(); open("made/a", "w"); pathlib.Path("made/a").rename("made/b"); open("/etc/hostname")
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.7", 9))
"""
    assert looked_up(['7 sendmmsg(5<UDP:[192.0.2.1:4->192.0.2.53:53]>, [{msg_hdr={"\\3pypi\\3org"}}]) = 1']) != []
    calls = traced([sys.executable, "-c", code], tmp_path / "calls", dict(os.environ), tmp_path)
    mine = {path for path in written(calls, tmp_path) if path.startswith(str(tmp_path))}
    assert mine == {f"{tmp_path}/made", f"{tmp_path}/made/a", f"{tmp_path}/made/b"}
    assert reached(calls) == {"192.0.2.7"}
