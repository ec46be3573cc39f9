"""An efficient open-loop client: sends requests on a schedule, without waiting for answers.

    python loadtests/openloop.py

measures the client itself with a server that answers at once: how late it sends requests, and the
latency that it adds. Other scripts of this folder import the client.

Latency counts from the time at which a request was due, not from the time at which it was sent. So
if a server stalls, the latency of all requests that are due meanwhile includes the stall.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import httptools
import uvloop

MAX_CONNECTIONS = 4000
PATIENCE = 40.0
"""Seconds to wait for answers after the end of the schedule."""
SLEEP_RESOLUTION = 0.0015
"""Latest wake-up of the event loop, in seconds; shorter waits are busy-waits."""

Arrivals = Literal["constant", "poisson"]


@dataclass
class Phase:
    """The results of sending at one rate; times are in seconds.

    Attributes:
        name: name of the phase.
        seconds: scheduled duration.
        rate: scheduled requests per second; 0 in a closed loop.
        due: number of requests that were due.
        took: time until the last answer.
        client_cpu: processor time of the client.
        statuses: number of answers by HTTP status, or by the error without one.
        levels: number of 200s by the quality level of the answer (X-Quality).
        answered: due time after the start, and latency, of each 200.
        refused: latencies of all other answers.
        late: delay between due time and sending, of each request.
        bodies: index of the request and the body, of each 200, if the client keeps bodies.
    """

    name: str
    seconds: float
    rate: float = 0.0
    due: int = 0
    took: float = 0.0
    client_cpu: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    levels: Counter[str] = field(default_factory=Counter)
    answered: list[tuple[float, float]] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    bodies: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def unanswered(self) -> int:
        return self.due - sum(self.statuses.values())

    @property
    def goodput(self) -> float:
        """Requests per second that were answered with 200."""
        return self.statuses["200"] / max(self.seconds, self.took)

    def latency(self, share: float) -> float:
        """Return the quantile `share` of the latencies of 200s."""
        return quantile([latency for _, latency in self.answered], share)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the quantile `share` of the values; NaN if there are none.

    >>> quantile([3.0, 1.0, 2.0], 0.5)
    2.0
    """
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class _Connection(asyncio.Protocol):
    """A keep-alive connection with one request at a time."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._transport: Any = None
        self._parser: Any = None
        self._done: Callable[[str, str, bytes], None] | None = None
        self._level = ""
        self._parts: list[bytes] = []

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def send(self, request: bytes, done: Callable[[str, str, bytes], None]) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._done, self._level, self._parts = done, "", []
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self._done is None:  # an idle connection: the server announces that it closes it
            self._transport.close()
        else:
            self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-quality":
            self._level = value.decode()

    def on_body(self, body: bytes) -> None:
        if self._client.keep_bodies:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        done, self._done = self._done, None
        assert done is not None
        if self._parser.should_keep_alive() and not self._transport.is_closing():
            self._client.release(self)
        else:
            self._transport.close()
        done(str(self._parser.get_status_code()), self._level, b"".join(self._parts))

    def connection_lost(self, _: Exception | None) -> None:
        self._client.forget(self)
        if self._done is not None:
            done, self._done = self._done, None
            done("broke off", "", b"")

    def close(self) -> None:
        self._transport.close()


class Client:
    """A pool of connections to one server.

    Args:
        url: URL of the route; http only.
        headers: headers of every request.
        spin: busy-wait for due times, for microsecond precision; requires a dedicated core.
        keep_bodies: whether phases store the answers.
    """

    def __init__(
        self,
        url: str,
        headers: dict[str, str] | None = None,
        *,
        spin: bool = True,
        keep_bodies: bool = False,
    ) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        head = {"Host": parts.netloc, "Content-Type": "application/json"} | (headers or {})
        lines = [f"POST {parts.path or '/'} HTTP/1.1", *(f"{k}: {v}" for k, v in head.items())]
        self._head = "\r\n".join(lines).encode() + b"\r\nContent-Length: %d\r\n\r\n"
        self._spin = spin
        self.keep_bodies = keep_bodies
        self._idle: list[_Connection] = []
        self._open = 0

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return self._open

    def request(self, body: Any) -> bytes:
        """Return a complete HTTP request as bytes."""
        content = json.dumps(body).encode()
        return self._head % len(content) + content

    def release(self, connection: _Connection) -> None:
        self._idle.append(connection)

    def forget(self, connection: _Connection) -> None:
        self._open -= 1
        if connection in self._idle:
            self._idle.remove(connection)

    async def connect(self, count: int) -> None:
        """Open connections until this many are idle."""
        while len(self._idle) < count and self._open < MAX_CONNECTIONS:
            self._idle.append(await self._connect())

    def close(self) -> None:
        for connection in list(self._idle):
            connection.close()

    async def _connect(self) -> _Connection:
        self._open += 1
        loop = asyncio.get_running_loop()
        try:
            _, made = await loop.create_connection(
                lambda: _Connection(self), self._host, self._port
            )
        except OSError:
            self._open -= 1
            raise
        return made

    async def closed(
        self, name: str, requests: Sequence[bytes], callers: int, seconds: float
    ) -> Phase:
        """Send requests closed-loop, with `callers` in flight; latency counts from sending."""
        await self.connect(callers)
        loop = asyncio.get_running_loop()
        phase, numbers = Phase(name, seconds), itertools.count()
        start, cpu = time.perf_counter(), time.process_time()
        finished, busy = loop.create_future(), callers

        def ask() -> None:
            nonlocal busy
            now = time.perf_counter()
            if now - start >= seconds or not self._idle:
                busy -= 1
                if not busy:
                    finished.set_result(None)
                return
            number = next(numbers) % len(requests)
            phase.due += 1

            def done(status: str, level: str, body: bytes) -> None:
                self._record(phase, status, level, body, number, now - start, now)
                ask()

            self._idle.pop().send(requests[number], done)

        for _ in range(callers):
            ask()
        await asyncio.wait_for(finished, seconds + PATIENCE)
        phase.took = time.perf_counter() - start
        phase.client_cpu = time.process_time() - cpu
        return phase

    async def scheduled(
        self,
        name: str,
        requests: Sequence[bytes],
        rate: float,
        seconds: float,
        arrivals: Arrivals = "constant",
    ) -> Phase:
        """Send `rate` requests per second, open-loop."""
        phase = Phase(name, seconds, rate)
        await self.connect(min(int(rate / 4) + 8, 512))
        waiting: set[asyncio.Task[None]] = set()
        start, cpu = time.perf_counter(), time.process_time()
        for number, offset in enumerate(_offsets(rate, seconds, arrivals)):
            due = start + offset
            await self._until(due)
            phase.late.append(time.perf_counter() - due)
            phase.due += 1
            index = number % len(requests)

            def done(
                status: str, level: str, body: bytes,
                index: int = index, offset: float = offset, due: float = due,
            ) -> None:  # fmt: skip
                self._record(phase, status, level, body, index, offset, due)

            if self._idle:
                self._idle.pop().send(requests[index], done)
            else:
                task = asyncio.create_task(self._connect_and_send(requests[index], done))
                waiting.add(task)
                task.add_done_callback(waiting.discard)
        phase.client_cpu = time.process_time() - cpu
        end = time.perf_counter() + PATIENCE
        while phase.unanswered and time.perf_counter() < end:
            await asyncio.sleep(0.005)
        phase.took = time.perf_counter() - start
        return phase

    async def _until(self, due: float) -> None:
        left = due - time.perf_counter()
        if not self._spin:
            await asyncio.sleep(max(left, 0.0))
            return
        if left > SLEEP_RESOLUTION:
            await asyncio.sleep(left - SLEEP_RESOLUTION)
        await asyncio.sleep(0)  # reads answers even if the schedule is behind
        while time.perf_counter() < due:
            await asyncio.sleep(0)

    async def _connect_and_send(
        self, request: bytes, done: Callable[[str, str, bytes], None]
    ) -> None:
        while self._open >= MAX_CONNECTIONS and not self._idle:
            await asyncio.sleep(0.001)
        try:
            connection = self._idle.pop() if self._idle else await self._connect()
        except OSError as error:
            done(type(error).__name__, "", b"")
            return
        connection.send(request, done)

    def _record(
        self, phase: Phase, status: str, level: str, body: bytes,
        index: int, offset: float, due: float,
    ) -> None:  # fmt: skip
        phase.statuses[status] += 1
        latency = time.perf_counter() - due
        if status == "200":
            phase.answered.append((offset, latency))
            phase.levels[level] += 1
            if self.keep_bodies:
                phase.bodies.append((index, body))
        else:
            phase.refused.append(latency)


def _offsets(rate: float, seconds: float, arrivals: Arrivals) -> Iterator[float]:
    draw = random.Random(2)
    gaps = (
        1 / rate if arrivals == "constant" else draw.expovariate(rate) for _ in itertools.count()
    )
    return itertools.takewhile(lambda offset: offset < seconds, itertools.accumulate(gaps))


# The limits of the client


class _Fixed(asyncio.Protocol):
    """A server that answers every request with the same body."""

    ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\n" + b" " * 300

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self._transport.write(self.ANSWER)


def _serve_fixed(port: Any, core: int | None) -> None:
    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(_Fixed, "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    if core is not None:
        os.sched_setaffinity(0, {core})
    uvloop.run(serve())


async def limit(url: str, size: int, rates: Sequence[float], seconds: float) -> list[Phase]:
    """Return one phase per rate with the server at `url`, for requests of `size` bytes."""
    client = Client(url)
    requests = [client.request({"input": "x" * size})]
    phases = [await client.scheduled(f"{rate:g}/s", requests, rate, seconds) for rate in rates]
    client.close()
    return phases


def limit_lines(size: int, rates: Sequence[float], seconds: float) -> list[str]:
    """Measure this client at several rates with a server that answers at once.

    Args:
        size: size of the requests, in bytes.
        rates: requests per second.
        seconds: duration of each rate.

    Returns:
        The lines of a Markdown table.
    """
    cores = sorted(os.sched_getaffinity(0))
    server_core = cores[0] if len(cores) > 1 else None
    ours, theirs = multiprocessing.Pipe()
    serving = multiprocessing.Process(target=_serve_fixed, args=(theirs, server_core), daemon=True)
    serving.start()
    if len(cores) > 1:
        os.sched_setaffinity(0, {cores[-1]})
    try:
        phases = uvloop.run(limit(f"http://127.0.0.1:{ours.recv()}/", size, rates, seconds))
    finally:
        os.sched_setaffinity(0, set(cores))
        serving.terminate()
        serving.join()
    lines = [
        f"| requests/s, {size} bytes | answered | late p99, us | late max, us | p50, us |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {phase.rate:.0f} | {phase.statuses['200']} of {phase.due} "
        f"| {1e6 * quantile(phase.late, 0.99):.0f} | {1e6 * max(phase.late):.0f} "
        f"| {1e6 * phase.latency(0.5):.0f} |"
        for phase in phases
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[500, 2000, 5000, 8000])
    parser.add_argument("--sizes", type=int, nargs="+", default=[250, 16_000])
    parser.add_argument("--seconds", type=float, default=4.0)
    given = parser.parse_args()
    for size in given.sizes:
        print("\n".join(limit_lines(size, given.rates, given.seconds)), end="\n\n")


if __name__ == "__main__":
    main()
