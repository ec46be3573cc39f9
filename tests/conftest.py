"""Mark every test by its folder: `pytest -m unit` then needs no word in the tests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

KINDS = ("unit", "integration", "e2e", "fuzz", "cluster")
HERE = Path(__file__).parent

# What Triton interprets is settled as it is imported, which others may do first. Servers that tests
# start on a host with a GPU are to use it, so there the tests of the kernels are skipped.
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        kind = item.path.relative_to(HERE).parts[0]
        if kind in KINDS:
            item.add_marker(kind)
