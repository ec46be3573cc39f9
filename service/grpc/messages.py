"""The protocol's messages, as `inference.proto` and `health.proto` define them.

`make proto` compiles both into `messages.binpb`. The classes are made of that at import, in a pool
of descriptors of their own: Triton's client defines messages of the same names, and may be imported
by the same process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from service.http.errors import ApiError

Message: TypeAlias = Any
"""A message; its fields are those of the .proto file."""

INFERENCE, HEALTH = "inference.GRPCInferenceService", "grpc.health.v1.Health"

_POOL = DescriptorPool()
for _file in FileDescriptorSet.FromString(
    Path(__file__).with_name("messages.binpb").read_bytes()
).file:
    _POOL.AddSerializedFile(_file.SerializeToString())

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types; others begin and end groups, which no message here has."""
_CONTINUED = 0x80
"""The bit of every byte of a variable-length integer but the last."""
_LONGEST = 10
"""Bytes of the longest of them."""


def messages_of(service: str, method: str) -> tuple[type[Message], type[Message]]:
    """Return the classes of a method's request and response."""
    described = _POOL.FindServiceByName(service).FindMethodByName(method)
    return GetMessageClass(described.input_type), GetMessageClass(described.output_type)


def decode(kind: type[Message], data: bytes, most: int) -> Message:
    """Decode a message of at most so many values.

    A value takes up to a hundred bytes of memory, however short it is in the message: so they are
    counted before they are made.

    Raises:
        ApiError: 400 not such a message, 413 too many values.
    """
    # A value takes a byte of its own where it is packed, and two elsewhere.
    if len(data) > most and _count(memoryview(data), kind.DESCRIPTOR, most) > most:
        message = f"the message holds more than {most} values"
        raise ApiError(413, message, code="too_many_items")
    try:
        return kind.FromString(data)
    except DecodeError:
        raise ApiError(400, f"this is no {kind.DESCRIPTOR.name}", code="invalid_message") from None


def _count(data: memoryview, kind: Any, most: int) -> int:
    """Count the values of a message, as far as it is one, and not far beyond `most`."""
    count = place = 0
    while place < len(data) and count <= most:
        count += 1
        tag, place = _varint(data, place)
        wire = tag & 7
        if wire == _VARINT:
            _, place = _varint(data, place)
        elif wire == _FIXED64:
            place += 8
        elif wire == _FIXED32:
            place += 4
        elif wire == _BYTES:
            length, place = _varint(data, place)
            field = kind.fields_by_number.get(tag >> 3)
            part = data[place : place + length]
            place += length
            if field is None:
                continue
            if field.message_type is not None:
                count += _count(part, field.message_type, most - count)
            elif field.is_packed:
                count += _packed(part, field)
    return count


def _packed(data: memoryview, field: Any) -> int:
    if field.type == field.TYPE_FLOAT:
        return len(data) // 4
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) < _CONTINUED))


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """Return an integer of variable length, and where it ends: where the data do, if it is none."""
    value = 0
    for shift, byte in enumerate(data[place : place + _LONGEST]):
        value |= (byte & ~_CONTINUED) << 7 * shift
        if byte < _CONTINUED:
            return value, place + shift + 1
    return value, len(data)
