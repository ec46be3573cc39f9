"""The Python of the pages on clients, run against a served program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.processes import Server
from tests.support.stores import TOPICS

DOCS = Path(__file__).parents[2] / "docs"
SNIPPETS = [
    pytest.param(snippet, id=f"{page}-{number}")
    for page in ("client.md", "compatibility.md")
    for number, snippet in enumerate(
        re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    )
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_runs(running: Server, snippet: str) -> None:
    program = snippet.replace("http://127.0.0.1:8000", running.url)
    program = program.replace("127.0.0.1:8000", running.url.removeprefix("http://"))
    exec(compile(program.replace("ag_news", TOPICS), "snippet", "exec"), {})


def test_every_page_has_some() -> None:
    assert len(SNIPPETS) == 5
