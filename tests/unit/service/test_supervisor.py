"""When a child counts as silent; the rest of the supervisor is tested with real processes."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import Process

import pytest

from service.process import start
from service.settings import Settings
from service.supervisor import _Child
from tests.support.waiting import until

PATIENCE = 100.0


async def run() -> Process:
    return await start([sys.executable, "-c", "import time; time.sleep(600)"], Settings())


@pytest.fixture
def child() -> _Child:
    return _Child("one", run, lambda *_: None)


def test_a_child_may_be_silent_until_it_has_said_something(child: _Child) -> None:
    child.started = 1000.0
    assert child.last_word(None, PATIENCE) == 1100.0
    assert child.last_word(1010.0, PATIENCE) == 1010.0
    assert child.last_word(None, PATIENCE) == 1010.0


def test_one_whose_connection_breaks_was_heard_until_then(child: _Child) -> None:
    child.started = 1000.0
    assert child.last_word(5000.0, PATIENCE) == 5000.0
    assert child.last_word(None, PATIENCE) == 5000.0
    assert child.last_word(5001.0, PATIENCE) == 5001.0


def test_what_was_heard_of_the_one_before_says_nothing_of_the_next(child: _Child) -> None:
    child.started = 1000.0
    child.last_word(5000.0, PATIENCE)
    child.started = 6000.0
    assert child.last_word(None, PATIENCE) == 6100.0


async def test_only_one_that_is_to_go_on_is_watched(child: _Child) -> None:
    assert not child.watched
    running = asyncio.create_task(child.keep_running())
    await until(lambda: child.pid is not None, "its start")
    assert child.watched
    await child.stop(30)
    assert not child.watched
    await running
