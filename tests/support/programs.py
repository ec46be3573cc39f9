"""External programs that tests run if they are installed."""

from __future__ import annotations

import shutil

import pytest


def program(name: str) -> str:
    """Return the path of a program, or skip the test if it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}, which is not installed")
    return found
