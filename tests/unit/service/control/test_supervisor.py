"""A supervised child: when it counts as silent, and restarts after failed starts.

Integration and end-to-end tests cover the supervisor as a whole.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from asyncio.subprocess import Process

import pytest
from structlog.testing import capture_logs

from service.control import supervisor
from service.control.supervisor import _Child
from service.process import start
from service.settings import Settings
from tests.support.waiting import until

PATIENCE = 100.0


async def start_sleeping() -> Process:
    return await start([sys.executable, "-c", "import time; time.sleep(600)"], Settings())


@pytest.fixture
def child() -> _Child:
    return _Child("one", start_sleeping, lambda *_: None)


def test_a_child_may_be_silent_for_longer_before_its_first_message(child: _Child) -> None:
    child.started = 1000.0
    assert child.silent_since(None, PATIENCE) == 1100.0
    assert child.silent_since(1010.0, PATIENCE) == 1010.0
    assert child.silent_since(None, PATIENCE) == 1010.0


def test_the_last_message_counts_after_the_connection_broke(child: _Child) -> None:
    child.started = 1000.0
    assert child.silent_since(5000.0, PATIENCE) == 5000.0
    assert child.silent_since(None, PATIENCE) == 5000.0
    assert child.silent_since(5001.0, PATIENCE) == 5001.0


def test_messages_before_a_restart_do_not_count_after_it(child: _Child) -> None:
    child.started = 1000.0
    child.silent_since(5000.0, PATIENCE)
    child.started = 6000.0
    assert child.silent_since(None, PATIENCE) == 6100.0


async def test_a_child_is_watched_until_it_is_stopped(child: _Child) -> None:
    assert not child.watched
    running = asyncio.create_task(child.keep_running())
    await until(lambda: child.pid is not None, "the start of the process")
    assert child.watched
    await child.stop(30)
    assert not child.watched
    await running


ERRORS = (
    BlockingIOError(11, "Resource temporarily unavailable"), MemoryError(), OSError(24, "files"),
    RuntimeError("can't start new thread"), subprocess.SubprocessError(), ValueError(),
)  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_failed_starts_are_retried_with_backoff_and_reported(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF", 0.001)
    tries, reports = 0, []

    async def start_at_fifth_try() -> Process:
        nonlocal tries
        tries += 1
        if tries <= 4:
            raise error
        return await start_sleeping()

    child = _Child("frontend-3", start_at_fifth_try, lambda *report: reports.append(report))
    with capture_logs() as lines:
        running = asyncio.create_task(child.keep_running())
        await until(lambda: child.pid is not None, "the start of the process")
    child.mark_serving()
    assert [name for name, _ in reports] == ["frontend-3"] * 3
    assert [reason is None for _, reason in reports] == [False, False, True]
    assert type(error).__name__ in reports[0][1]
    assert "3 failed starts in a row" in reports[0][1]
    assert [line["restart_in"] for line in lines] == [0.001, 0.002, 0.004, 0.008]
    assert not running.done()
    await child.stop(30)
    await running


async def test_a_child_stopped_during_its_start_does_not_run() -> None:
    gate = asyncio.Event()

    async def start_slowly() -> Process:
        await gate.wait()
        return await start_sleeping()

    child = _Child("one", start_slowly, lambda *_: None)
    running = asyncio.create_task(child.keep_running())
    await asyncio.sleep(0)
    await child.stop(30)
    gate.set()
    await asyncio.wait_for(running, 30)
    assert child.pid is None
