"""The process that runs jobs: a client of the hub and of the engines, like a frontend.

`python -m service.jobs RUN_DIR LOCK`

LOCK is the descriptor that holds the lock of the folder of jobs. The process keeps it open, so that
no other server runs the jobs until this process has ended.
"""

from __future__ import annotations

if __name__ == "__main__":
    import service.without_rich  # noqa: F401

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import uvloop

from service.jobs.process import JobProcess
from service.process import (
    exit_with_parent,
    freeze_garbage_collector,
    name_process,
    receive_settings,
)
from service.settings import Settings
from service.telemetry.logs import configure_logs, drain_logs


async def _until_stopped(settings: Settings, run_dir: Path) -> None:
    running = asyncio.create_task(JobProcess(settings, run_dir).run())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    with suppress(asyncio.CancelledError):
        await running


def main() -> None:
    """Run the process."""
    run_dir = Path(sys.argv[1])
    os.umask(0o077)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = receive_settings()
    exit_with_parent()
    name_process("jobs")
    configure_logs(settings.log_level, settings.log_format, "jobs")
    freeze_garbage_collector()
    uvloop.run(_until_stopped(settings, run_dir))
    drain_logs()


if __name__ == "__main__":
    main()
