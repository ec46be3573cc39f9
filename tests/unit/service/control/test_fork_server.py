"""The fork server, with real processes that run a few lines of Python."""

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
print("output of a library")
exit_with_parent()
"""
SLEEP = "time.sleep(600)"
FORK_LIMIT = """
import resource, signal
def allow(*_):
    resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
signal.signal(signal.SIGUSR1, allow)
def forbid(*_):
    resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
signal.signal(signal.SIGUSR2, forbid)
import os
if os.getuid() == 0:  # limits do not apply to root
    os.setuid(54321)
"""
"""Lets signals switch whether the kernel allows this process to fork."""


@asynccontextmanager
async def fork_server(
    child: str, before: str = BEFORE, seconds: float = 30
) -> AsyncIterator[ForkServer]:
    server = ForkServer([sys.executable, "-c", before + child], Settings(), seconds)
    try:
        yield server
    finally:
        await server.stop()


async def within(seconds: float, awaited: Awaitable[int]) -> int:
    return await asyncio.wait_for(awaited, seconds)


def has_ended(forked: Forked) -> bool:
    return not psutil.pid_exists(forked.pid)


async def test_each_process_gets_its_number_and_its_exit_code_is_reported() -> None:
    async with fork_server("sys.exit(10 + number)") as server:
        forked = await asyncio.gather(*(server.fork(number) for number in range(3)))
        assert len({process.pid for process in forked}) == 3
        codes = [await within(30, process.wait()) for process in forked]
        assert codes == [10, 11, 12]
        assert [process.returncode for process in forked] == codes


async def test_an_exception_is_exit_code_1() -> None:
    async with fork_server("raise SystemError") as server:
        assert await within(30, (await server.fork(0)).wait()) == 1


@pytest.mark.parametrize(
    ("end", "number"), [("terminate", signal.SIGTERM), ("kill", signal.SIGKILL)]
)
async def test_terminate_and_kill_end_one_process(end: str, number: signal.Signals) -> None:
    async with fork_server(SLEEP) as server:
        victim, other = await server.fork(0), await server.fork(1)
        assert victim.returncode is None
        getattr(victim, end)()
        assert await within(30, victim.wait()) == -number
        getattr(victim, end)()  # no effect on a process that has ended
        assert other.returncode is None
        assert not has_ended(other)


async def test_the_fork_server_is_the_parent_of_its_processes() -> None:
    async with fork_server(SLEEP) as server:
        forked = await server.fork(0)
        assert psutil.Process(forked.pid).ppid() == server.pid


async def test_after_it_died_all_processes_end_and_the_next_fork_restarts_it() -> None:
    async with fork_server(SLEEP) as server:
        first, pid = await server.fork(0), server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert await within(30, first.wait()) == -signal.SIGKILL
        await until(lambda: has_ended(first), "the end of the first")
        second = await server.fork(0)
        assert server.pid not in {None, pid}
        assert second.returncode is None
        assert not has_ended(second)


async def test_if_it_cannot_start_forks_report_its_exit_code() -> None:
    async with fork_server("", "raise SystemExit(7)") as server:
        assert await within(30, (await server.fork(0)).wait()) == 7


async def test_a_fork_server_that_hangs_is_killed() -> None:
    async with fork_server("", "import time; time.sleep(600)", seconds=0.5) as server:
        assert await within(30, (await server.fork(0)).wait()) == -signal.SIGKILL


async def test_stopping_ends_all_processes() -> None:
    async with fork_server(SLEEP) as server:
        forked = await server.fork(0)
        await server.stop()
        assert server.pid is None
        await until(lambda: has_ended(forked), "the end of the process")


async def test_stopping_before_the_first_fork_is_allowed() -> None:
    async with fork_server(SLEEP) as server:
        assert server.pid is None


@pytest.fixture
async def limited() -> AsyncIterator[ForkServer]:
    """Return a fork server that has forked process 0 and may not fork others."""
    before = BEFORE.replace("number =", FORK_LIMIT + "number =")
    async with fork_server(SLEEP, before) as server:
        await server.fork(0)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGUSR2)
        yield server


async def test_a_failed_fork_does_not_affect_other_processes(limited: ForkServer) -> None:
    pid, (first,) = limited.pid, limited._forked.values()
    assert pid is not None
    for number in (1, 2, 1):
        with pytest.raises(BlockingIOError):
            await asyncio.wait_for(limited.fork(number), 30)
    assert (limited.pid, first.returncode) == (pid, None)
    assert not has_ended(first)
    os.kill(pid, signal.SIGUSR1)
    second = await asyncio.wait_for(limited.fork(1), 30)
    assert second.returncode is None
    first.kill()
    assert await within(30, first.wait()) == -signal.SIGKILL
    assert not has_ended(second)


async def test_each_fork_fails_if_the_fork_server_cannot_be_started() -> None:
    server = ForkServer(["/nowhere/python"], Settings(), 30)
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            await server.fork(0)
    await server.stop()


@pytest.mark.parametrize(
    "noise", ["'hello'", "1", "'1 2 3'", "'9 99999'", "'x' * 200_000", "'\xff\xfe'", "'5 -11'"]
)
async def test_output_on_stdout_does_not_disturb_forks(noise: str) -> None:
    """A library may print while it is imported."""
    before = f"print({noise}, flush=True)\n" + BEFORE
    async with fork_server(SLEEP, before) as server:
        forked = await asyncio.wait_for(server.fork(0), 30)
        assert not has_ended(forked)
        forked.kill()
        assert await within(30, forked.wait()) == -signal.SIGKILL
