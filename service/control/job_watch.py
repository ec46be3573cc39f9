"""The supervisor's watch over the folder of jobs: its lock, old jobs, and whether jobs wait."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

from service.background import DetachedThreads, Report, describe
from service.job_store import STORED, JobStore, Status
from service.settings import Settings
from service.telemetry.metrics import Metrics

POLL_SECONDS = 1.0
TIDY_SECONDS = 60.0
IDLE_SECONDS = 30.0
"""Time after the last job until the process that runs jobs is ended."""


class JobWatch:
    """Check the folder of jobs once a second; hold its lock until this process ends.

    Args:
        settings: returns the settings in force.
        metrics: metrics of the server, among them the number of jobs.
        report: called with a problem of the folder, or with None when there is none.

    Attributes:
        lock: descriptor that holds the lock; None: the folder does not exist, or another server
            holds its lock.
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
        """Check the folder until cancelled."""
        while True:
            try:
                await self._check()
            except OSError as error:
                self._report("jobs", f"{self._store.folder}: {describe(error)}")
            await asyncio.sleep(POLL_SECONDS)

    async def until_wanted(self) -> None:
        """Wait until there is a job that this server must run."""
        await self._wanted.wait()

    async def until_idle(self) -> None:
        """Wait until there has been no such job for `IDLE_SECONDS`."""
        while self._wanted.is_set() or time.monotonic() - self._worked < IDLE_SECONDS:
            await asyncio.sleep(POLL_SECONDS)

    async def _check(self) -> None:
        exists, jobs = await self._threads.run("jobs", self._read)
        for status in STORED:
            self._metrics.jobs.labels(status).set(jobs[status])
        if self.lock is not None and (jobs["queued"] or jobs["running"]):
            self._worked = time.monotonic()
            self._wanted.set()
        else:
            self._wanted.clear()
        locked_elsewhere = exists and self.lock is None
        problem = f"{self._store.folder}: another server runs the jobs in it, so this one does not"
        self._report("jobs", problem if locked_elsewhere else None)

    def _read(self) -> tuple[bool, Counter[Status]]:
        """Return whether the folder exists, and the number of its jobs by status.

        Raises:
            OSError: the folder cannot be read or written.
        """
        if not self._store.folder.is_dir():
            return False, Counter()
        if self.lock is None:
            self.lock = self._store.lock()
        if self.lock is not None and time.monotonic() - self._tidied > TIDY_SECONDS:
            self._tidied = time.monotonic()
            self._store.tidy(self._settings().job_retention_seconds)
        return True, self._store.count()
