"""Tensors of the Open Inference Protocol, in JSON or in Triton's binary extension.

Binary numbers are little-endian. An element of a BYTES tensor is its length (uint32) and its bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import msgspec
import numpy as np

from budgetformer.model.tfidf import Array
from service.http.errors import ApiError

_DTYPES = {"FP32": "<f4", "INT32": "<i4", "INT64": "<i8", "BOOL": "?"}
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Tensor:
    """A named tensor; `values` are in row-major order, strings for the datatype BYTES."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Array | Sequence[str]

    def described(self) -> dict[str, Any]:
        """Return the JSON entries that both forms have."""
        return {"name": self.name, "datatype": self.datatype, "shape": self.shape}

    def binary(self) -> bytes:
        """Return the values in the binary form."""
        if isinstance(self.values, np.ndarray):
            return self.values.astype(_DTYPES[self.datatype], copy=False).tobytes()
        texts = [value.encode() for value in self.values]
        return b"".join(_LENGTH.pack(len(text)) + text for text in texts)

    def data(self) -> list[Any]:
        """Return the values in the JSON form."""
        if isinstance(self.values, np.ndarray):
            numbers: list[Any] = self.values.ravel().tolist()
            return numbers
        return list(self.values)


def split_body(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    """Split a body into its JSON and the binary data after it.

    Raises:
        ApiError: 400, the value of the header is not a length within this body.
    """
    if header_length is None:
        return body, memoryview(b"")
    if not header_length.isdecimal() or int(header_length) > len(body):
        message = "Inference-Header-Content-Length must be the length of the body's JSON in bytes"
        raise ApiError(400, message, code="invalid_header_length")
    length = int(header_length)
    return body[:length], memoryview(body)[length:]


def read_texts(
    name: str, shape: Sequence[int], data: list[Any] | None, binary: memoryview | None
) -> list[str]:
    """Return the texts of a BYTES tensor of shape [B] or [B, 1].

    Raises:
        ApiError: 422, the shape is invalid, or the data do not match it or are not texts.
    """
    if not shape or prod(shape) != shape[0] or shape[0] < 1:
        message = (
            f"input {name!r} has the shape {list(shape)}; it must be [items] or [items, 1], "
            "with at least one item"
        )
        raise ApiError(422, message, name, "invalid_shape")
    _check_one_form(name, data, binary)
    texts = _flat(data) if binary is None else _unpack(name, binary)
    if len(texts) != shape[0]:
        message = f"input {name!r} has {len(texts)} elements, but its shape requires {shape[0]}"
        raise ApiError(422, message, name, "invalid_shape")
    if not all(isinstance(text, str) for text in texts):
        raise ApiError(422, f"input {name!r} must contain only strings", name, "invalid_field")
    return texts


def read_integers(
    name: str,
    datatype: str,
    shape: Sequence[int],
    data: list[Any] | None,
    binary: memoryview | None,
) -> Array:
    """Return an INT32 or INT64 tensor of shape [B, T], both at least 1.

    Raises:
        ApiError: 422, the shape is invalid, or the data do not match it or are not integers.
    """
    if len(shape) != 2 or 0 in shape:
        message = (
            f"input {name!r} has the shape {list(shape)}; it must be [items, tokens], "
            "with at least one of each"
        )
        raise ApiError(422, message, name, "invalid_shape")
    _check_one_form(name, data, binary)
    dtype = np.dtype(_DTYPES[datatype])
    if binary is None:
        values = _integers(name, data or [])
    elif len(binary) % dtype.itemsize:
        message = f"the binary data of input {name!r} end within an element; check binary_data_size"
        raise ApiError(422, message, name, "invalid_field")
    else:
        values = np.frombuffer(binary, dtype)
    if values.size != prod(shape) or values.ndim == 2 and values.shape != tuple(shape):
        message = f"input {name!r} has {values.size} elements, but its shape is {list(shape)}"
        raise ApiError(422, message, name, "invalid_shape")
    return values.reshape(shape)


def _integers(name: str, data: list[Any]) -> Array:
    """Return integers from JSON, or rows of integers, as int64."""
    kind: Any = list[list[int]] if data and isinstance(data[0], list) else list[int]
    try:
        return np.array(msgspec.convert(data, kind), np.int64)
    except (msgspec.ValidationError, OverflowError):
        problem = "must contain only integers, or only rows of integers"
    except ValueError:
        problem = "has rows of different lengths; pad them"
    raise ApiError(422, f"input {name!r} {problem}", name, "invalid_field")


def _check_one_form(name: str, data: list[Any] | None, binary: memoryview | None) -> None:
    if (data is None) == (binary is None):
        message = f"input {name!r} needs either `data` or the parameter `binary_data_size`"
        raise ApiError(422, message, name, "invalid_field")


def _flat(data: list[Any] | None) -> list[Any]:
    rows = data or []
    return list(chain.from_iterable(row if isinstance(row, list) else [row] for row in rows))


def _unpack(name: str, data: memoryview) -> list[str]:
    texts = []
    end = 0
    try:
        while end < len(data):
            (length,) = _LENGTH.unpack_from(data, end)
            end += _LENGTH.size + length
            if end > len(data):
                raise struct.error
            texts.append(str(data[end - length : end], "utf-8"))
    except struct.error:
        message = f"the binary data of input {name!r} end within an element; check binary_data_size"
        raise ApiError(422, message, name, "invalid_field") from None
    except UnicodeDecodeError:
        item = f"{name}[{len(texts)}]"
        raise ApiError(400, f"{item} is not UTF-8", item, "invalid_field") from None
    return texts


def write_body(
    head: dict[str, Any], outputs: Sequence[tuple[Tensor, bool]]
) -> tuple[bytes, int | None]:
    """Encode a response of tensors.

    Args:
        head: JSON of the response without its outputs.
        outputs: tensors, and whether each has the binary form.

    Returns the body, and the length of its JSON part if a tensor has the binary form, else None.
    """
    described = []
    blobs = []
    for tensor, as_binary in outputs:
        entry = tensor.described()
        if as_binary:
            blobs.append(tensor.binary())
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            entry["data"] = tensor.data()
        described.append(entry)
    text = msgspec.json.encode(head | {"outputs": described})
    return b"".join([text, *blobs]), len(text) if blobs else None
