"""The protobuf messages of `inference.proto` and `health.proto`.

`make proto` compiles both into `messages.binpb`, from which the classes are created at import. They
have their own descriptor pool, because Triton's client, which the same process may import, defines
messages of the same names.
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
"""A message with the fields of the .proto file."""

INFERENCE, HEALTH = "inference.GRPCInferenceService", "grpc.health.v1.Health"

_POOL = DescriptorPool()
for _file in FileDescriptorSet.FromString(
    Path(__file__).with_name("messages.binpb").read_bytes()
).file:
    _POOL.AddSerializedFile(_file.SerializeToString())

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types; the others are those of groups, which no message here has."""
_CONTINUED = 0x80
"""Bit that is set in every byte of a varint except the last."""
_MAX_VARINT_BYTES = 10


def messages_of(service: str, method: str) -> tuple[type[Message], type[Message]]:
    """Return the classes of a method's request and response."""
    described = _POOL.FindServiceByName(service).FindMethodByName(method)
    return GetMessageClass(described.input_type), GetMessageClass(described.output_type)


def decode(kind: type[Message], data: bytes, max_values: int) -> Message:
    """Decode a message.

    A decoded value takes up to 100 bytes of memory, even if it has one byte in the message, so the
    values are counted first.

    Args:
        kind: class of the message.
        data: encoded message.
        max_values: maximum number of values.

    Raises:
        ApiError: 400 the message is invalid, 413 it has too many values.
    """
    # Each value has at least one byte, so a short message need not be counted.
    too_long = len(data) > max_values
    if too_long and _count(memoryview(data), kind.DESCRIPTOR, max_values) > max_values:
        message = f"the message has more than {max_values} values"
        raise ApiError(413, message, code="too_many_items")
    try:
        return kind.FromString(data)
    except DecodeError:
        message = f"the data is not a valid {kind.DESCRIPTOR.name}"
        raise ApiError(400, message, code="invalid_message") from None


def _count(data: memoryview, kind: Any, limit: int) -> int:
    """Count the values of a message that may be invalid; stop soon after `limit`."""
    count = position = 0
    while position < len(data) and count <= limit:
        count += 1
        tag, position = _varint(data, position)
        wire = tag & 7
        if wire == _VARINT:
            _, position = _varint(data, position)
        elif wire == _FIXED64:
            position += 8
        elif wire == _FIXED32:
            position += 4
        elif wire == _BYTES:
            length, position = _varint(data, position)
            field = kind.fields_by_number.get(tag >> 3)
            part = data[position : position + length]
            position += length
            if field is None:
                continue
            if field.message_type is not None:
                count += _count(part, field.message_type, limit - count)
            elif field.is_packed:
                count += _packed(part, field)
    return count


def _packed(data: memoryview, field: Any) -> int:
    if field.type == field.TYPE_FLOAT:
        return len(data) // 4
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) < _CONTINUED))


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """Return a varint and the position after it; the end of the data if it is not complete."""
    value = 0
    for index, byte in enumerate(data[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & ~_CONTINUED) << 7 * index
        if byte < _CONTINUED:
            return value, position + index + 1
    return value, len(data)
