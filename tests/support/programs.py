"""Programs that tests run if they are there."""

from __future__ import annotations

import shutil

import pytest


def program(name: str) -> str:
    """Return where a program lies; without it the test is skipped."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}, which is not installed")
    return found
