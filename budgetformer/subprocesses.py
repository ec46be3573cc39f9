"""Start Python child processes that cannot import modules from their working directory."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path


def python_command(*arguments: str) -> list[str]:
    """Return the command line of a Python child that does not import from its working directory.

    Without `-P`, `python -m` and `python -c` search that directory first, so a user's `service.py`,
    `json.py` or `torch` folder would replace the installed module.

    Args:
        arguments: arguments of `python`, such as `-m` and a module.
    """
    return [sys.executable, "-P", *arguments]


def shadowing_files(folder: Path) -> list[str]:
    """Return the files in a folder that would shadow modules imported by this process.

    They shadow them in a process whose `sys.path` begins with that folder.
    """
    shadowing = []
    for name in sorted({name.partition(".")[0] for name in sys.modules}):
        spec = PathFinder.find_spec(name, [str(folder)])
        imported = getattr(sys.modules.get(name), "__file__", None)
        # A folder without `__init__.py` has no origin, and shadows nothing.
        if spec and spec.origin and imported and not Path(spec.origin).samefile(imported):
            shadowing.append(spec.origin)
    return shadowing
