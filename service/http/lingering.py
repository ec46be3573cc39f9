"""Close a connection so that its client can read the response, even while it is still sending."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from service.ipc.coalesced_writes import CoalescedWriter

LINGER_SECONDS = 2.0
"""Time after `close` in which the client may neither send nor close."""
LINGER_BYTES = 128 * 2**20
"""Maximum number of bytes that are read and discarded after the last response."""


class LingeringTransport(CoalescedWriter):
    """A transport with coalesced writes that, on `close`, reads and discards what the client sends.

    If a socket is closed while the client sends, the kernel resets the connection, and the client
    may lose the response. So `close` sends the data that is held, shuts down the writing side
    (except with TLS), discards received data, and closes when the client does or at a limit.

    Args:
        transport: transport of the connection.
        sending: returns whether the client may still be sending; if not, `close` closes at once.
        seconds: time limit for the client to go on sending.
    """

    def __init__(
        self, transport: asyncio.Transport, sending: Callable[[], bool], seconds: float
    ) -> None:
        super().__init__(transport)
        self._transport = transport
        self._closed = transport.is_closing
        self.is_closing = self._is_closing
        self._sending = sending
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._until = 0.0
        self._left = LINGER_BYTES
        self.lingering = False
        """Whether `close` was called, so that received data is discarded."""

    def close(self) -> None:
        """Send the data that is held, and close when the client has stopped sending."""
        if self.is_closing():
            return
        if not self._sending():
            self._end()
            return
        self._send()
        self.lingering = True
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._transport.resume_reading()
        self._until = self._loop.time() + self._seconds
        self.discard(0)

    def discard(self, size: int) -> None:
        """Count bytes that were received after `close`, and abort above the limit."""
        self._left -= size
        if self._left <= 0:
            self._transport.abort()
        else:
            left = min(LINGER_SECONDS, self._until - self._loop.time())
            self._wait(left, self._end)

    def forget(self) -> None:
        """Cancel the timer of a lost connection."""
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        self._send()
        self._transport.close()
        self._wait(LINGER_SECONDS, self._transport.abort)

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self.forget()
        self._timer = self._loop.call_later(seconds, then)

    def _is_closing(self) -> bool:
        return self.lingering or self._closed()
