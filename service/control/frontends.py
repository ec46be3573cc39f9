"""The frontends that are connected to the hub."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

from service.ipc.connection import Say
from service.ipc.frames import Message


class FrontendPeer:
    """A connected frontend.

    Attributes:
        say: sends a message to it.
        name: unique name of the frontend.
        pid: process id.
        serves: whether it accepts requests; the process that runs jobs does not.
        heard: time of its last message, on the monotonic clock.
        swapped, drained, configured: generations that it has reached; see the messages `Swapped`,
            `Drained` and `SettingsTaken`.
        cache_bytes: size of its answer cache.
    """

    def __init__(self, say: Say) -> None:
        self.say = say
        self.name = ""
        self.pid = 0
        self.serves = False
        self.heard = time.monotonic()
        self.swapped = self.drained = self.configured = 0
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

    def tell(self, message: Message) -> None:
        """Send a message to all frontends."""
        for peer in self._peers:
            peer.say(message)

    def advanced(self) -> None:
        """Wake `until`, since a frontend has reached another generation."""
        self._advanced.set()

    async def until(self, reached: Callable[[FrontendPeer], bool]) -> None:
        """Wait until `reached` is true for every frontend."""
        while not all(map(reached, self._peers)):
            self._advanced.clear()
            await self._advanced.wait()
