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

from service.ipc.connection import Streams

GATHER_SECONDS = 0.5
"""A call takes along all that was written since the last one, and comes no sooner after it."""
CALL_SECONDS = 10.0
"""A call that takes longer is as good as lost."""
MAX_CHUNKS = 64
"""Chunks of a stream that wait to be taken by Ray."""
SILENCE_SECONDS = 15.0
"""Who has not been heard of for so long is gone: a dead host says no farewell."""


class _CallTransport(asyncio.Transport):
    """The writing half of a stream.

    Args:
        send: takes bytes to the other side; one call at a time, so that they stay in order.
        gather: seconds between two calls.
        ended: is called once, when this side is closed or the other one is lost.
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
        except Exception:  # Ray has many words for a side that is not there
            self.abort()
        finally:
            self._sending = None


def _streams(send: Callable[[bytes], Awaitable[object]], gather: float) -> Streams:
    """Return streams that write by calls, and read what is fed; closed, they are at their end."""
    reader = asyncio.StreamReader()
    transport = _CallTransport(send, gather, reader.feed_eof)
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
        try:
            chunks = self._handle.options(stream=True).attach.remote(self._kind, name)
            async with asyncio.timeout(CALL_SECONDS):
                await anext(chunks)  # says that the other side knows the name
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
        return  # the side that spoke is gone
    finally:
        writer.transport.abort()


class Switchboard:
    """The other side: takes streams, and has each served as its kind says.

    Args:
        serve: by kind, what serves a stream until its end.
    """

    def __init__(self, serve: dict[str, Callable[[Streams], Awaitable[None]]]) -> None:
        self._serve = serve
        self._open: dict[str, Streams] = {}
        self._heard: dict[str, float] = {}

    async def attach(self, kind: str, name: str) -> AsyncIterator[bytes]:
        """Serve a new stream, and give what it says, chunk by chunk."""
        # When it is full, `put` waits for `CALL_SECONDS`, and then the stream is closed.
        said: asyncio.Queue[bytes] = asyncio.Queue(MAX_CHUNKS)
        reader, writer = _streams(said.put, 0.0)
        self._open[name], self._heard[name] = (reader, writer), time.monotonic()
        serving = asyncio.ensure_future(self._serve[kind]((reader, writer)))
        try:
            yield b""
            while not serving.done() and time.monotonic() - self._heard[name] < SILENCE_SECONDS:
                try:
                    chunk = await asyncio.wait_for(said.get(), 1.0)
                except TimeoutError:
                    chunk = b""  # tells Ray that this goes on, and us when nobody takes it
                yield chunk
        finally:
            del self._open[name], self._heard[name]
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    def feed(self, name: str, data: bytes) -> None:
        """Take what the other side of a stream says.

        Raises:
            ConnectionError: the stream has ended.
        """
        reader, writer = self._open.get(name, (None, None))
        if reader is None or writer is None or writer.is_closing():
            raise ConnectionError
        self._heard[name] = time.monotonic()
        reader.feed_data(data)
