"""The frontends that are connected to the hub."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

from service.ipc.connection import Say
from service.ipc.frames import Message


class FrontendPeer:
    """A frontend that is connected.

    Attributes:
        name: tells it from all others; pid: its process.
        serves: whether it takes requests; the process that runs jobs does not.
        heard: when it last said something.
        swapped, drained, configured: see `Swapped`, `Drained`, `SettingsTaken`.
        cache_bytes: size of the answers that it keeps.
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
    """All of them."""

    def __init__(self) -> None:
        self._peers: set[FrontendPeer] = set()
        self._moved = asyncio.Event()

    def __iter__(self) -> Iterator[FrontendPeer]:
        return iter(self._peers)

    def add(self, peer: FrontendPeer) -> None:
        """Count one that came."""
        self._peers.add(peer)

    def discard(self, peer: FrontendPeer) -> None:
        """Forget one that went."""
        self._peers.discard(peer)
        self.moved()

    def tell(self, message: Message) -> None:
        """Send all of them a message."""
        for peer in self._peers:
            peer.say(message)

    def moved(self) -> None:
        """Say that a frontend is further than it was."""
        self._moved.set()

    async def until(self, reached: Callable[[FrontendPeer], bool]) -> None:
        """Wait until this is true of every one."""
        while not all(map(reached, self._peers)):
            self._moved.clear()
            await self._moved.wait()
