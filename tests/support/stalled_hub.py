"""A hub that stops reading or does not answer scrapes."""

from __future__ import annotations

import asyncio

from service.ipc import frames
from service.ipc.connection import Say
from service.ipc.control_messages import (
    TO_HUB,
    Acknowledged,
    Alive,
    Here,
    Report,
    Scrape,
    Serving,
    Shown,
)


class StalledHub:
    """A hub that reads only while `reads` is set, and answers scrapes unless it is slow."""

    def __init__(self, slow: bool = False) -> None:
        self.slow = slow
        self.reads = asyncio.Event()
        self.keys: list[list[str]] = []
        self.reports: list[Report] = []
        self.connections = 0

    async def came(self, reader: asyncio.StreamReader, say: Say) -> None:
        self.connections += 1
        say(Serving(0, [], [], [], {}))
        while True:
            await self.reads.wait()
            message = await frames.read(reader, TO_HUB)
            if message is None:
                return
            say(Alive(1, {}, True))
            if isinstance(message, Here):
                self.keys.append(message.keys)
            if isinstance(message, Report):
                self.reports.append(message)
                say(Acknowledged(message.number))
            if isinstance(message, Scrape) and not self.slow:
                say(Shown(message.id, b"series", "text/plain"))
