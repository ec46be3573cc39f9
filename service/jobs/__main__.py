"""The process that runs jobs: a client of the hub and of the engines, as a frontend is.

`python -m service.jobs RUN_DIR LOCK`

LOCK is the descriptor that holds the lock on the folder of jobs. The process keeps it open, so that
no other server runs the jobs while this one still does.
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

from service.background import run_forever
from service.ipc.engine_client import Engines
from service.ipc.hub_client import HubLink
from service.job_store import JobStore
from service.jobs.answering import ChunkAnswering
from service.jobs.runner import Runner
from service.pipeline.answering import Answering
from service.pipeline.catalog_follower import Follow
from service.pipeline.served_models import Models
from service.process import (
    decode_settings,
    engine_socket,
    exit_with_parent,
    hub_socket,
    keep_what_is_here,
    name_process,
    receive_settings,
)
from service.settings import Settings
from service.telemetry.logs import configure_logs, drain_logs, set_log_level


class JobProcess:
    """What this process holds: connections, models, and the settings in force."""

    def __init__(self, settings: Settings, run_dir: Path) -> None:
        self.settings = settings
        sockets = [engine_socket(run_dir, i) for i in range(settings.engines)]
        self._engines = Engines(sockets)
        models = Models(settings.model_store, settings.default_model, run_dir)
        self._hub = HubLink(
            hub_socket(run_dir), lambda serving: self._follow(serving), [], self._configure
        )
        self._follow = Follow(models, self._engines, self._hub)
        answering = ChunkAnswering(
            models, self._hub, Answering(self._engines), lambda: self.settings
        )
        store = JobStore(settings.state_dir)
        self._runner = Runner(store, answering, lambda: self.settings)

    async def run(self) -> None:
        """Run jobs until cancelled."""
        self._engines.start()
        await self._hub.start()
        try:
            await run_forever("jobs", self._runner.run)
        finally:
            await self._hub.stop()
            await self._follow.stop()
            await self._engines.stop()

    def _configure(self, line: bytes) -> None:
        self.settings = decode_settings(line)
        set_log_level(self.settings.log_level)


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
    keep_what_is_here()
    uvloop.run(_until_stopped(settings, run_dir))
    drain_logs()


if __name__ == "__main__":
    main()
