"""Client of the hub: the model catalog, settings, queries, and reports of counts."""

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
from service.ipc.connection import Address, Connection, DisconnectedError
from service.ipc.control_messages import (
    FROM_HUB,
    CatalogUpdate,
    ChangeModel,
    ChangeRollOut,
    ContentReply,
    CountsReport,
    FromHub,
    FrontendHello,
    GetRecentTraffic,
    HubHeartbeat,
    ReloadSettings,
    ReportAcknowledged,
    RequestFailed,
    Scrape,
    SettingsApplied,
    SettingsUpdate,
)
from service.ipc.frames import Message
from service.telemetry.counts import Counts

REPORT_SECONDS = 0.25
"""Time between reports. A killed frontend loses the counts of this time; it is much shorter than
the time between scrapes, and long enough that reports cost little beside the counted requests."""
MAX_UNACKNOWLEDGED = 4
"""Maximum number of unacknowledged reports; beyond it, counts are added to the next report."""
QUERY_SECONDS = 8.0
"""Time limit for the answer to a scrape, below the default scrape timeout of Prometheus, 10 s."""
SILENCE_LIMIT = 5.0
"""Seconds without a message after which requests to the hub fail."""
POLL_SECONDS = 0.25
RETRY_SECONDS = 1.0
EMPTY_CATALOG = CatalogUpdate(-1, [], [], [], {})
"""The catalog before the first one of the hub."""

log = structlog.get_logger()


class HubError(Exception):
    """The hub failed to handle a request."""


class Reports:
    """Reports of counts, each kept until the hub acknowledges it.

    Attributes:
        counts: counts for the next report.
        unacknowledged: reports to send again over a new connection, oldest first.
    """

    def __init__(self) -> None:
        self.counts = Counts()
        self.unacknowledged: deque[CountsReport] = deque()
        self._numbers = itertools.count()

    def next(self, ready: bool) -> CountsReport | None:
        """Return the next report to send; None: too many reports are unacknowledged."""
        if len(self.unacknowledged) >= MAX_UNACKNOWLEDGED:
            return None
        report = CountsReport(
            next(self._numbers), self.counts.take(), self.counts.cache_bytes, ready
        )
        self.unacknowledged.append(report)
        return report

    def acknowledge(self, number: int) -> None:
        """Forget the reports up to this number."""
        while self.unacknowledged and self.unacknowledged[0].number <= number:
            self.unacknowledged.popleft()


class HubLink(Connection):
    """The connection to the hub.

    Args:
        address: address of the hub.
        serve: applies a model catalog; it is called again after an error. Of several catalogs that
            arrive while it runs, it gets the last.
        routes: all routes, which are label values of the counts.
        configure: applies settings, encoded by `encode_settings`, or raises.
        ready: returns whether this frontend can classify.

    Attributes:
        catalog: catalog that `serve` has applied last.
        counts: counts of this frontend, which are reported to the hub.
    """

    def __init__(
        self,
        address: Address,
        serve: Callable[[CatalogUpdate], Awaitable[None]],
        routes: list[str],
        configure: Callable[[bytes], None] = lambda _: None,
        ready: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__("hub", address, FROM_HUB)
        self.catalog = EMPTY_CATALOG
        self.heartbeat: HubHeartbeat | None = None
        """The last heartbeat of the hub; None: there was none yet."""
        self.silent_seconds = 0.0
        """Seconds since the last message of the hub."""
        self._serve = serve
        self._routes = routes
        self._configure = configure
        self._ready = ready
        self._keys: list[str] = []
        self._frontend = uuid4().hex
        self._reports = Reports()
        self.counts = self._reports.counts
        self._newest = EMPTY_CATALOG
        self._changed = asyncio.Event()
        self._first = asyncio.Event()
        self._background = Background()

    async def start(self) -> None:
        """Connect, and return when the first catalog was applied."""
        for work in (
            self.stay_connected(), self._apply_catalogs(), self._report(), self._measure_silence(),
        ):  # fmt: skip
            self._background.start(work)
        await self._first.wait()

    async def stop(self) -> None:
        """Send the last report, and close the connection."""
        self._flush()
        await self._background.stop()

    def send_keys(self, names: list[str]) -> None:
        """Send the names of all keys to the hub."""
        self._keys = names
        self._send_hello()

    async def query(self, query: Scrape | GetRecentTraffic) -> ContentReply:
        """Return the metrics or the recent traffic from the hub.

        The answer includes the counts of this frontend up to now, unless reports are still
        unacknowledged.

        Raises:
            DisconnectedError: there is no connection to the hub, or it is silent for
                `SILENCE_LIMIT`, or takes longer than `QUERY_SECONDS`.
            HubError: the hub failed to answer.
        """
        self._flush()
        answer = await self._request(query, QUERY_SECONDS)
        assert isinstance(answer, ContentReply)
        return answer

    async def change(self, wanted: ChangeModel | ChangeRollOut | ReloadSettings) -> FromHub:
        """Request a change of the server, and return the answer when all processes have made it.

        Raises:
            DisconnectedError: there is no connection to the hub, or it is silent for
                `SILENCE_LIMIT`; the change may still be made.
            HubError: the hub failed to answer.
        """
        return await self._request(wanted)

    async def _request(self, message: Message, timeout: float | None = None) -> FromHub:
        request = asyncio.create_task(self.request(message, timeout))
        try:
            while not request.done():
                if self.silent_seconds > SILENCE_LIMIT:
                    raise DisconnectedError
                await asyncio.wait({request}, timeout=POLL_SECONDS)
            answer: FromHub = request.result()
        except TimeoutError:
            raise DisconnectedError from None
        finally:
            request.cancel()
        if isinstance(answer, RequestFailed):
            raise HubError(answer.message)
        return answer

    def _on_connect(self) -> None:
        self._send_hello()
        for report in self._reports.unacknowledged:
            self.send(report)

    def _send_hello(self) -> None:
        self.send(FrontendHello(self._frontend, os.getpid(), self._routes, self._keys))

    def _on_message(self, message: FromHub) -> None:
        if isinstance(message, CatalogUpdate):
            self._newest = message
            self._changed.set()
        elif isinstance(message, SettingsUpdate):
            try:
                self._configure(message.settings)
            except Exception as error:  # the frontend keeps its settings
                log.error("settings not applied", exc_info=error)
            else:
                self.send(SettingsApplied(message.generation))
        elif isinstance(message, ReportAcknowledged):
            self._reports.acknowledge(message.number)
        elif isinstance(message, HubHeartbeat):
            self.heartbeat = message
        else:
            super()._on_message(message)

    async def _apply_catalogs(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            catalog = self._newest
            try:
                await self._serve(catalog)
            except Exception as error:  # tried again
                log.error("model catalog not applied", retry_in=RETRY_SECONDS, exc_info=error)
                self._changed.set()
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self.catalog = catalog
            self._first.set()

    async def _measure_silence(self) -> None:
        """Measure the silence of the hub, without time in which this process itself was stopped."""
        last_seen, before = self.last_seen, time.monotonic()
        while True:
            await asyncio.sleep(POLL_SECONDS)
            now = time.monotonic()
            passed = min(now - before, 2 * POLL_SECONDS)
            self.silent_seconds = (
                0.0 if self.last_seen > last_seen else self.silent_seconds + passed
            )
            last_seen, before = self.last_seen, now

    async def _report(self) -> None:
        """Send reports at even intervals; one without counts is the heartbeat of this frontend."""
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            self._flush()

    def _flush(self) -> None:
        if self.connected and (report := self._reports.next(self._ready())) is not None:
            self.send(report)
