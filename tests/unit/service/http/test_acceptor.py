"""Connections are taken several a turn, never by waiting, and more after a long turn."""

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
    """Sends back what comes."""

    open: ClassVar[list[asyncio.Transport]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.open.append(transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


class Listener(socket.socket):
    """A listening socket that counts what is taken of it, and has no room for some."""

    taken = 0
    full = 0

    def accept(self) -> tuple[socket.socket, Any]:
        if self.full:
            self.full -= 1
            raise OSError(errno.EMFILE, "too many open files")
        taken = super().accept()
        self.taken += 1
        return taken


@pytest.fixture
def listener() -> Iterator[Listener]:
    with bind("127.0.0.1", 0) as bound:
        yield Listener(fileno=os.dup(bound.fileno()))


@pytest_asyncio.fixture(autouse=True)
async def _let_go() -> AsyncIterator[None]:
    yield
    while Echo.open:
        Echo.open.pop().abort()
    await turns(2)


@pytest_asyncio.fixture
async def accepting(listener: Listener) -> AsyncIterator[Acceptor]:
    one = Acceptor(listener, handshake_seconds=0.2)
    yield one
    one.close()


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


async def test_no_frontend_ever_waits_at_the_socket_that_all_share() -> None:
    with bind("127.0.0.1", 0) as shared:
        assert not os.get_blocking(shared.fileno())
        os.set_blocking(shared.fileno(), True)
        one = Acceptor(socket.socket(fileno=os.dup(shared.fileno())), 1.0)
        assert not os.get_blocking(shared.fileno())
        one.start(Echo)
        one.close()


async def test_some_are_left_to_other_frontends_in_each_turn(
    accepting: Acceptor,
    listener: Listener,
    connect: Callable[[], socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(acceptor, "ACCEPT_SECONDS", 60.0)
    clients = [connect() for _ in range(3 * ACCEPTS)]
    accepting.start(Echo)
    seen = set()
    while listener.taken < len(clients):
        await asyncio.sleep(0)
        seen.add(listener.taken)
    assert {ACCEPTS, 2 * ACCEPTS} <= seen
    assert await echoed(clients[-1]) == b"word"


async def test_after_a_long_turn_all_who_were_left_are_taken(
    accepting: Acceptor, listener: Listener, connect: Callable[[], socket.socket]
) -> None:
    clients = [connect() for _ in range(8 * ACCEPTS)]
    accepting.start(Echo)
    while not listener.taken:
        await asyncio.sleep(0)
    assert listener.taken == ACCEPTS
    time.sleep(8 * ACCEPTS * acceptor.ACCEPT_SECONDS)  # noqa: ASYNC251  # the turn is long
    await turns(2)
    assert listener.taken == len(clients)


async def test_without_room_for_connections_none_is_taken_for_a_moment(
    accepting: Acceptor,
    listener: Listener,
    connect: Callable[[], socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(acceptor, "PAUSE_SECONDS", 0.05)
    listener.full = 1
    client = connect()
    accepting.start(Echo)
    await turns(20)
    assert (listener.full, listener.taken) == (0, 0)
    assert await echoed(client) == b"word"


async def test_when_it_is_closed_who_was_taken_stays(
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
async def test_who_speaks_no_tls_is_let_go(
    sent: bytes, accepting: Acceptor, connect: Callable[[], socket.socket]
) -> None:
    accepting.start(Echo, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    client = connect()
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, sent)
    left = b"more"
    while left:
        left = await asyncio.wait_for(loop.sock_recv(client, 100), 5)


async def test_without_room_who_comes_is_closed_at_once(
    accepting: Acceptor, connect: Callable[[], socket.socket]
) -> None:
    room = [True, False]
    accepting.start(Echo, full=lambda: not room.pop(0))
    first, second = connect(), connect()
    assert await echoed(first) == b"word"
    loop = asyncio.get_running_loop()
    assert await asyncio.wait_for(loop.sock_recv(second, 10), 5) == b""


class Waiting(Echo):
    """Tells when its handshake begins, and when it fails."""

    told: ClassVar[list[str]] = []

    def __init__(self) -> None:
        self.told.append("begun")

    def connection_lost(self, exc: Exception | None) -> None:
        self.told.append("failed" if exc else "ended")


async def test_a_handshake_that_takes_too_long_is_told(
    accepting: Acceptor, connect: Callable[[], socket.socket]
) -> None:
    Waiting.told.clear()
    accepting.start(Waiting, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    client = connect()
    loop = asyncio.get_running_loop()
    await turns(9)
    assert Waiting.told == ["begun"]
    assert await asyncio.wait_for(loop.sock_recv(client, 10), 5) == b""
    await turns(2)
    assert Waiting.told == ["begun", "failed"]
