"""Commands in the place of SLURM's, by which launch/slurm.sbatch runs on this machine as on a cluster's only node.

    environment = os.environ | stand_in_slurm.install(folder, ranks=2)
    job = subprocess.Popen(["bash", str(SBATCH), "config.yaml"], cwd=folder, env=environment)
    job.send_signal(signal.SIGUSR1)                 # as SLURM does 300 s before the time is up
    stand_in_slurm.requeued(folder)                 # how often the job was queued again

srun ends its task by SIGKILL when it gets SIGTERM itself, as SLURM's does; scancel signals the task alone.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SBATCH = ROOT / "launch" / "slurm.sbatch"

_SRUN = """\
while [[ $1 == --* ]]; do shift; done
"$@" &
echo $! >{folder}/task
trap 'kill -KILL $(cat {folder}/task)' TERM
wait $!; status=$?
while kill -0 $! 2>/dev/null; do wait $!; status=$?; done
exit $status"""
_SCONTROL = """\
case $1 in
show) echo 127.0.0.1 ;;
requeue) echo "$2" >>{folder}/requeued ;;
esac"""
_SCANCEL = """\
[ "$1 $2" = "--signal=TERM $SLURM_JOB_ID" ] && kill -TERM $(cat {folder}/task)"""
_JOB = "4711"


def install(
    folder: Path, ranks: int, torchrun: str = "{python} -m torch.distributed.run", python: str = "{python}"
) -> dict[str, str]:
    """Put the commands, a .venv and launch/ into `folder`, from which the job is to be started; its environment.

    Args:
        ranks: of the node.
        torchrun, python: what the commands of .venv run; {python} is this process's.
    """
    commands = {"srun": _SRUN, "scontrol": _SCONTROL, "scancel": _SCANCEL}
    for name, body in commands.items():
        _write(folder / "slurm" / name, body.format(folder=folder / "slurm"))
    for name, command in {"torchrun": torchrun, "python": python}.items():
        _write(folder / ".venv" / "bin" / name, f'exec {command.format(python=sys.executable)} "$@"')
    if not (folder / "launch").exists():
        (folder / "launch").symlink_to(ROOT / "launch")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "PATH": f"{folder / 'slurm'}:/usr/local/bin:/usr/bin:/bin", "RDZV_PORT": str(port), "SLURM_JOB_ID": _JOB,
        "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": str(ranks),
        "SLURM_GPUS_PER_NODE": str(ranks), "PYTHONPATH": str(ROOT),
    }  # fmt: skip


def requeued(folder: Path) -> int:
    """How often the job was queued again."""
    path = folder / "slurm" / "requeued"
    return path.read_text().split().count(_JOB) if path.exists() else 0


def _write(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
