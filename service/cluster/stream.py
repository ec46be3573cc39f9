"""Byte streams over calls of a Ray deployment, which replace local sockets between hosts.

A client opens a stream with a call of `attach`, whose response is a stream of chunks to the client.
Bytes from the client are arguments of calls of `feed`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import uuid4

from service.ipc.connection import Streams

GATHER_SECONDS = 0.5
"""Shortest interval between two calls of `feed`; a call sends all bytes written since the last."""
CALL_SECONDS = 10.0
"""Time after which a call counts as failed."""
MAX_CHUNKS = 64
"""Most chunks of a stream that wait for Ray to send them."""
SILENCE_SECONDS = 15.0
"""Time without a message after which a client counts as dead; a dead host closes nothing."""


class _CallTransport(asyncio.Transport):
    """The writing half of a stream.

    Args:
        send: sends bytes to the peer; it is called once at a time, so that bytes stay in order.
        gather: seconds between two calls.
        ended: called once, when this side is closed or the peer is lost.
    """

    def __init__(
        self,
        send: Callable[[bytes], Awaitable[object]],
        gather: float,
        ended: Callable[[], None],
    ) -> None:
        super().__init__()
        self._send = send
        self._gather = gather
        self._ended = ended
        self._waiting = bytearray()
        self._closing = False
        self._sending: asyncio.Task[None] | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._waiting += data
        if self._sending is None and not self._closing:
            self._sending = asyncio.create_task(self._drain())

    def get_write_buffer_size(self) -> int:
        return len(self._waiting)

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._ended()

    def abort(self) -> None:
        self.close()
        if self._sending is not None:
            self._sending.cancel()

    async def _drain(self) -> None:
        try:
            while self._waiting:
                chunk = bytes(self._waiting)
                self._waiting.clear()
                async with asyncio.timeout(CALL_SECONDS):
                    await self._send(chunk)
                await asyncio.sleep(self._gather)
        except Exception:  # Ray raises many types of errors if the peer is down
            self.abort()
        finally:
            self._sending = None


def _streams(send: Callable[[bytes], Awaitable[object]], gather: float) -> Streams:
    """Return a writer that writes with calls of `send`, and a reader whose bytes are fed to it.

    Closing the writer ends the reader.
    """
    reader = asyncio.StreamReader()
    transport = _CallTransport(send, gather, reader.feed_eof)
    protocol = asyncio.StreamReaderProtocol(reader)
    loop = asyncio.get_running_loop()
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


class Caller:
    """Opens streams to a deployment with a `Switchboard`.

    Args:
        handle: handle of the deployment.
        kind: kind of this client, a key of the switchboard.
    """

    def __init__(self, handle: Any, kind: str) -> None:
        self._handle = handle
        self._kind = kind
        self._listening: set[asyncio.Task[None]] = set()

    async def __call__(self) -> Streams:
        """Open a stream.

        Raises:
            ConnectionError: the deployment does not answer.
        """
        name = uuid4().hex
        try:
            chunks = self._handle.options(stream=True).attach.remote(self._kind, name)
            async with asyncio.timeout(CALL_SECONDS):
                await anext(chunks)  # the peer has registered the name and accepts `feed`
        except Exception as error:
            raise ConnectionError from error
        reader, writer = _streams(lambda data: self._handle.feed.remote(name, data), GATHER_SECONDS)
        listening = asyncio.create_task(_listen(chunks, reader, writer))
        self._listening.add(listening)
        listening.add_done_callback(self._listening.discard)
        return reader, writer


async def _listen(
    chunks: AsyncIterator[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    try:
        async for chunk in chunks:
            if writer.is_closing():
                return
            reader.feed_data(chunk)
    except Exception:
        return  # the peer is down
    finally:
        writer.transport.abort()


class Switchboard:
    """The server side of streams.

    Args:
        serve: functions that serve a stream until its end, by kind of the client.
    """

    def __init__(self, serve: dict[str, Callable[[Streams], Awaitable[None]]]) -> None:
        self._serve = serve
        self._open: dict[str, Streams] = {}
        self._last_seen: dict[str, float] = {}

    async def attach(self, kind: str, name: str) -> AsyncIterator[bytes]:
        """Serve a new stream, and yield the chunks that are sent to its client."""
        # While the queue is full, `put` waits; after `CALL_SECONDS` the stream is closed.
        chunks: asyncio.Queue[bytes] = asyncio.Queue(MAX_CHUNKS)
        reader, writer = _streams(chunks.put, 0.0)
        self._open[name], self._last_seen[name] = (reader, writer), time.monotonic()
        serving = asyncio.ensure_future(self._serve[kind]((reader, writer)))
        try:
            yield b""
            while not serving.done() and time.monotonic() - self._last_seen[name] < SILENCE_SECONDS:
                try:
                    chunk = await asyncio.wait_for(chunks.get(), 1.0)
                except TimeoutError:
                    chunk = b""  # keeps the call alive, and fails if the client is gone
                yield chunk
        finally:
            del self._open[name], self._last_seen[name]
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    def feed(self, name: str, data: bytes) -> None:
        """Pass bytes of the client to its stream.

        Raises:
            ConnectionError: the stream has ended.
        """
        reader, writer = self._open.get(name, (None, None))
        if reader is None or writer is None or writer.is_closing():
            raise ConnectionError
        self._last_seen[name] = time.monotonic()
        reader.feed_data(data)
