"""Wait for conditions; the only place where tests poll."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from inspect import isawaitable

PATIENCE = 40.0
INTERVAL = 0.02


class NeverTrueError(AssertionError):
    """A condition did not become true in time."""


def wait_until(check: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    """Wait until `check` is true."""
    limit = time.monotonic() + patience
    while not check():
        if time.monotonic() > limit:
            raise NeverTrueError(f"{what}: not within {patience:.0f} s")
        time.sleep(INTERVAL)


async def until(
    check: Callable[[], bool | Awaitable[bool]], what: str, patience: float = PATIENCE
) -> None:
    """Wait until `check` is true while the event loop runs."""
    limit = time.monotonic() + patience
    while True:
        outcome = check()
        if await outcome if isawaitable(outcome) else outcome:
            return
        if time.monotonic() > limit:
            raise NeverTrueError(f"{what}: not within {patience:.0f} s")
        await asyncio.sleep(INTERVAL)
