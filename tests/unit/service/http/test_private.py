"""Undocumented features of FastAPI and uvicorn behave as the server expects."""

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


class TestFastApiRoutes:
    async def test_routes_have_the_prefixes_and_dependencies_of_their_routers(self) -> None:
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


class TestUvicornServer:
    """uvicorn's server, on a socket that is already bound, like in `frontend.py`."""

    async def test_hooks_are_called_and_connections_are_counted(self) -> None:
        events: list[Any] = []

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                loop = asyncio.get_running_loop()
                made = await loop.create_server(lambda: new_protocol(self), sock=listener)
                events.append(("started", made))

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                events.append("ends")
                await super().shutdown(sockets)

            def handle_exit(self, sig: int, _: Any) -> None:
                events.append(sig)
                self.should_exit = True  # uvicorn's own handler would end this process

        async def application(scope: Any, _: Any, send: Any) -> None:
            assert scope["state"] == {}
            events.append(open_connections(server))
            headers = [(b"content-length", b"0")]
            await send({"type": "http.response.start", "status": 204, "headers": headers})
            await send({"type": "http.response.body"})

        with bind("127.0.0.1", 0) as listener:
            config = uvicorn.Config(application, lifespan="off", log_config=None, ws="none")
            server = Server(config)
            running = asyncio.create_task(server.serve([]))
            while not events:
                await asyncio.sleep(0)
            port = listener.getsockname()[1]
            async with httpx.AsyncClient() as client:
                answer = await client.get(f"http://127.0.0.1:{port}/")
            assert (answer.status_code, events[1:]) == (204, [1])
            os.kill(os.getpid(), signal.SIGTERM)
            await running
            assert events[2:] == [signal.SIGTERM, "ends"]
            events[0][1].close()

    async def test_signal_handlers_can_be_left_unchanged(self) -> None:
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
    """A protocol that holds its requests until a test releases them."""

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


class TestUvicornProtocol:
    async def test_the_parsed_request_can_be_read(self, held: Held, wire: Wire) -> None:
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

    async def test_answered_is_false_while_a_request_runs(self, held: Held, wire: Wire) -> None:
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

    async def test_the_keep_alive_timer_runs_while_idle(self, held: Held) -> None:
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

    async def test_the_connection_can_be_closed_after_the_answer(
        self, held: Held, wire: Wire
    ) -> None:
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

    async def test_the_last_pipelined_request_can_be_dropped(self, held: Held, wire: Wire) -> None:
        held.data_received(GET + POST)
        assert len(held.pipeline) == 1
        assert held.drop_last_request() is held.cycle
        assert not held.pipeline
        await held.answer()
        assert wire.sent.count(b"HTTP/1.1 200") == 1
        assert held.received == ["http.request"]

    async def test_the_parser_can_refuse_data_after_the_last_request(self, held: Held) -> None:
        """uvicorn makes the parser lenient by default."""
        last = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        held.parser.feed_data(last)
        held.parser.set_dangerous_leniencies(lenient_data_after_close=False)
        with pytest.raises(Exception, match="after .*close"):
            held.parser.feed_data(GET)
