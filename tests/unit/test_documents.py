"""The documentation: links, code blocks, pictures, settings, and the build of the site."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from service.settings import Settings
from tests.support.documents import PAGES, ROOT, TEXTS, anchors_of, blocks_of, links_of

LANGUAGES = {"bash", "python", "json", "text", "toml"}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_have_existing_targets(page: Path) -> None:
    for link in links_of(page):
        if re.match(r"[a-z]+:", link):
            assert re.match(r"https?://\S+\.\S+|http://127\.0\.0\.1|mailto:", link), link
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: there is no {target}"
        if anchor:
            assert anchor in anchors_of(target), f"{link}: {target.name} has no such heading"


def test_the_helpers_find_links_and_anchors() -> None:
    assert sum(len(links_of(page)) for page in TEXTS) > 50
    assert "post-classify" in anchors_of(ROOT / "docs" / "api.md")
    assert "fastapi" not in anchors_of(ROOT / "docs" / "architecture.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_name_their_language_and_are_valid(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in LANGUAGES, str(block)
        if block.language == "json":
            json.loads(block.code)
        if block.language == "toml":
            tomllib.loads(block.code)
    assert page.read_text().count("\n```") % 2 == 0


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_separate_blocks(page: Path) -> None:
    lines = page.read_text().splitlines()
    for number, (before, line) in enumerate(zip(lines, lines[1:], strict=False), start=2):
        if line.startswith("|"):
            # Below anything else, the site shows the rows of the table as text.
            assert not before or before.startswith(("|", "#")), f"{page}:{number}"


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named == {page.name for page in PAGES if page.parent == ROOT / "docs"}


def test_pictures_are_current(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs/pictures/draw.py", tmp_path], check=True)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn == {p.name: p.read_text() for p in (ROOT / "docs" / "pictures").glob("*.svg")}


def test_settings_in_operations_md_exist() -> None:
    known = {f"--{name.replace('_', '-')}" for name in Settings.model_fields} | {"--config"}
    page = (ROOT / "docs" / "operations.md").read_text()
    for flags in re.findall(r"\| `(--[^`]+)`", page):
        assert set(re.findall(r"--[a-z-]+", flags)) <= known, flags


def test_extras_named_in_pages_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for page in PAGES:
        for names in re.findall(r"budgetformer-serving\[([\w,]+)\]", page.read_text()):
            assert set(names.split(",")) <= set(extras), page


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs (`make docs` installs it)"
)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "reference" / "index.html").read_text()
    for name in ("Classifier", "read_checkpoint", "AsyncClient", "drain_seconds"):
        assert name in reference
