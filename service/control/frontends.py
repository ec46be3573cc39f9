"""The frontends that are connected to the hub."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

from service.ipc.connection import Sender
from service.ipc.frames import Message


class FrontendPeer:
    """A connected frontend.

    Attributes:
        send: sends a message to it.
        name: unique name of the frontend.
        pid: process id.
        serves: whether it accepts requests; the process that runs jobs does not.
        last_seen: time of its last message, on the monotonic clock.
        applied, drained, configured: generations that it has reached; see the messages
            `CatalogApplied`, `Drained` and `SettingsApplied`.
        cache_bytes: size of its answer cache.
    """

    def __init__(self, send: Sender) -> None:
        self.send = send
        self.name = ""
        self.pid = 0
        self.serves = False
        self.last_seen = time.monotonic()
        self.applied = self.drained = self.configured = 0
        self.cache_bytes = 0


class Frontends:
    """All connected frontends."""

    def __init__(self) -> None:
        self._peers: set[FrontendPeer] = set()
        self._advanced = asyncio.Event()

    def __iter__(self) -> Iterator[FrontendPeer]:
        return iter(self._peers)

    def add(self, peer: FrontendPeer) -> None:
        """Add a frontend that connected."""
        self._peers.add(peer)

    def discard(self, peer: FrontendPeer) -> None:
        """Remove a frontend whose connection ended."""
        self._peers.discard(peer)
        self.advanced()

    def broadcast(self, message: Message) -> None:
        """Send a message to all frontends."""
        for peer in self._peers:
            peer.send(message)

    def advanced(self) -> None:
        """Wake `until`, since a frontend has reached another generation."""
        self._advanced.set()

    async def until(self, reached: Callable[[FrontendPeer], bool]) -> None:
        """Wait until `reached` is true for every frontend."""
        while not all(map(reached, self._peers)):
            self._advanced.clear()
            await self._advanced.wait()
