"""What FastAPI and uvicorn do not document, each part against what it is to do."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from uvicorn.server import ServerState

from service.http.private import (
    UvicornProtocol,
    api_routes,
    calls_of,
    disconnect,
    new_protocol,
    open_connections,
)
from service.process import bind
from tests.support.connected import Wire

GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /b?c HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n"


class TestRoutes:
    """Of FastAPI."""

    async def test_they_have_what_routers_add(self) -> None:
        async def first(_: Request) -> None: ...
        async def second(_: Request) -> None: ...
        async def endpoint(_: Request) -> Response:
            return Response()

        app, router = FastAPI(openapi_url=None), APIRouter(prefix="/b")
        router.post("/{c}", dependencies=[Depends(second)], responses={400: {}})(endpoint)
        app.include_router(router, prefix="/a", dependencies=[Depends(first)])
        (route,) = api_routes(app)
        assert (route.path, route.methods) == ("/a/b/{c}", {"POST"})
        assert route.path_regex.match("/a/b/x")
        assert not route.path_regex.match("/b/x")
        assert route.responses == {400: {}}
        assert route.max_body_size is None
        assert route.endpoint is endpoint
        assert calls_of(route) == [first, second, endpoint]


class TestServer:
    """Of uvicorn, on a socket of ours, as `frontend.py` runs it."""

    async def test_its_hooks_are_called_and_its_connections_are_ours(self) -> None:
        told: list[Any] = []

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                loop = asyncio.get_running_loop()
                made = await loop.create_server(lambda: new_protocol(self), sock=listener)
                told.append(("started", made))

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                told.append("ends")
                await super().shutdown(sockets)

            def handle_exit(self, sig: int, _: Any) -> None:
                told.append(sig)
                self.should_exit = True  # uvicorn would end this process by the signal

        async def application(scope: Any, _: Any, send: Any) -> None:
            assert scope["state"] == {}
            told.append(open_connections(server))
            headers = [(b"content-length", b"0")]
            await send({"type": "http.response.start", "status": 204, "headers": headers})
            await send({"type": "http.response.body"})

        with bind("127.0.0.1", 0) as listener:
            config = uvicorn.Config(application, lifespan="off", log_config=None, ws="none")
            server = Server(config)
            running = asyncio.create_task(server.serve([]))
            while not told:
                await asyncio.sleep(0)
            port = listener.getsockname()[1]
            async with httpx.AsyncClient() as client:
                answer = await client.get(f"http://127.0.0.1:{port}/")
            assert (answer.status_code, told[1:]) == (204, [1])
            os.kill(os.getpid(), signal.SIGTERM)
            await running
            assert told[2:] == [signal.SIGTERM, "ends"]
            told[0][1].close()

    async def test_signals_can_be_left_to_another(self) -> None:
        class Server(uvicorn.Server):
            @contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                assert signal.getsignal(signal.SIGTERM) == before
                self.should_exit = True

        before = signal.getsignal(signal.SIGTERM)
        config = uvicorn.Config(lambda: None, lifespan="off", log_config=None)
        server = Server(config)
        await server.serve([])
        assert server.started


class Held(UvicornProtocol):
    """A protocol whose requests are answered when a test says so."""

    def __init__(self, wire: Wire) -> None:
        self.release = asyncio.Event()
        self.received: list[str] = []
        self.completed = 0
        config = uvicorn.Config(self._serve, interface="asgi3", log_config=None, ws="none")
        super().__init__(config, ServerState(), {}, asyncio.get_running_loop())
        self.connection_made(wire)

    async def _serve(self, _: Any, receive: Any, send: Any) -> None:
        await self.release.wait()
        self.received.append((await receive())["type"])
        headers = [(b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body"})

    def on_response_complete(self) -> None:
        self.completed += 1
        super().on_response_complete()

    async def answer(self) -> None:
        self.release.set()
        for _ in range(9):
            await asyncio.sleep(0)


@pytest.fixture
async def wire() -> Wire:
    return Wire()


@pytest.fixture
async def held(wire: Wire) -> Held:
    return Held(wire)


class TestProtocol:
    """Of uvicorn, for one connection."""

    async def test_what_it_tells_of_a_request(self, held: Held, wire: Wire) -> None:
        assert held.transport is wire
        assert held.loop is asyncio.get_running_loop()
        assert held in held.connections
        held.data_received(POST)
        assert held.url == b"/b?c"
        assert (b"host", b"x") in held.headers
        assert held.parser.get_method() == b"POST"
        assert held.parser.get_http_version() == "1.1"
        assert held.parser.should_keep_alive()
        assert not held.parser.should_upgrade()
        assert held.expect_100_continue

    async def test_whether_it_is_answered(self, held: Held, wire: Wire) -> None:
        assert held.answered
        held.data_received(GET)
        assert not held.answered
        assert not held.cycle.response_started
        await held.answer()
        assert held.answered
        assert held.cycle.response_started
        assert held.completed == 1
        assert wire.sent.startswith(b"HTTP/1.1 200")
        assert not wire.closed

    async def test_the_timer_of_an_idle_connection(self, held: Held) -> None:
        held.stop_keep_alive_timer()
        held.data_received(GET)
        assert not held.expects_request
        await held.answer()
        assert held.expects_request
        timer = held.timeout_keep_alive_task
        assert timer is not None
        held.stop_keep_alive_timer()
        assert timer.cancelled()
        assert not held.expects_request

    async def test_the_connection_can_end_with_the_answer(self, held: Held, wire: Wire) -> None:
        held.data_received(GET)
        held.keep_alive_after_answer(False)
        await held.answer()
        assert b"connection: close" in wire.sent
        assert wire.closed

    async def test_shutdown_waits_for_the_answer(self, held: Held, wire: Wire) -> None:
        held.data_received(GET)
        held.shutdown()
        assert not wire.closed
        await held.answer()
        assert wire.closed

    async def test_a_request_can_be_disconnected(self, held: Held, wire: Wire) -> None:
        held.data_received(POST)
        disconnect(held.cycle)
        await held.answer()
        assert held.received == ["http.disconnect"]
        assert b"HTTP/1.1 200" not in wire.sent

    async def test_the_last_of_several_can_be_dropped(self, held: Held, wire: Wire) -> None:
        held.data_received(GET + POST)
        assert len(held.pipeline) == 1
        assert held.drop_last_request() is held.cycle
        assert not held.pipeline
        await held.answer()
        assert wire.sent.count(b"HTTP/1.1 200") == 1
        assert held.received == ["http.request"]

    async def test_data_after_the_last_request_is_an_error(self, held: Held) -> None:
        """The parser's, which uvicorn tells to be lenient."""
        last = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        held.parser.feed_data(last)
        held.parser.set_dangerous_leniencies(lenient_data_after_close=False)
        with pytest.raises(Exception, match="after .*close"):
            held.parser.feed_data(GET)
