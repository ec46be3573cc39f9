"""A hub that stops reading or does not answer scrapes."""

from __future__ import annotations

import asyncio

from service.ipc import frames
from service.ipc.connection import Sender
from service.ipc.control_messages import (
    TO_HUB,
    CatalogUpdate,
    ContentReply,
    CountsReport,
    FrontendHello,
    HubHeartbeat,
    ReportAcknowledged,
    Scrape,
)


class StalledHub:
    """A hub that reads only while `reads` is set, and answers scrapes unless it is slow."""

    def __init__(self, slow: bool = False) -> None:
        self.slow = slow
        self.reads = asyncio.Event()
        self.keys: list[list[str]] = []
        self.reports: list[CountsReport] = []
        self.connections = 0

    async def came(self, reader: asyncio.StreamReader, send: Sender) -> None:
        self.connections += 1
        send(CatalogUpdate(0, [], [], [], {}))
        while True:
            await self.reads.wait()
            message = await frames.read(reader, TO_HUB)
            if message is None:
                return
            send(HubHeartbeat(1, {}, True))
            if isinstance(message, FrontendHello):
                self.keys.append(message.keys)
            if isinstance(message, CountsReport):
                self.reports.append(message)
                send(ReportAcknowledged(message.number))
            if isinstance(message, Scrape) and not self.slow:
                send(ContentReply(message.id, b"series", "text/plain"))
