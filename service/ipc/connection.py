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
from service.ipc.coalesced_writes import OneWrite
from service.ipc.frames import Decoder, FrameError, Message

log = structlog.get_logger()

RECONNECT_SECONDS = 0.05

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Place = Path | Callable[[], Awaitable[Streams]]
"""Where somebody listens: a local socket, or what opens streams to them."""


class DisconnectedError(Exception):
    """The other side is not there, or went away while its answer was awaited."""


async def nowhere() -> Streams:
    """Be the place of one who cannot be connected to.

    Raises:
        ConnectionRefusedError: always.
    """
    raise ConnectionRefusedError


MAX_REPORT_BYTES = 4 * 2**20
"""Unsent bytes of a connection above which droppable messages are left out."""
MAX_UNSENT_BYTES = frames.MAX_FRAME_BYTES
"""Unsent bytes above which a connection is closed: its other side does not read."""

Say = Callable[[Message], bool]
"""Sends a message to a peer; False: it was not sent."""


class Outlet:
    """Send messages to one peer, and hold a bounded number of bytes that it has not read.

    Args:
        writer: of the stream.
        peer: name of the other side, for the log.
    """

    def __init__(self, writer: asyncio.StreamWriter, peer: str) -> None:
        self._writer = OneWrite(writer)
        self._peer = peer

    @property
    def closing(self) -> bool:
        """Whether nothing more can be sent."""
        return bool(self._writer.is_closing())

    @property
    def unsent(self) -> int:
        """Bytes that wait because the peer has not read what was sent before."""
        return self._writer.unsent

    def say(self, message: Message) -> bool:
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
        """Send what waits, and close."""
        self._writer.close()

    def abort(self) -> None:
        """Close at once, without what waits."""
        self._writer.transport.abort()


async def handle_each(
    reader: asyncio.StreamReader,
    messages: Decoder,
    handle: Callable[[Any], None],
    failed: Callable[[Any, str], None],
    peer: str,
) -> None:
    """Hand every message to `handle` until the stream ends.

    An error in handling a message concerns that message alone: it is logged, once for each kind
    of message and error, and the next message is read.

    Args:
        reader: of the stream.
        messages: decodes them.
        handle: acts on one message.
        failed: is told of a message that could not be handled, and why, to answer it.
        peer: name of the other side, for the log.

    Raises:
        FrameError: something came that is not a message.
    """
    logged: set[tuple[str, type[Exception]]] = set()
    while (message := await frames.read(reader, messages)) is not None:
        try:
            handle(message)
        except Exception as error:  # whatever it is, the messages after this one are handled
            kind = type(message).__name__
            if (kind, type(error)) not in logged:
                logged.add((kind, type(error)))
                log.error("message handling failed", message=kind, peer=peer, exc_info=error)
            failed(message, f"{kind} failed: {type(error).__name__}; the server's log says more")


@asynccontextmanager
async def listening(
    socket: Path, came: Callable[[asyncio.StreamReader, Say], Awaitable[None]]
) -> AsyncIterator[None]:
    """Listen on a local socket, which only this user may reach, for as long as this block.

    Args:
        socket: where.
        came: serves one connection; it is cancelled when the block ends.
    """
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        try:
            await attend((reader, writer), came, socket.name)
        except asyncio.CancelledError:
            return  # nobody awaits a connection's task, and its end is no news
        finally:
            serving.discard(task)

    async with await asyncio.start_unix_server(serve, socket):
        socket.chmod(0o600)
        try:
            yield
        finally:
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving)


async def attend(
    streams: Streams, came: Callable[[asyncio.StreamReader, Say], Awaitable[None]], name: str
) -> None:
    """Serve one connection until its end; `name` says in the log where it came.

    An error ends this connection alone.
    """
    outlet = Outlet(streams[1], name)
    try:
        await came(streams[0], outlet.say)
    except FrameError as error:
        log.error("connection closed: bad frame", at=name, reason=str(error))
    except Exception as error:
        log.error("connection closed: unexpected error", at=name, exc_info=error)
    finally:
        outlet.close()


class Connection:
    """Keep connected to somebody who listens, again whenever the connection breaks.

    Args:
        name: of the other side, for the log.
        place: where it listens.
        decoder: of what it says.
    """

    def __init__(self, name: str, place: Place, decoder: Decoder) -> None:
        self.heard = 0.0
        self._name = name
        self._place = place
        self._decoder = decoder
        self._outlet: Outlet | None = None
        self._backoff = RECONNECT_SECONDS
        self._refusal = ""
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()

    async def stay_connected(self) -> None:
        """Connect, listen, and connect again, until cancelled.

        A peer that sends something other than expected is asked again with backoff.
        """
        while True:
            try:
                streams = await self._open()
            except OSError:
                # Another process will listen here, which may be understood.
                self._backoff = RECONNECT_SECONDS
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            try:
                await self.hold(streams)
            except Exception as error:  # whatever it is, the connection is made anew
                log.error("connection lost: unexpected error", peer=self._name, exc_info=error)
            await asyncio.sleep(self._backoff)

    async def hold(self, streams: Streams) -> None:
        """Speak over these streams until they end."""
        outlet = self._outlet = Outlet(streams[1], self._name)
        try:
            self._came()
            await handle_each(streams[0], self._decoder, self._hear, self._not_handled, self._name)
        except FrameError as error:
            self._refuse(f"bad frame: {error}")
        finally:
            self._lose(outlet)

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        return self._outlet is not None and not self._outlet.closing

    @property
    def unsent(self) -> int:
        """Bytes that the other side has not read yet."""
        return 0 if self._outlet is None else self._outlet.unsent

    def say(self, message: Message) -> bool:
        """Send a message that is not answered; False: it was not sent, see `Outlet.say`."""
        return self._outlet is not None and self._outlet.say(message)

    def close(self) -> None:
        """Break the connection; it is made anew."""
        if self._outlet is not None:
            self._outlet.abort()

    async def ask(self, message: Message, timeout: float | None = None) -> Any:
        """Send a message that has an `id`, and await the one that comes back with it.

        Raises:
            DisconnectedError: the other side is not there, does not read, or goes away meanwhile.
            TimeoutError: no answer within `timeout` seconds.
        """
        number = next(self._numbers)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not self.say(msgspec.structs.replace(message, id=number)):
            raise DisconnectedError
        self._pending[number] = future
        try:
            async with asyncio.timeout(timeout):
                return await future
        except DisconnectedError:
            raise
        except BaseException:
            self._given_up(number)
            raise
        finally:
            self._pending.pop(number, None)

    async def _open(self) -> Streams:
        if isinstance(self._place, Path):
            return await asyncio.open_unix_connection(self._place)
        return await self._place()

    def _came(self) -> None:
        """Act when the connection was made."""

    def _take(self, message: Any) -> None:
        """Act on a message; by default it is the answer to a question."""
        future = self._pending.get(message.id)
        if future is not None and not future.done():
            future.set_result(message)

    def _given_up(self, number: int) -> None:
        """Act when nobody waits for an answer any more."""

    def _lost(self) -> None:
        """Act when the connection broke."""

    def _refuse(self, reason: str) -> None:
        """Close a connection whose peer is not understood; each new reason is logged."""
        if reason != self._refusal:
            log.error("connection closed: peer not understood", peer=self._name, reason=reason)
        self._refusal = reason
        self._backoff = min(2 * self._backoff, LONGEST_BACKOFF)
        self.close()

    def _hear(self, message: Any) -> None:
        self.heard = time.monotonic()
        self._take(message)
        if self.connected:  # the message was not a reason to refuse the peer
            self._refusal, self._backoff = "", RECONNECT_SECONDS

    def _not_handled(self, message: Any, reason: str) -> None:
        """Fail the question whose answer could not be handled."""
        future = self._pending.get(getattr(message, "id", -1))
        if future is not None and not future.done():
            log.error("answer lost", peer=self._name, reason=reason)
            future.set_exception(DisconnectedError())

    def _lose(self, outlet: Outlet) -> None:
        self._outlet = None
        outlet.close()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(DisconnectedError())
        self._lost()
