"""Streams whose bytes travel in calls of a Ray deployment: the frames of one host, between hosts.

Whoever connects calls `attach`, whose answer, a stream of chunks, is the one direction; calls of
`feed` are the other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import uuid4

from service.connection import Streams

GATHER_SECONDS = 0.5
"""A call takes along all that was written since the last one, and comes no sooner after it."""
CALL_SECONDS = 10.0
"""A call that takes longer is as good as lost."""
SILENCE_SECONDS = 15.0
"""Who has not been heard of for so long is gone: a dead host says no farewell."""


class _CallTransport(asyncio.Transport):
    """The writing half of a stream.

    Args:
        send: takes bytes to the other side; one call at a time, so that they stay in order.
        gather: seconds between two calls.
    """

    def __init__(self, send: Callable[[bytes], Awaitable[object]], gather: float) -> None:
        super().__init__()
        self._send = send
        self._gather = gather
        self._waiting = bytearray()
        self._closing = False
        self._sending: asyncio.Task[None] | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._waiting += data
        if self._sending is None and not self._closing:
            self._sending = asyncio.create_task(self._drain())

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._closing = True

    def abort(self) -> None:
        self._closing = True
        if self._sending is not None:
            self._sending.cancel()

    async def _drain(self) -> None:
        try:
            while self._waiting and not self._closing:
                chunk = bytes(self._waiting)
                self._waiting.clear()
                async with asyncio.timeout(CALL_SECONDS):
                    await self._send(chunk)
                await asyncio.sleep(self._gather)
        except Exception:  # Ray has many words for a side that is not there
            self.abort()
        finally:
            self._sending = None


def _streams(send: Callable[[bytes], Awaitable[object]], gather: float) -> Streams:
    reader = asyncio.StreamReader()
    transport = _CallTransport(send, gather)
    protocol = asyncio.StreamReaderProtocol(reader)
    loop = asyncio.get_running_loop()
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


class Caller:
    """Opens streams to a deployment that holds a `Switchboard`.

    Args:
        handle: of the deployment.
        kind: of this caller, as the switchboard knows kinds.
    """

    def __init__(self, handle: Any, kind: str) -> None:
        self._handle = handle
        self._kind = kind
        self._listening: set[asyncio.Task[None]] = set()

    async def __call__(self) -> Streams:
        """Open a stream.

        Raises:
            ConnectionError: nobody answers.
        """
        name = uuid4().hex
        chunks = self._handle.options(stream=True).attach.remote(self._kind, name)
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await anext(chunks)  # says that the other side knows the name
        except Exception as error:
            raise ConnectionError from error
        reader, writer = _streams(lambda data: self._handle.feed.remote(name, data), GATHER_SECONDS)
        listening = asyncio.create_task(self._listen(chunks, reader, writer))
        self._listening.add(listening)
        listening.add_done_callback(self._listening.discard)
        return reader, writer

    @staticmethod
    async def _listen(
        chunks: AsyncIterator[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            async for chunk in chunks:
                if writer.is_closing():
                    break
                reader.feed_data(chunk)
        except Exception:
            return  # the side that spoke is gone
        finally:
            reader.feed_eof()
            writer.transport.abort()


class Switchboard:
    """The other side: takes streams, and has each served as its kind says.

    Args:
        serve: by kind, what serves a stream until its end.
    """

    def __init__(self, serve: dict[str, Callable[[Streams], Awaitable[None]]]) -> None:
        self._serve = serve
        self._readers: dict[str, asyncio.StreamReader] = {}
        self._heard: dict[str, float] = {}

    async def attach(self, kind: str, name: str) -> AsyncIterator[bytes]:
        """Serve a new stream, and give what it says, chunk by chunk."""
        said: asyncio.Queue[bytes] = asyncio.Queue()
        reader, writer = _streams(said.put, 0.0)
        self._readers[name], self._heard[name] = reader, time.monotonic()
        serving = asyncio.ensure_future(self._serve[kind]((reader, writer)))
        try:
            yield b""
            while not serving.done() and time.monotonic() - self._heard[name] < SILENCE_SECONDS:
                try:
                    async with asyncio.timeout(1.0):
                        yield await said.get()
                except TimeoutError:
                    continue
        finally:
            del self._readers[name], self._heard[name]
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    def feed(self, name: str, data: bytes) -> None:
        """Take what the other side of a stream says.

        Raises:
            ConnectionError: the stream has ended.
        """
        if name not in self._readers:
            raise ConnectionError
        self._heard[name] = time.monotonic()
        self._readers[name].feed_data(data)
