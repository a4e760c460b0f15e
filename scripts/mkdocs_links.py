"""A hook of mkdocs: links of docs/ to files of the repository outside it, which the site does not have, become text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page without links that leave docs/.

    Raises:
        FileNotFoundError: one of them leads nowhere.
    """
    here = Path(page.file.abs_src_path).parent

    def as_text(link: re.Match[str]) -> str:
        target = here / link[2].split("#")[0]
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {link[2]}, which is not there")
        return link[1]

    return re.sub(r"\[([^\]]*)\]\((\.\./[^)]*)\)", as_text, markdown)
