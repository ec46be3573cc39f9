"""Convert the typed contents of tensors to the binary form of the HTTP protocol, and back.

Raw contents have that form already.
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
"""Field of the typed contents of a datatype, and the NumPy type of its elements."""
_LENGTH = struct.Struct("<I")


def pack(datatype: str, contents: Message) -> bytes:
    """Return typed contents in binary form; empty for a datatype that no input supports."""
    if datatype not in _FIELDS:
        return b""
    field, dtype = _FIELDS[datatype]
    values = getattr(contents, field)
    if not dtype:
        return b"".join(_LENGTH.pack(len(value)) + value for value in values)
    return np.fromiter(values, dtype, len(values)).tobytes()


def unpack(datatype: str, data: memoryview, contents: Message) -> None:
    """Write values in binary form to the typed contents of an output."""
    field, dtype = _FIELDS[datatype]
    values = np.frombuffer(data, dtype).tolist() if dtype else _elements(data)
    getattr(contents, field).extend(values)


def _elements(data: memoryview) -> Iterator[bytes]:
    end = 0
    while end < len(data):
        (length,) = _LENGTH.unpack_from(data, end)
        end += _LENGTH.size + length
        yield bytes(data[end - length : end])
