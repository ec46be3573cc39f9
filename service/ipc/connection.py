"""Connections between the processes of this server, over local sockets or other streams."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import structlog

from service.background import LONGEST_BACKOFF
from service.ipc import frames
from service.ipc.coalesced_writes import CoalescedWriter
from service.ipc.frames import Decoder, FrameError, Message

log = structlog.get_logger()

RECONNECT_SECONDS = 0.05

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Address = Path | Callable[[], Awaitable[Streams]]
"""Path of a local socket, or a function that opens streams to the peer."""


class DisconnectedError(Exception):
    """There is no connection to the peer, or it broke before the answer."""


async def unreachable() -> Streams:
    """Refuse to connect: the address of a peer that connects itself, or of a remote one.

    Raises:
        ConnectionRefusedError: always.
    """
    raise ConnectionRefusedError


MAX_REPORT_BYTES = 4 * 2**20
"""Unsent bytes of a connection above which droppable messages are not sent."""
MAX_UNSENT_BYTES = frames.MAX_FRAME_BYTES
"""Unsent bytes above which a connection is closed, because the peer does not read."""

Sender = Callable[[Message], bool]
"""Sends a message to a peer; False: it was not sent."""


class MessageWriter:
    """Send messages to one peer, with a bounded buffer for unread bytes.

    Args:
        writer: writer of the stream.
        peer: name of the peer, for the log.
    """

    def __init__(self, writer: asyncio.StreamWriter, peer: str) -> None:
        self._writer = CoalescedWriter(writer)
        self._peer = peer

    @property
    def closing(self) -> bool:
        """Whether nothing more can be sent."""
        return bool(self._writer.is_closing())

    @property
    def unsent(self) -> int:
        """Bytes that wait because the peer has not read earlier ones."""
        return self._writer.unsent

    def send(self, message: Message) -> bool:
        """Send a message; False: the connection is closed, or the peer does not read."""
        if self._writer.is_closing():
            return False
        unsent = self._writer.unsent
        if unsent > MAX_REPORT_BYTES and message.droppable:
            return False
        if unsent > MAX_UNSENT_BYTES:
            log.error("connection closed: the peer does not read", peer=self._peer, unsent=unsent)
            self.abort()
            return False
        frames.write(self._writer, message)
        return True

    def close(self) -> None:
        """Send the waiting bytes, and close."""
        self._writer.close()

    def abort(self) -> None:
        """Close at once; waiting bytes are lost."""
        self._writer.transport.abort()


async def handle_each(
    reader: asyncio.StreamReader,
    messages: Decoder,
    handle: Callable[[Any], None],
    failed: Callable[[Any, str], None],
    peer: str,
) -> None:
    """Call `handle` with every message until the stream ends.

    If `handle` raises an error, the error is logged, once per type of message and of error, and the
    next message is read.

    Args:
        reader: reader of the stream.
        messages: decoder of the messages.
        handle: handles one message.
        failed: called with a message that could not be handled and the reason, to answer it.
        peer: name of the peer, for the log.

    Raises:
        FrameError: the peer sent bytes that are not a message.
    """
    logged: set[tuple[str, type[Exception]]] = set()
    while (message := await frames.read(reader, messages)) is not None:
        try:
            handle(message)
        except Exception as error:  # it must not stop the messages that follow
            kind = type(message).__name__
            if (kind, type(error)) not in logged:
                logged.add((kind, type(error)))
                log.error("message handling failed", message=kind, peer=peer, exc_info=error)
            failed(message, f"{kind} failed: {type(error).__name__}; see the server's log")


@asynccontextmanager
async def listening(
    socket: Path, serve: Callable[[asyncio.StreamReader, Sender], Awaitable[None]]
) -> AsyncIterator[None]:
    """Listen on a local socket, with access for this user only, while the context is open.

    Args:
        socket: path of the socket.
        serve: serves one connection; it is cancelled when the context closes.
    """
    serving: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        try:
            await serve_streams((reader, writer), serve, socket.name)
        except asyncio.CancelledError:
            return  # asyncio would log the cancellation as an error
        finally:
            serving.discard(task)

    async with await asyncio.start_unix_server(accept, socket):
        socket.chmod(0o600)
        try:
            yield
        finally:
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving)


async def serve_streams(
    streams: Streams, serve: Callable[[asyncio.StreamReader, Sender], Awaitable[None]], name: str
) -> None:
    """Serve one connection until it ends; errors are logged, and end only this connection.

    Args:
        streams: streams of the connection.
        serve: serves the connection.
        name: name of the socket, for the log.
    """
    writer = MessageWriter(streams[1], name)
    try:
        await serve(streams[0], writer.send)
    except FrameError as error:
        log.error("connection closed: bad frame", at=name, reason=str(error))
    except Exception as error:
        log.error("connection closed: unexpected error", at=name, exc_info=error)
    finally:
        writer.close()


class Connection:
    """Keep a connection to a listening peer, and restore it when it breaks.

    Args:
        name: name of the peer, for the log.
        address: address of the peer.
        decoder: decoder of its messages.

    Attributes:
        last_seen: time of the last message, on the monotonic clock; 0: none yet.
    """

    def __init__(self, name: str, address: Address, decoder: Decoder) -> None:
        self.last_seen = 0.0
        self._name = name
        self._address = address
        self._decoder = decoder
        self._writer: MessageWriter | None = None
        self._backoff = RECONNECT_SECONDS
        self._refusal = ""
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()

    async def stay_connected(self) -> None:
        """Connect, handle messages, and connect again, until cancelled.

        After an unexpected message, the next attempt follows with backoff.
        """
        while True:
            try:
                streams = await self._open()
            except OSError:
                # Nothing listens, so the process that listens next is a new one: no backoff.
                self._backoff = RECONNECT_SECONDS
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            try:
                await self.hold(streams)
            except Exception as error:  # it must not stop the next attempt
                log.error("connection lost: unexpected error", peer=self._name, exc_info=error)
            await asyncio.sleep(self._backoff)

    async def hold(self, streams: Streams) -> None:
        """Use these streams as the connection until they end."""
        writer = self._writer = MessageWriter(streams[1], self._name)
        try:
            self._on_connect()
            await handle_each(streams[0], self._decoder, self._receive, self._failed, self._name)
        except FrameError as error:
            self._refuse(f"bad frame: {error}")
        finally:
            self._disconnected(writer)

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        return self._writer is not None and not self._writer.closing

    @property
    def unsent(self) -> int:
        """Bytes that the peer has not read yet."""
        return 0 if self._writer is None else self._writer.unsent

    def send(self, message: Message) -> bool:
        """Send a message that has no answer; False: it was not sent, see `MessageWriter.send`."""
        return self._writer is not None and self._writer.send(message)

    def close(self) -> None:
        """Break the connection; `stay_connected` connects again."""
        if self._writer is not None:
            self._writer.abort()

    async def request(self, message: Message, timeout: float | None = None) -> Any:
        """Send a message with a new `id`, and return the answer, which has the same `id`.

        Raises:
            DisconnectedError: there is no connection, it breaks, or the peer does not read.
            TimeoutError: no answer within `timeout` seconds.
        """
        number = next(self._numbers)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not self.send(msgspec.structs.replace(message, id=number)):
            raise DisconnectedError
        self._pending[number] = future
        try:
            async with asyncio.timeout(timeout):
                return await future
        except DisconnectedError:
            raise
        except BaseException:
            self._on_abandoned(number)
            raise
        finally:
            self._pending.pop(number, None)

    async def _open(self) -> Streams:
        if isinstance(self._address, Path):
            return await asyncio.open_unix_connection(self._address)
        return await self._address()

    def _on_connect(self) -> None:
        """Act on a new connection."""

    def _on_message(self, message: Any) -> None:
        """Act on a message; by default, it is the answer to a `request`."""
        future = self._pending.get(message.id)
        if future is not None and not future.done():
            future.set_result(message)

    def _on_abandoned(self, number: int) -> None:
        """Act when a `request` ends without its answer, but with the connection."""

    def _on_disconnect(self) -> None:
        """Act when the connection has ended."""

    def _refuse(self, reason: str) -> None:
        """Close the connection because of an unexpected message; each new reason is logged."""
        if reason != self._refusal:
            log.error("connection closed: peer not understood", peer=self._name, reason=reason)
        self._refusal = reason
        self._backoff = min(2 * self._backoff, LONGEST_BACKOFF)
        self.close()

    def _receive(self, message: Any) -> None:
        self.last_seen = time.monotonic()
        self._on_message(message)
        if self.connected:  # the peer was not refused because of this message
            self._refusal, self._backoff = "", RECONNECT_SECONDS

    def _failed(self, message: Any, reason: str) -> None:
        """Fail the `request` whose answer could not be handled."""
        future = self._pending.get(getattr(message, "id", -1))
        if future is not None and not future.done():
            log.error("answer lost", peer=self._name, reason=reason)
            future.set_exception(DisconnectedError())

    def _disconnected(self, writer: MessageWriter) -> None:
        self._writer = None
        writer.close()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(DisconnectedError())
        self._on_disconnect()
