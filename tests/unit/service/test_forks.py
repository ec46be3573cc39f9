"""The fork server with real processes, which do what a line of Python says."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

import psutil
import pytest

from service.forks import Forked, ForkServer
from service.settings import Settings
from tests.support.waiting import until

BEFORE = """
import os, sys, time
from service.forks import fork_on_demand
from service.process import exit_with_parent, receive_settings
settings = receive_settings()
number = fork_on_demand()
if number is None:
    sys.exit(0)
print("this is for people")
exit_with_parent()
"""
SLEEP = "time.sleep(600)"


@asynccontextmanager
async def fork_server(
    then: str, before: str = BEFORE, seconds: float = 30
) -> AsyncIterator[ForkServer]:
    server = ForkServer([sys.executable, "-c", before + then], Settings(), seconds)
    try:
        yield server
    finally:
        await server.stop()


async def within(seconds: float, awaited: Awaitable[int]) -> int:
    return await asyncio.wait_for(awaited, seconds)


def gone(forked: Forked) -> bool:
    return not psutil.pid_exists(forked.pid)


async def test_each_is_told_its_number_and_ends_with_its_code() -> None:
    async with fork_server("sys.exit(10 + number)") as server:
        forked = await asyncio.gather(*(server.fork(number) for number in range(3)))
        assert len({one.pid for one in forked}) == 3
        codes = [await within(30, one.wait()) for one in forked]
        assert codes == [10, 11, 12]
        assert [one.returncode for one in forked] == codes


async def test_an_exception_is_a_code_too() -> None:
    async with fork_server("raise SystemError") as server:
        assert await within(30, (await server.fork(0)).wait()) == 1


@pytest.mark.parametrize(
    ("end", "number"), [("terminate", signal.SIGTERM), ("kill", signal.SIGKILL)]
)
async def test_a_signal_ends_it(end: str, number: signal.Signals) -> None:
    async with fork_server(SLEEP) as server:
        victim, other = await server.fork(0), await server.fork(1)
        assert victim.returncode is None
        getattr(victim, end)()
        assert await within(30, victim.wait()) == -number
        getattr(victim, end)()  # it has ended, so nobody is meant
        assert other.returncode is None
        assert not gone(other)


async def test_it_is_their_parent() -> None:
    async with fork_server(SLEEP) as server:
        forked = await server.fork(0)
        assert psutil.Process(forked.pid).ppid() == server.pid


async def test_when_it_dies_all_end_and_the_next_fork_starts_it_again() -> None:
    async with fork_server(SLEEP) as server:
        first, pid = await server.fork(0), server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert await within(30, first.wait()) == -signal.SIGKILL
        await until(lambda: gone(first), "the end of the first")
        second = await server.fork(0)
        assert server.pid not in {None, pid}
        assert second.returncode is None
        assert not gone(second)


async def test_where_it_cannot_start_a_process_has_ended_at_once() -> None:
    async with fork_server("", "raise SystemExit(7)") as server:
        assert await within(30, (await server.fork(0)).wait()) == 7


async def test_one_that_hangs_is_killed() -> None:
    async with fork_server("", "import time; time.sleep(600)", seconds=0.5) as server:
        assert await within(30, (await server.fork(0)).wait()) == -signal.SIGKILL


async def test_stopped_it_leaves_nothing() -> None:
    async with fork_server(SLEEP) as server:
        forked = await server.fork(0)
        await server.stop()
        assert server.pid is None
        await until(lambda: gone(forked), "its end")


async def test_stopped_before_it_began_is_stopped() -> None:
    async with fork_server(SLEEP) as server:
        assert server.pid is None
