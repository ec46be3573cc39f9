"""Frames: how the processes of one server speak over local stream sockets.

A frame is a little-endian uint32 length and that many bytes: one message, MessagePack-encoded as an
array whose first element is the message's tag.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any, TypeAlias

import msgspec

MAX_FRAME_BYTES = 256 * 2**20
_LENGTH = struct.Struct("<I")

Decoder: TypeAlias = msgspec.msgpack.Decoder[Any]


class FrameError(Exception):
    """The other side sent something that is no frame, or a message that it may not send."""


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages."""


def decoder(messages: Any) -> Decoder:
    """Return what decodes one of these kinds of message."""
    return msgspec.msgpack.Decoder(messages)


_encoder = msgspec.msgpack.Encoder()


def framed(message: Message) -> bytes:
    """Return the frame of one message."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class Outbox:
    """Writes messages on a stream: those of one turn of the event loop leave together.

    A write costs more than the message, and wakes who reads it, who may want the same core.
    """

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._held: list[bytes] = []

    @property
    def closing(self) -> bool:
        """Whether nothing that is put here leaves any more."""
        return self._writer.is_closing()

    def put(self, message: Message) -> None:
        """Put one message on the stream."""
        if not self._held:
            asyncio.get_running_loop().call_soon(self._send)
        self._held.append(framed(message))

    def close(self) -> None:
        """Send what is held, then close the stream."""
        self._send()
        self._writer.close()

    def abort(self) -> None:
        """Break the stream."""
        self._writer.transport.abort()

    def _send(self) -> None:
        if self._held and not self.closing:
            self._writer.write(b"".join(self._held))
        self._held.clear()


async def read(reader: asyncio.StreamReader, messages: Decoder) -> Any:
    """Read one message; None at the end of the stream.

    Raises:
        FrameError: it is none that `messages` knows.
    """
    try:
        header = await reader.readexactly(_LENGTH.size)
        (length,) = _LENGTH.unpack(header)
        if length > MAX_FRAME_BYTES:
            raise FrameError(f"a frame of {length} bytes")
        return messages.decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FrameError(str(error)) from error
