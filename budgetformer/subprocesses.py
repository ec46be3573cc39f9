"""Child processes of Python."""

from __future__ import annotations

import sys


def python_command(*arguments: str) -> list[str]:
    """Return the command line of a Python child that imports nothing from its working directory.

    Without `-P`, `python -m` and `python -c` look there first: a user's `service.py`, `json.py` or
    `torch` folder would replace the installed module.

    Args:
        arguments: as for `python`, such as `-m` and a module.
    """
    return [sys.executable, "-P", *arguments]
