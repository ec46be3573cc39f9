"""How connections are taken from a listening socket that several processes share."""

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
"""Connections taken a turn of the event loop, at least: the others are left to other frontends."""
ACCEPT_SECONDS = 0.001
"""Who was left there may wait so long for each who was: under overload a turn lasts tenths of a
second, and nobody can refuse those who are in the kernel's backlog."""
PAUSE_SECONDS = 1.0
"""How long none is taken after there was no room for one."""
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Acceptor:
    """Take connections, several a turn: the event loop's own servers take one.

    The frontends share one socket, which the supervisor holds, rather than have one each on the
    same port (SO_REUSEPORT): the kernel would give a connection to one of them for good, and it
    would wait there while that frontend hangs, restarts or is in a long turn, though others are
    free. With one of two processes stopped, 52 of 100 new connections were answered that way, and
    all 100 on one socket. Nor would the event loop take more than one a turn.

    Never, not for a moment, may the socket wait: whether it does is shared with all processes that
    hold it, and another frontend might be about to take a connection that this one has taken.

    Args:
        listener: the socket; it is closed in the end.
        handshake_seconds: how long TLS may take to be agreed.
    """

    def __init__(self, listener: socket.socket, handshake_seconds: float) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._handshake_seconds = handshake_seconds
        self._opening: set[asyncio.Task[None]] = set()
        self._left: float | None = None
        """When some were left in the backlog, if some were."""
        self._paused: asyncio.TimerHandle | None = None

    def start(
        self,
        protocol: Callable[[], asyncio.Protocol],
        tls: ssl.SSLContext | None = None,
        full: Callable[[], bool] = lambda: False,
    ) -> None:
        """Begin to take connections.

        Args:
            protocol: makes what reads a connection, as soon as it is accepted; told by
                `connection_lost` alone when its TLS handshake fails.
            tls: how they are encrypted; None: they are not.
            full: says whether a connection is closed as soon as it is accepted.
        """
        self._protocol = protocol
        self._full = full
        self._tls: dict[str, Any] = {}
        if tls is not None:
            self._tls = {"ssl": tls, "ssl_handshake_timeout": self._handshake_seconds}
        self._watch()

    def encrypt(self, tls: ssl.SSLContext) -> None:
        """Agree with connections that come from now on by another context."""
        self._tls["ssl"] = tls

    def close(self) -> None:
        """Take no more of them, if that is not so already."""
        if self._listener.fileno() < 0:
            return
        if self._paused is not None:
            self._paused.cancel()
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()

    def _watch(self) -> None:
        self._paused = self._left = None
        asyncio.get_running_loop().add_reader(self._listener, self._take)

    def _take(self) -> None:
        now = time.monotonic()
        most = ACCEPTS
        if self._left is not None:
            most = max(ACCEPTS, int((now - self._left) / ACCEPT_SECONDS))
        self._left = None
        loop = asyncio.get_running_loop()
        for _ in range(most):
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                # Else another frontend has taken it, or it is gone, as accept(2) says in many ways.
                if error.errno in _NO_ROOM:
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
            connection.close()  # gone, or it speaks no TLS
            protocol.connection_lost(error)

    def _pause(self, error: OSError) -> None:
        log.warning("connections not accepted", error=str(error))
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        self._paused = loop.call_later(PAUSE_SECONDS, self._watch)
