"""Write docs/licences.md: the licence of every package that constraints.txt pins, as the installed ones state it.

PYTHONPATH=. python scripts/list_licences.py
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "licences.md"
_TEXT = """# Licences

shardopt is under Apache-2.0. These packages are installed with it or its extras, or test it; what stands here is what
they state themselves. Made by `python scripts/list_licences.py`.

| package | licence |
|---|---|
"""


# Packages whose metadata states none, as their licence file reads.
_FROM_FILE = {"torchao": "BSD-3-Clause"}


def pinned() -> list[str]:
    """The names in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line.partition("==")[0] for line in lines if "==" in line and not line.startswith("#")]


def licence_of(name: str) -> str:
    """One line."""
    about = importlib.metadata.metadata(name)
    classes = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or () if c.startswith("License :: ")]
    stated = about.get("License-Expression") or ", ".join(c for c in classes if c != "OSI Approved")
    first = next(iter((about.get("License") or "").strip().splitlines()), "")
    return re.sub(r"\s+", " ", stated or first or _FROM_FILE.get(name, "not stated"))[:80].replace("|", "/")


def main() -> None:
    PAGE.write_text(_TEXT + "".join(f"| {name} | {licence_of(name)} |\n" for name in pinned()))


if __name__ == "__main__":
    main()
