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

from service.control.fork_server import Forked, ForkServer
from service.settings import Settings
from tests.support.waiting import until

BEFORE = """
import os, sys, time
from service.control.fork_server import fork_on_demand
from service.process import exit_with_parent, receive_settings
settings = receive_settings()
number = fork_on_demand()
if number is None:
    sys.exit(0)
print("this is for people")
exit_with_parent()
"""
SLEEP = "time.sleep(600)"
NO_ROOM = """
import resource, signal
def allow(*_):
    resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
signal.signal(signal.SIGUSR1, allow)
def forbid(*_):
    resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
signal.signal(signal.SIGUSR2, forbid)
import os
if os.getuid() == 0:  # no limit holds for root
    os.setuid(54321)
"""
"""Lets a signal decide whether the kernel allows this process to fork."""


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


@pytest.fixture
async def limited() -> AsyncIterator[ForkServer]:
    """Return a fork server that has forked process 0 and has no room for others."""
    before = BEFORE.replace("number =", NO_ROOM + "number =")
    async with fork_server(SLEEP, before) as server:
        await server.fork(0)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGUSR2)
        yield server


async def test_a_failed_fork_is_an_error_for_that_number_alone(limited: ForkServer) -> None:
    pid, (first,) = limited.pid, limited._forked.values()
    assert pid is not None
    for number in (1, 2, 1):
        with pytest.raises(BlockingIOError):
            await asyncio.wait_for(limited.fork(number), 30)
    assert (limited.pid, first.returncode) == (pid, None)
    assert not gone(first)
    os.kill(pid, signal.SIGUSR1)
    second = await asyncio.wait_for(limited.fork(1), 30)
    assert second.returncode is None
    first.kill()
    assert await within(30, first.wait()) == -signal.SIGKILL
    assert not gone(second)


async def test_a_fork_server_that_cannot_be_started_is_an_error_each_time() -> None:
    server = ForkServer(["/nowhere/python"], Settings(), 30)
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            await server.fork(0)
    await server.stop()


@pytest.mark.parametrize(
    "noise", ["'hello'", "1", "'1 2 3'", "'9 99999'", "'x' * 200_000", "'\xff\xfe'", "'5 -11'"]
)
async def test_whatever_it_prints_forks_go_on(noise: str) -> None:
    """A library may print to the stdout of the process that imports it."""
    before = f"print({noise}, flush=True)\n" + BEFORE
    async with fork_server(SLEEP, before) as server:
        forked = await asyncio.wait_for(server.fork(0), 30)
        assert not gone(forked)
        forked.kill()
        assert await within(30, forked.wait()) == -signal.SIGKILL
