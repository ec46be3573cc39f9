"""Compression of responses for clients that accept it."""

from __future__ import annotations

import asyncio
import zlib
from concurrent.futures import Executor
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.accept import prefers_gzip
from service.http.middleware import PROBES

LEVEL = 1
"""Compression level of zlib: level 6 takes three times as long to save a fifth more."""
MAX_LOOP_BYTES = 64 * 2**10
"""Maximum size that is compressed on the event loop, which takes a quarter of a millisecond."""
GZIP_FORMAT = 31
"""Window bits for which zlib writes the gzip format."""


@dataclass(frozen=True)
class Compress:
    """Compress responses with gzip if the client prefers it.

    Streams, probes, files with ranges and responses with a Content-Encoding are not changed.

    Attributes:
        app: application.
        min_bytes: minimum size of a body to compress.
        threads: executor for bodies above `MAX_LOOP_BYTES`.
    """

    app: ASGIApp
    min_bytes: int
    threads: Executor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"].startswith(PROBES):
            await self.app(scope, receive, send)
            return
        start: Message | None = None

        async def send_encoded(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message  # sent when the size of the body is known
                return
            if start is not None:
                message = await self._encode(scope, start, message)
                await send(start)
                start = None
            await send(message)

        await self.app(scope, receive, send_encoded)

    async def _encode(self, scope: Scope, start: Message, message: Message) -> Message:
        """Return the body message to send, and update the headers in `start`."""
        headers = MutableHeaders(raw=start["headers"])
        body = message.get("body", b"")
        fixed = "content-encoding" in headers or "accept-ranges" in headers
        whole = not message.get("more_body") and not fixed
        large = whole and len(body) >= self.min_bytes
        if large or start["status"] == 304:
            headers.add_vary_header("Accept-Encoding")
        if not large:
            return message
        if not prefers_gzip(",".join(Headers(scope=scope).getlist("accept-encoding"))):
            return message
        if len(body) <= MAX_LOOP_BYTES:
            compressed = _gzip(body)
        else:
            loop = asyncio.get_running_loop()
            compressed = await loop.run_in_executor(self.threads, _gzip, body)
        headers["Content-Encoding"] = "gzip"
        headers["Content-Length"] = str(len(compressed))
        return {**message, "body": compressed}


def _gzip(body: bytes) -> bytes:
    return zlib.compress(body, LEVEL, GZIP_FORMAT)
