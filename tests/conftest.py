"""Mark every test by its folder: `pytest -m unit` then needs no word in the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

KINDS = ("unit", "integration", "e2e", "fuzz", "cluster")
HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        kind = item.path.relative_to(HERE).parts[0]
        if kind in KINDS:
            item.add_marker(kind)
