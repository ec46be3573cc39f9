"""Connections, before there is a request: how many, how large a head, how slow."""

from __future__ import annotations

import time
from asyncio import TimerHandle, Transport
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Literal

from fastapi import Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.api.bodies import travelled
from service.api.errors import ApiError, Shape
from service.api.middleware import SECURITY_HEADERS, name_request
from service.api.state import no_room
from service.one_write import OneWrite
from service.scheduling.door import Door

LINGER_SECONDS = 2.0
"""How long what a client still sends, or has not read, may keep its connection after its answer."""
READ_BYTES = 2**18
"""About what one read of the event loop brings."""


@dataclass(frozen=True)
class ConnectionLimits:
    """What a connection may take.

    Attributes:
        connections: open at once.
        head_bytes: of a request's line and headers.
        message_bytes: of a whole request, as it travels.
        seconds: until the head of a request is there.
    """

    connections: int
    head_bytes: int
    message_bytes: int
    seconds: float


@dataclass(frozen=True)
class Guard:
    """What stands at the door.

    Attributes:
        door: says who is turned away unread.
        shapes: how a refusal is written, by the paths of the routes that have a door.
        count: told the path of every request that was turned away.
    """

    door: Door
    shapes: Mapping[bytes, Shape]
    count: Callable[[str], None]


class GuardedProtocol(HttpToolsProtocol):
    """Uvicorn's, with limits on what a client can hold without ever asking anything.

    Args:
        limits: the limits.
        guard: turns away what would be refused after being read.
        count: told why a connection was ended.
        arguments: as uvicorn gives them.
    """

    def __init__(
        self,
        *,
        limits: ConnectionLimits,
        guard: Guard,
        count: Callable[[str], None],
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self._limits = limits
        self._guard = guard
        self._turned_away = False
        self._count = count
        self._stage: Literal["idle", "head", "body"] = "idle"
        self._timer: TimerHandle | None = None
        self._head_bytes = 0
        self._message_bytes = 0
        self._refusal: ApiError | None = None
        self._begun: list[RequestResponseCycle] = []

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Take a connection, if there is room for it."""
        # Uvicorn writes an answer's head and its body one by one, each a packet of its own.
        self._stream = OneWrite(transport)
        super().connection_made(self._stream)  # type: ignore[arg-type]
        if len(self.connections) > self._limits.connections:
            message = "the server has all the connections that it can; try again in 1 s"
            refusal = ApiError(503, message, code="too_many_connections", retry_after=1)
            self._refuse("too_many", refusal)
            return
        self._wait(self._limits.seconds, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection, and tell every request of it: uvicorn tells only the last."""
        self._stop_waiting()
        super().connection_lost(exc)
        for cycle in self._begun:
            cycle.disconnected = True
            cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Parse what came, as long as it is not too much of it."""
        if self.transport.is_closing():
            return
        self._message_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._timer is None and self.timeout_keep_alive_task is None and self._answered:
            # A head has begun, or the body of who was turned away.
            then = self._end if self._turned_away else self._too_slow
            self._wait(self._limits.seconds, then)
        most = self._limits.head_bytes if self._stage != "body" else self._limits.message_bytes
        if self._message_bytes > most + READ_BYTES:
            # What is being parsed and never ends: a header, a trailer, a chunk's extension.
            self._refuse("head_too_large", self._too_large())

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._stage = "head"
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Take a part of the request's target."""
        self._grow(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer."""
        self._grow(len(name) + len(value) + len(b": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start to serve the request; its body is awaited by whoever reads it."""
        self._stage = "body"
        now = time.monotonic()
        self.loop.call_soon(self._note_begun, now)
        if self._answered and self._turn_away(now):
            return  # its body passes by, in the time that its head would have had
        self._stop_waiting()
        super().on_headers_complete()
        if self.cycle is not None and self.cycle not in self._begun:
            self._begun.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        """Take a part of the body, unless nobody wants it."""
        if not self._turned_away:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that the request is here."""
        self._stop_waiting()
        self._stage = "idle"
        self._message_bytes = 0
        if not self._turned_away:
            super().on_message_complete()
        elif self.parser.should_keep_alive():
            self._turned_away = False
            self.on_response_complete()
        else:
            self._end()

    def on_response_complete(self) -> None:
        """Let a client that still sends do so for a moment, so that it comes to read its answer."""
        self._begun = [cycle for cycle in self._begun if not cycle.response_complete]
        super().on_response_complete()
        if self.transport.is_closing():
            self._end()
        elif self._stage == "body" and self._answered:
            self._wait(LINGER_SECONDS, self._end)
        elif self._stage == "head":
            self._wait(self._limits.seconds, self._too_slow)

    def timeout_keep_alive_handler(self) -> None:
        """End a connection that has been idle for long."""
        self._end()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """Answer what is no request."""
        if self._refusal is not None:
            self._refuse("head_too_large", self._refusal)
        elif not self.transport.is_closing():
            self._refuse("malformed", ApiError(400, "this is no HTTP request", code="invalid_http"))

    @property
    def _answered(self) -> bool:
        """Whether no request of this connection is being served."""
        return self.cycle is None or self.cycle.response_complete

    def _note_begun(self, came: float) -> None:
        now = time.monotonic()
        self._guard.door.begun(now - came, now)

    def _turn_away(self, now: float) -> bool:
        """Answer a request whose body need not be read; False: it is to be served."""
        door, shape = self._guard.door, self._guard.shapes.get(self.url)
        size = None if shape is None else travelled(self.headers)
        if shape is None or size is None or not door.closed_to(size, now):
            return False
        headers = dict(self.headers)
        # A browser's page could not read an answer without what the application adds for it.
        if b"origin" in headers or self.parser.get_method() != b"POST":
            return False
        head, body = _refusal(shape, door.until_open(size, now))
        lines = [head, b"x-request-id: ", name_request(headers.get(b"x-request-id", b"")).encode()]
        if not self.parser.should_keep_alive():
            lines.append(b"\r\nconnection: close")
        self._stream.write_now(b"".join([*lines, b"\r\n\r\n", body]))
        self._turned_away = True
        self._guard.count(self.url.decode())
        return True

    def _grow(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._limits.head_bytes:
            self._refusal = self._too_large()
            raise ValueError("too large")  # the parser stops, and has a 400 sent

    def _too_large(self) -> ApiError:
        most = self._limits.head_bytes
        return ApiError(431, f"the head of the request is larger than {most} bytes")

    def _too_slow(self) -> None:
        self._timer = None
        seconds = self._limits.seconds
        self._refuse("slow", ApiError(408, f"no request came in {seconds:g} s"))

    def _refuse(self, reason: str, error: ApiError) -> None:
        """Say why, unless another answer is on its way, and end the connection."""
        self._count(reason)
        if self._turned_away:
            pass  # it has its answer
        elif self._answered:
            self.transport.write(_written(error))
        elif not self.pipeline and not self.cycle.response_started:
            self.cycle.disconnected = True  # whoever reads the body is told, and says nothing
            self.transport.write(_written(error))
        self._end()

    def _end(self) -> None:
        """Close, and if the client does not read what is left, break off."""
        self._stop_waiting()
        self.transport.close()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(seconds, then)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _written(error: ApiError) -> bytes:
    """Write an answer for which there is no request."""
    head, body = _parts(error.response({}))
    own = [b"x-request-id: ", name_request(b"").encode(), b"\r\nconnection: close\r\n\r\n"]
    return b"".join([head, *own, body])


@lru_cache(maxsize=256)
def _refusal(shape: Shape, seconds: int) -> tuple[bytes, bytes]:
    """Return the answer to a request for which there is no room, but for its id."""
    return _parts(no_room(seconds).shaped(shape))


def _parts(response: Response) -> tuple[bytes, bytes]:
    """Return what begins an answer's head, lines ended, and its body."""
    status = HTTPStatus(response.status_code)
    lines = [f"HTTP/1.1 {status.value} {status.phrase}".encode()]
    lines += [name + b": " + value for name, value in (*response.raw_headers, *SECURITY_HEADERS)]
    return b"\r\n".join([*lines, b""]), bytes(response.body)
