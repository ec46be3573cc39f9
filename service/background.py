"""Tasks and threads that run beside everything else, and what becomes of their errors."""

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
"""A task that has run for so long since its last error counts as recovered."""

_T = TypeVar("_T")
Report = Callable[[str, str | None], None]
"""Is told the name of a task and why it fails, or None when it has recovered."""


class Background:
    """Hold tasks that nobody awaits: the event loop itself would let them be collected."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` until it ends, and log the error that ends it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def stop(self) -> None:
        """Cancel what still runs, and wait for it."""
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

    False for a `CancelledError` that came out of a library, which is an error like any other.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def run_forever(
    name: str, work: Callable[[], Awaitable[None]], report: Report = lambda *_: None
) -> None:
    """Run a task until it returns or is cancelled; an error starts it again, with backoff.

    No error leaves this function, so a task group that runs it goes on.

    Args:
        name: of the task, for the log and `report`.
        work: starts the task.
        report: is told of errors and of recovery.
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
        except BaseException as error:  # third-party code raises anything, CancelledError too
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
    """The same work was given up earlier, and its thread has not ended yet."""


class DetachedThreads:
    """Run blocking work in threads that can be given up.

    A thread cannot be stopped: given up, it goes on, and its result is discarded. There is one
    thread for each key at most, so work that hangs and is retried does not pile up. The threads
    are daemons: they do not delay the end of the process.
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
        """Return what `work` returns.

        Args:
            key: of the work.
            work: runs in the thread; it may raise anything.
            timeout: seconds after which it is given up.
            discard: is given a result that comes too late.

        Raises:
            StillRunningError: work with this key was given up and has not ended.
            TimeoutError: it is given up.
        """
        if key in self._running:
            raise StillRunningError
        loop = asyncio.get_running_loop()
        future: Future[_T] = loop.create_future()

        def tell(result: Any, error: BaseException | None) -> None:
            self._running.discard(key)
            if future.done():  # given up
                if error is None:
                    discard(result)
            elif error is None:
                future.set_result(result)
            elif isinstance(error, Exception) and not isinstance(error, StopIteration):
                future.set_exception(error)
            else:  # a future takes no StopIteration, and SystemExit would end the event loop
                future.set_exception(RuntimeError(describe(error)))

        def run() -> None:
            result, error = None, None
            try:
                result = work()
            except BaseException as raised:  # whatever it is, the waiting task must hear of it
                error = raised
            with suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(tell, result, error)

        threading.Thread(target=run, daemon=True, name="detached").start()
        self._running.add(key)
        try:
            async with asyncio.timeout(timeout):
                return await future
        finally:
            future.cancel()
