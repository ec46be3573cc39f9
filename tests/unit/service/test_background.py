"""Tasks that are restarted after errors, and threads that can be abandoned."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError as ForeignCancelledError

import pytest
from structlog.testing import capture_logs

from service import background
from service.background import Background, DetachedThreads, StillRunningError, run_forever
from tests.support.waiting import until


class PanicError(BaseException):
    """Stands for the panic of a library in Rust."""


ERRORS = (
    OSError("no room"), ValueError(), KeyError("x"), RuntimeError("a\nb"), StopIteration(),
    SystemExit(3), GeneratorExit(), asyncio.CancelledError(), ForeignCancelledError(), PanicError(),
)  # fmt: skip
each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)


@pytest.fixture
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "FIRST_BACKOFF", 0.001)
    monkeypatch.setattr(background, "RECOVERED_SECONDS", 0.02)


@each_error
@pytest.mark.usefixtures("short_backoff")
async def test_an_error_of_a_task_does_not_end_its_group(error: BaseException) -> None:
    calls, reports = 0, []

    async def work() -> None:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise error
        await asyncio.Event().wait()

    with capture_logs() as lines:
        async with asyncio.TaskGroup() as tasks:
            running = run_forever("store", work, lambda *report: reports.append(report))
            task = tasks.create_task(running)
            await until(lambda: len(reports) == 4, "recovery")
            task.cancel()
    assert calls == 4
    assert [name for name, _ in reports] == ["store"] * 4
    *failures, recovered = (reason for _, reason in reports)
    assert recovered is None
    for reason in failures:
        assert reason is not None
        assert type(error).__name__ in reason
        assert "\n" not in reason
    assert [line["event"] for line in lines] == ["task failed"] * 3
    assert [line["restart_in"] for line in lines] == [0.001, 0.002, 0.004]


async def test_a_task_that_has_ended_is_not_restarted() -> None:
    calls = []

    async def work() -> None:
        calls.append(1)

    await run_forever("once", work)
    assert calls == [1]


async def test_an_error_of_a_background_task_is_logged() -> None:
    async def fail() -> None:
        raise ValueError("why")

    tasks = Background()
    with capture_logs() as lines:
        task = tasks.start(fail())
        await asyncio.wait({task})
        await asyncio.sleep(0)
    (line,) = lines
    assert line["event"] == "background task failed"
    await tasks.stop()


@each_error
async def test_any_error_in_a_thread_is_an_exception_in_the_task(
    error: BaseException,
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises((Exception, PanicError)) as caught:
        await DetachedThreads().run("key", fail)
    assert type(error).__name__ in f"{caught.type.__name__} {caught.value}"
    assert isinstance(caught.value, Exception)


@pytest.fixture
def gate() -> threading.Event:
    return threading.Event()


async def abandon(threads: DetachedThreads, work: Callable[[], str], late: list[str]) -> None:
    with pytest.raises(TimeoutError):
        await threads.run("key", work, 0.01, late.append)


async def test_abandoned_work_is_not_started_again_until_it_has_ended(
    gate: threading.Event,
) -> None:
    threads, late = DetachedThreads(), []

    def work() -> str:
        gate.wait(60)
        return "late"

    await abandon(threads, work, late)
    for _ in range(100):
        with pytest.raises(StillRunningError):
            await threads.run("key", work)
    assert threading.active_count() < 50
    assert await threads.run("other", lambda: 5, 60) == 5
    gate.set()
    await until(lambda: late == ["late"], "the late result")
    assert await threads.run("key", lambda: 6) == 6


async def test_abandoned_work_may_fail_without_an_error(gate: threading.Event) -> None:
    def work() -> str:
        gate.wait(60)
        raise SystemExit

    threads: DetachedThreads = DetachedThreads()
    await abandon(threads, work, [])
    gate.set()

    async def free() -> bool:
        try:
            return await threads.run("key", lambda: True)
        except StillRunningError:
            return False

    await until(free, "the end of the work")
