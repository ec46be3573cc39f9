"""Faults of processes: kills, hangs, slow devices."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import Iterator

import psutil

from loadtests.chaos.load import Seen, under_load
from loadtests.chaos.server import PATIENCE, Server, serving

KINDS = ("engine", "frontend")
CRAWL_SECONDS = 20.0
CRAWLS, PAUSES = 0.01, 0.09
"""Seconds for which the slow engine runs, and for which it is then suspended, in turns."""


def _victims(server: Server, count: int) -> Iterator[psutil.Process]:
    """Yield `count` processes: the oldest engine and the oldest frontend, in turns."""
    for kind in itertools.islice(itertools.cycle(KINDS), count):
        yield server.processes(kind)[0]


async def kills(repeats: int) -> Seen:
    """Kill engines and frontends, one after another."""
    async with serving() as server:

        async def work(seen: Seen) -> None:
            for victim in _victims(server, repeats):
                victim.kill()
                await asyncio.sleep(0.1)  # until the server notices
                seen.recovery.append(0.1 + await server.until_whole())
                await asyncio.sleep(0.5)

        return await under_load(server, work)


async def hangs(repeats: int) -> Seen:
    """Suspend engines and frontends (SIGSTOP)."""
    async with serving() as server:

        async def work(seen: Seen) -> None:
            for victim in _victims(server, max(2, repeats // 5)):
                victim.send_signal(signal.SIGSTOP)
                started = time.perf_counter()
                while victim.is_running() and time.perf_counter() - started < PATIENCE:
                    await asyncio.sleep(0.05)
                await server.until_whole()
                seen.recovery.append(time.perf_counter() - started)
                await asyncio.sleep(0.5)

        return await under_load(server, work)


async def slow_device(repeats: int) -> Seen:  # noqa: ARG001
    """Suspend one engine for nine tenths of the time."""
    async with serving() as server:

        async def work(seen: Seen) -> None:
            engine = server.processes("engine")[0]
            until = time.perf_counter() + CRAWL_SECONDS
            try:
                while time.perf_counter() < until:
                    engine.send_signal(signal.SIGSTOP)
                    await asyncio.sleep(PAUSES)
                    engine.send_signal(signal.SIGCONT)
                    await asyncio.sleep(CRAWLS)
            finally:
                engine.send_signal(signal.SIGCONT)
            lives = engine in server.processes("engine")
            seen.notes.append("the engine lives" if lives else "the engine was replaced")
            await server.until_whole()

        return await under_load(server, work)
