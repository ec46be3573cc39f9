"""Tensors in messages, beside the binary form of the HTTP protocol.

Raw contents are that form. Typed contents are turned into it, and back.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from service.grpc.messages import Message

_FIELDS = {
    "BYTES": ("bytes_contents", ""),
    "BOOL": ("bool_contents", "?"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
    "FP32": ("fp32_contents", "<f4"),
}
"""Where a datatype's typed contents stand, and what NumPy calls its elements."""
_LENGTH = struct.Struct("<I")


def pack(datatype: str, contents: Message) -> bytes:
    """Return typed contents in binary form; nothing of a datatype that no input has."""
    if datatype not in _FIELDS:
        return b""
    field, dtype = _FIELDS[datatype]
    values = getattr(contents, field)
    if not dtype:
        return b"".join(_LENGTH.pack(len(value)) + value for value in values)
    return np.fromiter(values, dtype, len(values)).tobytes()


def unpack(datatype: str, data: memoryview, contents: Message) -> None:
    """Write an output's values, which are in binary form, into typed contents."""
    field, dtype = _FIELDS[datatype]
    values = np.frombuffer(data, dtype).tolist() if dtype else _elements(data)
    getattr(contents, field).extend(values)


def _elements(data: memoryview) -> Iterator[bytes]:
    place = 0
    while place < len(data):
        (length,) = _LENGTH.unpack_from(data, place)
        place += _LENGTH.size + length
        yield bytes(data[place - length : place])
