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


def engine_socket(run_dir: Path, index: int) -> Path:
    """Return where engine `index` listens."""
    return run_dir / f"engine-{index}.sock"


def encode_settings(settings: Settings) -> bytes:
    """Return the settings, secrets in the clear, as the line that a child reads from its stdin."""
    values = settings.model_dump(mode="json")
    if settings.admin_key is not None:
        values["admin_key"] = settings.admin_key.get_secret_value()
    return json.dumps(values).encode() + b"\n"


def receive_settings() -> Settings:
    """Read the settings from stdin, where the parent writes them: no secret is left on a disk."""
    line = bytearray()
    while not line.endswith(b"\n"):
        part = os.read(0, 1)
        if not part:
            raise SystemExit("this process is started by `budgetformer serve`")
        line += part
    return Settings(**json.loads(line))


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
