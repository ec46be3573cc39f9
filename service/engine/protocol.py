"""What front and engine say to each other: one binary frame per message over a local stream socket.

A frame is a little-endian uint32 length and that many bytes: one of the messages below,
MessagePack-encoded as an array whose first element is the message's tag. Token ids travel as raw
little-endian int32.
"""

from __future__ import annotations

import array
import asyncio
import struct
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec

PROTOCOL = 2
MAX_FRAME_BYTES = 256 * 2**20
_LENGTH = struct.Struct("<I")


class FrameError(Exception):
    """The other side sent something that is no frame of this protocol."""


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages."""


class ItemTokens(msgspec.Struct, frozen=True, array_like=True):
    """One text: token ids and segment ids, int32 bytes; no segments means all 0."""

    ids: bytes
    segments: bytes = b""


class Classify(_Message, frozen=True):
    """Classify some items with one model; `remaining` seconds until the answer is worthless.

    A quality of "auto" leaves the level to the engine; so does `target`, the seconds that the
    answer should take. `request_id` and the W3C `traceparent` name the request in logs and traces.
    """

    id: int
    model: str
    version: int
    items: list[ItemTokens]
    quality: str | float
    remaining: float
    heads: int | None = None
    max_heads: int | None = None
    return_heads: bool = False
    target: float | None = None
    request_id: str = ""
    traceparent: str = ""


class Cancel(_Message, frozen=True):
    """Nobody waits for this request any more."""

    id: int


class Load(_Message, frozen=True):
    """Load, verify and warm the checkpoint folder `path`, then serve it beside what was."""

    id: int
    path: str


class Unload(_Message, frozen=True):
    """Stop serving a model version and free it, once nothing waits for it."""

    id: int
    model: str
    version: int


class ModelInfo(msgspec.Struct, frozen=True, array_like=True):
    """A model that an engine serves."""

    name: str
    version: int
    load_seconds: float
    memory_bytes: int
    dtype: str


class Hello(_Message, frozen=True):
    """First message of an engine, which has no model yet: the front says what to load."""

    protocol: int
    pid: int
    device: str
    torch: str


class Heartbeat(_Message, frozen=True):
    """An engine lives; the state of its queue, by model where it differs.

    `quality` is the level in force for requests that leave it to the engine.
    """

    queue_items: dict[str, int]
    queue_seconds: dict[str, float]
    oldest_age: dict[str, float]
    in_flight: dict[str, int]
    memory_bytes: int
    quality: str


class ItemAnswer(msgspec.Struct, frozen=True, array_like=True):
    """The answer for one item. `error` set: it failed alone and the other fields mean nothing."""

    logits: list[float] = []
    budget: int = 0
    heads: list[int] = []
    chosen: list[list[int]] | None = None
    macs: int = 0
    dense_macs: int = 0
    error: str = ""


class Answer(_Message, frozen=True):
    """The answers of a request, and the seconds of its stages (the slowest item's).

    `quality` is what decided the budgets: a level, or the points given up.
    """

    id: int
    items: list[ItemAnswer]
    budget_seconds: float
    queue_seconds: float
    compute_seconds: float
    quality: str | float


class Refused(_Message, frozen=True):
    """A request was not admitted."""

    id: int
    reason: str
    retry_after: int


class Expired(_Message, frozen=True):
    """A request's deadline passed before it was computed."""

    id: int


class Failed(_Message, frozen=True):
    """A load or unload did not succeed, or a request named what the engine does not have."""

    id: int
    message: str


class Done(_Message, frozen=True):
    """A load or unload succeeded; `model` is None for an unload."""

    id: int
    model: ModelInfo | None = None


class BatchRan(_Message, frozen=True):
    """One batch ran, for the metrics."""

    model: str
    version: int
    budget: int
    items: int
    tokens: int
    padding: float
    seconds: float


ToEngine: TypeAlias = Classify | Cancel | Load | Unload
ToFront: TypeAlias = Hello | Heartbeat | Answer | Refused | Expired | Failed | Done | BatchRan

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToEngine)
_to_front: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToFront)


ID_BYTES = 4


def pack_ids(ids: Sequence[int]) -> bytes:
    """Encode token ids as little-endian int32."""
    packed = array.array("i", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """Decode what `pack_ids` made.

    Raises:
        FrameError: the length is not a multiple of four.
    """
    if len(data) % ID_BYTES:
        raise FrameError("token ids are not whole int32 numbers")
    unpacked = array.array("i")
    unpacked.frombytes(data)
    if sys.byteorder == "big":
        unpacked.byteswap()
    return unpacked.tolist()


def write(writer: asyncio.StreamWriter, message: ToEngine | ToFront) -> None:
    """Put one message on the stream."""
    body = _encoder.encode(message)
    writer.write(_LENGTH.pack(len(body)) + body)


async def read_to_engine(reader: asyncio.StreamReader) -> ToEngine | None:
    """Read one message of a front; None at the end of the stream.

    Raises:
        FrameError: it is none.
    """
    message: ToEngine | None = await _read(reader, _to_engine)
    return message


async def read_to_front(reader: asyncio.StreamReader) -> ToFront | None:
    """Read one message of an engine; None at the end of the stream.

    Raises:
        FrameError: it is none.
    """
    message: ToFront | None = await _read(reader, _to_front)
    return message


async def _read(reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
    try:
        header = await reader.readexactly(_LENGTH.size)
        (length,) = _LENGTH.unpack(header)
        if length > MAX_FRAME_BYTES:
            raise FrameError(f"a frame of {length} bytes")
        return decoder.decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FrameError(str(error)) from error
