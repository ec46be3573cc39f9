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

from service import frames
from service.frames import Decoder, FrameError, Message
from service.one_write import OneWrite

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


Say = Callable[[Message], None]
"""Sends a message to whoever connected; one who is gone hears nothing."""


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
    """Serve one connection until its end; `name` says in the log where it came."""
    reader, writer = streams[0], OneWrite(streams[1])

    def say(message: Message) -> None:
        if not writer.is_closing():
            frames.write(writer, message)

    try:
        await came(reader, say)
    except FrameError as error:
        log.error("a bad frame came", at=name, reason=str(error))
    finally:
        writer.close()


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
        self._writer: OneWrite | None = None
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()

    async def stay_connected(self) -> None:
        """Connect, listen, and connect again, until cancelled."""
        while True:
            try:
                streams = await self._open()
            except OSError:
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            await self.hold(streams)
            await asyncio.sleep(RECONNECT_SECONDS)

    async def hold(self, streams: Streams) -> None:
        """Speak over these streams until they end."""
        reader, writer = streams[0], OneWrite(streams[1])
        self._writer = writer
        try:
            self._came()
            while (message := await frames.read(reader, self._decoder)) is not None:
                self.heard = time.monotonic()
                self._take(message)
        except FrameError as error:
            log.error("a bad frame came", sender=self._name, reason=str(error))
        finally:
            self._lose(writer)

    def say(self, message: Message) -> bool:
        """Send a message that is not answered; False: nobody is there."""
        if self._writer is None or self._writer.is_closing():
            return False
        frames.write(self._writer, message)
        return True

    def close(self) -> None:
        """Break the connection; it is made anew."""
        if self._writer is not None:
            self._writer.transport.abort()

    async def ask(self, message: Message, timeout: float | None = None) -> Any:
        """Send a message that has an `id`, and await the one that comes back with it.

        Raises:
            DisconnectedError: the other side is not there, or goes away meanwhile.
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

    def _lose(self, writer: OneWrite) -> None:
        self._writer = None
        self._lost()
        writer.close()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(DisconnectedError())
