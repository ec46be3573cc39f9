"""What a frontend holds of the hub: one connection."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable
from uuid import uuid4

import structlog

from service.background import Background
from service.ipc.connection import Connection, DisconnectedError, Place
from service.ipc.control_messages import (
    FROM_HUB,
    Acknowledged,
    Alive,
    ChangeModel,
    ChangeRollOut,
    FromHub,
    Here,
    NewSettings,
    NotShown,
    ReloadSettings,
    Report,
    Scrape,
    Serving,
    SettingsTaken,
    Shown,
    TellRecent,
)
from service.ipc.frames import Message
from service.telemetry.counts import Counts

REPORT_SECONDS = 0.25
"""Time between reports: short beside the seconds between scrapes, and all that a frontend that is
killed takes with it; long enough that a report costs little beside the requests that it counts."""
MAX_UNACKNOWLEDGED = 4
"""Reports sent and not acknowledged; beyond, what is counted is added to the next one."""
SHOW_SECONDS = 8.0
"""Time for an answer to a scrape, below the 10 s for which Prometheus waits."""
SILENCE_LIMIT = 5.0
"""Seconds without a word after which the hub is not waited for."""
LOOK_SECONDS = 0.25
RETRY_SECONDS = 1.0
NOTHING = Serving(-1, [], [], [], {})
"""What is served before the hub has said what."""

log = structlog.get_logger()


class HubError(Exception):
    """The hub failed at what it was asked."""


class Reports:
    """Reports of counts, each kept until the hub acknowledges it.

    Attributes:
        counts: what the next report will hold.
        unacknowledged: reports to be sent again over a new connection, oldest first.
    """

    def __init__(self) -> None:
        self.counts = Counts()
        self.unacknowledged: deque[Report] = deque()
        self._numbers = itertools.count()

    def next(self, ready: bool) -> Report | None:
        """Return the next report to send; None: too many are not acknowledged."""
        if len(self.unacknowledged) >= MAX_UNACKNOWLEDGED:
            return None
        report = Report(next(self._numbers), self.counts.take(), self.counts.cache_bytes, ready)
        self.unacknowledged.append(report)
        return report

    def acknowledge(self, number: int) -> None:
        """Forget the reports up to this number."""
        while self.unacknowledged and self.unacknowledged[0].number <= number:
            self.unacknowledged.popleft()


class HubLink(Connection):
    """The connection to the hub.

    Args:
        place: where it listens.
        serve: is told what is to be served, again until it succeeds; of changes that come while it
            is at work it is told the last.
        routes: that requests are counted by.
        configure: takes over settings, as `encode_settings` writes them, or raises.
        ready: whether this frontend can classify.

    Attributes:
        counts: everything that the hub is to count for this frontend.
    """

    def __init__(
        self,
        place: Place,
        serve: Callable[[Serving], Awaitable[None]],
        routes: list[str],
        configure: Callable[[bytes], None] = lambda _: None,
        ready: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__("hub", place, FROM_HUB)
        self.serving = NOTHING
        self.alive: Alive | None = None
        """The hub's last word of the server's parts; None: it has said none yet."""
        self.silent_seconds = 0.0
        """Seconds since the hub was last heard."""
        self._serve = serve
        self._routes = routes
        self._configure = configure
        self._ready = ready
        self._keys: list[str] = []
        self._frontend = uuid4().hex
        self._reports = Reports()
        self.counts = self._reports.counts
        self._next = NOTHING
        self._changed = asyncio.Event()
        self._first = asyncio.Event()
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

    def know_keys(self, names: list[str]) -> None:
        """Tell the hub the names of all keys."""
        self._keys = names
        self._introduce()

    async def show(self, question: Scrape | TellRecent) -> Shown:
        """Ask for something to show.

        What this frontend has counted by now is in it, unless the hub is behind with its reports.

        Raises:
            DisconnectedError: the hub is not there, silent for `SILENCE_LIMIT`, or takes longer
                than `SHOW_SECONDS`.
            HubError: it failed at the question.
        """
        self._flush()
        answer = await self._ask(question, SHOW_SECONDS)
        assert isinstance(answer, Shown)
        return answer

    async def change(self, wanted: ChangeModel | ChangeRollOut | ReloadSettings) -> FromHub:
        """Ask for a change of the server; it is made everywhere when the answer comes.

        Raises:
            DisconnectedError: the hub is not there, or silent for `SILENCE_LIMIT`; the change may
                still be made.
            HubError: it failed at the question.
        """
        return await self._ask(wanted)

    async def _ask(self, question: Message, timeout: float | None = None) -> FromHub:
        asking = asyncio.create_task(self.ask(question, timeout))
        try:
            while not asking.done():
                if self.silent_seconds > SILENCE_LIMIT:
                    raise DisconnectedError
                await asyncio.wait({asking}, timeout=LOOK_SECONDS)
            answer: FromHub = asking.result()
        except TimeoutError:
            raise DisconnectedError from None
        finally:
            asking.cancel()
        if isinstance(answer, NotShown):
            raise HubError(answer.message)
        return answer

    def _came(self) -> None:
        self._introduce()
        for report in self._reports.unacknowledged:
            self.say(report)

    def _introduce(self) -> None:
        self.say(Here(self._frontend, os.getpid(), self._routes, self._keys))

    def _take(self, message: FromHub) -> None:
        if isinstance(message, Serving):
            self._next = message
            self._changed.set()
        elif isinstance(message, NewSettings):
            try:
                self._configure(message.settings)
            except Exception as error:  # whatever it is, this frontend goes on as it is
                log.error("settings not applied", exc_info=error)
            else:
                self.say(SettingsTaken(message.generation))
        elif isinstance(message, Acknowledged):
            self._reports.acknowledge(message.number)
        elif isinstance(message, Alive):
            self.alive = message
        else:
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
        """Report at even intervals, if only that this frontend is there."""
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            self._flush()

    def _flush(self) -> None:
        if self.connected and (report := self._reports.next(self._ready())) is not None:
            self.say(report)
