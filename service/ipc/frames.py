"""Frames: the encoding of messages between the processes of a server.

A frame is a length (uint32, little-endian) and a message of so many bytes: a MessagePack array
whose first element is the tag of the message.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any, ClassVar, TypeAlias

import msgspec

from service.ipc.coalesced_writes import CoalescedWriter

MAX_FRAME_BYTES = 256 * 2**20
_LENGTH = struct.Struct("<I")

Decoder: TypeAlias = msgspec.msgpack.Decoder[Any]


class FrameError(Exception):
    """The peer sent bytes that are not a frame, or a message that it may not send."""


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages.

    Attributes:
        droppable: whether the message is left out while the receiver does not read.
    """

    droppable: ClassVar[bool] = False


def decoder(messages: Any) -> Decoder:
    """Return a decoder of a union of messages."""
    return msgspec.msgpack.Decoder(messages)


_encoder = msgspec.msgpack.Encoder()


def write(writer: asyncio.StreamWriter | CoalescedWriter, message: Message) -> None:
    """Write one message to the stream."""
    body = _encoder.encode(message)
    writer.write(_LENGTH.pack(len(body)) + body)


async def read(reader: asyncio.StreamReader, messages: Decoder) -> Any:
    """Read one message; None at the end of the stream.

    Raises:
        FrameError: the bytes are not a message that `messages` decodes.
    """
    try:
        header = await reader.readexactly(_LENGTH.size)
        (length,) = _LENGTH.unpack(header)
        if length > MAX_FRAME_BYTES:
            raise FrameError(f"frame of {length} bytes, above the limit of {MAX_FRAME_BYTES}")
        return messages.decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    except FrameError:
        raise
    except Exception as error:  # a decoder raises msgspec's errors and RecursionError
        raise FrameError(str(error) or type(error).__name__) from error
