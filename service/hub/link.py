"""What a front holds of the hub: one connection."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

from service.background import Background
from service.connection import Connection, Place
from service.hub.messages import (
    FROM_HUB,
    ChangeModel,
    FromHub,
    Here,
    Observation,
    Observed,
    Scrape,
    Serving,
    Shown,
    TellRecent,
)

REPORT_SECONDS = 0.05
"""So long what is to be counted is gathered."""
SILENT_SECONDS = 0.5
"""After so long without anything to count, a front says that it is there."""
MOST_OBSERVATIONS = 100_000
"""Held at most while the hub does not take them; the oldest go first."""
NOTHING = Serving(-1, [], [], [], [])
"""What is served before the hub has said what."""


class HubLink(Connection):
    """The connection to the hub.

    Args:
        place: where it listens.
        serve: is told what is to be served, once per change and in their order.
        routes: that requests are counted by.
    """

    def __init__(
        self, place: Place, serve: Callable[[Serving], Awaitable[None]], routes: list[str]
    ) -> None:
        super().__init__("hub", place, FROM_HUB)
        self.serving = NOTHING
        self._serve = serve
        self._routes = routes
        self._seen: deque[Observation] = deque(maxlen=MOST_OBSERVATIONS)
        self._changes: asyncio.Queue[Serving] = asyncio.Queue()
        self._first = asyncio.Event()
        self._something = asyncio.Event()
        self._background = Background()

    async def start(self) -> None:
        """Connect, and return when the first word of what is to be served was heeded."""
        for work in (self.stay_connected(), self._follow(), self._report()):
            self._background.start(work)
        await self._first.wait()

    async def stop(self) -> None:
        """Tell what is left to tell, and let the connection go."""
        self._flush()
        await self._background.stop()

    def observe(self, seen: Observation) -> None:
        """Have something counted."""
        self._seen.append(seen)
        self._something.set()

    async def show(self, question: Scrape | TellRecent) -> Shown:
        """Ask for something to show; what this front has seen by now is in it.

        Raises:
            DisconnectedError: the hub is not there.
        """
        self._flush()
        answer: Shown = await self.ask(question)
        return answer

    async def change(self, wanted: ChangeModel) -> FromHub:
        """Ask for a change of what is served; it is made everywhere when the answer comes.

        Raises:
            DisconnectedError: the hub is not there.
        """
        answer: FromHub = await self.ask(wanted)
        return answer

    def _came(self) -> None:
        self.say(Here(os.getpid(), self._routes))

    def _take(self, message: FromHub) -> None:
        if isinstance(message, Serving):
            self._changes.put_nowait(message)
        else:
            super()._take(message)

    async def _follow(self) -> None:
        while True:
            serving = await self._changes.get()
            await self._serve(serving)
            self.serving = serving
            self._first.set()

    async def _report(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(SILENT_SECONDS):
                    await self._something.wait()
            await asyncio.sleep(REPORT_SECONDS)
            self._flush()

    def _flush(self) -> None:
        if self.say(Observed(list(self._seen))):
            self._seen.clear()
            self._something.clear()
