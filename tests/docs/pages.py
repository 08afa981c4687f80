"""The pages of the documentation and what is in them: code blocks, and the prose around them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "lightning_mics" / "techniques" / "README.md",
    ROOT / "lightning_mics" / "checkpoint" / "README.md",
)


_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: Path of the page from the root of the repository.
        language: What stands behind the fence, such as ``python``.
        text: The lines between the fences.
    """

    page: str
    language: str
    text: str


def name_of(page: Path) -> str:
    """The path of a page from the root of the repository."""
    return str(page.relative_to(ROOT))


def blocks(language: str, pages: tuple[Path, ...] = PAGES) -> list[Block]:
    """All blocks in a language, in order."""
    return [
        Block(name_of(page), found, text)
        for page in pages
        for found, text in _FENCE.findall(page.read_text())
        if found == language
    ]


def without_blocks(text: str) -> str:
    """A page's prose and tables."""
    return _FENCE.sub("", text)
