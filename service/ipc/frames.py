"""Frames: how the processes of one server speak over local stream sockets.

A frame is a little-endian uint32 length and that many bytes: one message, MessagePack-encoded as an
array whose first element is the message's tag.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any, ClassVar, TypeAlias

import msgspec

from service.ipc.coalesced_writes import OneWrite

MAX_FRAME_BYTES = 256 * 2**20
_LENGTH = struct.Struct("<I")

Decoder: TypeAlias = msgspec.msgpack.Decoder[Any]


class FrameError(Exception):
    """The other side sent something that is no frame, or a message that it may not send."""


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages.

    Attributes:
        droppable: it is left out where the receiver does not read what was sent before.
    """

    droppable: ClassVar[bool] = False


def decoder(messages: Any) -> Decoder:
    """Return what decodes one of these kinds of message."""
    return msgspec.msgpack.Decoder(messages)


_encoder = msgspec.msgpack.Encoder()


def write(writer: asyncio.StreamWriter | OneWrite, message: Message) -> None:
    """Put one message on the stream."""
    body = _encoder.encode(message)
    writer.write(_LENGTH.pack(len(body)) + body)


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
    except FrameError:
        raise
    except Exception as error:  # besides msgspec's own errors a decoder raises RecursionError
        raise FrameError(str(error) or type(error).__name__) from error
