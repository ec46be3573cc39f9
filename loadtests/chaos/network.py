"""Faults of the network and of clients: delay, loss, slow readers, disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from loadtests.chaos.load import Seen, under_load
from loadtests.chaos.server import MODEL, Server, Setup, serving

DELAY, JITTER, LOSS = 0.05, 0.01, 0.05
"""Delay in seconds each way, its jitter, and the share of lost packets."""
LINK_SECONDS = 30.0
HERE, THERE = "10.231.77.1", "10.231.77.2"
SCRAPERS, LEAVERS = 40, 15
"""Number of scrapers that do not read, and requests per second whose clients disconnect."""
READING_SECONDS = 20.0

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MAX_BYTES = 65536


class _Link:
    """A link to a second network namespace, which delays and loses packets."""

    def __init__(self) -> None:
        self.namespace = f"budgetformer-{os.getpid()}"
        self.carried = self.lost = 0
        self._ends: list[int] = []

    def open(self) -> None:
        """Create both ends and forward connections."""
        _ip("netns", "add", self.namespace)
        inside = ("netns", "exec", self.namespace, "ip")
        names = [f"bf{os.getpid()}{end}" for end in "ab"]
        self._ends = [_tunnel(name) for name in names]
        _ip("link", "set", names[1], "netns", self.namespace)
        for name, own, other, where in (
            (names[0], HERE, THERE, ()),
            (names[1], THERE, HERE, inside),
        ):
            _ip(*where, "address", "add", own, "peer", other, "dev", name)
            _ip(*where, "link", "set", name, "up")
        _ip(*inside, "link", "set", "lo", "up")
        loop = asyncio.get_running_loop()
        for source, target in (self._ends, self._ends[::-1]):
            loop.add_reader(source, self._carry, source, target)

    def close(self) -> None:
        """Remove the link."""
        loop = asyncio.get_running_loop()
        for end in self._ends:
            loop.remove_reader(end)
            os.close(end)
        self._ends = []
        _ip("netns", "delete", self.namespace)

    def _carry(self, source: int, target: int) -> None:
        packet = os.read(source, _MAX_BYTES)
        self.carried += 1
        if random.random() < LOSS:
            self.lost += 1
            return
        delay = random.uniform(DELAY - JITTER, DELAY + JITTER)
        asyncio.get_running_loop().call_later(delay, self._deliver, target, packet)

    def _deliver(self, target: int, packet: bytes) -> None:
        with contextlib.suppress(OSError):  # the other side is gone
            os.write(target, packet)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _tunnel(name: str) -> int:
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return end


@contextmanager
def _link() -> Iterator[_Link]:
    link = _Link()
    try:
        link.open()
        yield link
    finally:
        link.close()


def no_link() -> str | None:
    """Return the missing requirement for creating a network, if any."""
    name = f"budgetformer-{os.getpid()}-try"
    try:
        _ip("netns", "add", name)
        _ip("netns", "delete", name)
        os.close(_tunnel(f"bf{os.getpid()}"))
    except (OSError, subprocess.CalledProcessError):
        return "needs root, iproute2 and /dev/net/tun"
    return None


async def link(repeats: int) -> Seen:  # noqa: ARG001
    """Send requests over a link that delays and loses packets."""
    with _link() as wire:
        before = ("ip", "netns", "exec", wire.namespace)
        anyone = {"BUDGETFORMER_ALLOW_ANONYMOUS": "true"}
        async with serving(Setup({"host": THERE}, before, anyone, host=THERE)) as server:

            async def work(seen: Seen) -> None:
                await asyncio.sleep(LINK_SECONDS)
                seen.notes.append(f"{wire.lost:,} of {wire.carried:,} packets lost")

            return await under_load(server, work)


async def readers(repeats: int) -> Seen:  # noqa: ARG001
    """Scrape while hardly reading the responses, and disconnect before answers."""
    async with serving() as server:

        async def work(seen: Seen) -> None:
            seen.memory.append(server.memory())
            until = asyncio.get_running_loop().time() + READING_SECONDS
            async with asyncio.TaskGroup() as tasks:
                for _ in range(SCRAPERS):
                    tasks.create_task(_scrape_slowly(server, until))
                tasks.create_task(_leave(server, until))
            seen.memory.append(server.memory())
            seen.recovery.append(await server.until_whole())

        return await under_load(server, work)


async def _scrape_slowly(server: Server, until: float) -> None:
    """Request the metrics repeatedly on one connection, and read only a byte now and then."""
    clock = asyncio.get_running_loop().time
    while clock() < until:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=2)
            try:
                for _ in range(50):
                    writer.write(b"GET /metrics HTTP/1.1\r\nhost: here\r\n\r\n")
                while clock() < until and await reader.read(1):
                    await asyncio.sleep(0.2)
            finally:
                writer.transport.abort()


async def _leave(server: Server, until: float) -> None:
    """Send requests repeatedly, and disconnect before each answer."""
    clock = asyncio.get_running_loop().time
    body = b'{"input": ["A text that nobody waits for."], "model": "%s"}' % MODEL.encode()
    head = b"POST /classify HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\n"
    while clock() < until:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            await asyncio.sleep(random.uniform(0, 0.01))
            writer.transport.abort()
        await asyncio.sleep(1 / LEAVERS)
