"""The acceptor takes a few connections per turn of the event loop, and more after a long turn."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, ClassVar

import pytest
import pytest_asyncio

from service.http import acceptor
from service.http.acceptor import ACCEPTS, Acceptor
from service.process import bind


class Echo(asyncio.Protocol):
    """A protocol that returns the data that it receives."""

    open: ClassVar[list[asyncio.Transport]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.open.append(transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


class Listener(socket.socket):
    """A listening socket that counts accepted connections; the first `failures` calls fail."""

    accepted = 0
    failures = 0

    def accept(self) -> tuple[socket.socket, Any]:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, "too many open files")
        connection = super().accept()
        self.accepted += 1
        return connection


@pytest.fixture
def listener() -> Iterator[Listener]:
    with bind("127.0.0.1", 0) as bound:
        yield Listener(fileno=os.dup(bound.fileno()))


@pytest_asyncio.fixture(autouse=True)
async def _close_connections() -> AsyncIterator[None]:
    yield
    while Echo.open:
        Echo.open.pop().abort()
    await turns(2)


@pytest_asyncio.fixture
async def accepting(listener: Listener) -> AsyncIterator[Acceptor]:
    acceptor = Acceptor(listener, handshake_seconds=0.2)
    yield acceptor
    acceptor.close()


@pytest.fixture
def connect(listener: Listener) -> Iterator[Callable[[], socket.socket]]:
    clients: list[socket.socket] = []

    def connect_one() -> socket.socket:
        clients.append(socket.create_connection(listener.getsockname()))
        clients[-1].setblocking(False)
        return clients[-1]

    yield connect_one
    for client in clients:
        client.close()


async def echoed(client: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, b"word")
    return await asyncio.wait_for(loop.sock_recv(client, 10), 5)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_connection_is_served(
    accepting: Acceptor, connect: Callable[[], socket.socket]
) -> None:
    accepting.start(Echo)
    assert await echoed(connect()) == b"word"


async def test_the_shared_socket_is_made_non_blocking() -> None:
    with bind("127.0.0.1", 0) as shared:
        assert not os.get_blocking(shared.fileno())
        os.set_blocking(shared.fileno(), True)
        accepting = Acceptor(socket.socket(fileno=os.dup(shared.fileno())), 1.0)
        assert not os.get_blocking(shared.fileno())
        accepting.start(Echo)
        accepting.close()


async def test_a_turn_leaves_connections_to_other_frontends(
    accepting: Acceptor,
    listener: Listener,
    connect: Callable[[], socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(acceptor, "ACCEPT_SECONDS", 60.0)
    clients = [connect() for _ in range(3 * ACCEPTS)]
    accepting.start(Echo)
    seen = set()
    while listener.accepted < len(clients):
        await asyncio.sleep(0)
        seen.add(listener.accepted)
    assert {ACCEPTS, 2 * ACCEPTS} <= seen
    assert await echoed(clients[-1]) == b"word"


async def test_a_long_turn_is_followed_by_accepting_all_connections(
    accepting: Acceptor, listener: Listener, connect: Callable[[], socket.socket]
) -> None:
    clients = [connect() for _ in range(8 * ACCEPTS)]
    accepting.start(Echo)
    while not listener.accepted:
        await asyncio.sleep(0)
    assert listener.accepted == ACCEPTS
    time.sleep(8 * ACCEPTS * acceptor.ACCEPT_SECONDS)  # noqa: ASYNC251  # the turn is long
    await turns(2)
    assert listener.accepted == len(clients)


async def test_accepting_pauses_if_no_file_can_be_opened(
    accepting: Acceptor,
    listener: Listener,
    connect: Callable[[], socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(acceptor, "PAUSE_SECONDS", 0.05)
    listener.failures = 1
    client = connect()
    accepting.start(Echo)
    await turns(20)
    assert (listener.failures, listener.accepted) == (0, 0)
    assert await echoed(client) == b"word"


async def test_closing_keeps_accepted_connections(
    listener: Listener, connect: Callable[[], socket.socket]
) -> None:
    closing = Acceptor(listener, 1.0)
    closing.start(Echo)
    served = connect()
    await echoed(served)
    closing.close()
    assert listener.fileno() == -1
    assert await echoed(served) == b"word"


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n\r\n"], ids=["nothing", "plain text"])
async def test_clients_without_tls_are_disconnected(
    sent: bytes, accepting: Acceptor, connect: Callable[[], socket.socket]
) -> None:
    accepting.start(Echo, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    client = connect()
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, sent)
    while await asyncio.wait_for(loop.sock_recv(client, 100), 5):
        pass


async def test_connections_above_the_limit_are_closed_at_once(
    accepting: Acceptor, connect: Callable[[], socket.socket]
) -> None:
    room = [True, False]
    accepting.start(Echo, full=lambda: not room.pop(0))
    first, second = connect(), connect()
    assert await echoed(first) == b"word"
    loop = asyncio.get_running_loop()
    assert await asyncio.wait_for(loop.sock_recv(second, 10), 5) == b""


class RecordingProtocol(Echo):
    """Records when its handshake begins and fails."""

    events: ClassVar[list[str]] = []

    def __init__(self) -> None:
        self.events.append("begun")

    def connection_lost(self, exc: Exception | None) -> None:
        self.events.append("failed" if exc else "ended")


async def test_a_handshake_times_out(
    accepting: Acceptor, connect: Callable[[], socket.socket]
) -> None:
    RecordingProtocol.events.clear()
    accepting.start(RecordingProtocol, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    client = connect()
    loop = asyncio.get_running_loop()
    await turns(9)
    assert RecordingProtocol.events == ["begun"]
    assert await asyncio.wait_for(loop.sock_recv(client, 10), 5) == b""
    await turns(2)
    assert RecordingProtocol.events == ["begun", "failed"]
