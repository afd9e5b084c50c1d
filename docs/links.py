"""A hook of mkdocs: links that lead out of `docs/` become addresses in the repository.

On a code host `../examples/paper/README.md` is a file of the same repository; a site over `docs/` has no such page.
"""

from __future__ import annotations

import logging
import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
LINK = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]+)?\)")

logger = logging.getLogger(f"mkdocs.plugins.{__name__}")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites the links of one page; a link to a file that does not exist is a warning, and an error if strict."""

    def address(match: re.Match[str]) -> str:
        path, anchor = match.groups(default="")
        if not (ROOT / path).exists():
            logger.warning("%s links to ../%s, which does not exist.", page.file.src_path, path)
        return f"]({REPOSITORY}/blob/main/{path}{anchor})"

    return LINK.sub(address, markdown)
