"""What the processes of one server share: the run directory, its files, and their life."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import psutil

from service.settings import Settings

_SETTINGS_FILE = "settings.json"


def engine_socket(run_dir: Path, index: int) -> Path:
    """Return where engine `index` listens."""
    return run_dir / f"engine-{index}.sock"


def write_settings(run_dir: Path, settings: Settings) -> None:
    """Leave the settings, secrets in the clear, for the other processes.

    Only this user may read them.
    """
    values = settings.model_dump(mode="json")
    if settings.admin_key is not None:
        values["admin_key"] = settings.admin_key.get_secret_value()
    path = run_dir / _SETTINGS_FILE
    path.touch(0o600)
    path.write_text(json.dumps(values))


def read_settings(run_dir: Path) -> Settings:
    """Read what `write_settings` left."""
    return Settings(**json.loads((run_dir / _SETTINGS_FILE).read_text()))


def exit_with_parent() -> None:
    """End this process, by SIGTERM, when its parent ends.

    The parent holds the other side of stdin.
    """

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def resident_bytes() -> int:
    """Return this process's resident memory."""
    return int(psutil.Process().memory_info().rss)


def child_command(module: str, *arguments: str) -> list[str]:
    """Return the command line of a child process that runs a module of this package."""
    return [sys.executable, "-m", module, *arguments]
