"""Coalesced writes: each write is a system call, and wakes a reader that may need the same core."""

from __future__ import annotations

import asyncio
from typing import Any


class CoalescedWriter:
    """Wrap a stream, and send all data of one turn of the event loop in one write.

    Other attributes are those of the stream.

    Args:
        stream: transport or stream writer.
    """

    def __init__(self, stream: asyncio.Transport | asyncio.StreamWriter) -> None:
        self._stream = stream
        self._transport: Any = getattr(stream, "transport", stream)
        self.is_closing = stream.is_closing
        self._held: list[bytes] = []
        self._held_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def unsent(self) -> int:
        """Bytes that this process still buffers, because the peer has not read them."""
        buffered: int = self._transport.get_write_buffer_size()
        return self._held_bytes + buffered

    def write(self, data: bytes) -> None:
        """Write before the next turn of the event loop."""
        if not self._held:
            asyncio.get_running_loop().call_soon(self._send)
        self._held.append(data)
        self._held_bytes += len(data)

    def write_now(self, data: bytes) -> None:
        """Write at once, after the data that is held."""
        self._held.append(data)
        self._send()

    def close(self) -> None:
        """Write the data that is held, and close."""
        self._send()
        self._stream.close()

    def _send(self) -> None:
        if self._held and not self.is_closing():
            self._stream.write(b"".join(self._held))
        self._held.clear()
        self._held_bytes = 0
