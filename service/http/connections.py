"""HTTP connections: limits of their number, of the size of requests, and of their duration."""

from __future__ import annotations

import re
import time
from asyncio import TimerHandle, Transport
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.http.admission import Admission, queue_full
from service.http.bodies import travelled
from service.http.dialects import Dialects
from service.http.errors import ApiError, ErrorSchema, error_response
from service.http.lingering import LINGER_BYTES, LINGER_SECONDS, LingeringTransport
from service.http.middleware import SECURITY_HEADERS, name_request
from service.http.private import UvicornProtocol, disconnect

READ_BYTES = 2**18
"""Approximate maximum number of bytes of one read of the event loop."""
_HOST = re.compile(rb"(\[[0-9A-Za-z:.%]+\]|[\w.~!$&'()*+,;=%-]*)(:[0-9]*)?", re.ASCII)
_OFFERS = (b"upgrade", b"http2-settings")
"""Headers, and options of `Connection`, that request another protocol (Upgrade)."""


@dataclass(frozen=True)
class ConnectionLimits:
    """The limits of one connection.

    Attributes:
        head_bytes: maximum size of the request line and headers.
        message_bytes: maximum size of a whole request, as sent.
        seconds: time limit for the head of a request.
        uploads: other values of `message_bytes`, by path.
    """

    head_bytes: int
    message_bytes: int
    seconds: float
    uploads: Mapping[bytes, int] = field(default_factory=dict)

    def most_bytes(self, target: bytes) -> int:
        """Return the maximum size of a request to this target."""
        return self.uploads.get(target.partition(b"?")[0], self.message_bytes)


class GuardedProtocol(UvicornProtocol):
    """Uvicorn's HTTP protocol with limits, and with one rule for the end of every request.

    Only the parser decides where a request ends. After a malformed or ambiguous request, or one
    with `Connection: close`, nothing more is parsed: earlier requests are answered, then the
    malformed one, and the connection closes.

    Args:
        limits: limits of the connection.
        admission: admission of the frontend.
        dialects: error responses for requests that do not reach the application.
        refusable: routes, by target, whose requests may be refused before the body is read.
        arguments: arguments of uvicorn's protocol.
    """

    def __init__(
        self,
        *,
        limits: ConnectionLimits,
        admission: Admission,
        dialects: Dialects,
        refusable: Mapping[bytes, str],
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        # Uvicorn's parser ignores data after `Connection: close`. Here it is an error, so that the
        # connection lingers.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=False)
        self._limits = limits
        self._admission = admission
        self._dialects = dialects
        self._refusable = refusable
        self._unread = False
        """Whether the current request was refused, so that its body is discarded."""
        self._stage: Literal["idle", "head", "body"] = "idle"
        self._timer: TimerHandle | None = None
        self._head_bytes = 0
        self._message_bytes = 0
        self._most_bytes = limits.message_bytes
        self._refusal: tuple[str, ApiError] | None = None
        self._begun: list[RequestResponseCycle] = []
        self._declined = b""
        """The head of a request for another protocol (Upgrade), without that part."""
        self._keep_alive = True
        """Whether another request may follow the current one."""
        self._stopped = False
        """Whether received data is discarded."""
        self._last_answer = b""
        """The response to write after those to all earlier requests."""
        # Connections count towards the limit from the start of the TLS handshake.
        self.connections.add(self)

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Accept a connection, or refuse it above the limit."""
        # Uvicorn writes the head and the body of a response separately, as two packets.
        self._stream = LingeringTransport(transport, self._sending, self._limits.seconds)
        super().connection_made(self._stream)  # type: ignore[arg-type]
        try:
            self._admission.connection(len(self.connections))
        except ApiError as refusal:
            self._refuse("too_many", refusal)
            return
        self._wait(self._limits.seconds, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection, and disconnect all its requests; uvicorn disconnects the last."""
        if self.transport is None:  # its TLS handshake failed
            self.connections.discard(self)
            return
        self._stop_waiting()
        super().connection_lost(exc)
        self._stream.forget()
        for cycle in self._begun:
            disconnect(cycle)

    def shutdown(self) -> None:
        """Close the connection after the response to the current request."""
        self._keep_alive = False
        if self.transport is None:
            self.connections.discard(self)
        else:
            super().shutdown()

    def data_received(self, data: bytes) -> None:
        """Parse received data within the limits."""
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
        self.stop_keep_alive_timer()
        self._parse(data)
        if self._stopped or self.transport.is_closing():
            return
        if self._timer is None and not self.expects_request and self.answered:
            self._expect_more()
        most = self._most_bytes if self._stage == "body" else self._limits.head_bytes
        if self._message_bytes > most + READ_BYTES:
            # An endless header, trailer or chunk extension.
            self._refuse("head_too_large", self._too_large())

    def on_message_begin(self) -> None:
        """Begin a request."""
        if self._stopped or not self._keep_alive:
            raise ValueError("the request before is the last one")
        super().on_message_begin()
        self._stage = "head"
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Add a part of the request's target."""
        self._grow(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header. A trailer counts towards the limit and is discarded."""
        self._grow(len(name) + len(value) + len(b": \r\n"))
        if self._stage == "head":
            super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        """Start to serve the request, before its body is received."""
        size = self._body_size()
        self._most_bytes = self._limits.most_bytes(self.url)
        if self.parser.should_upgrade():
            self._declined = self._without_offer()
            return
        now = time.monotonic()
        self.loop.call_soon(self._note_begun, now)
        old = self.parser.get_http_version() == "1.0"
        self._keep_alive = self._keep_alive and not old and self.parser.should_keep_alive()
        if old:
            self.expect_100_continue = False
        # A response before the end of the body ends the connection, unless the body is small.
        small = size is not None and size <= READ_BYTES and not self.expect_100_continue
        if self.answered and self._refuse_unread(now, self._keep_alive and small):
            self._stage = "body"
            return  # its body is read and discarded
        super().on_headers_complete()
        self._stage = "body"
        self._stop_waiting()
        self.keep_alive_after_answer(self._keep_alive and small)
        self._begun.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        """Add a part of the body, unless the request was refused."""
        if not self._unread:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Complete the request, and close the connection or serve the next request."""
        if self._declined or self._stopped:
            return
        self._stop_waiting()
        self._stage = "idle"
        self._message_bytes = 0
        # A trailer may have contained `Connection: close`.
        self._keep_alive = self._keep_alive and self.parser.should_keep_alive()
        if self._unread:
            self._unread = False
        else:
            self.keep_alive_after_answer(self._keep_alive)
            super().on_message_complete()
            if not self.answered:
                return
        # The response was sent before the request was complete.
        if self._keep_alive:
            self.on_response_complete()
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        """Serve the next request, wait for the rest of the current one, or close."""
        self._begun = [cycle for cycle in self._begun if not cycle.response_complete]
        super().on_response_complete()
        if self.transport.is_closing():
            self._stop_waiting()
        elif self._stopped:
            self._finish()
        elif self._stage != "idle" and self.answered:
            self._expect_more()

    def _sending(self) -> bool:
        """Whether the client may still be sending bytes that are discarded."""
        return self._stage == "body" or self._stopped

    def _parse(self, data: bytes | memoryview) -> None:
        try:
            while True:
                try:
                    self.parser.feed_data(data)
                    return
                except HttpParserUpgrade as upgrade:
                    # The parser ends a request with Upgrade before its body. Parse it again
                    # without that header.
                    data = memoryview(data)[upgrade.args[0] :]
                    head, self._declined = self._declined, b""
                    self.parser = HttpRequestParser(self)
                    self.parser.feed_data(head)
        except HttpParserError as error:
            if self._refusal is not None:
                self._refuse(*self._refusal)
            elif self._stopped or (not self._keep_alive and self._stage == "idle"):
                self._stopped = True  # the data follows the last request
            else:
                in_callback = isinstance(error, HttpParserCallbackError)
                reason = "invalid target" if in_callback else str(error)
                self._refuse("malformed", _malformed(reason))

    def _body_size(self) -> int | None:
        """Return the size of the body by the headers; None: it is chunked.

        Raises:
            ValueError: the head is ambiguous, so a proxy may disagree about the end of the request
                or its host; `_refusal` has the error.
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
        """Return the head of this request without the headers of `_OFFERS`."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(one for one in tokens if one.lower() not in _OFFERS)
            if name not in _OFFERS:
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"\r\n"])

    def _note_begun(self, received: float) -> None:
        now = time.monotonic()
        self._admission.shedding.note_delay(now - received, now)

    def _refuse_unread(self, now: float, keep_alive: bool) -> bool:
        """Refuse a request under overload, before its body is read; False: it is served."""
        route = self._refusable.get(self.url)
        size = None if route is None else travelled(self.headers)
        if route is None or size is None:
            return False
        seconds = self._admission.seconds_until_read(size, now)
        if seconds is None:
            return False
        headers, method = dict(self.headers), self.parser.get_method()
        # A web page cannot read a response without the CORS headers that the application adds.
        if b"origin" in headers or method != b"POST":
            return False
        head, body = _refusal(self._dialects.schema("POST", route), seconds)
        lines = [head, b"x-request-id: ", name_request(headers.get(b"x-request-id", b"")).encode()]
        if not keep_alive:
            lines.append(b"\r\nconnection: close")
        self._stream.write_now(b"".join([*lines, b"\r\n\r\n", body]))
        self._admission.refused_unread(route)
        self._unread = True
        if not keep_alive:
            self._stopped = True
            self.transport.close()
        return True

    def _grow(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._limits.head_bytes:
            raise self._refused(self._too_large(), "head_too_large")

    def _refused(self, error: ApiError, reason: str = "malformed") -> ValueError:
        """Store the error of the current request; return the exception that stops the parser."""
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
        """Stop parsing, with an error as the last response unless the request already has one."""
        self._admission.connection_broken(reason)
        self._stopped = True
        # Between requests, `url` is still that of the last one.
        target = b"" if self._stage == "idle" else self.url
        method = self.parser.get_method().decode() if target else ""
        path = target.partition(b"?")[0].decode("latin-1")
        self._last_answer = _last_answer(self._dialects.response(method, path, error))
        if self._stage == "body":
            if self._unread or self.cycle.response_started:
                self._last_answer = b""
            else:
                self._begun.remove(self.drop_last_request())
        self._finish()

    def _finish(self) -> None:
        """Write the last response and close, after the responses to all earlier requests."""
        self._stop_waiting()
        if self._begun:
            return
        if self._last_answer:
            self.transport.write(self._last_answer)
        self.transport.close()

    def _expect_more(self) -> None:
        """Limit the time for the rest of a head, or of a body whose response was sent."""
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


def _malformed(reason: str) -> ApiError:
    return ApiError(400, f"malformed HTTP request: {reason}", code="invalid_http")


def _last_answer(response: Response) -> bytes:
    """Encode a response that ends the connection."""
    head, body = _parts(response)
    rest = [b"x-request-id: ", name_request(b"").encode(), b"\r\nconnection: close\r\n\r\n"]
    return b"".join([head, *rest, body])


@lru_cache(maxsize=256)
def _refusal(schema: type[ErrorSchema], seconds: int) -> tuple[bytes, bytes]:
    """Return the encoded `queue_full` response, without the id of the request."""
    return _parts(error_response(queue_full(seconds), schema))


def _parts(response: Response) -> tuple[bytes, bytes]:
    """Return the encoded head of a response, without the empty line at its end, and the body."""
    status = HTTPStatus(response.status_code)
    lines = [f"HTTP/1.1 {status.value} {status.phrase}".encode()]
    lines += [name + b": " + value for name, value in (*response.raw_headers, *SECURITY_HEADERS)]
    return b"\r\n".join([*lines, b""]), bytes(response.body)
