"""What a front holds of the hub: one connection."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

from service.background import Background
from service.ipc.connection import Connection, DisconnectedError, Place
from service.ipc.control_messages import (
    FROM_HUB,
    Alive,
    ChangeModel,
    FromHub,
    Here,
    ItemsAnswered,
    KeysKnown,
    NotShown,
    Observation,
    Observed,
    Scrape,
    Serving,
    Shown,
    TellRecent,
)
from service.ipc.frames import Message

REPORT_SECONDS = 0.05
"""So long what is to be counted is gathered."""
SILENT_SECONDS = 0.5
"""After so long without anything to count, a front says that it is there."""
MAX_OBSERVED = 200_000
"""Observations, and items in them, held at most while the hub does not read: some 50 MB."""
CHUNK = 5000
"""Of these, sent in one message."""
MAX_UNSENT_BYTES = 2**20
"""Unsent bytes above which nothing more is sent to the hub: it does not read."""
SILENCE_LIMIT = 5.0
"""Seconds without a word after which the hub is not waited for."""
LOOK_SECONDS = 0.25
RETRY_SECONDS = 1.0
NOTHING = Serving(-1, [], [], [], {})
"""What is served before the hub has said what."""

log = structlog.get_logger()


class HubError(Exception):
    """The hub failed at what it was asked."""


class _Observations:
    """Hold observations in their order, the newest `MAX_OBSERVED` of them, and count the others."""

    def __init__(self) -> None:
        self._seen: deque[Observation] = deque()
        self._size = 0
        self._dropped = 0
        self._keys: KeysKnown | None = None

    def add(self, seen: Observation) -> None:
        if isinstance(seen, KeysKnown):  # the last one says all, and must not be dropped
            self._keys = seen
            return
        self._seen.append(seen)
        self._size += _size(seen)
        while self._size > MAX_OBSERVED:
            self._size -= _size(self._seen.popleft())
            self._dropped += 1

    def take(self) -> Observed:
        """Remove and return the next ones to send."""
        chunk: list[Observation] = []
        if self._keys is not None:
            chunk.append(self._keys)
            self._keys = None
        size = 0
        while self._seen and size < CHUNK:
            size += _size(self._seen[0])
            chunk.append(self._seen.popleft())
        self._size -= size
        dropped, self._dropped = self._dropped, 0
        return Observed(chunk, dropped)

    def __len__(self) -> int:
        return len(self._seen)


def _size(seen: Observation) -> int:
    return 1 + len(seen.items) if isinstance(seen, ItemsAnswered) else 1


class HubLink(Connection):
    """The connection to the hub.

    Args:
        place: where it listens.
        serve: is told what is to be served, again until it succeeds; of changes that come while it
            is at work it is told the last.
        routes: that requests are counted by.
    """

    def __init__(
        self, place: Place, serve: Callable[[Serving], Awaitable[None]], routes: list[str]
    ) -> None:
        super().__init__("hub", place, FROM_HUB)
        self.serving = NOTHING
        self.silent_seconds = 0.0
        """Seconds since the hub was last heard."""
        self._serve = serve
        self._routes = routes
        self._seen = _Observations()
        self._next = NOTHING
        self._changed = asyncio.Event()
        self._first = asyncio.Event()
        self._something = asyncio.Event()
        self._background = Background()

    async def start(self) -> None:
        """Connect, and return when the first word of what is to be served was heeded."""
        for work in (
            self.stay_connected(), self._follow(), self._report(), self._measure_silence(),
        ):  # fmt: skip
            self._background.start(work)
        await self._first.wait()

    async def stop(self) -> None:
        """Tell what is left to tell, and let the connection go."""
        self._flush()
        await self._background.stop()

    def observe(self, seen: Observation) -> None:
        """Have something counted."""
        self._seen.add(seen)
        self._something.set()

    async def show(self, question: Scrape | TellRecent) -> Shown:
        """Ask for something to show; what this front has seen by now is in it.

        Raises:
            DisconnectedError: the hub is not there, or silent for `SILENCE_LIMIT`.
            HubError: it failed at the question.
        """
        self._flush()
        answer = await self._ask(question)
        assert isinstance(answer, Shown)
        return answer

    async def change(self, wanted: ChangeModel) -> FromHub:
        """Ask for a change of what is served; it is made everywhere when the answer comes.

        Raises:
            DisconnectedError: the hub is not there, or silent for `SILENCE_LIMIT`; the change may
                still be made.
            HubError: it failed at the question.
        """
        return await self._ask(wanted)

    async def _ask(self, question: Message) -> FromHub:
        asking = asyncio.create_task(self.ask(question))
        try:
            while not asking.done():
                if self.silent_seconds > SILENCE_LIMIT:
                    raise DisconnectedError
                await asyncio.wait({asking}, timeout=LOOK_SECONDS)
            answer: FromHub = asking.result()
        finally:
            asking.cancel()
        if isinstance(answer, NotShown):
            raise HubError(answer.message)
        return answer

    def _came(self) -> None:
        self.say(Here(os.getpid(), self._routes))

    def _take(self, message: FromHub) -> None:
        if isinstance(message, Serving):
            self._next = message
            self._changed.set()
        elif not isinstance(message, Alive):  # that was for `heard`
            super()._take(message)

    async def _follow(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            serving = self._next
            try:
                await self._serve(serving)
            except Exception as error:  # whatever it is, it is tried again
                log.error("model catalog not applied", retry_in=RETRY_SECONDS, exc_info=error)
                self._changed.set()
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self.serving = serving
            self._first.set()

    async def _measure_silence(self) -> None:
        """Measure the silence, without time in which this process itself was stopped."""
        heard, before = self.heard, time.monotonic()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = time.monotonic()
            passed = min(now - before, 2 * LOOK_SECONDS)
            self.silent_seconds = 0.0 if self.heard > heard else self.silent_seconds + passed
            heard, before = self.heard, now

    async def _report(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(SILENT_SECONDS):
                    await self._something.wait()
            await asyncio.sleep(REPORT_SECONDS)
            self._flush()

    def _flush(self) -> None:
        """Send what was seen, as long as the hub reads it."""
        while self.connected and self.unsent < MAX_UNSENT_BYTES:
            self.say(self._seen.take())
            if not self._seen:
                self._something.clear()
                return
