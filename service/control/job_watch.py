"""The folder of jobs as the supervisor sees it: its lock, its age, and whether there is work."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

from service.background import DetachedThreads, Report, describe
from service.job_store import STORED, JobStore, Status
from service.settings import Settings
from service.telemetry.metrics import Metrics

LOOK_SECONDS = 1.0
TIDY_SECONDS = 60.0
IDLE_SECONDS = 30.0
"""How long the process that runs jobs is kept without one."""


class JobWatch:
    """Look into the folder of jobs again and again; its lock is held until this process ends.

    Args:
        settings: returns those in force.
        metrics: show how many jobs there are.
        report: is told of what is wrong with the folder.

    Attributes:
        lock: descriptor that holds the lock; None: there is no folder, or another server has it.
    """

    def __init__(self, settings: Callable[[], Settings], metrics: Metrics, report: Report) -> None:
        self.lock: int | None = None
        self._settings = settings
        self._metrics = metrics
        self._report = report
        self._store = JobStore(settings().state_dir)
        self._threads = DetachedThreads()
        self._tidied = float("-inf")
        self._wanted = asyncio.Event()
        self._worked = float("-inf")

    async def run(self) -> None:
        """Look, until cancelled."""
        while True:
            try:
                await self._look()
            except OSError as error:
                self._report("jobs", f"{self._store.folder}: {describe(error)}")
            await asyncio.sleep(LOOK_SECONDS)

    async def until_wanted(self) -> None:
        """Return when there is a job that this server is to run."""
        await self._wanted.wait()

    async def until_idle(self) -> None:
        """Return when there has been no such job for `IDLE_SECONDS`."""
        while self._wanted.is_set() or time.monotonic() - self._worked < IDLE_SECONDS:
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self) -> None:
        there, found = await self._threads.run("jobs", self._read)
        for status in STORED:
            self._metrics.jobs.labels(status).set(found[status])
        work = found["queued"] + found["running"]
        if self.lock is not None and work:
            self._worked = time.monotonic()
            self._wanted.set()
        else:
            self._wanted.clear()
        taken = there and self.lock is None
        problem = f"{self._store.folder}: another server runs the jobs in it, so this one does not"
        self._report("jobs", problem if taken else None)

    def _read(self) -> tuple[bool, Counter[Status]]:
        """Return whether there is a folder, and its jobs by status.

        Raises:
            OSError: it cannot be read or written.
        """
        if not self._store.folder.is_dir():
            return False, Counter()
        if self.lock is None:
            self.lock = self._store.lock()
        if self.lock is not None and time.monotonic() - self._tidied > TIDY_SECONDS:
            self._tidied = time.monotonic()
            self._store.tidy(self._settings().job_retention_seconds)
        return True, self._store.count()
