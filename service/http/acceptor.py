"""Accept connections from a listening socket that several processes share."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

import structlog

log = structlog.get_logger()

ACCEPTS = 8
"""Minimum batch of connections per turn of the event loop; others are left to other frontends."""
ACCEPT_SECONDS = 0.001
"""Time per accepted connection that grows the next batch: if connections were left in the backlog
for t seconds, the batch is t / ACCEPT_SECONDS. Under overload, a turn takes tenths of a second, and
connections can be refused only after they are accepted."""
PAUSE_SECONDS = 1.0
"""Pause after a lack of file descriptors or memory."""
_NO_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Acceptor:
    """Accept several connections per turn of the event loop; asyncio's servers accept one.

    The frontends share one socket of the supervisor. With one socket each on the same port
    (SO_REUSEPORT), the kernel would assign each connection to one frontend, where it would wait
    while that frontend hangs, restarts or is busy, although others are idle. With one of two
    processes stopped, 52 of 100 new connections were answered with SO_REUSEPORT, and all 100 with
    one socket.

    The socket must never be blocking, not even for a moment: the mode is shared by all processes
    that hold the socket, and `accept` would block if another frontend has taken the connection.

    Args:
        listener: listening socket, which `close` closes.
        handshake_seconds: time limit of a TLS handshake.
    """

    def __init__(self, listener: socket.socket, handshake_seconds: float) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._handshake_seconds = handshake_seconds
        self._opening: set[asyncio.Task[None]] = set()
        self._left: float | None = None
        """Time at which connections were left in the backlog; None: the backlog was empty."""
        self._paused: asyncio.TimerHandle | None = None

    def start(
        self,
        protocol: Callable[[], asyncio.Protocol],
        tls: ssl.SSLContext | None = None,
        full: Callable[[], bool] = lambda: False,
    ) -> None:
        """Begin to accept connections.

        Args:
            protocol: creates the protocol of an accepted connection. If the TLS handshake fails,
                only `connection_lost` is called.
            tls: TLS context; None: connections are not encrypted.
            full: returns whether an accepted connection is closed at once.
        """
        self._protocol = protocol
        self._full = full
        self._tls: dict[str, Any] = {}
        if tls is not None:
            self._tls = {"ssl": tls, "ssl_handshake_timeout": self._handshake_seconds}
        self._watch()

    def encrypt(self, tls: ssl.SSLContext) -> None:
        """Use another TLS context for new connections."""
        self._tls["ssl"] = tls

    def close(self) -> None:
        """Close the listening socket; a second call does nothing."""
        if self._listener.fileno() < 0:
            return
        if self._paused is not None:
            self._paused.cancel()
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()

    def _watch(self) -> None:
        self._paused = self._left = None
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        now = time.monotonic()
        batch = ACCEPTS
        if self._left is not None:
            batch = max(ACCEPTS, int((now - self._left) / ACCEPT_SECONDS))
        self._left = None
        loop = asyncio.get_running_loop()
        for _ in range(batch):
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                # Other errors mean that the connection was closed or another frontend has it.
                if error.errno in _NO_RESOURCES:
                    self._pause(error)
                return
            if self._full():
                connection.close()
                continue
            opening = loop.create_task(self._open(connection, self._protocol()))
            self._opening.add(opening)
            opening.add_done_callback(self._opening.discard)
        self._left = now

    async def _open(self, connection: socket.socket, protocol: asyncio.Protocol) -> None:
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: protocol, connection, **self._tls)
        except OSError as error:
            connection.close()  # the client has disconnected, or the TLS handshake failed
            protocol.connection_lost(error)

    def _pause(self, error: OSError) -> None:
        log.warning("connections not accepted", error=str(error))
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        self._paused = loop.call_later(PAUSE_SECONDS, self._watch)
