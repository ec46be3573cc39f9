"""Background tasks and threads, and the handling of their errors."""

from __future__ import annotations

import asyncio
import threading
from asyncio import CancelledError, Future
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from contextlib import suppress
from typing import Any, TypeVar

import structlog

from budgetformer.errors import one_line

log = structlog.get_logger()

FIRST_BACKOFF = 0.1
LONGEST_BACKOFF = 5.0
RECOVERED_SECONDS = 30.0
"""Time without an error after which a task counts as recovered."""

_T = TypeVar("_T")
Report = Callable[[str, str | None], None]
"""Called with the name of a task and why it fails, or with None when it has recovered."""


class Background:
    """Tasks that are not awaited. They are referenced here, since the event loop does not do it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` as a task, and log the error that ends it, if any."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def stop(self) -> None:
        """Cancel all tasks, and wait for their end."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("background task failed", task=task.get_name(), exc_info=error)


def describe(error: BaseException) -> str:
    """Return an error's type and message on one line."""
    message = one_line(error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def is_cancelled() -> bool:
    """Return whether the current task is being cancelled.

    False if a library raised `CancelledError` for another reason; it is then an ordinary error.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def run_forever(
    name: str, work: Callable[[], Awaitable[None]], report: Report = lambda *_: None
) -> None:
    """Run a task until it returns or is cancelled; restart it after errors, with backoff.

    No error leaves this function, so it does not end a task group.

    Args:
        name: name of the task, for the log and `report`.
        work: starts the task.
        report: called with errors, and with None after recovery.
    """
    loop, backoff = asyncio.get_running_loop(), FIRST_BACKOFF
    while True:
        started = loop.time()
        recovery = loop.call_later(RECOVERED_SECONDS, report, name, None)
        try:
            await work()
            return
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # libraries may raise anything, even CancelledError
            if isinstance(error, CancelledError) and is_cancelled():
                raise
            if loop.time() - started > RECOVERED_SECONDS:
                backoff = FIRST_BACKOFF
            log.error("task failed", task=name, restart_in=backoff, exc_info=error)
            report(name, f"{name}: {describe(error)}; next attempt in {backoff:g} s")
        finally:
            recovery.cancel()
        await asyncio.sleep(backoff)
        backoff = min(backoff * 2, LONGEST_BACKOFF)


class StillRunningError(Exception):
    """Earlier work with the same key was abandoned, and its thread has not ended yet."""


class DetachedThreads:
    """Run blocking work in threads that can be abandoned.

    A thread cannot be stopped. An abandoned one goes on, and its result is discarded. There is at
    most one thread for each key, so retries of work that hangs do not pile up. The threads are
    daemons: they do not delay the end of the process.
    """

    def __init__(self) -> None:
        self._running: set[Hashable] = set()

    async def run(
        self,
        key: Hashable,
        work: Callable[[], _T],
        timeout: float | None = None,
        discard: Callable[[_T], None] = lambda _: None,
    ) -> _T:
        """Run `work` in a thread, and return its result.

        Args:
            key: name of the work.
            work: runs in the thread; its errors are raised here.
            timeout: seconds after which it is abandoned.
            discard: called with a result that comes too late.

        Raises:
            StillRunningError: abandoned work with this key has not ended.
            TimeoutError: the work was abandoned.
        """
        if key in self._running:
            raise StillRunningError
        loop = asyncio.get_running_loop()
        future: Future[_T] = loop.create_future()

        def deliver(result: Any, error: BaseException | None) -> None:
            self._running.discard(key)
            if future.done():  # abandoned
                if error is None:
                    discard(result)
            elif error is None:
                future.set_result(result)
            elif isinstance(error, Exception) and not isinstance(error, StopIteration):
                future.set_exception(error)
            else:  # futures reject StopIteration, and SystemExit would end the event loop
                future.set_exception(RuntimeError(describe(error)))

        def run() -> None:
            result, error = None, None
            try:
                result = work()
            except BaseException as raised:  # any error must reach the waiting task
                error = raised
            with suppress(RuntimeError):  # the loop is closed, since the process ends
                loop.call_soon_threadsafe(deliver, result, error)

        threading.Thread(target=run, daemon=True, name="detached").start()
        self._running.add(key)
        try:
            async with asyncio.timeout(timeout):
                return await future
        finally:
            future.cancel()
