"""Progress messages of the commands in this package."""

from __future__ import annotations

import sys


def log(line: str) -> None:
    """Write a line to the error stream, so that the output holds the report alone."""
    sys.stderr.write(f"{line}\n")
