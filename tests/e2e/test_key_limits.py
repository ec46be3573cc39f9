"""The limits of a key hold over all frontends of a server."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from service.keys import digest
from tests.support.exposition import Exposition
from tests.support.processes import Server, server
from tests.support.stores import TOPICS, sentences
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

FRONTENDS = 4
RATE = 100
BURST = 50
MAX_REQUESTS = 6
TEXT = sentences("animals")[0]
PATIENCE = 30
BUSY = b"POST /classify HTTP/1.1\r\nHost: x\r\nX-API-Key: many\r\nContent-Length: 9\r\n\r\n"
"""The head of a request whose body is never sent, so the request stays open."""


@pytest.fixture
def running(model_store: Path, tmp_path: Path) -> Iterator[Server]:
    keys = tmp_path / "keys.toml"
    keys.write_text(
        f'web = {{ sha256 = "{digest(b"often")}", texts_per_second = {RATE}, burst = {BURST} }}\n'
        f'app = {{ sha256 = "{digest(b"many")}", max_requests = {MAX_REQUESTS} }}\n'
    )
    options = {
        "default_model": TOPICS, "models": TOPICS, "fronts": str(FRONTENDS),
        "keys_file": str(keys), "hang_seconds": "60",
    }  # fmt: skip
    with server(model_store, tmp_path, engines=1, **options) as running:
        wait_until(lambda: all_serve(running), "all frontends")
        yield running


def frontends(running: Server) -> list[psutil.Process]:
    """Return the processes of the frontends that have not been killed."""
    found = []
    for child in running.children:
        with suppress(psutil.NoSuchProcess):  # raised for zombies, too
            if "service.frontend" in child.cmdline():
                found.append(child)
    return found


def all_serve(running: Server) -> bool:
    """Return whether all frontends run and are connected to the hub."""
    if len(frontends(running)) < FRONTENDS:
        return False
    # 503 shortly after the hub was stopped.
    shown = httpx.get(f"{running.url}/metrics", timeout=PATIENCE)
    return shown.status_code == 200 and Exposition(shown.text).total("fronts") == FRONTENDS


async def ask_for(running: Server, seconds: float) -> tuple[Counter[int], float]:
    """Send requests with the key `often` over many connections, as fast as possible.

    Returns:
        The number of answers by status, and the seconds until the last one.
    """
    statuses: Counter[int] = Counter()
    async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE) as client:
        started = time.monotonic()

        async def caller() -> None:
            while time.monotonic() - started < seconds:
                answer = await client.post(
                    "/classify", json={"input": TEXT}, headers={"X-API-Key": "often"}
                )
                statuses[answer.status_code] += 1

        await asyncio.gather(*(caller() for _ in range(4 * FRONTENDS)))
    return statuses, time.monotonic() - started


def test_the_rate_holds_over_all_frontends_and_after_one_was_killed(running: Server) -> None:
    seconds = 3.0
    statuses, took = asyncio.run(ask_for(running, seconds))
    assert set(statuses) == {200, 429}
    assert 0.95 * (BURST + RATE * seconds) <= statuses[200] <= BURST + RATE * took + FRONTENDS
    frontends(running)[0].kill()
    wait_until(lambda: all_serve(running), "another frontend")
    # At most, the bucket was full again.
    statuses, took = asyncio.run(ask_for(running, seconds))
    assert 0.95 * RATE * seconds <= statuses[200] <= BURST + RATE * took + FRONTENDS


@contextmanager
def held_requests(running: Server, count: int) -> Iterator[dict[int, int]]:
    """Hold requests of the key `many` open; yield their number by the frontend's process id."""
    port = httpx.URL(running.url).port
    with ExitStack() as stack:
        held = set()
        for _ in range(count):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port or 0), PATIENCE))
            one.sendall(BUSY)
            held.add(one.getsockname()[1])

        def holders() -> dict[int, int]:
            found = {
                frontend.pid: sum(
                    bool(one.raddr) and one.raddr.port in held
                    for one in frontend.net_connections("tcp")
                )
                for frontend in frontends(running)
            }
            return {pid: number for pid, number in found.items() if number}

        wait_until(lambda: sum(holders().values()) == count, "connections")
        yield holders()


def admitted(running: Server) -> int:
    """Count the requests of the key `many` that are admitted in addition to open ones."""
    port = httpx.URL(running.url).port
    count = 0
    with ExitStack() as stack:
        # Each over a new connection, which any frontend may accept.
        for _ in range(3 * MAX_REQUESTS):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port or 0), PATIENCE))
            one.settimeout(0.5)
            one.sendall(BUSY)
            try:
                assert b" 429 " in one.recv(64).split(b"\r\n")[0]
            except TimeoutError:
                count += 1
    return count


def free(running: Server) -> int:
    """Return the number of requests that may still begin, after earlier ones have ended."""
    counts: list[int] = []

    def settled() -> bool:
        counts.append(admitted(running))
        return len(counts) > 1 and counts[-1] == counts[-2]

    wait_until(settled, "the end of earlier requests")
    return counts[-1]


def test_open_requests_count_over_all_frontends_without_hub_and_after_kills(
    running: Server,
) -> None:
    with held_requests(running, MAX_REQUESTS) as holders:
        assert free(running) == 0
        running.process.send_signal(signal.SIGSTOP)
        try:
            assert free(running) == 0
            victim, lost = next(iter(holders.items()))
            psutil.Process(victim).kill()
            wait_until(
                lambda: free(running) == lost, "the requests of the killed frontend to be released"
            )
        finally:
            running.process.send_signal(signal.SIGCONT)
        wait_until(lambda: all_serve(running), "another frontend")
        assert free(running) == lost
    wait_until(lambda: free(running) == MAX_REQUESTS, "the end of all")
