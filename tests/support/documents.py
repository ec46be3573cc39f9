"""The documentation as text: its pages, their code, their headings and links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [
    *PAGES,
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*/**/*.md")),
    *sorted((ROOT / "model_store").glob("*/*/README.md")),
]
"""Every document whose links are checked; the code of PAGES is also run."""

_FENCED = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Some fenced code of a page, from `line` on."""

    page: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[list[str]]:
        """Return the words of each shell command, without comments, with continued lines joined."""
        joined = self.code.replace("\\\n", " ")
        split = (shlex.split(line, comments=True) for line in joined.splitlines())
        return [words for words in split if words]


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced code of a page."""
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[2], found[3])
        for found in _FENCED.finditer(text)
    ]


def prose_of(page: Path) -> str:
    """Return a page without any code."""
    return re.sub(r"`[^`\n]*`", "", _FENCED.sub("", page.read_text()))


def links_of(page: Path) -> list[str]:
    """Return the targets of links and pictures."""
    without_code = _FENCED.sub("", page.read_text())
    return re.findall(r"\]\(<?([^)\s>]+)>?\)", without_code)


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and MkDocs generate them."""
    found = re.findall(r"^#+ +(.+?) *$", _FENCED.sub("", page.read_text()), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in found)
    return {re.sub(r"\s+", "-", heading) for heading in plain}
