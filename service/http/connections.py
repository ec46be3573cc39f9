"""Connections, before there is a request: how many, how large a head, how slow."""

from __future__ import annotations

import re
import time
from asyncio import TimerHandle, Transport
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Literal

from fastapi import Response
from httptools import (
    HttpParserCallbackError,
    HttpParserError,
    HttpParserUpgrade,
    HttpRequestParser,
)
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.http.bodies import travelled
from service.http.errors import ApiError, Shape
from service.http.lingering import LINGER_BYTES, LINGER_SECONDS, LingeringTransport
from service.http.middleware import SECURITY_HEADERS, name_request
from service.http.state import no_room
from service.scheduling.load_shedding import Door

READ_BYTES = 2**18
"""About what one read of the event loop brings."""
_HOST = re.compile(rb"(\[[0-9A-Za-z:.%]+\]|[\w.~!$&'()*+,;=%-]*)(:[0-9]*)?", re.ASCII)
_OFFERS = (b"upgrade", b"http2-settings")
"""Headers, and options of `Connection`, that offer another protocol."""


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
    """Uvicorn's HTTP protocol with limits, and with one rule for the end of every request.

    The parser alone says where a request ends. After a request that is malformed or ambiguous, or
    that says `Connection: close`, no byte is parsed: earlier requests are answered, then the
    malformed one is, and the connection closes.

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
        # Uvicorn has the parser ignore what follows `Connection: close`; here it is an error, so
        # that the connection lingers.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=False)
        self._limits = limits
        self._guard = guard
        self._turned_away = False
        self._count = count
        self._stage: Literal["idle", "head", "body"] = "idle"
        self._timer: TimerHandle | None = None
        self._head_bytes = 0
        self._message_bytes = 0
        self._refusal: tuple[str, ApiError] | None = None
        self._begun: list[RequestResponseCycle] = []
        self._declined = b""
        """The head of a request that offers another protocol, without the offer."""
        self._keep_alive = True
        """Whether another request may follow the one that is read."""
        self._stopped = False
        """Whether what comes is discarded."""
        self._last_answer = b""
        """Written when all earlier requests are answered."""
        # A connection whose TLS handshake is in progress counts, too.
        self.connections.add(self)

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Take a connection, if there is room for it."""
        # Uvicorn writes an answer's head and its body one by one, each a packet of its own.
        self._stream = LingeringTransport(transport, self._sending, self._limits.seconds)
        super().connection_made(self._stream)  # type: ignore[arg-type]
        limit = self._limits.connections
        if len(self.connections) > limit:
            message = f"too many open connections (limit {limit}); retry in 1 s"
            refusal = ApiError(503, message, code="too_many_connections", retry_after=1)
            self._refuse("too_many", refusal)
            return
        self._wait(self._limits.seconds, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection, and tell every request of it: uvicorn tells only the last."""
        if self.transport is None:  # its TLS handshake failed
            self.connections.discard(self)
            return
        self._stop_waiting()
        super().connection_lost(exc)
        self._stream.forget()
        for cycle in self._begun:
            _disconnect(cycle)

    def shutdown(self) -> None:
        """Close when the request that is served has its answer."""
        self._keep_alive = False
        if self.transport is None:
            self.connections.discard(self)
        else:
            super().shutdown()

    def data_received(self, data: bytes) -> None:
        """Parse what came, as long as it is not too much of it."""
        if self._stream.lingering:
            self._stream.discard(len(data))
            return
        if self.transport.is_closing():
            return
        self._message_bytes += len(data)
        if self._stopped:
            if self._message_bytes > LINGER_BYTES:
                self.transport.abort()
            return
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._stopped or self.transport.is_closing():
            return
        if self._timer is None and self.timeout_keep_alive_task is None and self._answered:
            self._expect_more()
        most = self._limits.head_bytes if self._stage != "body" else self._limits.message_bytes
        if self._message_bytes > most + READ_BYTES:
            # What is being parsed and never ends: a header, a trailer, a chunk's extension.
            self._refuse("head_too_large", self._too_large())

    def on_message_begin(self) -> None:
        """Begin a request."""
        if self._stopped or not self._keep_alive:
            raise ValueError("the request before is the last one")
        super().on_message_begin()
        self._stage = "head"
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Take a part of the request's target."""
        self._grow(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header. A trailer counts towards the limit and is then discarded."""
        self._grow(len(name) + len(value) + len(b": \r\n"))
        if self._stage == "head":
            super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        """Start to serve the request; its body is awaited by whoever reads it."""
        size = self._body_size()
        if self.parser.should_upgrade():
            self._declined = self._without_offer()
            return
        now = time.monotonic()
        self.loop.call_soon(self._note_begun, now)
        old = self.parser.get_http_version() == "1.0"
        self._keep_alive = self._keep_alive and not old and self.parser.should_keep_alive()
        if old:
            self.expect_100_continue = False
        # An answer that comes before the body ends the connection, unless the rest is small.
        small = size is not None and size <= READ_BYTES and not self.expect_100_continue
        if self._answered and self._turn_away(now, self._keep_alive and small):
            self._stage = "body"
            return  # its body is read and discarded
        super().on_headers_complete()
        self._stage = "body"
        self._stop_waiting()
        self.cycle.keep_alive = self._keep_alive and small
        self._begun.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        """Take a part of the body, unless nobody wants it."""
        if not self._turned_away:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that the request is here."""
        if self._declined or self._stopped:
            return
        self._stop_waiting()
        self._stage = "idle"
        self._message_bytes = 0
        # A trailer may have said `Connection: close`.
        self._keep_alive = self._keep_alive and self.parser.should_keep_alive()
        if self._turned_away:
            self._turned_away = False
        else:
            self.cycle.keep_alive = self._keep_alive
            super().on_message_complete()
            if not self.cycle.response_complete:
                return
        # It was answered before it was here.
        if self._keep_alive:
            self.on_response_complete()
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        """Serve the next request, wait for the rest of this one, or close."""
        self._begun = [cycle for cycle in self._begun if not cycle.response_complete]
        super().on_response_complete()
        if self.transport.is_closing():
            self._stop_waiting()
        elif self._stopped:
            self._finish()
        elif self._stage != "idle" and self._answered:
            self._expect_more()

    @property
    def _answered(self) -> bool:
        """Whether no request of this connection is being served."""
        return self.cycle is None or self.cycle.response_complete

    def _sending(self) -> bool:
        """Whether the client may still be sending bytes that are discarded."""
        return self._stage == "body" or self._stopped

    def _parse(self, data: bytes | memoryview) -> None:
        try:
            while True:
                try:
                    self.parser.feed_data(data)
                    return
                except HttpParserUpgrade as offer:
                    # The parser ends a request at an offer of another protocol, before its body.
                    # It is parsed again without the offer.
                    data = memoryview(data)[offer.args[0] :]
                    head, self._declined = self._declined, b""
                    self.parser = HttpRequestParser(self)
                    self.parser.feed_data(head)
        except HttpParserError as error:
            if self._refusal is not None:
                self._refuse(*self._refusal)
            elif self._stopped or (not self._keep_alive and self._stage == "idle"):
                self._stopped = True  # this follows the last request
            else:
                unclear = isinstance(error, HttpParserCallbackError)
                self._refuse("malformed", _malformed("invalid target" if unclear else str(error)))

    def _body_size(self) -> int | None:
        """Return how many bytes the body has by its head; None: it comes in chunks.

        Raises:
            ValueError: readers of this head may disagree about where the request ends, or about
                whom it is for; the refusal is noted.
        """
        size: int | None = 0
        hosts = 0
        version = self.parser.get_http_version()
        for name, value in self.headers:
            if name == b"host":
                hosts += 1
                if not _HOST.fullmatch(value):
                    raise self._refused(_malformed("invalid Host header"))
            elif name == b"content-length":
                size = int(value)
            elif name == b"transfer-encoding":
                size = None
                if value.lower() != b"chunked" or version != "1.1":
                    message = "the only supported Transfer-Encoding is chunked, in HTTP/1.1"
                    raise self._refused(_malformed(message))
        if version not in ("1.0", "1.1"):
            raise self._refused(_malformed(f"HTTP/{version} is not supported"))
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            raise self._refused(_malformed(f"one Host header is required, there are {hosts}"))
        if self.parser.get_method() == b"CONNECT":
            raise self._refused(_malformed("CONNECT is not supported; this is not a proxy"))
        return size

    def _without_offer(self) -> bytes:
        """Return the head of this request without what offers another protocol."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(one for one in tokens if one.lower() not in _OFFERS)
            if name not in _OFFERS:
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"\r\n"])

    def _note_begun(self, came: float) -> None:
        now = time.monotonic()
        self._guard.door.begun(now - came, now)

    def _turn_away(self, now: float, keep_alive: bool) -> bool:
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
        if not keep_alive:
            lines.append(b"\r\nconnection: close")
        self._stream.write_now(b"".join([*lines, b"\r\n\r\n", body]))
        self._guard.count(self.url.decode())
        self._turned_away = True
        if not keep_alive:
            self._stopped = True
            self.transport.close()
        return True

    def _grow(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._limits.head_bytes:
            raise self._refused(self._too_large(), "head_too_large")

    def _refused(self, error: ApiError, reason: str = "malformed") -> ValueError:
        """Note the answer to a request that cannot be served; what is returned stops the parser."""
        self._refusal = reason, error
        return ValueError(error.message)

    def _too_large(self) -> ApiError:
        most = self._limits.head_bytes
        return ApiError(431, f"the head of the request is larger than {most} bytes")

    def _too_slow(self) -> None:
        self._timer = None
        seconds = self._limits.seconds
        self._refuse("slow", ApiError(408, f"no complete request head arrived in {seconds:g} s"))

    def _refuse(self, reason: str, error: ApiError) -> None:
        """Make an error the last answer, unless the request in question has one, and stop."""
        self._count(reason)
        self._stopped = True
        self._last_answer = _written(error)
        if self._stage == "body":
            if self._turned_away or self.cycle.response_started:
                self._last_answer = b""
            else:
                # The application learns of a disconnect and sends nothing.
                _disconnect(self.cycle)
                self._begun.remove(self.cycle)
                if self.pipeline:
                    self.pipeline.popleft()
        self._finish()

    def _finish(self) -> None:
        """Give the last answer and close, if all earlier requests have theirs."""
        self._stop_waiting()
        if self._begun:
            return
        if self._last_answer:
            self.transport.write(self._last_answer)
        self.transport.close()

    def _expect_more(self) -> None:
        """Limit the time for the rest of a head, or of a body that has its answer."""
        if self._stage == "body":
            self._wait(LINGER_SECONDS, self.transport.close)
        else:
            self._wait(self._limits.seconds, self._too_slow)

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(seconds, then)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _disconnect(cycle: RequestResponseCycle) -> None:
    """Tell the application that the client no longer waits."""
    cycle.disconnected = True
    cycle.message_event.set()


def _malformed(reason: str) -> ApiError:
    return ApiError(400, f"malformed HTTP request: {reason}", code="invalid_http")


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
