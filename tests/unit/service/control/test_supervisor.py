"""When a child counts as silent; the rest of the supervisor is tested with real processes."""

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


async def run() -> Process:
    return await start([sys.executable, "-c", "import time; time.sleep(600)"], Settings())


@pytest.fixture
def child() -> _Child:
    return _Child("one", run, lambda *_: None)


def test_a_child_may_be_silent_until_it_has_said_something(child: _Child) -> None:
    child.started = 1000.0
    assert child.silent_since(None, PATIENCE) == 1100.0
    assert child.silent_since(1010.0, PATIENCE) == 1010.0
    assert child.silent_since(None, PATIENCE) == 1010.0


def test_one_whose_connection_breaks_was_heard_until_then(child: _Child) -> None:
    child.started = 1000.0
    assert child.silent_since(5000.0, PATIENCE) == 5000.0
    assert child.silent_since(None, PATIENCE) == 5000.0
    assert child.silent_since(5001.0, PATIENCE) == 5001.0


def test_what_was_heard_of_the_one_before_says_nothing_of_the_next(child: _Child) -> None:
    child.started = 1000.0
    child.silent_since(5000.0, PATIENCE)
    child.started = 6000.0
    assert child.silent_since(None, PATIENCE) == 6100.0


async def test_only_one_that_is_to_go_on_is_watched(child: _Child) -> None:
    assert not child.watched
    running = asyncio.create_task(child.keep_running())
    await until(lambda: child.pid is not None, "its start")
    assert child.watched
    await child.stop(30)
    assert not child.watched
    await running


ERRORS = (
    BlockingIOError(11, "Resource temporarily unavailable"), MemoryError(), OSError(24, "files"),
    RuntimeError("can't start new thread"), subprocess.SubprocessError(), ValueError(),
)  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_one_that_cannot_be_started_is_tried_again_and_reported(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF", 0.001)
    tries, told = 0, []

    async def start_at_last() -> Process:
        nonlocal tries
        tries += 1
        if tries <= 4:
            raise error
        return await run()

    child = _Child("frontend-3", start_at_last, lambda *words: told.append(words))
    with capture_logs() as lines:
        running = asyncio.create_task(child.keep_running())
        await until(lambda: child.pid is not None, "its start")
    child.mark_serving()
    assert [name for name, _ in told] == ["frontend-3"] * 3
    assert [reason is None for _, reason in told] == [False, False, True]
    assert type(error).__name__ in told[0][1]
    assert "3 failed starts in a row" in told[0][1]
    assert [line["restart_in"] for line in lines] == [0.001, 0.002, 0.004, 0.008]
    assert not running.done()
    await child.stop(30)
    await running


async def test_one_that_starts_while_it_is_stopped_does_not_go_on() -> None:
    gate = asyncio.Event()

    async def start_slowly() -> Process:
        await gate.wait()
        return await run()

    child = _Child("one", start_slowly, lambda *_: None)
    running = asyncio.create_task(child.keep_running())
    await asyncio.sleep(0)
    await child.stop(30)
    gate.set()
    await asyncio.wait_for(running, 30)
    assert child.pid is None
