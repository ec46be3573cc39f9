"""Run jobs one after another, oldest first; a job that was interrupted goes on where it was."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
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

LOOK_SECONDS = 0.25
REPORT_SECONDS = 0.5
MAX_STARTS = 5
"""Starts of a job without an answered row after which it is to blame for the end of its process."""


_T = TypeVar("_T")


class _StoppedError(Exception):
    """The run is to end: the job was removed, or the process ends."""


class Runner:
    """Run the jobs of a store.

    Args:
        store: of jobs.
        answering: answers their rows.
        settings: returns those in force.
    """

    def __init__(
        self, store: JobStore, answering: ChunkAnswering, settings: Callable[[], Settings]
    ) -> None:
        self._store = store
        self._answering = answering
        self._settings = settings

    async def run(self) -> None:
        """Run jobs as they come, until cancelled.

        Raises:
            OSError: the folder of jobs cannot be written.
        """
        while True:
            job = await asyncio.to_thread(self._store.next)
            if job is None:
                await asyncio.sleep(LOOK_SECONDS)
            else:
                await self._run(job)

    async def _run(self, job: StoredJob) -> None:
        """Run a job to its end."""
        description = job.description
        names = {"job": description.id, "model": description.model, "key": description.owner}
        run = _Run(job, self._store, self._answering, self._settings)
        log.info("job begun", rows=run.progress.rows, **names)
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
    """One job, from where it is to its end.

    A thread reads rows and writes answers; the event loop asks the engines and reports.
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
        self._asked: set[Future[Any]] = set()
        self._writing = threading.Lock()
        self._reason: Exception | None = None
        """Why the thread is to stop."""

    async def to_the_end(self) -> None:
        """Run the job until it has finished or failed.

        Raises:
            _StoppedError: it was removed.
            OSError: its outcome cannot be written.
        """
        starts = self.progress.starts + 1
        begun = self.progress.started or time.time()
        self._know(status="running", started=begun, starts=starts, seconds_left=None)
        try:
            await asyncio.to_thread(self._write)
            if starts > MAX_STARTS:
                raise JobFailedError(
                    f"the process that ran the job has ended {MAX_STARTS} times without an answer"
                )
            await self._work()
        except asyncio.CancelledError:
            self._know(starts=self.progress.starts - 1)
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
        """Have a thread do the work, and look after it."""
        working = asyncio.create_task(asyncio.to_thread(self._classify))
        try:
            while not (await asyncio.wait({working}, timeout=REPORT_SECONDS))[0]:
                await self._look()
            working.result()
        except (CancelledError, asyncio.CancelledError):
            if self._reason is None or is_cancelled():
                raise
            raise self._reason from None  # `_stop` cancelled what the thread waited for
        finally:
            self._stop(self._reason or _StoppedError())
            await asyncio.wait({working})

    async def _look(self) -> None:
        """Report how far the job is, and stop it where it may not go on."""
        try:
            await asyncio.to_thread(self._write)
            most = self._settings().max_jobs_bytes
            await asyncio.to_thread(self._store.check_bytes, most)
        except FileNotFoundError:
            self._stop(_StoppedError())
        except BudgetFormerError as error:
            self._stop(error)

    def _stop(self, reason: Exception) -> None:
        self._reason = reason
        for future in list(self._asked):
            future.cancel()

    def _write(self) -> None:
        with self._writing:
            waiting = self._answering.waiting_for if self.progress.unfinished else None
            self.job.write_progress(msgspec.structs.replace(self.progress, waiting_for=waiting))

    def _know(self, **fields: object) -> None:
        self.progress = msgspec.structs.replace(self.progress, **fields)

    def _explain(self, error: Exception) -> str:
        """Return what the job's owner is told; it may quote the file, so it is not logged."""
        if isinstance(error, BudgetFormerError):
            return str(error).replace(f"{self.job.folder}/", "")
        if isinstance(error, OSError):
            return f"the job's files: {error.strerror or error}"
        log.error("job failed: unexpected error", job=self.job.description.id, exc_info=error)
        return "unexpected error; the server's log says more"

    async def _end(self, status: Status, error: str | None) -> None:
        kept = {"job.json", "progress.json"} | ({self.job.result.name} if error is None else set())
        self._know(status=status, error=error, ended=time.time(), seconds_left=None, starts=0)
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
            follow = _Follow(rows, journal.totals)
            chunks = chunks_of(journal.remaining(iter(rows)), lambda: self._answering.rows)
            # One more than engines compute, so that they need not wait for its tokens.
            for answered in answer_in_order(chunks, self._ask, self._answering.at_once + 1):
                journal.append(answered)
                self._know(starts=0, **follow.figures())
            self._know(**follow.figures())
            self._write()  # all that is known once the journal is gone
            finish(journal, result)

    def _fetch(self) -> None:
        """Fetch the input from its URL, unless that is done."""
        url = self.job.description.source
        if url is None or self.job.input.exists():
            return
        settings = self._settings()
        if not is_allowed(url, settings.job_sources):
            raise JobFailedError("the setting job_sources does not allow the source any more")
        partial = self.job.input.with_name("fetched")

        def check(*_: object) -> None:
            if self._reason is not None:
                raise self._reason

        download(url, partial, check, settings.max_job_bytes)
        partial.replace(self.job.input)

    def _ask(self, chunk: Chunk) -> Future[Answered]:
        return self._wait_for(self._answering.answer(self.job.description, chunk))

    def _wait_for(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Have the event loop do some work, which ends when the run is stopped."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._asked.add(future)
        future.add_done_callback(self._asked.discard)
        if self._reason is not None:
            future.cancel()
        return future


class _Follow:
    """Figures of a run that has just begun or gone on."""

    def __init__(self, rows: TableFile, totals: Totals) -> None:
        self._rows, self._totals = rows, totals
        self._before = totals.rows
        self._began = time.monotonic()
        self._share_before: float | None = None

    def figures(self) -> dict[str, object]:
        """Return the fields of `JobProgress` that they are."""
        totals, rows = self._totals, self._rows
        seconds = max(time.monotonic() - self._began, 1e-6)
        share = rows.position / rows.size if rows.size else 1.0
        if self._share_before is None:
            self._share_before = share
        passed = share - self._share_before
        return {
            "rows": totals.rows,
            "failed_rows": totals.failed,
            "read_share": share,
            "rows_per_second": (totals.rows - self._before) / seconds,
            "seconds_left": (1 - share) * seconds / passed if passed > 0 else None,
            "labels": dict(totals.labels),
            "mean_heads": totals.mean_heads,
            "macs_share": totals.macs_share,
        }
