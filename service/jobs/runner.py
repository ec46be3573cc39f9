"""Run jobs one after another, oldest first; resume interrupted jobs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import structlog

from budgetformer.bulk.chunks import Answered, Chunk, Totals, answer_in_order, chunks_of
from budgetformer.bulk.journal import Journal
from budgetformer.bulk.outputs import finish
from budgetformer.checkpoint.install.sources import download
from budgetformer.errors import BudgetFormerError
from budgetformer.tables import TableFile, open_table
from service.background import is_cancelled
from service.job_store import JobStore, Status, StoredJob
from service.jobs.answering import ChunkAnswering, JobFailedError
from service.settings import Settings
from service.source_urls import is_allowed

log = structlog.get_logger()

POLL_SECONDS = 0.25
REPORT_SECONDS = 0.5
MAX_STARTS = 5
"""Number of starts without an answered row after which a job fails, since it ends its process."""


_T = TypeVar("_T")


class _StoppedError(Exception):
    """The run must end, since the job was removed or the process ends."""


@dataclass(frozen=True)
class Runner:
    """Run the jobs of a store.

    Attributes:
        store: jobs to run.
        answering: answers their rows.
        settings: returns the settings in force.
    """

    store: JobStore
    answering: ChunkAnswering
    settings: Callable[[], Settings]

    async def run(self) -> None:
        """Run new and unfinished jobs, until cancelled.

        Raises:
            OSError: the folder of jobs cannot be written.
        """
        while True:
            job = await asyncio.to_thread(self.store.next)
            if job is None:
                await asyncio.sleep(POLL_SECONDS)
            else:
                await self._run(job)

    async def _run(self, job: StoredJob) -> None:
        description = job.description
        names = {"job": description.id, "model": description.model, "key": description.owner}
        run = _Run(job, self.store, self.answering, self.settings)
        log.info("job started", rows=run.progress.rows, **names)
        began = time.monotonic()
        try:
            await run.to_the_end()
        except _StoppedError:
            log.info("job cancelled", rows=run.progress.rows, **names)
            return
        seconds = round(time.monotonic() - began, 1)
        ended = run.progress
        log.info("job ended", status=ended.status, rows=ended.rows, seconds=seconds, **names)


class _Run:
    """Run of one job, from its last answered row to its end.

    A thread reads rows and writes answers; the event loop calls the engines and saves the progress.

    Args:
        job: job to run.
        store: store of the job.
        answering: answers rows.
        settings: returns the settings in force.

    Attributes:
        progress: progress of the job.
    """

    def __init__(
        self,
        job: StoredJob,
        store: JobStore,
        answering: ChunkAnswering,
        settings: Callable[[], Settings],
    ) -> None:
        self.job = job
        self.progress = job.progress()
        self._store = store
        self._answering = answering
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._futures: set[Future[Any]] = set()
        """Work of the event loop for which the thread waits."""
        self._writing = threading.Lock()
        self._reason: Exception | None = None
        """Reason why the thread must stop."""

    async def to_the_end(self) -> None:
        """Run the job until it has finished or failed.

        Raises:
            _StoppedError: the job was removed.
            OSError: its outcome cannot be written.
        """
        starts = self.progress.starts + 1
        started = self.progress.started or time.time()
        self._update(status="running", started=started, starts=starts, seconds_left=None)
        try:
            await asyncio.to_thread(self._write)
            if starts > MAX_STARTS:
                raise JobFailedError(
                    f"the process that ran the job has ended {MAX_STARTS} times without an answer"
                )
            await self._work()
        except asyncio.CancelledError:
            self._update(starts=self.progress.starts - 1)
            with suppress(OSError):
                self._write()
            raise
        except _StoppedError:
            raise
        except Exception as error:
            if not self.job.exists:
                raise _StoppedError from None
            await self._end("failed", self._explain(error))
        else:
            await self._end("finished", None)

    async def _work(self) -> None:
        """Run the thread, and save the progress regularly until it ends."""
        working = asyncio.create_task(asyncio.to_thread(self._classify))
        try:
            while not (await asyncio.wait({working}, timeout=REPORT_SECONDS))[0]:
                await self._check()
            working.result()
        except (CancelledError, asyncio.CancelledError):
            if self._reason is None or is_cancelled():
                raise
            raise self._reason from None  # `_stop` cancelled the futures of the thread
        finally:
            self._stop(self._reason or _StoppedError())
            await asyncio.wait({working})

    async def _check(self) -> None:
        """Save the progress; stop the job if it was removed or all jobs take too many bytes."""
        try:
            await asyncio.to_thread(self._write)
            await asyncio.to_thread(self._store.check_bytes, self._settings().max_jobs_bytes)
        except FileNotFoundError:
            self._stop(_StoppedError())
        except BudgetFormerError as error:
            self._stop(error)

    def _stop(self, reason: Exception) -> None:
        self._reason = reason
        for future in list(self._futures):
            future.cancel()

    def _write(self) -> None:
        with self._writing:
            waiting = self._answering.waiting_for if self.progress.unfinished else None
            self.job.write_progress(msgspec.structs.replace(self.progress, waiting_for=waiting))

    def _update(self, **fields: object) -> None:
        self.progress = msgspec.structs.replace(self.progress, **fields)

    def _explain(self, error: Exception) -> str:
        """Return the error message for the job's owner; not for the log, as it may quote texts."""
        if isinstance(error, BudgetFormerError):
            return str(error).replace(f"{self.job.folder}/", "")
        if isinstance(error, OSError):
            return f"the job's files: {error.strerror or error}"
        log.error("job failed: unexpected error", job=self.job.description.id, exc_info=error)
        return "unexpected error; the server's log says more"

    async def _end(self, status: Status, error: str | None) -> None:
        kept = {"job.json", "progress.json"} | ({self.job.result.name} if error is None else set())
        self._update(status=status, error=error, ended=time.time(), seconds_left=None, starts=0)
        try:
            for path in list(self.job.folder.iterdir()):
                if path.name not in kept:
                    path.unlink(missing_ok=True)
            await asyncio.to_thread(self._write)
        except FileNotFoundError:
            raise _StoppedError from None

    # In the thread

    def _classify(self) -> None:
        """Answer all rows that have no answer yet, and write the result."""
        description, result = self.job.description, self.job.result
        if Journal.is_finished(result):
            return
        self._fetch()
        checkpoint = self._wait_for(self._answering.checkpoint(description.model)).result()
        rows = open_table(self.job.input)
        with Journal(
            result, checkpoint, description.quality, description.heads, resume=True
        ) as journal:
            rate = _Rate(rows, journal.totals)
            chunks = chunks_of(journal.remaining(iter(rows)), lambda: self._answering.rows)
            # One more than engines compute: its texts are tokenized meanwhile.
            for answered in answer_in_order(chunks, self._ask, self._answering.at_once + 1):
                journal.append(answered)
                self._update(starts=0, **rate.figures())
            self._update(**rate.figures())
            self._write()  # the figures must be saved before the journal is removed
            finish(journal, result)

    def _fetch(self) -> None:
        """Fetch the input from its URL, unless it has been fetched."""
        url = self.job.description.source
        if url is None or self.job.input.exists():
            return
        settings = self._settings()
        if not is_allowed(url, settings.job_sources):
            raise JobFailedError("the setting job_sources no longer allows the source")
        partial = self.job.input.with_name("fetched")

        def check(*_: object) -> None:
            if self._reason is not None:
                raise self._reason

        download(url, partial, check, settings.max_job_bytes)
        partial.replace(self.job.input)

    def _ask(self, chunk: Chunk) -> Future[Answered]:
        return self._wait_for(self._answering.answer(self.job.description, chunk))

    def _wait_for(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Have the event loop run a coroutine, which is cancelled when the run is stopped."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        if self._reason is not None:
            future.cancel()
        return future


class _Rate:
    """Figures and speed of a run, measured from its start or its resumption."""

    def __init__(self, rows: TableFile, totals: Totals) -> None:
        self._rows, self._totals = rows, totals
        self._rows_at_start = totals.rows
        self._began = time.monotonic()
        self._share_at_start: float | None = None

    def figures(self) -> dict[str, object]:
        """Return fields of `JobProgress`."""
        totals, rows = self._totals, self._rows
        seconds = max(time.monotonic() - self._began, 1e-6)
        share = rows.position / rows.size if rows.size else 1.0
        if self._share_at_start is None:
            self._share_at_start = share
        done = share - self._share_at_start
        return {
            "rows": totals.rows,
            "failed_rows": totals.failed,
            "read_share": share,
            "rows_per_second": (totals.rows - self._rows_at_start) / seconds,
            "seconds_left": (1 - share) * seconds / done if done > 0 else None,
            "labels": dict(totals.labels),
            "mean_heads": totals.mean_heads,
            "macs_share": totals.macs_share,
        }
