"""The Python blocks of a page of docs/recipes/, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"


def blocks(page: str) -> list[str]:
    """The page's blocks in its order."""
    return re.findall(r"```python\n(.*?)```", (RECIPES / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)


def names_of(page: str, number: int = 0, **given: Any) -> dict[str, Any]:
    """What the block of this number defines, run with the names `given`."""
    names = {"__name__": page, **given}
    exec(compile(blocks(page)[number], f"docs/recipes/{page}.md", "exec"), names)
    return names
